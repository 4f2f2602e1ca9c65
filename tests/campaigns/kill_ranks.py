"""Kill ranks at random moments, continue, and compare with a run that nobody disturbed.

    python tests/campaigns/kill_ranks.py FOLDER --controller mpi --kills 20 --runs 100
    python tests/campaigns/kill_ranks.py FOLDER --controller gloo --kills 20
    python tests/campaigns/kill_ranks.py FOLDER --controller elastic --kills 20

mpi (mpirun) and gloo (horovodrun --gloo): one kill a run, which is then resumed. The runs save
after every update, so that a checkpoint is nearly always being written; every fourth kill waits for
a half-written file and takes rank 0, which writes it. What the resumed run ends with (weights,
momentum, wire scale, counts) must have the hash of the undisturbed run's, and it must continue from
the newest file. Then --runs short runs, each of which has to end with 0: no signal 11 at the exit.

elastic: all kills in one run of two to three workers; every second comes within 0.6 s after a world
has formed, while its ranks connect, and the last one takes the driver, after which the run is
resumed. Each sample must be used once an epoch, no loss may cost more than the update under way,
and the weights must be those of one undisturbed worker within 1e-4.

Prints one JSON line; the exit code is 1 unless all is as it has to be.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

import trainings
from elastic_runs import Elastic, check_whole
from launching import Launch, begin, run_ranks
from trainings import EXACT, ROUNDING, difference, events

from hvd_lbt import checkpoint

SETTINGS = (
    *("model.width=4", "schedule.epochs=2", "schedule.milestones=[{epoch: 1, factor: 4}]"),
    *("run.eval_every=1", "run.checkpoint_minutes=0.00001"),
)
SHORT = ("model.width=4", "schedule.epochs=0.1", "schedule.milestones=[]")
RANKS = 2
SECONDS = 300.0  # a run, or one step of the elastic run, that takes longer hangs


def train(out: Path, settings: Sequence[str] = SETTINGS) -> list[str | Path]:
    words = [word for one in settings for word in ("--set", one)]
    return ["-m", "hvd_lbt", "train", "digits", "--out", out, "--resume", *words]


def saved(out: Path) -> int:
    """Updates in the newest checkpoint."""
    files = checkpoint.checkpoint_files(out / "checkpoints")
    return int(files[-1].stem[len("update-") :]) if files else 0


def state_hash(out: Path) -> str:
    """SHA-256 of all tensors and numbers of the newest checkpoint."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if hasattr(value, "numpy"):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(checkpoint.load_newest(out / "checkpoints"))
    return digest.hexdigest()


def begin_ranks(controller: str, words: Sequence[str | Path]) -> Launch:
    """Begin `python *words` on RANKS ranks under mpirun or `horovodrun --gloo`."""
    if controller == "mpi":
        return begin(RANKS, *words, timeout=SECONDS)
    launcher = f"horovodrun --gloo -H localhost:{RANKS} -np"
    return begin(RANKS, sys.executable, *words, timeout=SECONDS, launcher=launcher)


def finish(controller: str, words: Sequence[str | Path]) -> None:
    """Run it to the end; it must end with 0."""
    ended = begin_ranks(controller, words).wait()
    assert ended.code == 0, f"exit code {ended.code}:\n{ended.output[-4000:]}"


def rank_processes(launch: Launch) -> list[psutil.Process]:
    """The ranks by number, whatever the launcher has put between itself and them."""
    found = {}
    for process in psutil.Process(launch.process.pid).children(recursive=True):
        own = process.environ()
        rank = own.get("OMPI_COMM_WORLD_RANK", own.get("HOROVOD_RANK"))
        if rank is not None and process.cmdline()[:1] == [sys.executable]:
            found.setdefault(int(rank), process)  # its data readers come later
    return [found[rank] for rank in sorted(found)]


