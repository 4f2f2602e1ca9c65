"""What a run with policy measured decides, writes down, and takes from another run."""

import json
import math

import pytest

from hvd_lbt.errors import UserError
from hvd_lbt.growing import (
    FILE,
    Costs,
    Growing,
    Noise,
    _next_due,
    bounds_of,
    profile_costs,
    read_decisions,
    widest_plan,
)
from hvd_lbt.micro_batch import MicroBatchSizes
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.plan_time import Cluster
from hvd_lbt.schedule.speed import SpeedProfile
from hvd_lbt.speed_profile import load_profile

N = 1437
MUCH = {"variance": 900.0, "squared": 0.1}  # φ = 9,000
EQUAL = Costs(fixed=0.5, a_sample=0.001)  # a/b = 500 samples


def recipe(*settings):
    return load_recipe("digits_measured", settings)


def trained(growing, noise=MUCH, costs=EQUAL):
    """All updates of a run in which each update is measured; the updates."""
    index, updates = 0, []
    while index < growing.plan.updates:
        update = growing.plan.at(index)
        updates.append(update)
        index += 1
        if growing.is_due(update):
            decision = growing.decide(update, Noise(**noise, measurements=index), costs)
            if decision is not None:
                growing.take(json.loads(json.dumps(decision)))
    return updates


def test_a_run_grows_to_its_bounds_and_takes_each_sample_once():
    growing = Growing(recipe(), N)
    updates = trained(growing)
    assert max(update.global_batch for update in updates) == 128  # lr ≤ 0.4, and N/10 is 143
    seen = 0
    for update in updates:
        assert update.samples_seen == seen
        assert update.lr <= 0.4 * (1 + 1e-6)
        seen += update.global_batch
    assert seen == 20 * N
    assert [one.global_batch for one in updates] == [
        growing.plan.at(index).global_batch for index in range(growing.plan.updates)
    ]
    # nothing that is measured held it back: this is the widest plan
    assert growing.plan.growth == widest_plan(recipe().schedule, N, 16, 1).growth


@pytest.mark.parametrize(
    ("noise", "costs", "bound"),
    [
        ({"variance": 5.0, "squared": 0.1}, EQUAL, "noise"),  # φ = 50
        (MUCH, Costs(fixed=0.0, a_sample=0.001), "time"),
        ({"variance": -5.0, "squared": 0.1}, EQUAL, "time"),
        (MUCH, Costs(fixed=1e-4, a_sample=0.001), "time"),  # B* = 30
    ],
)
def test_it_stays_where_growing_does_not_pay(noise, costs, bound):
    growing = Growing(recipe(), N)
    trained(growing, noise, costs)
    assert {one["bound"] for one in growing.decisions} == {bound}
    assert growing.plan.updates == make_plan(recipe().schedule, N).updates


def test_a_gradient_that_is_all_noise_lets_it_grow():
    growing = Growing(recipe(), N)
    trained(growing, {"variance": 5.0, "squared": -0.1})
    assert max(stage.global_batch for stage in growing.plan.stages) == 128
    assert {one["noise"] for one in growing.decisions} == {None}


def test_a_gradient_that_differences_say_is_all_noise_decides_nothing():
    growing = Growing(recipe(), N)
    trained(growing, {"variance": 5.0, "squared": -0.1, "source": "differences"})
    assert growing.undecided


def test_too_little_measured_decides_nothing():
    growing = Growing(recipe(), N)
    update = next(u for u in map(growing.plan.at, range(99)) if growing.is_due(u))
    assert growing.decide(update, Noise(**MUCH, measurements=9), EQUAL) is None
    assert growing.decide(update, Noise(**MUCH, measurements=99), None) is None
    nothing = Noise(variance=math.nan, squared=math.nan, measurements=99)
    assert growing.decide(update, nothing, EQUAL) is None
    assert growing.undecided
    fixed = Growing(recipe("schedule.overhead=500"), N)
    measured = Noise(**MUCH, measurements=10, source="differences")
    decision = fixed.decide(update, measured, None)
    assert decision["gradient_noise_from"] == "differences"
    assert decision["overhead"] == 500
    assert decision["seconds_fixed"] is None
    fixed.take(decision)
    assert not fixed.undecided
    # ten more measurements before the next change
    later = fixed.plan.at(40)
    assert fixed.decide(later, Noise(**MUCH, measurements=19), None) is None
    assert fixed.decide(later, Noise(**MUCH, measurements=20), None)["global_batch"] > 64


