"""Kill a random rank at random moments, resume, and compare the weights with an unbroken run's.

    python tests/dist/kill_campaign.py FOLDER --kills 20 --runs 100

A run saves after every update, so that a checkpoint is nearly always being written; every fourth
kill waits for a half-written file and takes rank 0, which writes it. Then as many short runs, each
of which has to end with 0: no signal 11 at the exit. Prints one JSON line.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import psutil
from launching import Launch, begin

from hvd_lbt import checkpoint

SETTINGS = (
    *("model.width=4", "schedule.epochs=3", "schedule.milestones=[{epoch: 2, factor: 4}]"),
    *("run.eval_every=1", "run.checkpoint_minutes=0.00001"),
)
SHORT = ("schedule.epochs=0.1", "schedule.milestones=[]")
RANKS = 2


def start(out: Path, *settings: str) -> Launch:
    words = ["-m", "hvd_lbt", "train", "digits", "--out", out, "--resume"]
    words += [word for one in (*SETTINGS, *settings) for word in ("--set", one)]
    return begin(RANKS, *words, timeout=600)


def weights(out: Path) -> int:
    state = checkpoint.load_newest(out / "checkpoints")
    assert state is not None
    return checkpoint.weights_checksum(state["model"])


def finish(out: Path, *settings: str) -> None:
    ended = start(out, *settings).wait()
    assert ended.code == 0, f"exit code {ended.code}:\n{ended.output[-4000:]}"


def kill(launch: Launch, out: Path, chance: random.Random, *, while_writing: bool) -> bool:
    """Kill one rank after the run has made some updates; whether the run was still going on."""
    file = out / "metrics.jsonl"
    size = file.stat().st_size if file.exists() else 0
    more = chance.randrange(1, 12_000)  # bytes of the log: 1 to 30 updates, or none but the start
    while launch.process.poll() is None and (
        not file.exists() or file.stat().st_size < size + more
    ):
        time.sleep(0.01)
    time.sleep(chance.random() * 0.3)
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


def campaign(folder: Path, *, kills: int, runs: int, seed: int) -> dict[str, int]:
    """The counts; kills_lost are those after which a run did not end with the unbroken weights."""
    chance = random.Random(seed)
    finish(folder / "unbroken")
    expected = weights(folder / "unbroken")
    done = writing = part = lost = resumed_runs = 0
    while done < kills:
        out, since = folder / f"killed-{part}", done
        part += 1
        for _ in range(min(5, kills - done)):
            while_writing = done % 4 == 3
            if not kill(start(out), out, chance, while_writing=while_writing):
                break
            done += 1
            writing += while_writing
            print(f"kill {done}/{kills}: {checkpoint.checkpoint_files(out / 'checkpoints')[-1:]}")
            sys.stdout.flush()
        finish(out)
        resumed_runs += 1
        lost += (done - since) * (weights(out) != expected)
    for number in range(runs):
        finish(folder / f"short-{number}", *SHORT)
    return {
        "kills": done,
        "kills_while_writing": writing,
        "kills_lost": lost,
        "resumed_runs": resumed_runs,
        "short_runs": runs,
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
    sys.exit(1 if result["kills_lost"] else 0)
