"""From plan to optimizer: what lr and momentum do to the weights."""

import pytest
import torch
from torch import nn

from hvd_lbt.hyperparameters import make_optimizer, set_hyperparameters
from hvd_lbt.recipe import OptimizerRecipe, load_recipe
from hvd_lbt.schedule.plan import make_plan


def lengths(*overrides: str, nesterov: bool = False, updates: int = 8) -> list[float]:
    """How far each update moves a weight whose gradient is always 1, as a share of ε/(1−m)."""
    schedule = load_recipe("digits", ["schedule.epochs=1", *overrides]).schedule
    plan = make_plan(schedule, 1437)
    model = nn.Linear(1, 1, bias=False)
    settings = OptimizerRecipe(weight_decay=0.0, nesterov=nesterov)
    optimizer = make_optimizer(model, settings, schedule.lr, schedule.momentum)
    moved = []
    for update in map(plan.at, range(updates)):
        set_hyperparameters(optimizer, update, schedule)
        before = model.weight.item()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        full = update.lr / (1 - update.momentum)
        moved.append((before - model.weight.item()) / full)
    return moved


CHANGE = "schedule.milestones=[{epoch: 0.1, factor: 1.0001, momentum: 0.98}]"  # after 4 updates
STILL = "schedule.milestones=[]"
ROUNDING = 1e-5  # weights near 1 in fp32, moved by 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_that_starts_at_zero_suppresses_the_first_updates(nesterov):
    wanted = [1 - 0.9 ** (t + nesterov) for t in range(1, 9)]
    assert lengths(STILL, nesterov=nesterov) == pytest.approx(wanted, abs=ROUNDING)


@pytest.mark.parametrize("nesterov", [False, True])
def test_corrected_every_update_is_as_long_as_in_the_steady_state(nesterov):
    found = lengths(STILL, "schedule.momentum_start=corrected", nesterov=nesterov)
    assert found == pytest.approx([1.0] * 8, abs=ROUNDING)


@pytest.mark.parametrize("nesterov", [False, True])
def test_corrected_and_rescaled_it_is_so_also_where_the_momentum_changes(nesterov):
    both = ("schedule.momentum_start=corrected", "schedule.momentum_change=rescale")
    found = lengths(CHANGE, *both, nesterov=nesterov)
    assert found == pytest.approx([1.0] * 8, abs=5 * ROUNDING)


def test_without_treatment_a_raised_momentum_shortens_the_updates():
    # the buffer had reached (1 − 0.9^4) of 10, and is to be 50
    first = 0.02 * (0.98 * 10 * (1 - 0.9**4) + 1)
    assert lengths(CHANGE)[4] == pytest.approx(first, abs=ROUNDING)


RISE = ("schedule.scaled_start={momentum: 0.98}", "schedule.epochs=2", STILL)


@pytest.mark.parametrize("compensate", ["batch", "lr"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_in_a_ramp_each_update_is_as_long_as_the_plan_says(compensate, nesterov):
    ramp = f"schedule.momentum_ramp={{epochs: 1, compensate: {compensate}}}"
    plan = make_plan(load_recipe("digits", [*RISE, ramp]).schedule, 1437)
    settled = [plan.at(index).settled for index in range(8)]
    momenta = [plan.at(index).momentum for index in range(8)]
    wanted = [1 - m * (1 - s) if nesterov else s for m, s in zip(momenta, settled, strict=True)]
    found = lengths(*RISE, ramp, nesterov=nesterov)
    assert found == pytest.approx(wanted, abs=5 * ROUNDING)
    # corrected, each is as long as lr/(1−m) says, though the momentum changes in each
    found = lengths(*RISE, ramp, "schedule.momentum_start=corrected", nesterov=nesterov)
    assert found == pytest.approx([1.0] * 8, abs=20 * ROUNDING)
