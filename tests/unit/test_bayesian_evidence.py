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

COMMITTED = Path(__file__).parents[2] / "docs/studies"


@pytest.mark.parametrize("labels", study.LABELS)
def test_one_split_is_as_in_the_papers_figures(labels):
    digits = load_digits()
    curves = study.sweep(digits.data / 16, digits.target, study.DRAWN, 99, labels)
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
