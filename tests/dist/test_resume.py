"""A run goes on after any update: bit for bit on as many ranks, within rounding on others."""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "campaigns"))

from kill_ranks import killed_and_resumed, state_hash
from launching import run_ranks

from hvd_lbt import checkpoint

# 22 updates of 32 to epoch 0.5, then 4 of up to 256, of which the momentum rises in the first two;
# epoch 1 begins in the middle of the last stage.
SETTINGS = (
    *("model.width=4", "schedule.epochs=1.2", "schedule.lr=0.02", "schedule.momentum=0.9"),
    "schedule.milestones=[{epoch: 0.5, factor: 4, momentum: 0.95}]",
    "schedule.momentum_ramp={epochs: 0.5, compensate: lr}",
    *("schedule.momentum_change=rescale", "run.keep_checkpoints=99"),
    "run.checkpoint_minutes=0.00001",  # after every update
)
ROUNDING = 1e-4  # as in test_train.py
MADE = ("loss", "accuracy", "lr", "momentum", "global_batch", "wire_scale", "samples_seen")


def train(out: Path, *settings: str, smooth: bool = False) -> list[str]:
    program = [str(Path(__file__).with_name("smooth.py"))] if smooth else ["-m", "hvd_lbt"]
    words = [*program, "train", "digits", "--out", str(out), "--resume"]
    return words + [word for one in (*SETTINGS, *settings) for word in ("--set", one)]


def cut(run: Path, update: int, out: Path) -> Path:
    """A copy of a run as it was when its checkpoint after `update` updates had been written."""
    (out / "checkpoints").mkdir(parents=True)
    for file in (run / "checkpoints").glob("update-*"):
        if int(file.name[7:15]) <= update:
            shutil.copy(file, out / "checkpoints")
    return out


def updates(out: Path) -> dict[int, list]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        line["update"]: [line[key] for key in MADE] for line in lines if line["event"] == "update"
    }


def tensors(state: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    parts = state.items() if isinstance(state, dict) else ()
    parts = enumerate(state) if isinstance(state, list) else parts
    return {key: t for part, value in parts for key, t in tensors(value, f"{name}.{part}").items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    run_ranks(2, *train(out))
    return out


def test_a_checkpoint_after_every_update_and_none_missing(run):
    assert [int(file.name[7:15]) for file in checkpoint.checkpoint_files(run / "checkpoints")] == [
        *range(1, len(updates(run)) + 1)
    ]


@pytest.mark.parametrize("where", ["in an epoch", "before the border", "at the border", "last"])
def test_the_same_number_of_ranks_goes_on_to_the_bit(ranks, run, tmp_path, where):
    whole = updates(run)
    border = next(at for at, made in whole.items() if made[4] != whole[0][4])
    after = {
        "in an epoch": 7,
        "before the border": border - 1,
        "at the border": border,
        "last": len(whole) - 1,
    }[where]
    out = cut(run, after, tmp_path / "run")
    profiled = ("run.profile=[8, 10]", "run.profile_rank=1") if where == "in an epoch" else ()
    ranks(2, *train(out, *profiled))  # a profile changes no bit either
    assert updates(out) == {at: made for at, made in whole.items() if at >= after}
    expected = checkpoint.load_newest(run / "checkpoints")
    state = checkpoint.load_newest(out / "checkpoints")
    mine, theirs = tensors(state), tensors(expected)
    assert any("momentum_buffer" in name for name in theirs)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name
    assert state["reducer"] == expected["reducer"]
    if profiled:
        trace = json.loads((out / "profile/rank1_updates_8-10.json").read_text())
        steps = [event for event in trace["traceEvents"] if event["name"] == "hvd_lbt::fused_sgd_"]
        messages = json.loads((out / "profile/horovod_updates_8-10.json").read_text())
        assert len(steps) >= 3
        assert any(event.get("name") == "ALLREDUCE" for event in messages)


@pytest.mark.parametrize("while_writing", [False, True])
def test_a_rank_killed_at_a_random_moment_costs_no_bit(run, tmp_path, while_writing):
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    out, chance = tmp_path / "run", random.Random(seed)
    killed_and_resumed(out, train(out), len(updates(run)), chance, while_writing)
    assert state_hash(out) == state_hash(run)


def test_two_then_one_then_three_ranks_train_the_same_network(ranks, tmp_path):
    exact = ("wire.form=fp32",)
    whole, one, three = (tmp_path / name for name in ("whole", "one", "three"))
    ranks(2, *train(whole, *exact, smooth=True))
    ranks(1, *train(cut(whole, 5, one), *exact, smooth=True))
    ranks(3, *train(cut(one, 19, three), *exact, smooth=True))
    expected = checkpoint.load_newest(whole / "checkpoints")["model"]
    found = checkpoint.load_newest(three / "checkpoints")["model"]
    for name, weight in expected.items():
        largest = weight.double().abs().max().clamp(min=1e-30)
        assert ((found[name].double() - weight.double()).abs().max() / largest) < ROUNDING, name
    made, losses = {**updates(whole), **updates(one), **updates(three)}, updates(whole)
    for at, values in losses.items():
        assert made[at][0] == pytest.approx(values[0], rel=ROUNDING)
        assert made[at][2:5] == values[2:5]
