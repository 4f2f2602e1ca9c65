"""A momentum that rises: the plan keeps g at every sample, and knows how full the buffer is."""

import re
from dataclasses import replace
from io import StringIO
from math import cos, pi

import pytest
from rich.console import Console

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import SHIPPED, load_recipe
from hvd_lbt.schedule import (
    Cosine,
    Milestone,
    MomentumRamp,
    ScaledStart,
    Schedule,
    WarmUp,
    make_plan,
)
from hvd_lbt.schedule.branches import branch_updates, make_span
from hvd_lbt.schedule.momentum import Buffer, Ramp
from hvd_lbt.schedule.phases import phases
from hvd_lbt.stage_table import render_plan

N = 4000
START = Schedule(
    policy="grow_batch",
    epochs=6,
    lr=0.1,
    momentum=0.9,
    global_batch=16,
    scaled_start=ScaledStart(momentum=0.98),
    milestones=(Milestone(epoch=4, factor=4),),
)
LATER = replace(
    START, scaled_start=None, milestones=(Milestone(epoch=2, factor=4, momentum=0.975),)
)
BOTH = replace(
    START,
    scaled_start=ScaledStart(lr=0.2, momentum=0.95),
    milestones=(Milestone(epoch=1.5, factor=2), Milestone(epoch=3, factor=2, momentum=0.99)),
    batch_multiple=8,
    max_global_batch=1000,
)
CURVE = replace(START, milestones=(), cosine=Cosine(), warm_up=WarmUp(epochs=0.7, first_lr=0.02))
ALL = [START, LATER, BOTH, replace(BOTH, policy="decay_lr"), CURVE]
RAMPS = [MomentumRamp(epochs=1.3), MomentumRamp(epochs=1.3, compensate="lr")]


def updates(schedule, samples=N):
    plan = make_plan(schedule, samples)
    return [plan.at(index) for index in range(plan.updates)]


def lengths(made, rescale=False):
    """How far each update moves a weight whose gradient is 1, as a share of lr/(1−m).

    By the sum over all gradients so far, each with its weight: the product of the momenta since.
    """
    shares = []
    for place, update in enumerate(made):
        total, weight = 0.0, 1.0
        for back in range(place, -1, -1):
            total += weight
            before = made[back - 1].momentum if back else made[back].momentum
            weight *= made[back].momentum
            if rescale:
                weight *= (1 - before) / (1 - made[back].momentum)
        moved = update.lr * total
        shares.append(moved / (update.lr / (1 - update.momentum)))
    return shares


def planned_noise(schedule, epoch, begun):
    """g by hand: after the falls up to the epoch `begun`, scaled by warm-up and cosine."""
    g = schedule.lr * N / (schedule.global_batch * (1 - schedule.momentum))
    for milestone in schedule.milestones:
        g /= milestone.factor if milestone.epoch <= begun else 1
    if schedule.curve is None:
        return g
    if begun < 0.7:
        return g * (0.2 + 0.8 * epoch / 0.7)
    return g * (1 + cos(pi * max(0, epoch - 0.7) / 5.3)) / 2


@pytest.mark.parametrize("ramp", RAMPS, ids=lambda ramp: ramp.compensate)
@pytest.mark.parametrize("schedule", ALL)
def test_g_is_that_of_the_schedule_at_every_sample(schedule, ramp):
    ramped = replace(schedule, momentum_ramp=ramp)
    plan, plain, spans = make_plan(ramped, N), make_plan(schedule, N), phases(ramped)
    assert plan.samples == plain.samples
    momenta = []
    for index in range(plan.updates):
        update = plan.at(index)
        momenta.append(update.momentum)
        begun = spans[plan.stages[update.stage].phase].epoch
        planned = planned_noise(schedule, update.epoch, begun)
        assert update.noise_scale == pytest.approx(planned, rel=1e-9)
        found = update.lr * N / (update.global_batch * (1 - update.momentum))
        assert found == pytest.approx(planned, rel=1e-9)
    assert momenta == sorted(momenta)
    assert len(set(momenta)) > (3 if ramp.compensate == "batch" else 20)
    last, of_plain = plan.stages[-1], plain.stages[-1]
    assert (last.momentum, last.global_batch) == (of_plain.momentum, of_plain.global_batch)
    if schedule.curve is None:  # along a curve the last stages begin at other samples
        assert last.lr == pytest.approx(of_plain.lr)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("schedule", [START, LATER, BOTH])
