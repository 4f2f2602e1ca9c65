"""Train on 2 to 64 real Horovod ranks on eight nodes of our own, and say what grows with the ranks.

    python tests/campaigns/many_ranks.py --ranks 2 4 8 16 32 64 --out docs/scale_ranks.json

Needs root and iproute2. The nodes are network namespaces with host names of their own, joined by a
bridge; ranks are dealt to at most eight of them. The network is a perceptron with softplus on the
built-in digits (data.cache_on_device, no DALI), so that a rank is light; wire.form is fp32.

For each controller (MPI under mpirun, Gloo) and number of ranks:

- a run whose batch grows is stopped by SIGUSR1 after a checkpoint, and resumed on half as many
  ranks: every weight is compared with one rank's, each sample must be used once an epoch, and
  nothing may be left: no process, shared memory, listening socket or thread;
- the start, part by part: until the last rank's process began, had imported, had MPI, had Horovod,
  had done an update;
- of an update: seconds, processor seconds of all ranks, collectives, messages and bytes (TCP, as
  `ss` counts them: MPI's ranks of one node talk through shared memory, which is not in it); the
  same of an idle second, and of a single small sum;
- of a rank: threads, descriptors, TCP connections, memory (Pss: shared pages divided).

Prints a table and one JSON line; the exit code is 1 if a check fails. What --out holds already is
not measured again, so that rows can be added one by one, each on a quiet machine.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from namespaces import hosts_of, start_gloo_ranks, switch_script, write_hosts

ROOT = Path(__file__).parents[2]
RANK = Path(__file__).with_name("observed_rank.py")
NODES = 8
CONTROLLERS = ("MPI", "Gloo")
REQUESTS: Counter[str] = Counter()  # to the rendezvous server, by method
# Of a tensor's largest weight: only the order of summation differs, as in tests/dist/trainings.py.
ROUNDING = 1e-4
# Python threads that a process keeps until its end, whatever it trains.
OF_A_PROCESS = {"MainThread", "watchdog", "launcher", "checkpoint_0"}
EPOCH = 1437  # samples of the built-in digits
SETTINGS = (
    *(
        f"data.train_samples={EPOCH}",
        "model.width=64",
        "data.cache_on_device=true",
        "run.loggers=[]",
    ),
    *("data.threads=1", "data.readers=1", "schedule.policy=grow_batch", "schedule.lr=0.05"),
    *("schedule.global_batch=64", "schedule.max_global_batch=256", "schedule.epochs=8"),
    "schedule.milestones=[{epoch: 2, factor: 2}, {epoch: 3, factor: 2}]",
    *("layout.micro_batch=64", "layout.ghost_batch=1", "wire.form=fp32", "run.keep_checkpoints=9"),
)

PREFIX = "10.79.0"  # of the network's addresses
AGENT = """\
#!/usr/bin/env bash
# what mpirun starts its daemons by, instead of ssh: HOST COMMAND…
node=$1 && shift
exec nsenter --target "$(<"{folder}/pid.$node")" --net --uts bash -c "$*"
"""


class CheckError(Exception):
    """Something that must hold does not."""


# ------------------------------------------------------------- within the namespaces: one launch


def launch(spec: dict[str, Any]) -> int:
    """Start the ranks of a spec on its nodes, wait for them, and write what they leave.

    The exit code is the largest of the ranks'. This process is the first of its namespace, so
    that whatever loses its parent is its child.
    """
    folder = Path(spec["folder"])
    before = {path.name for path in Path("/dev/shm").iterdir()}
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    starts = {"MPI": start_mpi, "Gloo": start_gloo}[spec["controller"]]
    processes = starts(spec, folder)
    stopping = spec["stop_after"]
    deadline = time.monotonic() + spec["timeout"]
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            print(f"the ranks hang after {spec['timeout']} s", flush=True)
            return 124
        if any(process.poll() not in (None, 0, 75) for process in processes):
            time.sleep(5)
            break
        if stopping and saved(Path(spec["out"])):
            processes[0].send_signal(signal.SIGUSR1)  # mpirun hands it on to the ranks
            stopping = False
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    left = what_is_left(before, spec["nodes"])
    (folder / "launch.json").write_text(
        json.dumps({"began": began, "left": left, "requests": REQUESTS})
    )
    return max(99 if code is None else abs(code) for code in codes)


def saved(out: Path) -> bool:
    """Whether the run has written a checkpoint."""
    return any((out / "checkpoints").glob("update-*.pt"))


def start_mpi(spec: dict[str, Any], folder: Path) -> list[subprocess.Popen[bytes]]:
    """The ranks under mpirun, whose daemons are started in the nodes' namespaces."""
    agent = folder / "agent"
    agent.write_text(AGENT.format(folder=folder))
    agent.chmod(0o755)
    hosts = hosts_of(spec["nodes"], spec["ranks"])
    settings = {
        "plm_rsh_agent": str(agent),
        "oob_tcp_if_include": f"{PREFIX}.0/24",
        "btl_tcp_if_include": f"{PREFIX}.0/24",
        "btl": "self,vader,tcp",
        "pml": "ob1",
    }
    words = ["mpirun", "-np", str(spec["ranks"]), "--host", hosts, "--map-by", "slot"]
    words += ["--bind-to", "none", "--oversubscribe"]
    words += [word for name, value in settings.items() for word in ("--mca", name, value)]
    passed = ("PYTHONPATH", "OMP_NUM_THREADS", "PATH", *spec["variables"])
    words += [word for name in passed for word in ("-x", name)]
    return [subprocess.Popen([*words, sys.executable, str(RANK), *spec["words"]])]