def test_a_warm_up_and_the_last_update_decide_nothing():
    growing = Growing(recipe("schedule.warm_up={epochs: 2, first_lr: 0.01}"), N)
    updates = [growing.plan.at(index) for index in range(growing.plan.updates)]
    due = [update for update in updates if growing.is_due(update)]
    assert min(update.epoch for update in due) > 1.9
    assert due[-1].index < growing.plan.updates - 1


def test_state_and_file_bring_the_same_plan_back(tmp_path):
    growing = Growing(recipe(), N)
    trained(growing)
    growing.write(tmp_path, "run", "finished")
    again = Growing(recipe(), N, growing.state_dict())
    assert again.plan == growing.plan
    decisions, notes = read_decisions(tmp_path, recipe("run.noise_every=9"), N)
    assert decisions == growing.decisions
    assert notes == []  # how it is measured makes no other bits
    replay = Growing(recipe(), N, replay=decisions)
    assert replay.plan == growing.plan
    assert not any(replay.is_due(update) for update in map(replay.plan.at, range(100)))
    assert Growing(recipe(), N, replay.state_dict(), decisions).replays
    with pytest.raises(UserError, match="--replay: the run that is resumed has other decisions"):
        Growing(recipe(), N, growing.state_dict(), decisions[:-1])
    replay.write(tmp_path, "replay", "finished")
    assert read_decisions(tmp_path / FILE, recipe(), N)[0] == decisions  # a replay of a replay


def written(tmp_path, change):
    growing = Growing(recipe(), N)
    trained(growing)
    growing.write(tmp_path, "run")
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    found = change(lines)
    lines = lines if found is None else found
    text = lines if isinstance(lines, str) else "\n".join(map(json.dumps, lines))
    (tmp_path / FILE).write_text(text)


def changed(number, **values):
    def change(lines):
        growing = [one for one in lines[1:] if one["global_batch"] > one["global_batch_before"]]
        (lines[0] if number == 0 else growing[number - 1]).update(values)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda lines: "", "is empty"),
        (lambda lines: "{", "line 1 is no JSON"),
        (lambda lines: "[1]", "line 1 is no object"),
        (lambda lines: "[" * 100_000, "line 1 is no JSON"),
        (lambda lines: lines[1:], "its first line does not say of which run it is"),
        (changed(0, train_samples=5), r"train samples 5, and this one has 1,437"),
        (changed(0, ghost_batch="x"), r"ghost batch 'x', and this one has 16"),
        (changed(0, schedule={"lr": 3}), r"another schedule \(schedule.batch_m"),
        (changed(0, schedule=7), "another schedule"),
        (changed(1, global_batch="many"), r"decision \d+: global_batch is 'many'"),
        (changed(1, global_batch=True), r"decision \d+: global_batch is True"),
        (changed(1, global_batch=10**400), r"decision \d+: global_batch is 1000"),
        (changed(1, global_batch=10**6), r"global batch of 1,000,000 after one of 32"),
        (changed(2, global_batch=1), r"global batch of 1 after one of "),
        (changed(1, samples_seen=True), r"samples_seen is True"),
        (changed(1, samples_seen=10**6), r"1,000,000 samples before update"),
        (changed(1, samples_seen=10**400), r"samples_seen is 1000"),
        (changed(2, samples_seen=3), r"3 samples before update \d+ are not what the plan has"),
        (changed(2, update=7), r"samples before update 7 are not what the plan has"),
        (changed(1, update=10**9), r"before update 1,000,000,000 are not"),
        (changed(1, global_batch_before=128), r"before it is 32, and it says 128"),
        (changed(1, global_batch=32), r"samples before update \d+ are not what the plan has"),
        (lambda lines: [*lines[:1], *lines[2:]], r"a line before it is missing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, named):
    written(tmp_path, change)
    with pytest.raises(UserError, match=named):
        read_decisions(tmp_path, recipe(), N)


def test_a_replay_says_that_a_run_did_not_finish_or_had_other_settings(tmp_path):
    growing = Growing(recipe(), N)
    trained(growing)
    growing.write(tmp_path, "run", "finished")
    _, (note,) = read_decisions(tmp_path, recipe("run.seed=7", "model.width=8"), N)
    assert "other settings (model.width" in note
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    (tmp_path / FILE).write_text("".join(lines[:-1]))
    _, (note,) = read_decisions(tmp_path, recipe(), N)
    assert "did not finish, or has not yet. Its decisions end at update " in note
    (tmp_path / FILE).write_text(lines[0])
    decisions, (note,) = read_decisions(tmp_path, recipe(), N)
    assert decisions == []
    assert "end at its beginning; from there on this run keeps its batch" in note


def test_a_replay_needs_the_policy_and_the_file(tmp_path):
    with pytest.raises(UserError, match=r"schedule.policy is grow_batch, which decides nothing"):
        read_decisions(tmp_path, load_recipe("digits"), N)
    with pytest.raises(UserError, match=r"there is no such file; a run with schedule.policy"):
        read_decisions(tmp_path, recipe(), N)
    Growing(recipe(), N).write(tmp_path, "run")
    with pytest.raises(UserError, match=r"another schedule \(schedule.epochs\)"):
        read_decisions(tmp_path, recipe("schedule.epochs=19"), N)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("run.noise_every=0",), "run.noise_every: 0 measures no gradient noise"),
        (("schedule.policy=decay_lr",), "schedule.max_lr: 0.4 has no effect"),
        (("run.speed=v100_infiniband", "schedule.overhead=3"), "leave one of them out"),
        (
            ("schedule.policy=grow_batch", "schedule.max_lr=null", "run.speed=mine.yaml"),
            "run.speed: mine.yaml has no effect with policy grow_batch",
        ),
    ],
)
def test_settings_without_effect_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        recipe(*settings)


