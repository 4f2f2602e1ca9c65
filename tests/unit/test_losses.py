"""The loss against torch's, and what is refused of a loss of one's own."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt.errors import UserError
from hvd_lbt.losses import Loss, load_loss, right_answers
from hvd_lbt.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.fixture
def batch():
    drawn = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 5, generator=drawn).requires_grad_()
    labels, partners = torch.randint(5, (2, 7), generator=drawn)
    return logits, labels, partners, torch.rand(7, generator=drawn)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_torchs_cross_entropy_and_its_formula(batch, smoothing):
    logits, labels, *_ = batch
    labels[2] = -100  # skipped
    total = Loss(label_smoothing=smoothing)(logits, labels)
    assert torch.equal(
        total, F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    )
    logs = logits.log_softmax(1)
    kept = labels >= 0
    own = logs[kept].gather(1, labels[kept, None])[:, 0]
    formula = -(1 - smoothing) * own - smoothing * logs[kept].mean(1)
    assert torch.allclose(total, formula.sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_mixed_labels_is_that_of_the_soft_label(batch, smoothing):
    logits, labels, partners, weights = batch
    soft = weights[:, None] * F.one_hot(labels, 5) + (1 - weights)[:, None] * F.one_hot(partners, 5)
    wanted = F.cross_entropy(logits, soft, label_smoothing=smoothing, reduction="sum")
    total = Loss(label_smoothing=smoothing)(logits, labels, partners, weights)
    assert torch.allclose(total, wanted)
    (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, logits)[0], atol=1e-6)


def test_a_loss_of_ones_own_is_mixed_by_the_weights_and_skips_what_has_no_label(batch):
    logits, labels, partners, weights = batch
    labels[2] = partners[2] = -100

    def own(logits, labels):
        return logits.gather(1, labels[:, None])[:, 0] ** 2  # fails for a label of -100

    loss = Loss(function=own)
    kept = labels >= 0
    wanted = weights * own(logits, labels.clamp(min=0)) + (1 - weights) * own(
        logits, partners.clamp(min=0)
    )
    assert torch.allclose(loss(logits, labels, partners, weights), wanted[kept].sum())
    with pytest.raises(UserError, match=r"loss.function: it gave a tensor of shape \(\)"):
        Loss(function=F.cross_entropy)(logits, labels)


def test_the_right_answer_of_a_mixed_sample_is_the_label_with_the_larger_weight():
    logits = torch.eye(3)  # answers 0, 1, 2
    labels, partners = torch.tensor([0, 2, 1]), torch.tensor([1, 1, 2])
    assert right_answers(logits, labels) == 1
    assert right_answers(logits, labels, partners, torch.tensor([0.5, 0.5, 0.5])) == 1
    assert right_answers(logits, labels, partners, torch.tensor([0.5, 0.4, 0.4])) == 3
    skipped = torch.full((3,), -100)
    assert right_answers(logits, skipped, partners, torch.zeros(3)) == 0


def per_sample(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


class Weighted(nn.Module):
    def __init__(self, requires_grad=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=requires_grad)

    def forward(self, logits, labels):
        return self.scale * per_sample(logits, labels)


LOSSES = {
    "mean": lambda logits, labels: F.cross_entropy(logits, labels),
    "number": lambda logits, labels: 3.0,
    "column": lambda logits, labels: per_sample(logits, labels)[:, None],
    "shared": lambda logits, labels: per_sample(logits, labels) / len(labels),
    "hardest": lambda logits, labels: (
        torch.where(per_sample(logits, labels) >= per_sample(logits, labels).max(), 1.0, 0.0)
        * per_sample(logits, labels)
    ),
    "random": lambda logits, labels: per_sample(F.dropout(logits), labels),
    "no_gradient": lambda logits, labels: per_sample(logits.detach(), labels),
    "soft": lambda logits, labels: F.kl_div(logits, labels.float(), reduction="none"),
    "Kind": Weighted,
    "trained": Weighted(),
    "constant": 3,
    "frozen": Weighted(requires_grad=False),
    "focal": lambda logits, labels: (
        (1 - (-per_sample(logits, labels)).exp()) ** 2 * per_sample(logits, labels)
    ),
}


@pytest.fixture
def named(monkeypatch):
    module = ModuleType("my_losses")
    vars(module).update(LOSSES)
    monkeypatch.setitem(sys.modules, "my_losses", module)
    return lambda name: load_loss(f"my_losses:{name}", 6, CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"of 4 samples it gave a tensor of shape \(\); it must give one loss a sample"),
        ("number", "it gave a float"),
        ("column", r"shape \(4, 1\)"),
        ("shared", "must depend on this sample only"),
        ("hardest", "must depend on this sample only"),
        ("random", "and not on random numbers"),
        ("no_gradient", "its losses have no gradient"),
        ("soft", "it raised RuntimeError"),
        ("Kind", r"my_losses:Kind is a class; it must be a function \(logits, labels\)"),
        ("trained", "has weights of its own"),
        ("constant", "is of type int"),
    ],
)
def test_what_is_no_loss_a_sample_is_refused(named, name, message):
    with pytest.raises(UserError, match=message):
        named(name)


@pytest.mark.parametrize("name", ["frozen", "focal"])
def test_a_loss_a_sample_is_taken(named, name):
    logits, labels = torch.randn(3, 6), torch.tensor([0, 5, 2])
    assert torch.equal(named(name)(logits, labels), LOSSES[name](logits, labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss=my_losses"], "loss.function: 'my_losses' is not allowed; it must read"),
        (["loss=a.b:c", "loss.mixup=1"], "loss.mixup=1: loss is 'a.b:c', which has no keys"),
        (["loss={function: a:b, label_smoothing: 0.1}"], "loss.label_smoothing: 0.1 has no effect"),
        (["loss.label_smoothing=1"], "loss.label_smoothing: 1 is not allowed; it must be less"),
        (["loss.label_smoothing=-0.1"], "loss.label_smoothing: -0.1 is not allowed"),
        (["loss.mixup=-1"], "loss.mixup: -1 is not allowed"),
        (["loss.cutmix=.inf"], "loss.cutmix: inf is not allowed"),
        (["loss.cutmix=true"], "loss.cutmix: true is not allowed"),
        (["loss.smoothing=0.1"], "loss.smoothing: there is no such key"),
        (
            ["loss.cutmix=1", "layout.ghost_batch=1"],
            "layout.ghost_batch: 1 leaves no partner for l",
        ),
        (
            ["loss.mixup=1", "schedule.milestones=[{epoch: 2, factor: 2, ghost_batch: 1}]"],
            r"schedule.milestones\[0\].ghost_batch: 1 leaves no partner for loss.mixup",
        ),
        (["ema.decay=1"], "ema.decay: 1 is not allowed; it must be less than 1"),
        (["ema.decay=0"], "ema.decay: 0 is not allowed; it must be greater than 0"),
        (["optimizer.clip_norm=0"], "optimizer.clip_norm: 0 is not allowed"),
        (["optimizer.clip_norm=-1"], "optimizer.clip_norm: -1 is not allowed"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_recipe("digits", settings)


def test_a_name_alone_is_short_for_the_function():
    recipe = load_recipe("digits", ["loss=my_code.losses:focal"])
    assert recipe.loss.function == "my_code.losses:focal"
    assert "loss.function was None, is 'my_code.losses:focal'" in recipe.changes_since(
        load_recipe("digits").to_dict()
    )