def start_gloo(spec: dict[str, Any], folder: Path) -> list[subprocess.Popen[bytes]]:
    """The ranks as horovodrun --gloo starts them, with its rendezvous server in this process."""
    from horovod.runner.http.http_server import RendezvousHandler

    class Counting(RendezvousHandler):
        def log_request(self, *about: Any) -> None:
            REQUESTS[self.command] += 1

    command = [sys.executable, str(RANK), *spec["words"]]
    return start_gloo_ranks(PREFIX, spec["nodes"], spec["ranks"], command, Counting)


def what_is_left(shared_before: set[str], nodes: int) -> dict[str, Any]:
    """Processes, shared memory and listening sockets of ranks that have ended."""
    time.sleep(1.0)  # mpirun's daemons end after it
    left: dict[str, Any] = {"processes": [], "shared_memory": [], "listening": []}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            mine = entry.name == str(os.getpid()) or words[:2] == [b"sleep", b"100000"]
            if words != [b""] and not mine:
                left["processes"].append(b" ".join(words).decode()[:200])
    left["shared_memory"] = sorted({p.name for p in Path("/dev/shm").iterdir()} - shared_before)
    for node in range(1, nodes + 1):
        pid = Path(f"pid.node{node}").read_text().strip()
        enter = ["nsenter", "--target", pid, "--net", "ss", "-tlnH"]
        shown = subprocess.run(enter, capture_output=True, text=True).stdout
        left["listening"] += [f"node{node}: {line}" for line in shown.splitlines()]
    return left


# -------------------------------------------------------------------- outside: runs and checks


class Run:
    """One launch of `hvd_lbt train` on a number of ranks; what its ranks noted, by rank."""

    def __init__(
        self, controller: str, ranks: int, out: Path, *, cycle_ms: float, stop: bool = False
    ) -> None:
        nodes = min(NODES, ranks)
        words = ["train", "digits_perceptron", "--out", str(out), "--resume"]
        words += [word for one in SETTINGS for word in ("--set", one)]
        self.notes: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as scratch:
            variables = {
                "HVD_LBT_NOTES": scratch,
                "HVD_LBT_NOTES_UPDATES": str(stage_updates()[0]),
                "HOROVOD_CYCLE_TIME": f"{cycle_ms:g}",
            }
            write_hosts(scratch, PREFIX, nodes)
            spec = {
                "controller": controller,
                "ranks": ranks,
                "nodes": nodes,
                "folder": scratch,
                "out": str(out),
                "words": words,
                "variables": sorted(variables),
                "stop_after": stop,
                "timeout": 60 + 10 * ranks,
            }
            Path(scratch, "spec.json").write_text(json.dumps(spec))
            self.ended = in_namespaces(scratch, nodes, variables, timeout=120 + 10 * ranks)
            files = [Path(scratch, f"{rank}.json") for rank in range(ranks)]
            if self.ended.returncode in (0, 75) and all(file.exists() for file in files):
                self.notes = [json.loads(file.read_text()) for file in files]
                self.launch = json.loads(Path(scratch, "launch.json").read_text())
                self.samples = samples_of(Path(scratch), ranks)
        if not self.notes:
            said = self.ended.stdout + self.ended.stderr
            raise CheckError(
                f"{controller}, {ranks} ranks: exit code {self.ended.returncode}\n{said[-2500:]}"
            )
        left = {kind: its for kind, its in self.launch["left"].items() if its}
        if left:
            raise CheckError(f"{controller}, {ranks} ranks: left behind: {left}")


