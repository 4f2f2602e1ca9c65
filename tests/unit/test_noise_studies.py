"""momentum_settling and equal_noise: what they train has one g, and their verdicts."""

import pytest

from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.studies import equal_noise, momentum_settling
from hvd_lbt.studies.paired import Outcome


def plan_of(arm):
    recipe = load_recipe(arm.recipe, arm.overrides)
    return make_plan(recipe.schedule, recipe.data.train_samples)


def numbers(study, accuracies, spread=0.1):
    """Results in which each arm's seeds differ by `spread`, but not in step with the others."""
    made = []
    for place, arm in enumerate(study.arms):
        middle = accuracies(arm)
        finals = [middle - spread, middle, middle + spread * (1 + 0.1 * (place % 5))]
        made.append({"name": arm.name, "finals": finals, "seeds": [0, 1, 2], "updates": 100})
    return {"arms": made}


@pytest.mark.parametrize("study", momentum_settling.STUDIES, ids=lambda study: study.scale)
def test_all_arms_have_the_same_noise_but_in_a_warm_up(study):
    wanted = {}
    for arm in study.arms:
        plan = plan_of(arm)
        for stage in plan.stages:
            if stage.shape == "warm_up":
                assert stage.last_noise_scale < 1.01 * wanted[0]
                continue
            falls = sum(
                stage.first_sample / plan.train_samples > m.epoch - 0.2
                for m in plan.schedule.milestones
            )
            # 1e-5: an lr is written with six digits
            assert stage.noise_scale == pytest.approx(
                wanted.setdefault(falls, stage.noise_scale), rel=1e-5
            )
    assert len(wanted) == len(plan.schedule.milestones) + 1


def test_the_two_causes_differ_in_one_setting_each():
    plans = {arm.name: plan_of(arm) for arm in momentum_settling.STUDIES[0].arms}
    first, same, large = (
        plans[name].stages[0]
        for name in (
            momentum_settling.REFERENCE,
            momentum_settling.SAME_BATCH,
            momentum_settling.UNTREATED,
        )
    )
    assert (first.momentum, same.momentum, large.momentum) == (0.9, 0.9, 0.98)
    assert same.global_batch == large.global_batch == 5 * first.global_batch
    assert large.lr == pytest.approx(first.lr)
    assert same.lr / (1 - 0.9) == pytest.approx(large.lr / (1 - 0.98))
    # as many updates for the control as for the ramp that it is compared with
    assert plans["equal_updates"].updates == pytest.approx(plans["ramp_batch"].updates, rel=0.02)
    assert max(s.global_batch for s in plans["ramp_batch"].stages) == large.global_batch


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, Outcome.HELD),
        ({"ramp_batch": 73.1, "ramp_lr": 75.9}, Outcome.HELD),  # one of the two is enough
        ({"ramp_batch": 73.1, "ramp_lr": 73.1}, Outcome.NO),  # less than half of 3 points
        ({"ramp_batch": 74.5, "ramp_lr": 74.5}, Outcome.UNDECIDED),  # half
        ({"m0.9_b5": 73.0}, Outcome.UNDECIDED),  # all of the cost is the batch's
        ({"m0.9_b5": 70.0}, Outcome.NO),  # the momentum costs nothing
    ],
)
def test_the_verdict_on_the_cost_and_on_the_treatments(changes, outcome):
    accuracies = {"m0.9_b1": 77.0, "m0.9_b5": 76.0, "m0.98_b5": 73.0, "ramp_batch": 75.8}
    accuracies |= {"ramp_lr": 73.0, "corrected": 40.0} | changes
    found = numbers(
        momentum_settling.STUDIES[0], lambda arm: accuracies.get(arm.name, 74.0), spread=0.2
    )
    verdict = momentum_settling.judge(found)
    assert verdict.outcome is outcome
    if not changes:
        assert "costs +3.98" in verdict.sentence
        assert "ramp by the batch +2." in verdict.sentence
        assert "corrected start -33." in verdict.sentence
        half = "(half of the momentum's cost or more)"
        assert verdict.sentence.count(half) == 1


def test_equal_noise_has_one_g_in_each_panel():
    for study in equal_noise.STUDIES:
        for arm in study.arms:
            stage = plan_of(arm).stages[0]
            assert f"g {stage.noise_scale:.4g}" == arm.panel
            rate = stage.lr / (1 - stage.momentum)
            assert rate == pytest.approx(float(arm.panel[2:]) * arm.x / 20_000, rel=1e-4)


@pytest.mark.parametrize(
    ("ends", "outcome", "said"),
    [
        # where the curves part: from which B/N on, whatever g
        (lambda lr, batch: batch > 2000, Outcome.HELD, "all are the same up to B/N 0.1"),
        # the same accuracy everywhere also holds
        (lambda lr, batch: False, Outcome.HELD, "all are the same up to B/N 0.2"),
        # from which ε/(1−m) on
        (lambda lr, batch: lr * batch / 250 > 8, Outcome.HELD, "and up to ε/(1−m) 8"),
        (lambda lr, batch: lr * batch / 250 > 2, Outcome.NO, "and up to ε/(1−m) 2"),
        (lambda lr, batch: batch > 1000, Outcome.NO, "all are the same up to B/N 0.05"),
    ],
)
def test_where_the_map_ends(ends, outcome, said):
    def accuracy(arm):
        lr = float(arm.name.split("_")[0][1:])
        return 60.0 if ends(lr, arm.x) else 75.0

    verdict = equal_noise.judge(numbers(equal_noise.STUDIES[0], accuracy))
    assert verdict.outcome is outcome
    assert said in verdict.sentence


def test_an_interval_wider_than_a_point_is_not_the_same():
    verdict = equal_noise.judge(numbers(equal_noise.STUDIES[0], lambda arm: 75.0, spread=20.0))
    assert verdict.outcome is Outcome.UNDECIDED
