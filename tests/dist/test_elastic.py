"""Workers that are killed, added and taken away: the same training, no sample lost or used twice.

The kills are at random moments. HVD_LBT_TEST_KILLS=20 makes a campaign of them; the seed is
printed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from launching import run_ranks
from test_train import EXACT, ROUNDING, difference, events, last_state, train

from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.recipe import load_recipe

KILLS = int(os.environ.get("HVD_LBT_TEST_KILLS", "3"))
PROGRAM = Path(__file__).with_name("elastic_ranks.py")


class Elastic:
    """A training under `hvd_lbt elastic`, its hosts file, and the workers' own notes."""

    def __init__(
        self, folder: Path, *settings: str, slots: int, maximum: int, pause: str, die: str = ""
    ):
        self.out, self.notes, self.hosts = folder / "run", folder / "notes", folder / "hosts"
        self.notes.mkdir()
        self.offer(slots)
        words = train(*settings, out=self.out)[2:]  # without `-m hvd_lbt`
        options = ["--max-workers", str(maximum), "--network-interface", "lo"]
        options += ["--discover", f"cat {self.hosts}", "--patience", "200"]
        self.output = (folder / "output").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "elastic", *options, *words],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HVD_LBT_TEST_LOG": str(self.notes)}
            | {"HVD_LBT_TEST_PAUSE": pause, "HVD_LBT_TEST_DIE": die},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def offer(self, slots: int) -> None:
        scratch = self.hosts.with_suffix(".part")
        scratch.write_text(f"localhost:{slots}\n")
        scratch.replace(self.hosts)

    def lines(self) -> list[dict]:
        """All workers' notes; a line cut off by a kill is none."""
        found = []
        for file in self.notes.glob("*.jsonl"):
            text = file.read_text()
            found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return found

    def members(self) -> dict[int, int]:
        """rank → pid of the present world."""
        joined = [line for line in self.lines() if "joined" in line]
        newest = max((line["generation"] for line in joined), default=0)
        return {line["rank"]: line["pid"] for line in joined if line["generation"] == newest}

    def until(self, condition, what: str, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended, not {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"not {what}:\n{self.said()}"
            time.sleep(0.05)

    def size(self) -> int:
        """Workers of the present world, once all of them have noted that they joined."""
        joined = [line for line in self.lines() if "joined" in line]
        newest = max((line["generation"] for line in joined), default=0)
        sizes = [line["size"] for line in joined if line["generation"] == newest]
        return sizes[0] if sizes and len(sizes) == sizes[0] else 0

    def committed(self) -> int:
        return max((line["update"] for line in self.lines() if "committed" in line), default=-1)

    def end(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs:\n{self.said()}")

    def said(self) -> str:
        return Path(self.output.name).read_text()[-6000:]

    def workers(self) -> set[int]:
        """The processes that have noted something and live."""
        alive = set()
        for pid in {line["pid"] for line in self.lines()}:
            with suppress(ProcessLookupError, FileNotFoundError):
                if "elastic_ranks" in Path(f"/proc/{pid}/cmdline").read_text():
                    alive.add(pid)
        return alive

    def kill_all(self) -> None:
        for pid in self.workers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.terminate()
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture
def elastic(tmp_path):
    begun: list[Elastic] = []

    def start(*settings: str, **options) -> Elastic:
        folder = tmp_path / f"elastic{len(begun)}"
        folder.mkdir()
        begun.append(Elastic(folder, *settings, **options))
        return begun[-1]

    yield start
    for one in begun:
        one.kill_all()
        one.output.close()


def samples_used(lines: list[dict], samples: int) -> dict[int, Counter]:
    """epoch → how often each sample was used, by the updates that count."""
    counted: dict[int, int] = {}
    sent: dict[tuple[int, int], dict[int, dict]] = defaultdict(dict)
    for line in lines:
        if "committed" in line:
            counted[line["update"]] = max(counted.get(line["update"], 0), line["generation"])
        elif "samples" in line:
            sent[line["update"], line["generation"]][line["rank"]] = line
    used: dict[int, Counter] = defaultdict(Counter)
    for update, generation in counted.items():
        parts = sent[update, generation]
        size = next(iter(parts.values()))["size"]
        assert sorted(parts) == list(range(size)), f"update {update}: notes of ranks {sorted(parts)}"
        for part in parts.values():
            for first, indices in part["samples"]:
                for place, index in enumerate(indices, start=first):
                    used[place // samples][index] += 1
    return used


def check_whole(run: Elastic, settings: tuple[str, ...]) -> None:
    """Each sample once an epoch, each update once in the metrics, as planned."""
    plan = make_plan(load_recipe("digits", settings).schedule, 1437)
    lines = run.lines()
    counted = {line["update"] for line in lines if "committed" in line}
    assert counted == set(range(plan.updates))
    used = samples_used(lines, plan.train_samples)
    assert set(used) == {0, 1}
    for epoch, counter in used.items():
        assert counter == Counter(range(plan.train_samples)), f"epoch {epoch}"
    for update in kept(run.out):
        planned = plan.at(update["update"])
        assert (update["global_batch"], update["lr"]) == (planned.global_batch, planned.lr)


def kept(out: Path) -> list[dict]:
    """The update lines that later parts of the run did not take back."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates: list[dict] = []
    for line in lines:
        if line["event"] == "run":
            updates = [old for old in updates if old["update"] < line["resumed_at_update"]]
        elif line["event"] == "update":
            updates.append(line)
    return updates


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Path:
    """The run on one worker, from which nobody goes."""
    out = tmp_path_factory.mktemp("fixed")
    run_ranks(1, *train(*EXACT, out=out, smooth=True))
    return out


def test_workers_killed_and_added_at_random_moments(elastic, fixed):
    seed = int(os.environ.get("HVD_LBT_TEST_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    chance = random.Random(seed)
    # 80 updates last until all kills are done: a new worker is loaded within some seconds
    run = elastic(*EXACT, slots=2, maximum=3, pause=str(0.15 * KILLS))
    run.until(lambda: run.committed() >= 2, "training")
    killed = []
    for number in range(KILLS):
        if number % 4 != 3:  # else also the only worker may be killed
            run.until(lambda: run.size() >= 2, "two workers")
        time.sleep(chance.uniform(0.5, 3.0))
        rank, pid = chance.choice(sorted(run.members().items()))
        os.kill(pid, signal.SIGKILL)
        killed.append(rank)
        before = run.committed()
        run.until(lambda before=before: run.committed() > before + 1, f"going on after {killed}")
        run.offer(chance.choice([2, 3]))
    run.offer(1)
    assert run.end(600) == 0, run.said()

    check_whole(run, EXACT)
    assert [line["update"] for line in kept(run.out)] == list(range(80))
    assert difference(fixed, run.out) < ROUNDING
    happened = [json.loads(line) for line in (run.out / "elastic.jsonl").read_text().splitlines()]
    assert sum("lost" in event for event in happened) >= KILLS
    seconds = sorted(event["again"] for event in happened if "again" in event)
    print(f"killed ranks {killed}; seconds from loss to the next committed update: {seconds}")


def test_losses_in_an_evaluation_and_in_a_checkpoint_then_of_the_driver(elastic, fixed, ranks):
    run = elastic(*EXACT, slots=3, maximum=3, pause="0.15", die="evaluation checkpoint")
    run.until(lambda: run.committed() >= 50, "past the first evaluation and its checkpoint")
    assert {file.name for file in run.notes.iterdir()} > {"evaluation", "checkpoint"}
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 60
    while run.workers():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.05)
    (end,) = events(run.out, "end")
    assert end["reason"] == "stopped"
    assert end["update"] == last_state(run.out)["update"] < 80
    assert end["update"] > run.committed()  # nothing that was committed is lost
    ranks(1, *train(*EXACT, out=run.out, resume=True, smooth=True))
    assert [line["update"] for line in kept(run.out)] == list(range(80))
    assert difference(fixed, run.out) < ROUNDING


def test_workers_grow_and_shrink_with_the_batch(elastic, ranks, tmp_path):
    stages = (
        "model.width=8",
        "wire.form=fp32",
        "schedule.epochs=2",
        "schedule.lr=0.02",
        "schedule.milestones=[{epoch: 0.5, factor: 2}, {epoch: 1, factor: 1.5}]",
        "elastic.local_batch=32",
    )
    ranks(1, *train(*stages, out=tmp_path / "fixed", smooth=True), timeout=300)
    run = elastic(*stages, slots=3, maximum=3, pause="target")
    assert run.end(600) == 0, run.said()
    check_whole(run, stages)
    assert difference(tmp_path / "fixed", run.out) < ROUNDING
    plan = make_plan(load_recipe("digits", stages).schedule, 1437)
    sizes: dict[int, int] = {}
    for line in sorted(run.lines(), key=lambda line: (line["update"], line["generation"])):
        if "samples" in line:
            sizes[plan.at(line["update"]).stage] = line["size"]
    assert sizes == {0: 1, 1: 2, 2: 3}  # at the end of each stage
    # nothing was lost, so no update was done twice
    starts = [event["resumed_at_update"] for event in events(run.out, "run")]
    assert [line["update"] for line in events(run.out, "update")] == list(range(plan.updates))
    assert starts == sorted(starts)