def test_costs_by_a_profile_or_why_not():
    cluster = Cluster(workers=64, micro_batch=128, ghost_batch=32, image_size=224)
    profile = load_profile("v100_infiniband")
    costs = profile_costs(profile, cluster, 8192, 32, 224)
    assert costs.a_sample * 64 == pytest.approx(profile.seconds_a_sample(224), rel=0.2)
    assert costs.fixed > 0
    with pytest.raises(UserError, match=r"run.speed: .* lacks .*within_node is not measured"):
        profile_costs(SpeedProfile(**lacking()), cluster, 8192, 32, 224)


def lacking():
    return {
        "name": "mine",
        "workers_per_node": 8,
        "update_seconds": 0.01,
        "sample_seconds": {224: 1e-3},
        "gradient_bytes": 10**8,
    }


def test_costs_are_the_line_through_two_batches():
    costs = Costs.of(lambda batch: 0.3 + 0.01 * batch, 64)
    assert (costs.fixed, costs.a_sample) == (pytest.approx(0.3), pytest.approx(0.01))
    assert costs.overhead == pytest.approx(30)
    flat = Costs.of(lambda batch: 0.3, 64)
    assert flat.overhead == math.inf
    steep = Costs.of(lambda batch: batch**2, 64)  # a larger one is slower a sample
    assert (steep.fixed, steep.overhead) == (0.0, 0.0)


def test_a_cosine_may_grow_where_it_has_fallen():
    """The largest lr bounds the lr of the updates to come, not that of the start."""
    cosine = recipe("schedule.milestones=[]", "schedule.cosine={}", "schedule.max_lr=0.1")
    growing = Growing(cosine, N)
    updates = trained(growing)
    assert max(update.global_batch for update in updates) == 128
    assert all(update.lr <= 0.1 * (1 + 1e-6) for update in updates)
    bounds = bounds_of(cosine.schedule, N, 32, 0.05)
    assert bounds.max_lr == pytest.approx(64)


@pytest.mark.parametrize("settings", [(), ("schedule.max_lr=9", "schedule.max_global_batch=144")])
def test_the_next_decision_is_found_without_going_through_the_updates(settings):
    plan = widest_plan(recipe(*settings).schedule, N, 16, 1)
    growing = Growing(recipe(*settings), N)
    growing.plan = plan
    due = [at for at in range(plan.updates) if growing.is_due(plan.at(at))]
    found, index = [], 0
    while (index := _next_due(plan, index)) < plan.updates:
        found.append(index)
        index += 1
    assert [at for at in found if at + 1 < plan.updates] == due


def test_stages_keep_the_micro_batch_of_their_phase():
    """A growth moves the update at which the images change their size, or the ghost batch."""
    images = "schedule.milestones=[{epoch: 2.3, image_size: 12}, {epoch: 8, factor: 4}]"
    growing = Growing(recipe(images, "schedule.max_lr=9"), N)
    before = growing.plan
    sizes = MicroBatchSizes(stages=(96, 128, 64), evaluation=5)
    trained(growing)
    after = growing.plan
    assert len(after.stages) > len(before.stages)
    ghosts = [64 if stage.image_size == 12 else 32 for stage in after.stages]
    new = sizes.replanned(before, after, ghosts)
    by_phase = {0: 96, 1: 128, 2: 64}
    assert list(new.stages) == [by_phase[stage.phase] for stage in after.stages]
    assert new.replanned(after, after, [40] * len(ghosts)).stages[0] == 80  # whole ghost batches
    begins = [stage.first_sample for stage in after.stages if stage.image_size == 12]
    assert begins[0] != before.stages[1].first_sample
    assert after.image_size_at(begins[0]) == 12
    assert after.image_size_at(begins[0] - 1) is None
