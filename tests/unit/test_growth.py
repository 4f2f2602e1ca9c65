"""The batch that grows by measurement: the rule, its bounds, and the plan of what was decided."""

from itertools import pairwise
from math import inf

import pytest

from hvd_lbt.schedule import Cosine, Milestone, Schedule, SettingError, WarmUp, make_plan
from hvd_lbt.schedule.growth import (
    STEP,
    Bounds,
    Growth,
    Measured,
    choose,
    fastest_batch,
    is_due,
    next_batch,
)
from hvd_lbt.schedule.phases import lr_share

N = 1437


def schedule(**changes):
    fixed = {
        "policy": "measured",
        "epochs": 10,
        "lr": 0.1,
        "momentum": 0.9,
        "global_batch": 32,
        "milestones": (Milestone(epoch=4, factor=5), Milestone(epoch=7, factor=5, momentum=0.95)),
        "max_lr": 0.4,
    }
    return Schedule(**(fixed | changes))


@pytest.mark.parametrize("noise", [10.0, 300.0, 70_000.0])
@pytest.mark.parametrize("overhead", [1.0, 64.0, 5_000.0])
def test_the_fastest_batch_takes_the_least_time(noise, overhead):
    def seconds(batch):
        return (1 + noise / batch) * (overhead + batch)

    best = fastest_batch(noise, overhead)
    tried = [best * 1.001**k for k in range(-3000, 3000)]
    assert min(tried, key=seconds) == pytest.approx(best, rel=1e-3)


def test_nothing_measured_asks_for_no_batch():
    assert fastest_batch(0.0, inf) == fastest_batch(-3.0, 5.0) == fastest_batch(5.0, 0.0) == 0.0
    assert fastest_batch(inf, 1.0) == inf


@pytest.mark.parametrize(
    ("noise", "overhead", "bounds", "batch", "bound"),
    [
        (1e4, 1e4, {}, 45, "step"),
        (2e3, 1.0, {}, 32, "time"),  # B* = 44.7
        (2048.0, 1.0, {}, 45, "time"),  # B* = 45.25, and 64 is too large
        (40.0, 1e9, {}, 32, "noise"),
        (1e4, 1e4, {"data": 44.0}, 32, "data"),
        (1e4, 1e4, {"max_lr": 45.0, "data": 60}, 45, "max_lr"),
        (inf, inf, {"max_global_batch": 32.0}, 32, "max_global_batch"),
        (inf, inf, {}, 45, "step"),
    ],
)
def test_one_step_at_a_time_within_the_bounds(noise, overhead, bounds, batch, bound):
    measured = Measured(noise=noise, overhead=overhead, measurements=10)
    choice = choose(32, measured, Bounds(**bounds), first=32)
    assert (choice.global_batch, choice.bound) == (batch, bound)


def test_the_batch_is_never_made_smaller_by_a_measurement():
    measured = Measured(noise=1.0, overhead=1.0, measurements=10)
    assert choose(512, measured, Bounds(data=100.0), first=32).global_batch == 512


def test_batches_are_steps_of_the_root_of_two_and_multiples():
    batch, seen = 32, []
    while batch < 2000:
        batch = next_batch(batch, first=32, multiple=8)
        seen.append(batch)
    assert all(one % 8 == 0 and 1.2 < one / before < 1.7 for before, one in pairwise(seen))
    assert seen[1::2] == [64 * 2**k for k in range(len(seen[1::2]))]
    assert next_batch(2, first=2, multiple=8) == 8  # where a step is less than the multiple
    assert seen[0] == int(32 * STEP) // 8 * 8


def test_a_decision_is_due_at_each_quarter_of_an_epoch():
    updates = range(0, 10 * N, 50)
    due = [seen + 50 for seen in updates if is_due(seen, seen + 50, N)]
    assert len(due) == 40
    assert all(at - 50 < (k + 1) * N / 4 <= at for k, at in enumerate(due))
    assert [is_due(seen, seen + N, N) for seen in range(0, 5 * N, N)] == [True] * 5


