"""The plan: noise kept, every sample once, whatever the schedule."""

import io
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.noise import batch_of_equal_noise, exact_noise_scale, noise_scale
from hvd_lbt.schedule.phases import phases
from hvd_lbt.schedule.plan import layout_of, make_plan
from hvd_lbt.schedule.settings import Cosine, Milestone, ScaledStart, Schedule, WarmUp
from hvd_lbt.stage_table import render_plan
from hvd_lbt.world import World


def schedule(**changes) -> Schedule:
    settings = {
        "policy": "grow_batch",
        "epochs": 10,
        "lr": 0.1,
        "momentum": 0.9,
        "global_batch": 10,
        "milestones": [{"epoch": 4, "factor": 5}, {"epoch": 8, "factor": 5}],
    }
    settings |= changes
    settings["milestones"] = tuple(Milestone(**one) for one in settings["milestones"])
    for key, kind in {"cosine": Cosine, "scaled_start": ScaledStart, "warm_up": WarmUp}.items():
        if settings.get(key) is not None:
            settings[key] = kind(**settings[key])
    return Schedule(**settings)


@st.composite
def schedules(draw) -> Schedule:
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
        joined = stage is plan.stages[-1]  # it may have taken a single sample that was left
        assert stage.first_sample + stage.samples <= ends[place] + joined
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
    decayed = replace(schedule, policy="decay_lr", batch_milestones=None)
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
    assert pairs(scaled_start={"lr": 0.5, "momentum": 0.98}) == [
        (250, 0.5),
        (1250, 0.5),
        (6250, 0.5),
    ]


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


def test_the_smaller_last_update_has_a_smaller_lr_and_the_planned_noise():
    plan = make_plan(schedule(milestones=[], epochs=0.15), 103)
    assert [plan.at(index).global_batch for index in (0, 1)] == [10, 5]
    assert [plan.at(index).lr for index in (0, 1)] == [0.1, 0.05]
    assert plan.at(1).noise_scale == pytest.approx(plan.at(0).noise_scale)


def test_a_single_sample_that_is_left_joins_the_update_before_it():
    plan = make_plan(schedule(milestones=[], epochs=1, global_batch=16), 5 * 1437)
    assert plan.updates == 449
    assert [plan.at(index).global_batch for index in (447, 448)] == [16, 17]
    assert plan.at(448).lr == pytest.approx(0.1 * 17 / 16)
    assert plan.at(448).noise_scale == pytest.approx(plan.at(0).noise_scale)
    # the stage before, where the last stage has but this sample
    plan = make_plan(schedule(milestones=[{"epoch": 9.9, "factor": 5}], global_batch=99), 10)
    assert [(s.updates, s.samples) for s in plan.stages] == [(1, 100)]
    assert plan.at(0).global_batch == plan.samples == 100
    assert make_plan(schedule(milestones=[], epochs=1), 1).at(0).global_batch == 1
    assert make_plan(schedule(milestones=[], epochs=1, global_batch=1), 3).updates == 3


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
    assert (
        "The last update takes the 3,584 samples that are left, with an lr smaller in proportion."
        in text
    )


def test_the_table_says_where_the_gradients_noise_is_measured_from_differences():
    recipe = load_recipe("cifar10_grow_batch")  # 128, 640, 3,200, 5,120; micro-batches of 640
    plan = make_plan(recipe.schedule, 50_000)
    text = "noise is measured from differences of consecutive updates in stage"
    assert f"{text} 1, 2: there an update is one" in shown(recipe, plan, 1)
    assert f"{text} 1: there an update is one" in shown(recipe, plan, 2)
    never = load_recipe("cifar10_grow_batch", ["run.noise_every=0"])
    assert "measured" not in shown(never, plan, 1)


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


# ------------------------------------------------------- warm-up, cosine, rounding, ghost batches


def lrs(plan, *indices) -> list[float]:
    return [plan.at(index).lr for index in indices]


def test_the_warm_up_rises_linearly_from_its_first_lr_and_then_ends():
    warm = schedule(warm_up={"epochs": 2, "first_lr": 0.02})
    plan = make_plan(warm, 100)
    # 20 updates of 10 samples: 0.02 + 0.08 · t/20, then 0.1; at epoch 4 the batch takes over. The
    # last update takes the 200 samples that are left, of 250.
    assert [(s.first_update, s.updates, s.global_batch) for s in plan.stages] == [
        (0, 20, 10),
        (20, 20, 10),
        (40, 8, 50),
        (48, 1, 250),
    ]
    assert lrs(plan, 0, 5, 10, 19, 20, 39, 40, 48) == pytest.approx(
        [0.02, 0.04, 0.06, 0.096, 0.1, 0.1, 0.1, 0.08]
    )
    assert (plan.stages[0].lr, plan.stages[0].last_lr) == pytest.approx((0.02, 0.096))
    assert plan.at(10).noise_scale == pytest.approx(0.06 * 100 / (10 * 0.1))
    assert make_plan(schedule(), 100).updates == plan.updates


