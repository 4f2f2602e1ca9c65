"""Study 6: one split as the paper has it, and that what docs/studies says is what its numbers
say.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hvd_lbt.studies import bayesian_evidence as study
from hvd_lbt.studies.paired import Outcome

COMMITTED = Path(__file__).parents[2] / "docs/studies"


@pytest.mark.parametrize("labels", study.LABELS)
def test_one_split_is_as_in_the_papers_figures(labels):
    digits = load_digits()
    curves = study.sweep(digits.data / 16, digits.target, study.DRAWN, (99,), labels)[0]
    assert curves["train_accuracy"][-1] == 1.0  # the smallest λ learns any labels by heart
    losses = np.diff(curves["train_loss"])
    assert (losses < 0).all()
    summary = study.summary(curves)
    if labels == "true":
        assert summary["best_ratio"] < -20
        assert summary["chosen_loss"] < summary["best_loss"] + 0.05 < summary["weakest_loss"]
        assert curves["test_accuracy"][-1] > 0.9
    else:
        assert summary["best_ratio"] > -2
        assert curves["evidence_ratio"][-1] > 20
        assert curves["test_loss"][-1] > 5 * math.log(2)
        assert abs(curves["test_accuracy"][-1] - 0.5) < 0.1


def splits(*, true, shuffled=0.1, weakest=0.5, spread=0.01):
    """Ten splits of a pair: the evidence's λ costs `true`, shuffled labels win `shuffled` nats."""

    def row(place, won, cost):
        return {
            "best_ratio": -won * (1 + spread * (place - 4.5)),
            "chosen_loss": 0.1 + cost + spread * (place - 4.5) * 0.01,
            "best_loss": 0.1,
            "weakest_loss": 0.1 + weakest,
        }

    return {
        "true": [row(place, 30.0, true) for place in range(10)],
        "shuffled": [row(place, shuffled, 0.0) for place in range(10)],
    }


@pytest.mark.parametrize(
    ("pair", "outcomes"),
    [
        (splits(true=0.01), (Outcome.HELD, Outcome.HELD)),
        (splits(true=0.09), (Outcome.NO, Outcome.HELD)),
        (splits(true=0.05), (Outcome.UNDECIDED, Outcome.HELD)),
        (splits(true=0.01, weakest=0.0), (Outcome.NO, Outcome.HELD)),  # no λ is too small
        (splits(true=0.01, shuffled=4.0), (Outcome.HELD, Outcome.NO)),
    ],
)
def test_a_pairs_outcomes(pair, outcomes):
    assert study.judge_pair(pair) == outcomes


def test_pairs_are_counted_with_an_interval():
    pairs = {str(place): splits(true=0.01 if place < 3 else 0.09) for place in range(10)}
    text = study.count_pairs({"pairs": pairs}, 0)
    # Clopper and Pearson: 3 of 10 are 6.67 to 65.25 %
    assert text.startswith("held for 3 of 10 pairs (95 % interval of the share 7% to 65%), did not")
    assert "for 7, is undecided for 0" in text


def test_the_committed_page_is_that_of_the_committed_numbers(tmp_path, monkeypatch):
    shutil.copy(COMMITTED / "bayesian_evidence.json", tmp_path)

    def measured_again():
        raise AssertionError("the numbers are there")

    monkeypatch.setattr(study, "measure", measured_again)
    told = study.study(tmp_path)
    page = (tmp_path / "bayesian_evidence.md").read_text(encoding="utf-8")
    assert told in page
    assert page == (COMMITTED / "bayesian_evidence.md").read_text(encoding="utf-8")
    assert (tmp_path / "bayesian_evidence.png").stat().st_size > 50_000