def in_namespaces(
    folder: str, nodes: int, variables: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `--launch` of this file in network, host and process namespaces of its own."""
    script = switch_script(PREFIX, first="mount -t tmpfs tmpfs /dev/shm")
    apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
    apart += ["--mount-proc", "bash", "-c", script, "bash", folder, str(nodes)]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    allowed |= {"OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}  # as launch/local
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*apart, sys.executable, __file__, "--launch", f"{folder}/spec.json"],
        env=os.environ | allowed | {"PYTHONPATH": str(ROOT), "PATH": path} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def samples_of(folder: Path, ranks: int) -> Any:
    """(2, n) of all ranks: places in the stream of samples, and the samples there; by place."""
    import numpy as np

    found = np.concatenate([np.load(folder / f"{rank}.npy") for rank in range(ranks)], 1)
    return found[:, np.argsort(found[0], kind="stable")]


def stage_updates() -> list[int]:
    """Updates of each stage of the plan."""
    from hvd_lbt.recipe import load_recipe
    from hvd_lbt.schedule.plan import make_plan

    recipe = load_recipe("digits_perceptron", SETTINGS)
    plan = make_plan(recipe.schedule, recipe.data.train_samples or 0)
    return [stage.updates for stage in plan.stages]


def weights(out: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    from hvd_lbt import checkpoint

    state = checkpoint.load_newest(out / "checkpoints")
    if state is None:
        raise CheckError(f"{out} has no checkpoint")
    return dict(state["model"])


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of all weights, relative to the tensor's largest."""
    return max(
        float((one[key].double() - other[key].double()).abs().max() / one[key].double().abs().max())
        for key in one
    )


def check_samples(name: str, samples: Any, first: int, end: int) -> None:
    """Raise CheckError unless each place from first to end was used once, and each sample an
    epoch."""
    import numpy as np

    if samples[0].tolist() != list(range(first, end)):
        counts = Counter(samples[0].tolist())
        wrong = [place for place in range(first, end) if counts[place] != 1]
        raise CheckError(f"{name}: places of the stream not used once: {wrong[:10]}")
    epoch = EPOCH
    for begin in range(-(-first // epoch) * epoch, end - epoch + 1, epoch):
        there = samples[1][begin - first : begin - first + epoch]
        if not np.array_equal(np.sort(there), np.arange(epoch)):
            raise CheckError(f"{name}: epoch {begin // epoch} does not have each sample once")


def check_left(name: str, run: Run) -> None:
    """Raise CheckError if a rank kept a thread of its training after its end."""
    for rank, note in enumerate(run.notes):
        if threads := set(note["left"]["python_threads"]) - OF_A_PROCESS:
            raise CheckError(f"{name}: rank {rank} kept the threads {threads}")


# -------------------------------------------------------------------------------- what is measured


def start_seconds(run: Run) -> dict[str, float]:
    """Seconds since the launch until the last rank had come so far."""
    names = ("process", "imported", "mpi", "connected", "first_update")
    return {
        name: max(note["start"][name] for note in run.notes) - run.launch["began"] for name in names
    }


def between(run: Run, first: int, second: int) -> dict[str, Any]:
    """Of all ranks between two of their marks: seconds, processor seconds, messages, bytes."""
    pairs = [(note["marks"][first], note["marks"][second]) for note in run.notes]
    counted = [(a["traffic"], b["traffic"]) for a, b in pairs if a["traffic"]]
    one, other = pairs[0]
    names = sorted(other["sums"])
    made = {name: other["sums"][name] - one["sums"].get(name, 0) for name in names}
    sizes = {name: other["sum_bytes"][name] - one["sum_bytes"].get(name, 0) for name in names}
    return {
        "updates": other["update"] - one["update"],
        "seconds": other["clock"] - one["clock"],
        "processor_seconds": sum(b["processor"] - a["processor"] for a, b in pairs),
        "messages": sum(b["messages"] - a["messages"] for a, b in counted),
        "bytes": sum(b["bytes"] - a["bytes"] for a, b in counted),
        "sums": {name: count for name, count in made.items() if count},
        "sum_bytes": {name: count for name, count in sizes.items() if count},
    }


def an_update(run: Run) -> dict[str, Any]:
    """What an update costs, of those after the first ones."""
    found = between(run, 0, 1)
    updates = found.pop("updates")
    kinds = ("sums", "sum_bytes")
    whole = {key: value / updates for key, value in found.items() if key not in kinds}
    return whole | {kind: {n: c / updates for n, c in found[kind].items()} for kind in kinds}


def row_of(run: Run) -> dict[str, Any]:
    """What the table says about a run."""
    from observed_rank import BARE_SUMS, IDLE_SECONDS

    idle, bare = between(run, 2, 3), between(run, 4, 5)
    seconds = idle["seconds"]
    largest = {
        key: max(note["resources"][key] for note in run.notes) for key in run.notes[0]["resources"]
    }
    assert seconds > IDLE_SECONDS / 2
    return {
        "start": start_seconds(run),
        "update": an_update(run),
        "idle_second": {
            key: idle[key] / seconds for key in ("messages", "bytes", "processor_seconds")
        },
        "bare_sum": {
            key: bare[key] / BARE_SUMS
            for key in ("seconds", "messages", "bytes", "processor_seconds")
        },
        "rank": largest,
        "rendezvous_requests": run.launch["requests"],
        "left_sockets": max(n["left"]["sockets"] - n["before"]["sockets"] for n in run.notes),
        "pss_of_all": sum(note["resources"]["pss"] for note in run.notes),
    }


def measured(
    controller: str, ranks: int, cycle_ms: float, folder: Path, alone: dict[str, Any]
) -> dict[str, Any]:
    """A run that is stopped after its first checkpoint and resumed on half as many ranks."""
    name, out = f"{controller}, {ranks} ranks", folder / f"{controller}-{ranks}-{cycle_ms:g}"
    first = Run(controller, ranks, out, cycle_ms=cycle_ms, stop=True)
    row = {"nodes": min(NODES, ranks), **row_of(first)}
    if not stopped(out):
        raise CheckError(f"{name}: the run was over before it could be stopped")
    done = first.notes[0]["updates"]
    resumed = Run(controller, ranks // 2, out, cycle_ms=cycle_ms)
    batches = global_batches(out)
    cut, end = sum(batches[:done]), sum(batches)
    check_samples(name, first.samples, 0, cut)
    check_samples(f"{name}, resumed", resumed.samples, cut, end)
    for run in (first, resumed):
        check_left(name, run)
    differs = largest_difference(alone, weights(out))
    if differs > ROUNDING:
        raise CheckError(f"{name}: weights differ from one rank's by {differs:.1e}")
    row["run"] = {"updates": len(batches), "stopped_after": done, "difference": differs}
    return row


def stopped(out: Path) -> bool:
    """Whether the run ended before its last update."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return '"reason": "stopped"' in lines[-1]


def global_batches(out: Path) -> list[int]:
    """Of all updates, as they were done."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["global_batch"] for line in lines if line["event"] == "update"]


def one_rank(folder: Path) -> dict[str, Any]:
    """The weights that one rank trains."""
    out = folder / "alone"
    words = ["train", "digits_perceptron", "--out", str(out)]
    words += [word for one in SETTINGS for word in ("--set", one)]
    smooth = ROOT / "tests/dist/smooth.py"
    subprocess.run(
        [sys.executable, str(smooth), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return weights(out)


def rank_0_costs(ranks: int) -> dict[str, Any]:
    """Processor milliseconds of rank 0 that grow with the ranks, without any: made-up times.

    update_ms: to judge the times of all ranks (`RunTimes`), as often as they come.
    """
    import numpy as np
    import torch

    from hvd_lbt.measure.rank_times import RankTimes
    from hvd_lbt.measure.run_times import RunTimes
    from hvd_lbt.recipe import load_recipe
    from hvd_lbt.schedule.plan import make_plan
    from hvd_lbt.world import World

    plan = make_plan(load_recipe("imagenet_resnet50", []).schedule, 1_281_167)
    comes = RankTimes(torch.device("cpu"), World(rank=0, size=ranks)).numbers
    times = RunTimes(["node"] * ranks, planned=plan.updates, ghost_batch=1)
    random, updates, at_once = np.random.default_rng(0), 320, 10
    spent = 0.0
    for first in range(0, updates, at_once):
        indices = range(first, first + at_once)
        rows = random.normal(0.03, 0.001, (at_once, ranks, 4)).clip(0.001)
        rows[[index for index in range(at_once) if not comes(first + index)]] = 0
        began = time.process_time()
        list(times.add([(plan.at(index), 0.1) for index in indices], rows))
        spent += time.process_time() - began
    return {
        "ranks": ranks,
        "update_ms": 1000 * spent / updates,
        "numbers_an_update": sum(map(comes, range(updates))) / updates,
    }


def campaign(args: argparse.Namespace) -> dict[str, Any]:
    """All runs; what the JSON line says."""
    from hvd_lbt.bench.harness import machine
    from hvd_lbt.log.provenance import revision, versions
    from hvd_lbt.rounding import five_digits

    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    rows = [row for row in rows if "failed" not in row]
    there = {(row["controller"], row["ranks"], row["cycle_ms"]) for row in rows}
    wanted = [
        (controller, ranks, cycle_ms)
        for ranks in args.ranks
        for controller in ([args.only] if args.only else CONTROLLERS)
        for cycle_ms in args.cycle_ms
        if (controller, ranks, cycle_ms) not in there
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = one_rank(folder)
        for controller, ranks, cycle_ms in wanted:
            row: dict[str, Any] = {"controller": controller, "ranks": ranks, "cycle_ms": cycle_ms}
            load, began = os.getloadavg()[0], time.monotonic()
            try:
                row |= measured(controller, ranks, cycle_ms, folder, alone)
            except CheckError as error:
                row["failed"] = str(error)
            row |= {"load_before": load, "seconds": time.monotonic() - began}
            rows.append(row)
            print(f"{controller}, {ranks} ranks: {row}", file=sys.stderr, flush=True)
            if args.out:  # a campaign that was ended continues here
                args.out.write_text(json.dumps({"rows": rows}) + "\n")
    rows.sort(key=lambda row: (row["controller"], row["cycle_ms"], row["ranks"]))
    return five_digits(
        {
            "campaign": "many_ranks",
            "settings": list(SETTINGS),
            "rows": rows,
            "rank_0": [rank_0_costs(ranks) for ranks in (8, 64, 512, 4096)],
            "failed": [row["failed"] for row in rows if "failed" in row],
            "versions": versions(),
            "revision": revision(),
            "machine": machine(),
            "time": time.time(),
        },
        exact=("time",),
    )


def table(found: dict[str, Any]) -> str:
    """The rows in Markdown."""
    heads = (
        *(
            "controller",
            "ranks",
            "cycle, ms",
            "start, s",
            "update, ms",
            "CPU ms an update",
            "sums an update",
        ),
        *("messages a rank an update", "bytes a rank an update", "connections a rank", "threads"),
        "memory a rank, MB",
    )
    lines = [f"| {' | '.join(heads)} |", "| -- |" + " -: |" * (len(heads) - 1)]
    for row in found["rows"]:
        if "update" not in row:
            lines.append(f"| {row['controller']} | {row['ranks']} | failed |")
            continue
        update, rank, ranks = row["update"], row["rank"], row["ranks"]
        lines.append(
            f"| {row['controller']} | {ranks} | {row['cycle_ms']:g} "
            f"| {row['start']['first_update']:.1f} "
            f"| {1000 * update['seconds']:.1f} | {1000 * update['processor_seconds']:.1f} "
            f"| {sum(update['sums'].values()):.1f} | {update['messages'] / ranks:.1f} "
            f"| {update['bytes'] / ranks:,.0f} | {rank['connections']} | {rank['threads']} "
            f"| {row['pss_of_all'] / ranks / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the campaign, or one launch of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--cycle-ms", type=float, nargs="+", default=[1.0], help="HOROVOD_CYCLE_TIME [1, Horovod's]"
    )
    parser.add_argument("--only", choices=CONTROLLERS, help="this controller [both]")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--launch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.launch:
        return launch(json.loads(args.launch.read_text()))
    for ranks in args.ranks:
        if ranks < 2 or ranks % min(NODES, ranks):
            parser.error(f"--ranks {ranks}: it must be at least 2, and a multiple of 8 above 8")
    found = campaign(args)
    print(table(found))
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
