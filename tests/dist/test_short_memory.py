"""One of three real ranks runs out of memory, in each pass: no rank waits, and nothing is lost."""

from pathlib import Path
from typing import Any

import torch
from trainings import ROUNDING, difference, events, last_state

SMOOTH = Path(__file__).with_name("smooth.py")
SHORT = Path(__file__).with_name("short_memory.py")
SETTINGS = (
    *("model.width=8", "schedule.epochs=0.9", "schedule.lr=0.02", "schedule.milestones=[]"),
    *("schedule.global_batch=192", "wire.form=fp32", "wire.bucket_mb=0.001", "run.noise_every=2"),
)


def words(program: Path, out: Path, *settings: str) -> list[str | Path]:
    given = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return [program, "train", "digits", "--out", out, *given]


def test_one_rank_runs_out_in_forward_last_backward_and_evaluation(start, ranks, tmp_path):
    short, never = tmp_path / "short", tmp_path / "never"
    # without the agreement the other two ranks wait for sums that never come
    # (no forks: the address space that is limited would be their loader's)
    ended = start(3, *words(SHORT, short), timeout=200).wait()
    assert ended.code == 0, ended.output[-4000:]
    ranks(1, *words(SMOOTH, never, "layout.micro_batch=16"))

    found = events(short, "out_of_memory")
    assert [e["ranks"] for e in found] == [
        {"1": "its forward pass"},
        {"1": "its last backward pass"},
        {"1": "the evaluation"},
    ]
    assert [(e["update"], e["micro_batch_before"], e["micro_batch"]) for e in found] == [
        (2, 64, 32),
        (4, 32, 16),
        (7, 64, 32),
    ]
    assert "do it again with a micro-batch of 32 instead of 64" in ended.output
    updates = events(short, "update")
    assert [u["update"] for u in updates] == [*range(7)]
    for mine, theirs in zip(updates, events(never, "update"), strict=True):
        assert mine["skipped_samples"] == 0 == mine["skipped"]
        assert abs(mine["loss"] - theirs["loss"]) < ROUNDING
    assert difference(short, never) < ROUNDING
    assert events(short, "eval")[-1]["samples"] == 360
    kept = last_state(short)["micro_batch"]
    assert (kept["stages"], kept["evaluation"], kept["asked"]) == ([16], 32, 64)


def test_auto_trains_what_the_number_that_it_found_trains(ranks, tmp_path):
    auto, number = tmp_path / "auto", tmp_path / "number"
    short = ("schedule.epochs=0.3", "layout.ghost_batch=16")
    output = ranks(2, *words(SMOOTH, auto, *short, "layout.micro_batch=auto"))
    (run,) = events(auto, "run")
    found = run["micro_batch"]
    assert found["asked"] == "auto"
    assert found["stages"][0] in (16, 32, 48, 64, 96)  # of 96 samples
    assert f"micro-batch: auto is {found['stages'][0]}" in output
    ranks(2, *words(SMOOTH, number, *short, f"layout.micro_batch={found['stages'][0]}"))
    one, other = last_state(auto), last_state(number)
    assert one["micro_batch"]["stages"] == found["stages"] == other["micro_batch"]["stages"]
    for part in ("model", "optimizer", "reducer", "gradient_noise"):
        assert same_bits(one[part], other[part]), part


def test_what_cannot_be_halved_is_saved_and_named(start, tmp_path):
    ended = start(1, *words(SHORT, tmp_path / "run", "layout.ghost_batch=64")).wait()
    assert ended.code == 2, ended.output[-4000:]
    said = " ".join(ended.output.split())
    assert "Out of memory: rank 0 in its forward pass, and the micro-batch cannot be" in said
    assert "Take a smaller layout.ghost_batch or model" in said
    assert "Saved after 2 updates: --resume continues from there." in said
    assert "Traceback" not in said
    assert last_state(tmp_path / "run")["update"] == 2


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return one.numpy().tobytes() == other.numpy().tobytes()
    return repr(one) == repr(other)
