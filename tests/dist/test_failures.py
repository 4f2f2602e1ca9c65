"""A rank that fails ends the others soon, and the first failure is told first."""

from pathlib import Path

import pytest

FAILING = Path(__file__).with_name("failing.py")
TINY = ("model.width=4", "schedule.epochs=0.5", "schedule.milestones=[]", "run.eval_every=9")


def train(how: str, out: Path) -> list[str]:
    words = [str(FAILING), how, "train", "digits", "--out", str(out)]
    return words + [word for setting in TINY for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "3")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "6")


def test_the_first_failure_is_told_first(start, tmp_path):
    ended = start(3, *train("raise", tmp_path)).wait()
    assert ended.code == 1
    told = [line for line in ended.output.splitlines() if line.startswith("hvd_lbt: rank")]
    assert told[0].startswith("hvd_lbt: rank 1 on ")
    assert told[0].endswith(" failed:")
    assert "RuntimeError: the memory of this GPU is full" in ended.output
    assert ended.output.count("Traceback") == 1


def test_a_sum_that_a_rank_does_not_join_is_named_and_ended(start, tmp_path):
    ended = start(2, *train("hang", tmp_path)).wait()
    assert ended.code != 0
    assert "Missing ranks:" in ended.output
    assert "gradient." in ended.output
    assert "hvd_lbt: rank 0 on " in ended.output
    assert "ends because another rank failed or is gone" in ended.output


def test_a_frozen_rank_is_noticed(start, tmp_path):
    ended = start(2, *train("freeze", tmp_path)).wait()
    assert ended.code == 74
    assert "hvd_lbt: rank 0 on " in ended.output
    assert "s for the ranks' sum of 'gradient." in ended.output
    assert "(HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=6)" in ended.output


@pytest.mark.parametrize(("how", "signal"), [("die", 9), ("crash", 11)])
def test_a_rank_that_dies_ends_the_others(start, tmp_path, how, signal):
    ended = start(3, *train(how, tmp_path)).wait()
    assert ended.code == 128 + signal
    assert "rank 1 with PID" in ended.output
    assert f"exited on signal {signal}" in ended.output