def kill(launch: Launch, out: Path, after: int, chance: random.Random, while_writing: bool) -> bool:
    """Kill one rank when `after` updates are saved; whether the run was still going on."""
    deadline = time.monotonic() + launch.timeout
    while launch.process.poll() is None and saved(out) < after and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.random() * 0.05)  # about an update
    while while_writing and launch.process.poll() is None and time.monotonic() < deadline:
        if list((out / "checkpoints").glob("*.part")):
            break
    try:
        ranks = rank_processes(launch)
        (ranks[0] if while_writing else chance.choice(ranks)).kill()
    except (psutil.NoSuchProcess, IndexError):
        launch.wait()
        return False
    return launch.wait().code != 0


def killed_and_resumed(
    out: Path,
    words: Sequence[str | Path],
    updates: int,
    chance: random.Random,
    while_writing: bool,
    controller: str = "mpi",
) -> int:
    """Run `words` into `out` with one kill, then resume; the updates saved when it was killed."""
    while True:
        launch = begin_ranks(controller, words)
        if kill(launch, out, chance.randrange(1, updates - 2), chance, while_writing):
            break
        shutil.rmtree(out)  # the run was over before the kill: once more
    there = saved(out)
    finish(controller, words)
    return there


def resumed_at(out: Path) -> int:
    """The update at which the newest part of a run began."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["resumed_at_update"] for line in lines if line["event"] == "run"][-1]


def campaign(
    folder: Path, *, controller: str, kills: int, runs: int, seed: int
) -> dict[str, object]:
    """The counts; equal are the killed runs that ended with the hash of the undisturbed one."""
    chance = random.Random(seed)
    equal = lost_work = hangs = writing = 0
    moments = []
    if kills:
        finish(controller, train(folder / "undisturbed"))
        expected, updates = state_hash(folder / "undisturbed"), saved(folder / "undisturbed")
        print(f"undisturbed: {updates} updates, {expected}", flush=True)
    for number in range(kills):
        out, while_writing = folder / f"killed-{number}", number % 4 == 3
        try:
            moments.append(
                killed_and_resumed(out, train(out), updates, chance, while_writing, controller)
            )
        except pytest.fail.Exception as hang:
            hangs += 1
            print(f"run {number}: {hang}", flush=True)
            continue
        result = state_hash(out)
        equal += result == expected
        lost_work += resumed_at(out) != moments[-1]
        writing += while_writing
        print(f"run {number}: killed after {moments[-1]} updates, {result}", flush=True)
    for number in range(runs):
        finish(controller, train(folder / f"short-{number}", SHORT))
    return {
        "controller": controller,
        "kills": kills,
        "kills_while_writing": writing,
        "equal": equal,
        "lost_work": lost_work,
        "hangs": hangs,
        "killed_after_updates": moments,
        "short_runs_ended_with_0": runs,
        "passed": equal == kills and lost_work == 0 and hangs == 0,
    }


class ElasticCampaign:
    """Kills in one elastic run, and in what resumes it after the driver's death."""

    def __init__(self, folder: Path, kills: int, seed: int):
        self.folder, self.kills, self.chance = folder, kills, random.Random(seed)
        self.settings = EXACT
        self.moments: list[int] = []
        self.pause = str(0.15 * kills)
        (folder / "first").mkdir(parents=True)
        self.run = Elastic(folder / "first", *EXACT, slots=2, maximum=3, pause=self.pause)

    def worlds(self) -> list[int]:
        """The sizes of the worlds that the driver has announced."""
        text = Path(self.run.output.name).read_text(errors="replace")
        return [int(size) for size in re.findall(r"world \d+: (\d+) workers", text)]

    def workers(self) -> list[psutil.Process]:
        """Workers of the driver, the oldest first."""
        children = psutil.Process(self.run.process.pid).children()
        found = [child for child in children if "elastic_ranks.py" in " ".join(child.cmdline())]
        return sorted(found, key=psutil.Process.create_time)

    def kill_a_worker(self, while_connecting: bool) -> None:
        """Kill one of at least two workers of a world, and wait until an update is committed."""
        run = self.run
        if while_connecting:
            # a world of one grows; the newcomer, or rank 0, dies while they connect
            run.offer(1)
            run.until(lambda: self.worlds()[-1] == 1, "one worker", SECONDS)
            known = len(self.worlds())
            run.offer(2)
            run.until(lambda: len(self.worlds()) > known, "two workers", SECONDS)
            time.sleep(self.chance.uniform(0, 0.6))
        else:
            run.offer(self.chance.choice([2, 3]))
            run.until(lambda: run.size() >= 2, "two workers", SECONDS)
            time.sleep(self.chance.uniform(0.5, 3.0))
        members = self.workers()[: self.worlds()[-1]]
        self.chance.choice(members).kill()
        before = run.committed()
        self.moments.append(before)
        run.until(lambda: run.committed() > before + 1, f"going on after {self.moments}", SECONDS)

    def kill_the_driver(self) -> list[dict]:
        """Kill it, and resume the run; what the workers have noted until then."""
        first = self.run
        self.moments.append(first.committed())
        first.process.kill()
        first.process.wait()
        deadline = time.monotonic() + SECONDS
        while first.workers():
            if time.monotonic() > deadline:
                pytest.fail(f"workers without a driver hang:\n{first.said()}")
            time.sleep(0.05)
        ended = events(first.out, "end")[-1]
        lines = first.lines()
        newest = {
            line["update"]: line["generation"]
            for line in sorted(lines, key=lambda line: line["generation"])
            if "samples" in line and line["update"] < ended["update"]
        }
        # what was saved without a commit: the workers without a driver end after their update
        lines += [
            {"committed": True, "update": update, "generation": generation}
            for update, generation in newest.items()
        ]
        second = self.folder / "second"
        second.mkdir()
        (second / "run").symlink_to(first.out.resolve())
        self.run = Elastic(second, *self.settings, slots=2, maximum=3, pause="0.05", resume=True)
        return [line | {"generation": line["generation"] - 1000} for line in lines]


