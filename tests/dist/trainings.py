"""Small trainings for the tests of real ranks: how they are called, and what they left."""

import json
from pathlib import Path

from hvd_lbt import checkpoint

# Two epochs of a small network: 77 updates of 32, then 3 of up to 128.
SMALL = (
    "model.width=8",
    "schedule.epochs=2",
    "schedule.lr=0.02",
    "schedule.milestones=[{epoch: 1.7, factor: 4}]",
    "run.keep_checkpoints=9",
)


EXACT = (*SMALL, "wire.form=fp32")


# Of two trainings of the same network, relative to a tensor's largest weight: only the order of
# summation differs, 2^-24 a sum, grown by 80 updates (measured 9e-6). Another sample in one update,
# or shares weighted by ranks, would make 1e-2.
ROUNDING = 1e-4


def train(
    *settings: str, out: Path, data: Path | None = None, resume: bool = False, smooth: bool = False
) -> list[str]:
    program = [str(Path(__file__).with_name("smooth.py"))] if smooth else ["-m", "hvd_lbt"]
    words = [*program, "train", "digits", "--out", str(out)]
    words += [word for setting in settings for word in ("--set", setting)]
    return words + (["--data", str(data)] if data else []) + (["--resume"] if resume else [])


def last_state(out: Path) -> dict:
    return checkpoint.load(sorted((out / "checkpoints").glob("*.pt"))[-1])


def events(out: Path, kind: str) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def difference(one: Path, other: Path) -> float:
    """The largest difference of weights, relative to the largest weight of the tensor."""
    pairs = zip(last_state(one)["model"].items(), last_state(other)["model"].items(), strict=True)
    return max(
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
        for (_, a), (_, b) in pairs
    )
