"""Weight decay by stage: λ·g an epoch, however the noise falls; and the study of it."""

import math

import pytest

from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Cosine, Milestone, MomentumRamp, ScaledStart, Schedule
from hvd_lbt.schedule.weight_decay import decay_of_equal_epochs, stage_decays

N, LAMBDA = 6400, 5e-4
SETTINGS = {
    "epochs": 10,
    "lr": 0.1,
    "momentum": 0.9,
    "global_batch": 64,
    "milestones": (Milestone(epoch=4, factor=4), Milestone(epoch=8, factor=4)),
}


@pytest.mark.parametrize("policy", ["decay_lr", "hybrid", "grow_batch"])
def test_policies_of_equal_noise_decay_the_weights_equally(policy):
    plan = make_plan(
        Schedule(policy=policy, batch_milestones=1 if policy == "hybrid" else None, **SETTINGS), N
    )
    decays = stage_decays(plan, LAMBDA)
    # λ·εN/(B(1−m)): 0.0005·0.1·100/0.1, and 4× less after each milestone
    assert [one.an_epoch for one in decays] == pytest.approx([0.05, 0.0125, 0.003125])
    assert [one.in_all for one in decays] == pytest.approx([0.2, 0.05, 0.00625])
    lrs = [stage.lr for stage in plan.stages]
    assert [one.an_update for one in decays] == pytest.approx([LAMBDA * lr * 10 for lr in lrs])


def test_a_larger_start_decays_as_much():
    larger = Schedule(
        policy="grow_batch", scaled_start=ScaledStart(lr=0.4, momentum=0.95), **SETTINGS
    )
    first = stage_decays(make_plan(larger, N), LAMBDA)[0]
    assert first.an_epoch == pytest.approx(0.05)
    assert first.an_update == pytest.approx(LAMBDA * 0.4 * 20)


def test_a_cosine_is_summed_update_by_update():
    plan = make_plan(
        Schedule(
            policy="decay_lr", epochs=2, lr=0.1, momentum=0.0, global_batch=64, cosine=Cosine()
        ),
        N,
    )
    (only,) = stage_decays(plan, LAMBDA)
    by_hand = sum(0.05 * (1 + math.cos(math.pi * at / 200)) for at in range(200))
    assert only.in_all == pytest.approx(LAMBDA * by_hand)


@pytest.mark.parametrize("compensate", ["lr", "batch"])
def test_a_momentum_that_rises_decays_as_the_noise_scale_says(compensate):
    plan = make_plan(
        Schedule(
            policy="grow_batch",
            epochs=10,
            lr=0.1,
            momentum=0.9,
            global_batch=16,
            scaled_start=ScaledStart(momentum=0.98),
            momentum_ramp=MomentumRamp(epochs=4, compensate=compensate),
        ),
        N,
    )
    for stage, one in zip(plan.stages, stage_decays(plan, LAMBDA), strict=True):
        if stage.updates > 10:  # the last update may be small
            assert one.an_epoch == pytest.approx(LAMBDA * plan.stages[0].noise_scale, rel=0.01)


@pytest.mark.parametrize("policy", ["decay_lr", "grow_batch"])
def test_equal_decay_an_epoch_takes_a_larger_lambda_as_the_noise_falls(policy):
    plan = make_plan(Schedule(policy=policy, **SETTINGS), N)
    last = plan.at(plan.updates - 1)
    assert decay_of_equal_epochs(plan, plan.at(0), LAMBDA) == LAMBDA
    assert decay_of_equal_epochs(plan, last, LAMBDA) == pytest.approx(16 * LAMBDA)