@pytest.mark.parametrize("ramp", [None, *RAMPS])
def test_settled_is_the_sum_of_all_weights_of_the_gradients(schedule, ramp, rescale):
    changes = bool([one for one in schedule.milestones if one.momentum])
    rescale &= changes or ramp is not None  # else there is nothing to rescale, which is refused
    change = "rescale" if rescale else "keep"
    made = updates(replace(schedule, momentum_ramp=ramp, momentum_change=change), 1000)
    assert [one.settled for one in made] == pytest.approx(lengths(made, rescale), rel=1e-9)


@pytest.mark.parametrize(("first", "last"), [(0.9, 0.98), (0.0, 0.5), (0.5, 0.5), (0.99, 0.9999)])
@pytest.mark.parametrize("count", [1, 2, 3, 700, 20_000])
def test_the_closed_form_of_the_buffer_is_its_recursion(first, last, count):
    low, high = 1 / (1 - first), 1 / (1 - last)
    begin = Buffer().after(0.8, 0.8, 3)
    assert begin.length == pytest.approx(1 + 0.8 + 0.64)
    v, m = begin.length, first
    for place in range(count):
        m = 1 - 1 / (low + (high - low) * place / max(1, count - 1))
        v = m * v + 1
    found = begin.after(first, m, count)
    assert found.length == pytest.approx(v, rel=1e-7)
    assert found.settled == pytest.approx(v * (1 - m), rel=1e-7)


@pytest.mark.parametrize("count", [10**5, 10**8])
def test_a_rise_over_very_many_updates_keeps_the_buffer_full(count):
    assert Buffer().after(0.9, 0.98, count).settled == pytest.approx(1, abs=1e-3)


def test_a_rise_that_is_linear_in_the_updates_averaged_keeps_the_buffer_equally_full():
    ramp = Ramp(begin=0, end=200, first=0.9, last=0.98)  # L from 10 to 50 by 0.2 an update
    v, m = 10.0, 0.9
    shares = []
    for update in range(1, 201):
        m = ramp.at(update)
        v = m * v + 1
        shares.append(v * (1 - m))
    assert shares[100:] == pytest.approx([1 / 1.2] * 100, rel=0.01)


def test_the_published_recipe_with_a_ramp_by_the_batch():
    schedule = load_recipe("imagenet_inception_m0975").schedule
    plan = make_plan(replace(schedule, momentum_ramp=MomentumRamp(epochs=3)), 1_281_167)
    assert plan.updates == 2488  # 2,346 without
    # 1/(1−m) = 10·√2^k on its way from 10 to 40: after (√2^k − 1)/3 of three epochs
    assert [(s.updates, s.global_batch, round(s.momentum, 4)) for s in plan.stages[:5]] == [
        (64, 8192, 0.9),
        (65, 11585, 0.9293),
        (65, 16384, 0.95),
        (64, 23170, 0.9646),
        (1056, 32768, 0.975),
    ]
    assert {round(s.noise_scale, 6) for s in plan.stages[:5]} == {round(3.0 * 1_281_167 / 819.2, 6)}