def test_the_warm_up_rises_to_a_raised_lr():
    warm = schedule(scaled_start={"lr": 0.5}, warm_up={"epochs": 2, "first_lr": 0.1})
    plan = make_plan(warm, 1000)  # updates of 50 samples
    assert lrs(plan, 0, 20, 40) == pytest.approx([0.1, 0.3, 0.5])


def test_the_cosine_decays_the_lr_to_zero():
    plan = make_plan(schedule(policy="decay_lr", milestones=[], cosine={}), 100)
    assert len(plan.stages) == 1
    # 0.05 · (1 + cos(π t/100))
    assert lrs(plan, 0, 25, 50, 75, 99) == pytest.approx(
        [0.1, 0.085355339, 0.05, 0.014644661, 0.0000246719818], rel=1e-7
    )


def test_the_cosine_begins_after_the_warm_up():
    rise = {"epochs": 2, "first_lr": 0.05}
    plan = make_plan(schedule(policy="decay_lr", milestones=[], cosine={}, warm_up=rise), 100)
    # 80 updates from 20 on
    assert lrs(plan, 0, 10, 20, 40, 60, 80) == pytest.approx(
        [0.05, 0.075, 0.1, 0.085355339, 0.05, 0.014644661], rel=1e-7
    )


def test_the_batch_growing_twin_of_the_cosine():
    grow = schedule(milestones=[], cosine={"batch_factor": 2}, max_global_batch=80)
    plan = make_plan(grow, 100)
    # The curve is at 1/2, 1/4, 1/8 after 500, 666.7, 769.9 of 1,000 samples.
    assert [(s.first_update, s.updates, s.first_sample, s.global_batch) for s in plan.stages] == [
        (0, 50, 0, 10),
        (50, 8, 500, 20),
        (58, 2, 660, 40),
        (60, 4, 740, 80),
    ]
    # lr = 0.1 · B/10 · (1 + cos(π samples/1000))/2, at 0, 490, 500, 640, 660, 740, 820 samples
    assert lrs(plan, 0, 49, 50, 57, 58, 60, 61) == pytest.approx(
        [0.1, 0.051570538, 0.1, 0.057422071, 0.103649265, 0.126181158, 0.06226883], rel=1e-6
    )


