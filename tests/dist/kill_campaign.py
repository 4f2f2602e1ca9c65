"""Kill a random rank of each run once, at a random moment, resume, and compare with an unbroken run.

    python tests/dist/kill_campaign.py FOLDER --kills 20 --runs 100

The runs save after every update, so that a checkpoint is nearly always being written; every fourth
kill waits for a half-written file and takes rank 0, which writes it. What the resumed run ends with
(weights, momentum, wire scale, counts) must have the hash of the unbroken run's. Then as many short
runs, each of which has to end with 0: no signal 11 at the exit. Prints one JSON line.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from launching import Launch, begin, run_ranks

from hvd_lbt import checkpoint

SETTINGS = (
    *("model.width=4", "schedule.epochs=2", "schedule.milestones=[{epoch: 1, factor: 4}]"),
    *("run.eval_every=1", "run.checkpoint_minutes=0.00001"),
)
SHORT = ("model.width=4", "schedule.epochs=0.1", "schedule.milestones=[]")
RANKS = 2


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


def kill(launch: Launch, out: Path, after: int, chance: random.Random, while_writing: bool) -> bool:
    """Kill one rank when `after` updates are saved; whether the run was still going on."""
    while launch.process.poll() is None and saved(out) < after:
        time.sleep(0.002)
    time.sleep(chance.random() * 0.05)  # about an update
    while while_writing and launch.process.poll() is None:
        if list((out / "checkpoints").glob("*.part")):
            break
    try:
        ranks = psutil.Process(launch.process.pid).children()
        ranks.sort(key=lambda rank: int(rank.environ()["OMPI_COMM_WORLD_RANK"]))
        (ranks[0] if while_writing else chance.choice(ranks)).kill()
    except (psutil.NoSuchProcess, IndexError):
        launch.wait()
        return False
    return launch.wait().code == 128 + 9


def killed_and_resumed(
    out: Path, words: Sequence[str | Path], updates: int, chance: random.Random, while_writing: bool
) -> int:
    """Run `words` into `out` with one kill, resume to the end; the updates saved when it was killed."""
    while not kill(
        begin(RANKS, *words), out, chance.randrange(1, updates - 2), chance, while_writing
    ):
        shutil.rmtree(out)  # the run was over before the kill: once more
    there = saved(out)
    run_ranks(RANKS, *words)
    return there


def campaign(folder: Path, *, kills: int, runs: int, seed: int) -> dict[str, object]:
    """The counts; equal are the killed runs that ended with the hash of the unbroken one."""
    chance = random.Random(seed)
    hashes, writing, moments = [], 0, []
    if kills:
        run_ranks(RANKS, *train(folder / "unbroken"))
        expected, updates = state_hash(folder / "unbroken"), saved(folder / "unbroken")
        print(f"unbroken: {updates} updates, {expected}", flush=True)
    for number in range(kills):
        out, while_writing = folder / f"killed-{number}", number % 4 == 3
        moments.append(killed_and_resumed(out, train(out), updates, chance, while_writing))
        hashes.append(state_hash(out))
        writing += while_writing
        print(f"run {number}: killed after {moments[-1]} updates, {hashes[-1]}", flush=True)
    for number in range(runs):
        run_ranks(RANKS, *train(folder / f"short-{number}", SHORT))
    return {
        "kills": kills,
        "kills_while_writing": writing,
        "equal": sum(one == expected for one in hashes),
        "killed_after_updates": moments,
        "short_runs_ended_with_0": runs,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    result = campaign(settings.folder, kills=settings.kills, runs=settings.runs, seed=settings.seed)
    print(json.dumps(result))
    sys.exit(0 if result["equal"] == settings.kills else 1)
