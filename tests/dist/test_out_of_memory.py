"""One of three real ranks runs out of memory, in each pass: no rank waits, and nothing is lost."""

from pathlib import Path

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


def test_one_rank_runs_out_in_forward_last_backward_and_evaluation(ranks, tmp_path):
    short, never = tmp_path / "short", tmp_path / "never"
    # without the agreement the other two ranks wait for sums that never come
    output = ranks(3, *words(SHORT, short), timeout=200)
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
    assert "do it again with a micro-batch of 32 instead of 64" in output
    updates = events(short, "update")
    assert [u["update"] for u in updates] == [*range(7)]
    for mine, theirs in zip(updates, events(never, "update"), strict=True):
        assert mine["skipped_samples"] == 0 == mine["skipped"]
        assert abs(mine["loss"] - theirs["loss"]) < ROUNDING
    assert difference(short, never) < ROUNDING
    assert events(short, "eval")[-1]["samples"] == 360
    assert last_state(short)["micro_batch"] == {"stages": [16], "evaluation": 32}