@given(
    st.integers(1, 300),
    st.integers(300, 3000),
    st.floats(1.05, 8),
    st.floats(0, 3),
    st.integers(300, 5000),
)
def test_every_update_has_the_noise_of_the_curve_whoever_pays(batch, largest, factor, rise, n):
    both = {
        "milestones": [],
        "global_batch": batch,
        "max_global_batch": largest,
        "warm_up": {"epochs": rise, "first_lr": 0.01} if rise > 0 else None,
    }
    plan = make_plan(schedule(cosine={"batch_factor": factor}, **both), n)
    first = noise_scale(0.1, 0.9, n, batch)
    for update in map(plan.at, range(0, plan.updates - 1, 1 + plan.updates // 50)):
        if update.epoch < rise:
            continue
        share = (1 + math.cos(math.pi * (update.epoch - rise) / (10 - rise))) / 2
        assert update.noise_scale == pytest.approx(first * share, rel=1e-9, abs=1e-9 * first)
        assert update.global_batch <= largest


def test_batches_are_multiples_and_the_lr_makes_up_for_the_rounding():
    falls = [{"epoch": 4, "factor": 1.4}, {"epoch": 8, "factor": 1.4}]
    rounded = schedule(global_batch=96, batch_multiple=32, milestones=falls)
    # wanted: 134.4 and 188.16
    assert [p.global_batch for p in phases(rounded)] == [96, 128, 192]
    assert [p.lr for p in phases(rounded)] == pytest.approx(
        [0.1, 0.1 * 128 / 134.4, 0.1 * 192 / 188.16]
    )
    capped = schedule(global_batch=96, batch_multiple=32, milestones=falls, max_global_batch=100)
    assert [p.global_batch for p in phases(capped)] == [96, 96, 96]
    raised = schedule(global_batch=96, batch_multiple=32, scaled_start={"lr": 0.19}, milestones=[])
    # 182.4 wanted
    assert [(p.global_batch, p.lr) for p in phases(raised)] == [(192, pytest.approx(0.2))]


def test_a_milestone_may_change_the_ghost_batch():
    falls = (
        "[{epoch: 4, factor: 4, ghost_batch: 32}, {epoch: 8, factor: 2}, "
        "{epoch: 9, factor: 2, ghost_batch: 64}]"
    )
    recipe = load_recipe("digits", [f"schedule.milestones={falls}"])
    plan = make_plan(recipe.schedule, 1437)
    firsts = [plan.at(stage.first_update) for stage in plan.stages]
    assert [update.ghost_batch for update in firsts] == [None, 32, 32, 64]
    # 128 samples on 3 workers: 4 ghost batches of 32 go 1, 1, 2
    shares = [
        layout_of(firsts[1], World(rank=rank, size=3), **recipe.layout.model_dump())
        for rank in range(3)
    ]
    assert [share.local_batch for share in shares] == [32, 32, 64]
    assert "The ghost batches are of 16, 32, 32, 64 samples, by stage." in shown(recipe, plan, 1)


def test_how_far_the_momentum_buffer_has_settled():
    falls = [{"epoch": 1, "factor": 2, "momentum": 0.95}]
    plan = make_plan(schedule(milestones=falls), 30)
    assert [plan.at(index).settled for index in (0, 1, 2)] == pytest.approx([0.1, 0.19, 0.271])
    # three updates of 0.9 (epoch 1 is 30 samples), then 0.95: the buffer is 2.71 gradients
    assert plan.at(3).settled == pytest.approx(0.05 * (2.71 * 0.95 + 1))
    assert plan.at(4).settled == pytest.approx(0.05 * ((2.71 * 0.95 + 1) * 0.95 + 1))
    # rescaled where m changes, what is missing shrinks by m with each update
    plan = make_plan(schedule(milestones=falls, momentum_change="rescale"), 30)
    assert plan.at(3).settled == pytest.approx(1 - 0.9**3 * 0.95)
    assert plan.at(4).settled == pytest.approx(1 - 0.9**3 * 0.95**2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.cosine={}"], "schedule.cosine: the noise scale falls along the curve or at"),
        (
            ["schedule.milestones=[]", "schedule.cosine={}", "schedule.policy=hybrid"],
            "schedule.policy: 'hybrid' shares milestones out, and schedule.cosine has none",
        ),
        (
            [
                "schedule.milestones=[]",
                "schedule.cosine={batch_factor: 2}",
                "schedule.policy=decay_lr",
            ],
            "schedule.cosine.batch_factor: 2 has no effect with policy decay_lr",
        ),
        (
            ["schedule.warm_up={epochs: 8, first_lr: 0.01}"],
            (
                "schedule.warm_up.epochs: 8 must be fewer than the epoch of the first of "
                "schedule.milestones, 8."
            ),
        ),
        (
            ["schedule.milestones=[]", "schedule.warm_up={epochs: 20, first_lr: 0.01}"],
            "schedule.warm_up.epochs: 20 must be fewer than schedule.epochs = 20.",
        ),
        (
            ["schedule.warm_up={epochs: 2, first_lr: 0.1}"],
            "schedule.warm_up.first_lr: 0.1 must be smaller than the lr that it rises to, 0.1.",
        ),
        (
            ["schedule.batch_multiple=24"],
            "schedule.batch_multiple: 24 does not divide schedule.global_batch = 32; it must.",
        ),
        (
            ["schedule.momentum=0", "schedule.momentum_start=corrected"],
            "schedule.momentum_start: 'corrected' has no effect with schedule.momentum = 0",
        ),
        (
            ["schedule.milestones=[{epoch: 4, factor: 4, ghost_batch: 48}]"],
            (
                "schedule.milestones[0].ghost_batch: 48 does not divide layout.micro_batch = 64; "
                "it must."
            ),
        ),
    ],
)
def test_impossible_combinations_name_their_keys(overrides, message):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", overrides)
    assert f"Recipe digits: {message}" in str(caught.value)


def test_a_single_sample_joins_the_stage_before_once():
    """Two milestones that round to the end of the run: the last sample was counted twice."""
    short = schedule(
        policy="hybrid",
        epochs=10,
        global_batch=1,
        milestones=[{"epoch": 9, "factor": 2}, {"epoch": 9.5, "factor": 2}],
    )
    plan = make_plan(short, 1)
    assert [stage.samples for stage in plan.stages] == [10]