def rolled_back(out: Path) -> list[int]:
    """For each part of a run: the updates in the metrics that it took back."""
    known, found = 0, []
    for text in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["event"] == "run":
            found.append(known - line["resumed_at_update"])
            known = line["resumed_at_update"]
        elif line["event"] == "update":
            known = line["update"] + 1
    return found


def elastic_campaign(folder: Path, *, kills: int, seed: int) -> dict[str, object]:
    """The counts of one elastic run with all the kills."""
    fixed = folder / "undisturbed"
    run_ranks(1, *trainings.train(*EXACT, out=fixed, smooth=True))
    campaign = ElasticCampaign(folder, kills, seed)
    hangs, before, apart = 0, [], None
    try:
        for number in range(kills - 1):
            campaign.kill_a_worker(while_connecting=number % 2 == 1)
        before = campaign.kill_the_driver()
        ended = campaign.run.end(SECONDS)
        assert ended == 0, campaign.run.said()
        check_whole(campaign.run, EXACT, before)
        apart = difference(fixed, campaign.run.out)
    except pytest.fail.Exception as hang:
        hangs += 1
        print(hang, flush=True)
    finally:
        campaign.run.kill_all()
    out = campaign.run.out
    happened = [json.loads(line) for line in (out / "elastic.jsonl").read_text().splitlines()]
    lost_work = sum(updates > 1 for updates in rolled_back(out))
    return {
        "controller": "elastic",
        "kills": len(campaign.moments),
        "kills_of_the_driver": int(bool(before)),
        "restarts_while_connecting": sum("restarts" in event for event in happened),
        "difference": apart,
        "lost_work": lost_work,
        "hangs": hangs,
        "killed_after_updates": campaign.moments,
        "seconds_to_the_next_update": sorted(
            round(event["again"], 1) for event in happened if "again" in event
        ),
        "passed": apart is not None and apart < ROUNDING and not lost_work and not hangs,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--controller", choices=("mpi", "gloo", "elastic"), default="mpi")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=0, help="short runs without a kill [0]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.controller == "elastic":
        result = elastic_campaign(args.folder, kills=args.kills, seed=args.seed)
    else:
        result = campaign(
            args.folder,
            controller=args.controller,
            kills=args.kills,
            runs=args.runs,
            seed=args.seed,
        )
    print(json.dumps(result))
    sys.exit(not result["passed"])
