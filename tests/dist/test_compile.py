"""Compiled training is the same training: weights, names, resume, and no more graphs than sizes."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from trainings import EXACT, ROUNDING, difference, events, last_state, train

from hvd_lbt.errors import UserError
from hvd_lbt.models import compiled, make_forward

# 8 updates of two ghost batches, 4 of two micro-batches, and a last one of a ghost batch and a
# half.
SETTINGS = (
    *EXACT,
    "model.name=wide_resnet10_1",
    "layout.micro_batch=32",
    f"schedule.epochs={536 / 1437}",
    "schedule.milestones=[{epoch: 0.2, factor: 2}]",
    "run.noise_every=1",
)
COMPILED = (*SETTINGS, "run.compile=true", "run.channels_last=true")


def test_a_compiled_run_has_the_eager_runs_weights_names_and_noise(ranks, tmp_path):
    eager, fast = tmp_path / "eager", tmp_path / "compiled"
    ranks(1, *train(*SETTINGS, out=eager, smooth=True))
    ranks(1, *train(*COMPILED, out=fast, smooth=True))  # a graph more than its sizes would end it
    assert [u["global_batch"] for u in events(fast, "update")] == [32] * 8 + [64] * 4 + [24]
    assert difference(eager, fast) < ROUNDING
    assert last_state(fast)["model"].keys() == last_state(eager)["model"].keys()
    for mine, theirs in zip(events(fast, "update"), events(eager, "update"), strict=True):
        assert mine["accuracy"] == theirs["accuracy"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=ROUNDING)
        variance = theirs["gradient_variance"]  # a difference of squares, as in test_train
        # of one micro-batch, from differences of consecutive updates
        assert (variance is not None) == (theirs["update"] > 0)
        if variance is not None:
            assert mine["gradient_variance"] == pytest.approx(variance, rel=20 * ROUNDING)

    weights = last_state(fast)["model"]
    last = sorted((fast / "checkpoints").glob("*.pt"))[-1]
    last.unlink()
    ranks(1, *train(*COMPILED, out=fast, resume=True, smooth=True))
    assert events(fast, "run")[-1]["resumed_at_update"] == 8
    assert all(torch.equal(weights[k], v) for k, v in last_state(fast)["model"].items())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_another_graph_than_was_planned_is_an_error():
    forward = compiled(make_forward(nn.Linear(2, 2)), graphs=1)
    images, labels = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
    forward(images, labels)
    with pytest.raises(FailOnRecompileLimitHit):
        forward(images[:2], labels[:2])


def test_without_a_compiler_it_is_said_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"run.compile: .* a C\+\+ compiler \(no-such-compiler"):
        compiled(make_forward(nn.Linear(2, 2)), graphs=1)