def grown_plan(**changes):
    """A plan that grows at update 20, at 40, and shortly before the first milestone."""
    settings, growth = schedule(**changes), ()
    for update, batch in ((20, 45), (40, 90), (75, 127)):
        seen = make_plan(settings, N, growth).at(update).samples_seen
        growth += (Growth(samples_seen=seen, global_batch=batch),)
    return settings, growth, make_plan(settings, N, growth)


def test_what_was_decided_changes_nothing_before_it():
    settings, growth, plan = grown_plan()
    for count in range(len(growth)):
        before = make_plan(settings, N, growth[:count])
        done = next(k for k in range(100) if plan.at(k).samples_seen == growth[count].samples_seen)
        for update in range(done):
            one, other = plan.at(update), before.at(update)
            assert (one.samples_seen, one.global_batch, one.lr, one.noise_scale) == (
                other.samples_seen,
                other.global_batch,
                other.lr,
                other.noise_scale,
            )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"milestones": (), "cosine": Cosine(), "warm_up": WarmUp(epochs=1, first_lr=0.02)},
        {"milestones": (Milestone(epoch=4, image_size=4), Milestone(epoch=6, factor=4))},
    ],
)
def test_the_noise_scale_is_the_planned_one_whatever_the_batch(changes):
    settings, _, plan = grown_plan(**changes)
    assert plan.samples == 10 * N
    constant = make_plan(settings, N)
    assert {stage.global_batch for stage in constant.stages} == {32}
    for index in range(plan.updates - 1):
        update = plan.at(index)
        shape = plan.stages[update.stage].shape
        fall = next(  # an update that begins before a milestone and ends after it is the later's
            (
                before.noise_scale / constant.stages[0].noise_scale
                for before in reversed(constant.stages)
                if before.shape == shape == "constant"
                and before.first_sample < update.samples_seen + update.global_batch
            ),
            lr_share(settings, shape, update.epoch),
        )
        g = settings.lr * N / (32 * (1 - settings.momentum)) * fall
        assert update.noise_scale == pytest.approx(g), index
        assert update.lr <= settings.max_lr * (1 + 1e-6)


def test_the_batch_falls_at_a_milestone_where_the_lr_would_be_too_large():
    """A smaller momentum needs a larger lr for the same noise."""
    fall = Milestone(epoch=4, factor=1.1, momentum=0.5)
    settings = schedule(milestones=(fall,), max_lr=1.0)
    growth = (Growth(samples_seen=320, global_batch=320, multiple=32),)
    first, after, later = make_plan(settings, N, growth).stages
    assert (first.global_batch, after.global_batch) == (32, 320)
    assert later.lr <= 1.0
    assert later.global_batch % 32 == 0
    assert later.global_batch < 320
    assert later.noise_scale == pytest.approx(after.noise_scale / 1.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy": "grow_batch"}, r"\.max_lr: 0.4 has no effect with policy grow_batch"),
        (
            {"policy": "decay_lr", "max_lr": None, "overhead": 3.0},
            r"\.overhead: 3 has no effect with policy decay_lr",
        ),
        ({"max_lr": 0.05}, r"\.max_lr: 0.05 is less than the lr that the run starts with, 0.1"),
        ({"overhead": 0}, r"\.overhead: 0 is not allowed"),
        ({"batch_milestones": 1}, r"\.batch_milestones: 1 has no effect with policy measured"),
        (
            {"milestones": (), "cosine": Cosine(batch_factor=2)},
            r"\.batch_factor: 2 has no effect with policy measured",
        ),
    ],
)
def test_settings_that_cannot_be(changes, named):
    with pytest.raises(SettingError, match=named):
        schedule(**changes)


def test_the_lr_does_not_rise_above_the_first_unless_max_lr_says_so():
    settings = schedule(max_lr=None)
    plan = make_plan(settings, N, (Growth(samples_seen=320, global_batch=320),))
    assert plan.stages[1].global_batch == 32
    assert max(stage.lr for stage in plan.stages) == pytest.approx(0.1)
