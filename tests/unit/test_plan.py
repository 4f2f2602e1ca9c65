"""The plan: noise kept, every sample once, whatever the schedule."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hvd_lbt.errors import UserError
from hvd_lbt.noise import batch_of_equal_noise, exact_noise_scale, noise_scale
from hvd_lbt.plan import make_plan, render_plan
from hvd_lbt.recipe import ScheduleRecipe, load_recipe
from hvd_lbt.schedule import phases


def schedule(**changes) -> ScheduleRecipe:
    settings = {
        "policy": "grow_batch",
        "epochs": 10,
        "lr": 0.1,
        "momentum": 0.9,
        "global_batch": 10,
        "milestones": [{"epoch": 4, "factor": 5}, {"epoch": 8, "factor": 5}],
    }
    return ScheduleRecipe.model_validate(settings | changes)


@st.composite
def schedules(draw) -> ScheduleRecipe:
    policy = draw(st.sampled_from(["decay_lr", "hybrid", "grow_batch"]))
    epochs = draw(st.lists(st.floats(0.1, 9.9), min_size=1, max_size=4, unique=True))
    return schedule(
        policy=policy,
        lr=draw(st.floats(1e-3, 10)),
        momentum=draw(st.floats(0, 0.99)),
        global_batch=draw(st.integers(1, 300)),
        max_global_batch=draw(st.integers(300, 3000)),
        milestones=[{"epoch": e, "factor": draw(st.floats(1.1, 12))} for e in sorted(epochs)],
        batch_milestones=draw(st.integers(1, len(epochs))) if policy == "hybrid" else None,
    )


@given(schedules(), st.integers(1, 5000))
def test_every_sample_is_in_exactly_one_update(schedule, train_samples):
    plan = make_plan(schedule, train_samples)
    assert plan.samples == 10 * train_samples
    seen = done = 0
    for index, stage in enumerate(plan.stages):
        assert (stage.index, stage.first_update, stage.first_sample) == (index, done, seen)
        seen, done = seen + stage.samples, done + stage.updates
        edges = {stage.first_update, done - 1}
        for update in map(plan.at, sorted(edges)):
            assert update.stage == index
            assert update.epoch == update.samples_seen / train_samples
            last_of_run = update.index == plan.updates - 1
            assert update.global_batch == stage.global_batch or last_of_run
        assert plan.at(done - 1).samples_seen + plan.at(done - 1).global_batch == seen
    assert (seen, done) == (plan.samples, plan.updates)


@given(schedules(), st.integers(1, 5000))
def test_no_update_starts_a_fall_early_or_late(schedule, train_samples):
    plan = make_plan(schedule, train_samples)
    by_values = {(p.global_batch, p.lr): p.epoch for p in phases(schedule)}
    if len(by_values) < len(schedule.milestones) + 1:
        return  # two phases alike to the bit: which is which cannot be told
    ends = [*[round(p.epoch * train_samples) for p in phases(schedule)][1:], plan.samples]
    for stage in plan.stages:
        place = list(by_values).index((stage.global_batch, stage.lr))
        assert stage.first_sample + stage.samples <= ends[place]
        assert ends[place] - (stage.first_sample + stage.samples) < stage.global_batch


@given(schedules())
def test_noise_falls_by_the_factor_whoever_pays(schedule):
    first, *later = phases(schedule)
    fall = 1.0
    for phase, milestone in zip(later, schedule.milestones, strict=True):
        fall *= milestone.factor
        wanted = noise_scale(first.lr, first.momentum, 1000, first.global_batch) / fall
        found = noise_scale(phase.lr, phase.momentum, 1000, phase.global_batch)
        # a batch is a whole number: half a sample of rounding
        assert found == pytest.approx(wanted, rel=0.5 / (phase.global_batch - 0.5) + 1e-9)
        assert phase.global_batch <= schedule.max_global_batch


@given(schedules())
def test_decaying_lr_leaves_the_batch_alone(schedule):
    decayed = schedule.model_copy(update={"policy": "decay_lr"})
    assert {phase.global_batch for phase in phases(decayed)} == {schedule.global_batch}


@given(
    st.integers(64, 5000),
    st.floats(0.01, 1),
    st.floats(0, 0.95),
    st.floats(1, 5),
    st.floats(0.95, 0.99),
)
def test_a_raised_start_keeps_the_noise(batch, lr, momentum, times, new_momentum):
    new = {"new_lr": lr * times, "new_momentum": new_momentum}
    raised = batch_of_equal_noise(batch, lr=lr, momentum=momentum, **new)
    assert noise_scale(lr * times, new_momentum, 50_000, raised) == pytest.approx(
        noise_scale(lr, momentum, 50_000, batch), rel=0.5 / (raised - 0.5) + 1e-9
    )


def test_policies_as_a_table():
    def pairs(**changes):
        return [(p.global_batch, round(p.lr, 9)) for p in phases(schedule(**changes))]

    assert pairs() == [(10, 0.1), (50, 0.1), (250, 0.1)]
    assert pairs(policy="decay_lr") == [(10, 0.1), (10, 0.02), (10, 0.004)]
    assert pairs(policy="hybrid") == [(10, 0.1), (50, 0.1), (50, 0.02)]
    assert pairs(policy="hybrid", batch_milestones=2) == pairs()
    assert pairs(max_global_batch=80) == [(10, 0.1), (50, 0.1), (80, 0.032)]
    assert pairs(raised={"lr": 0.5, "momentum": 0.98}) == [(250, 0.5), (1250, 0.5), (6250, 0.5)]


def test_left_over_samples_go_to_the_next_stage():
    # milestone after 103·4 = 412 samples: 41 updates of 10, 2 left; then 618 − … in updates of 50
    plan = make_plan(schedule(milestones=[{"epoch": 4, "factor": 5}]), 103)
    assert [(s.updates, s.first_sample, s.samples) for s in plan.stages] == [
        (41, 0, 410),
        (13, 410, 620),
    ]
    assert plan.at(53).global_batch == 20


def test_a_stage_too_short_for_one_update_is_left_out_and_said():
    recipe = load_recipe(
        "digits", ["schedule.milestones=[{epoch: 19.9, factor: 30}, {epoch: 19.95, factor: 1.5}]"]
    )
    plan = make_plan(recipe.schedule, 1437)
    assert [stage.index for stage in plan.stages] == [0, 1]
    assert "Warning: 1 stages are shorter than one update" in shown(recipe, plan, 1)


def test_the_smaller_last_update_is_the_noisier_one():
    plan = make_plan(schedule(milestones=[]), 103)
    assert plan.at(102).noise_scale == plan.stages[0].noise_scale
    assert make_plan(schedule(milestones=[], epochs=0.15), 103).at(1).noise_scale == pytest.approx(
        0.1 * 103 / (5 * 0.1)
    )


def test_exact_noise_is_zero_where_the_batch_is_all_there_is():
    assert exact_noise_scale(0.1, 0.9, 100, 100) == exact_noise_scale(0.1, 0.9, 100, 300) == 0


def test_outside_of_the_plan_is_an_error():
    plan = make_plan(schedule(), 100)
    for update in (-1, plan.updates):
        with pytest.raises(IndexError, match=f"update {update} of"):
            plan.at(update)


def test_no_samples_is_an_error():
    with pytest.raises(UserError, match=r"schedule.epochs: 10 epochs of 0 training samples"):
        make_plan(schedule(), 0)


def shown(recipe, plan, workers) -> str:
    text = io.StringIO()
    Console(width=140, file=text).print(render_plan(recipe, plan, workers))
    return text.getvalue()


def test_the_table_shows_what_every_worker_does():
    recipe = load_recipe("digits", ["schedule.global_batch=512", "schedule.max_global_batch=65536"])
    text = shown(recipe, make_plan(recipe.schedule, 1437), 3)
    # 32 ghost batches of 16 on 3 workers: 10, 11 and 11, in micro-batches of 4 ghost batches
    assert "3 × 32–64" in text
    assert "2,048" in text
    assert "have no samples" not in text


def test_the_table_warns_of_idle_workers():
    recipe = load_recipe("cifar10_grow_batch")
    text = shown(recipe, make_plan(recipe.schedule, 50_000), 4)
    assert "Warning: in stage 1 3 of 4 workers have no samples" in text
    assert "stage 2" not in text
    assert "The last update takes the 3,584 samples that are left." in text


def test_a_milestone_may_change_the_momentum_and_the_noise_scale_is_still_as_planned():
    overrides = [
        "schedule.milestones=[{epoch: 5, factor: 2, momentum: 0.95}, {epoch: 10, factor: 2}]",
        "schedule.momentum_change=rescale",
    ]
    schedule = load_recipe("digits", overrides).schedule
    first, second, third = make_plan(schedule, 1437).stages
    # m 0.9 → 0.95 halves 1−m: B must double once more than the factor says
    assert [stage.global_batch for stage in (first, second, third)] == [32, 128, 256]
    assert [stage.momentum for stage in (first, second, third)] == [0.9, 0.95, 0.95]
    assert second.noise_scale == pytest.approx(first.noise_scale / 2)
    assert third.noise_scale == pytest.approx(first.noise_scale / 4)


def test_rescaling_a_momentum_that_never_changes_is_refused():
    with pytest.raises(UserError, match=r"schedule.momentum_change: 'rescale' has no effect"):
        load_recipe("digits", ["schedule.momentum_change=rescale"])