@pytest.mark.parametrize(
    ("name", "epochs", "updates"),
    [
        ("imagenet_inception_m0975", 3, "2,488"),
        ("imagenet_inception_m095", 3, "3,673"),
        ("imagenet_resnet50_m095", 3, "3,673"),
        ("cifar10_grow_batch_lr_momentum", 10, "2,520"),
    ],
)
def test_the_recipes_name_the_updates_of_their_ramp(name, epochs, updates):
    ramp = f"schedule.momentum_ramp={{epochs: {epochs}}}"
    recipe = load_recipe(name, [ramp])
    assert f"{make_plan(recipe.schedule, recipe.data.train_samples).updates:,}" == updates
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert f"--set '{ramp}'" in text
    assert f"{updates} updates" in text


def test_the_table_shows_the_rise_and_does_not_call_its_steps_too_short():
    settings = ["schedule.momentum_ramp={epochs: 3, compensate: lr}", "layout.micro_batch=auto"]
    recipe = load_recipe("imagenet_inception_m0975", settings)
    console = Console(width=200, record=True, file=StringIO())
    console.print(render_plan(recipe, make_plan(recipe.schedule, 1_281_167), 1))
    text = console.export_text()
    assert "12–3.025" in text
    assert "0.9–0.9748" in text
    assert "takes to settle" not in text
    # the buffer of a rise by b an update is 1/(1+b) full: 30 in 117 updates
    assert "In stage 1 the momentum is on its way (schedule.momentum_ramp)" in text
    assert f"shorter than {1 / (1 + 30 / 117):.2f} times" in text.replace("\n", " ")


def test_a_branch_within_a_ramp_keeps_the_momentum_of_its_first_update():
    plan = make_plan(replace(START, momentum_ramp=RAMPS[1]), N)
    span = make_span(plan, 30, epochs=0.2)
    for batch in span.batches:
        made = branch_updates(plan, span, batch, "noise")
        assert made[0].settled == pytest.approx(plan.at(30).settled)
        for update in made:
            assert update.momentum == plan.at(30).momentum
            assert update.noise_scale == pytest.approx(plan.at(30).noise_scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule.momentum_ramp={epochs: 1}"], "it has no effect where the momentum never"),
        (["schedule.scaled_start={lr: 0.3}", "schedule.momentum_ramp={epochs: 1}"], "no effect"),
        (
            ["schedule.scaled_start={momentum: 0.8}", "schedule.momentum_ramp={epochs: 1}"],
            "at epoch 0 the momentum changes from 0.9 to 0.8; with a ramp it must rise",
        ),
        (
            [
                *("schedule.momentum=0", "schedule.scaled_start={momentum: 0.8}"),
                "schedule.momentum_ramp={epochs: 1}",
            ],
            "from 0 to 0.8; with a ramp it must rise, from more than 0",
        ),
        (
            [
                "schedule.scaled_start={momentum: 0.95}",
                "schedule.milestones=[{epoch: 5, factor: 2, momentum: 0.98}]",
                "schedule.momentum_ramp={epochs: 5}",
            ],
            "momentum_ramp.epochs: 5 must be fewer than 5, from the change at epoch 0 to the next",
        ),
        (
            ["schedule.scaled_start={momentum: 0.95}", "schedule.momentum_ramp={epochs: 30}"],
            "must be fewer than 20, from the change at epoch 0 to the end",
        ),
        (
            [
                *("schedule.policy=measured", "schedule.max_lr=1"),
                "schedule.scaled_start={momentum: 0.95}",
                "schedule.momentum_ramp={epochs: 1}",
            ],
            "with policy measured the batch follows",
        ),
        (
            ["schedule.scaled_start={momentum: 0.95}", "schedule.momentum_ramp={epochs: 0}"],
            "momentum_ramp.epochs: 0 is not allowed",
        ),
        (
            ["schedule.scaled_start={momentum: 0.95}", "schedule.momentum_ramp={epochs: 1, by: 2}"],
            "schedule.momentum_ramp.by",
        ),
    ],
)
def test_a_ramp_that_cannot_be_is_named(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("digits", settings)
