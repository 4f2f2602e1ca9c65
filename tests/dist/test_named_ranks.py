"""Real ranks of which two are slow: both are named, with the cause, and nobody before."""

import os
from pathlib import Path

import numpy as np
import pytest
from launching import run_ranks
from trainings import events

PROGRAM = Path(__file__).with_name("slow_ranks.py")


@pytest.mark.skipif(
    os.environ.get("HVD_LBT_IDLE") != "1",
    reason="other processes slow ranks too; on idle cores: HVD_LBT_IDLE=1 launch/test FILE",
)
def test_a_rank_that_computes_slowly_and_one_that_waits_for_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HVD_LBT_TEST_SLOW", "1:compute:0.025:30,2:data:0.03:30")
    out = tmp_path / "run"
    settings = ["schedule.epochs=2.5", "schedule.global_batch=48", "run.eval_every=3"]
    words = ["train", "digits_perceptron", "--out", out]
    words += [word for setting in settings for word in ("--set", setting)]
    said = run_ranks(4, PROGRAM, *words)
    named = [line for line in events(out, "slow_rank") if not line["ended"]]
    assert {(line["rank"], line["cause"]) for line in named} == {(1, "compute"), (2, "data")}
    assert all(30 < line["update"] <= 50 for line in named), named
    assert "slowest rank 1 on " in said
    (begin,), lines = events(out, "run"), events(out, "ranks")
    assert len(begin["hosts"]) == 4
    # the last update's times never come
    assert sum(line["updates"] for line in lines) == begin["plan"]["updates"] - 1
    late = {  # mean seconds an update, by rank
        part: np.mean([line[part] for line in lines if line["first_update"] >= 40], axis=0)
        for part in ("compute", "data", "sums")
    }
    assert late["compute"][1] > 1.2 * late["compute"][0]
    assert late["data"][2] > 0.02 + late["data"][0]
    assert late["sums"][1] < late["sums"][0]
    assert events(out, "end")[0]["stages"][0]["waiting"] > 0.1
