"""The studies: what they ask for exists, and their verdicts on made-up numbers."""

import json
import math

import numpy as np
import pytest

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.studies import imagenet_schedules, published
from hvd_lbt.studies.paired import Outcome, held_if, interval, paired, seeds_needed
from hvd_lbt.studies.published import ALL, STUDIES
from hvd_lbt.studies.trainings import compact_json, page, shortened, spread, train_samples
from hvd_lbt.study import main


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.stem)
def test_every_arm_is_a_recipe_that_can_be_planned(study):
    epochs = {}
    for arm in study.arms:
        recipe = load_recipe(arm.recipe, [*arm.overrides, f"name={arm.name}"])
        plan = make_plan(recipe.schedule, train_samples(arm, recipe))
        # what a panel compares is compared at equal epochs
        epochs.setdefault(arm.panel, plan.samples / plan.train_samples)
        assert plan.samples / plan.train_samples == pytest.approx(epochs[arm.panel])
    assert len(study.seeds) >= 3 or study.scale != "laptop"


def test_the_noise_is_that_of_the_first_arm_where_the_claim_is_about_equal_noise():
    for name in ("three_schedules", "fewer_updates"):
        for study in STUDIES[name].values():
            scales = {}
            for arm in study.arms:
                recipe = load_recipe(arm.recipe, arm.overrides)
                samples = train_samples(arm, recipe)
                scale = make_plan(recipe.schedule, samples).stages[0].noise_scale
                assert scale == pytest.approx(scales.setdefault(arm.panel, scale))


def arm(name, finals, *, updates=1000, loss=(1.0, 0.1), label="", panel="", x=None):
    """An arm whose training loss falls geometrically over 10 epochs between two values."""
    epochs = np.arange(1.0, 11.0)
    mean = np.geomspace(*loss, 10)
    curve = {
        "epochs": epochs.tolist(),
        "updates": (epochs * updates / 10).tolist(),
        "mean": mean.tolist(),
        "low": (0.9 * mean).tolist(),
        "high": (1.1 * mean).tolist(),
    }
    return {
        "name": name,
        "label": label or name,
        "panel": panel,
        "x": x,
        "paper": "–",
        "recipe": "digits_4px",
        "overrides": [],
        "global_batches": [16, 64],
        "first_lr": 0.1,
        "first_noise_scale": 75.0,
        "momentum": 0.9,
        "train_samples": 1200,
        "updates": updates,
        "seeds": list(range(len(finals))),
        "finals": list(finals),
        "loss": curve,
        "final_losses": [loss[1]] * len(finals),
        "accuracy": curve,
    }


def found(*arms):
    about = {"versions": {"python": "3"}, "revision": "", "seconds": {"trainings": 1.0}}
    return {"study": "made up", "scale": "laptop", "arms": list(arms), **about}


def three_schedules(**changes):
    arms = []
    for optimizer in published.OPTIMIZERS:
        for policy, updates in (("decay_lr", 1000), ("hybrid", 500), ("grow_batch", 300)):
            name = f"{optimizer}_{policy}"
            settings = {"finals": [95.0, 95.4, 95.2], "updates": updates} | changes.get(name, {})
            arms.append(arm(name, panel=optimizer, **settings))
    return found(*arms)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"nesterov_grow_batch": {"finals": [93.0, 93.4, 93.2]}}, False),
        ({"plain_hybrid": {"finals": [97.0, 97.4, 97.2]}}, False),
        ({"momentum_grow_batch": {"loss": (1.0, 0.02)}}, False),
        ({"momentum_grow_batch": {"updates": 600}}, False),
    ],
)
def test_three_schedules(changes, held):
    verdict = published.judge_three_schedules(three_schedules(**changes))
    assert verdict.outcome is held_if(held)


def test_three_schedules_tells_its_numbers():
    sentence = published.judge_three_schedules(three_schedules()).sentence
    assert (
        "momentum: +0.00 [+0.00, +0.00] points for hybrid and +0.00 [+0.00, +0.00] for" in sentence
    )
    assert "decay_lr's 95.20 %" in sentence
    # after 300 of 1,000 updates decay_lr is at its third of ten points: 0.1^(2/9) against 0.1
    assert f"still {0.1 ** (2 / 9) / 0.1:.1f} times as high" in sentence


@pytest.mark.parametrize(
    ("updates", "accuracies", "held"),
    [
        ((4000, 2000, 900, 400), (95, 95, 94.5, 92), True),
        ((4000, 2000, 2000, 400), (95, 95, 95, 95), False),
        ((4000, 2000, 900, 400), (95, 95, 93, 95), False),
    ],
)
def test_fewer_updates(updates, accuracies, held):
    arms = [
        arm(f"a{count}-{place}", [accuracy - 0.1, accuracy + 0.1], updates=count)
        for place, (count, accuracy) in enumerate(zip(updates, accuracies, strict=True))
    ]
    assert published.judge_fewer_updates(found(*arms)).outcome is held_if(held)


def test_one_seed_decides_nothing():
    arms = [arm(f"a{count}", [90.0], updates=count) for count in (400, 200, 100)]
    verdict = published.judge_fewer_updates(found(*arms))
    assert verdict.outcome is Outcome.UNDECIDED
    assert "in points: +0.00 (one seed), +0.00 (one seed); one seed shows nothing" in (
        verdict.sentence
    )


@pytest.mark.parametrize(
    ("accuracies", "outcome"),
    [
        ((95, 92, 94, 95), Outcome.HELD),
        # a warm-up that is worth less than its error
        ((95, 94, 94.05, 95), Outcome.UNDECIDED),
        ((95, 92, 94, 93), Outcome.NO),  # the grown batch loses
    ],
)
def test_warmup_or_not(accuracies, outcome):
    names = ("small", "no_warm_up", "warm_up", "grown")
    spreads = (0.1, 0.13, -0.1, 0.12)  # so that the differences vary
    arms = [
        arm(name, [a - spread, a, a + spread])
        for name, a, spread in zip(names, accuracies, spreads, strict=True)
    ]
    assert published.judge_warmup_or_not(found(*arms)).outcome is outcome


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.stem)
def test_figure_and_page_can_be_made_from_the_json(study, tmp_path):
    made = found(
        *(
            arm(
                a.name,
                [95.0, 95.5],
                label=a.label,
                panel=a.panel,
                x=a.x,
                updates=900 - place,
            )
            for place, a in enumerate(study.arms)
        )
    )
    made = json.loads(compact_json(made))
    study.draw(made).savefig(tmp_path / "figure.png", dpi=20)
    text = page(study, made)
    assert study.judge(made).sentence in text
    assert f"hvd_lbt study {study.name}" in text
    assert text.count("\n| ") == len(made["arms"]) + 1


def test_json_keeps_five_digits_and_one_line_a_list():
    text = compact_json({"arms": [{"mean": [0.123456789, 2.0], "n": 3}], "note": "–"})
    assert json.loads(text) == {"arms": [{"mean": [0.12346, 2.0], "n": 3}], "note": "–"}
    assert '"mean": [0.12346, 2.0]' in text


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert spread([1.0]) == "1.00"
    assert spread([4.8e23, 4.8e23], 4) == "4.8e+23 ± 0"
    assert spread([]) == "–"


def settings(**changes):
    from argparse import Namespace

    given = {
        "name": "three_schedules",
        "scale": "laptop",
        "data": None,
        "jobs": None,
        "launcher": "",
        "updates": None,
        "redraw": False,
    }
    return Namespace(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "cifar10"}, "--scale cifar10: three_schedules has laptop, gpu."),
        (
            {"name": "optimum_batch", "scale": "gpu"},
            "--scale gpu: optimum_batch has only the scale",
        ),
        ({"name": "optimum_batch", "data": "x"}, "--data x has no effect on optimum_batch"),
        ({"name": "optimum_batch", "launcher": "srun"}, "--launcher srun has no effect on optimum"),
        (
            {"name": "optimum_batch", "redraw": True, "jobs": 2},
            "--jobs 2 has no effect with --redr",
        ),
        (
            {"name": "optimum_batch", "redraw": True},
            "optimum_batch.json is not there: run the study",
        ),
        ({"name": "weight_decay"}, "--data: weight_decay needs images"),
        (
            {"name": "weight_decay", "data": "x", "redraw": True},
            "--data x has no effect with --redr",
        ),
        (
            {"name": "bayesian_evidence", "scale": "gpu"},
            "bayesian_evidence has only the scale laptop",
        ),
        ({"launcher": "srun 'x"}, "--launcher .*: No closing quotation"),
        ({"launcher": "no-such-program -n 2"}, "--launcher .*: there is no program 'no-such-"),
        ({"name": "fewer_updates", "scale": "gpu"}, "--data: the gpu scale of fewer_updates needs"),
    ],
)
def test_what_cannot_be_studied_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(settings(out=tmp_path, **changes))


def test_a_report_is_drawn_anew_from_its_numbers(tmp_path, capsys):
    study = STUDIES["fewer_updates"]["laptop"]
    numbers = found(
        *(arm(a.name, [95.0, 95.5, 95.2], updates=900 - n) for n, a in enumerate(study.arms))
    )
    file = tmp_path / "fewer_updates.json"
    file.write_text(compact_json(numbers))
    redrawn = settings(name="fewer_updates", out=tmp_path, redraw=True)
    assert main(redrawn) == 0
    assert capsys.readouterr().out.startswith("The claim held.")
    assert study.judge(numbers).sentence in (tmp_path / "fewer_updates.md").read_text()
    assert (tmp_path / "fewer_updates.png").stat().st_size > 10_000
    file.write_text(compact_json(numbers | {"arms": numbers["arms"][:2]}))
    with pytest.raises(UserError, match="other trainings"):
        main(redrawn)
    file.write_text("{")
    with pytest.raises(UserError, match="does not hold the numbers"):
        main(redrawn)
    file.unlink()
    with pytest.raises(UserError, match="There is no"):
        main(redrawn)


def test_a_dry_run_is_the_same_schedules_in_so_many_updates():
    whole = STUDIES["fewer_updates"]["gpu"]
    short = shortened(whole, 40, 600)
    assert short.stem == "fewer_updates_dry_run_gpu"
    stages = {}
    for arm, long in zip(short.arms, whole.arms, strict=True):
        recipe, own = (load_recipe(one.recipe, one.overrides) for one in (arm, long))
        assert recipe.data.cache_on_device
        assert recipe.schedule.first_global_batch == own.schedule.first_global_batch
        plan = make_plan(recipe.schedule, 600)
        assert plan.stages[0].global_batch == own.schedule.first_global_batch
        assert plan.samples == 40 * own.schedule.first_global_batch
        stages[arm.name] = [(stage.updates, stage.global_batch) for stage in plan.stages]
    # 60, 120 and 160 of 200 epochs are 3, 6 and 8 tenths
    assert stages["cifar10_decay_lr"] == [(12, 128), (12, 128), (8, 128), (8, 128)]
    assert stages["cifar10_grow_batch"][0] == (12, 128)
    assert sum(count for count, _ in stages["cifar10_grow_batch"]) < 20


def test_a_paired_difference_has_the_interval_of_students_t():
    one = {"seeds": [0, 1, 2, 7], "finals": [91.0, 92.0, 93.0, 0.0]}
    other = {"seeds": [2, 1, 0], "finals": [92.5, 91.2, 90.9]}
    found = paired(one, other)  # of seeds 0, 1, 2: 0.1, 0.8, 0.5
    assert found.pairs == 3
    assert found.mean == pytest.approx(0.4667, abs=1e-4)
    # t of 2 degrees of freedom at 97.5 % is 4.3027; the standard deviation is 0.35119
    assert found.high - found.mean == pytest.approx(4.3027 * 0.35119 / math.sqrt(3), rel=1e-4)
    assert str(found) == "+0.47 [-0.41, +1.34]"


def test_an_interval_wider_than_the_claim_decides_nothing():
    wide, narrow = interval([-1.0, 1.0, 0.0]), interval([0.1, 0.12, 0.11])
    assert wide.within(1) is wide.above(-1) is Outcome.UNDECIDED
    assert narrow.within(1) is narrow.above(-1) is Outcome.HELD
    assert narrow.within(0.05) is narrow.above(0.2) is Outcome.NO
    assert interval([0.0]).within(1) is Outcome.UNDECIDED
    with pytest.raises(ValueError, match="no seed"):
        paired({"seeds": [0], "finals": [1.0]}, {"seeds": [1], "finals": [1.0]})


@pytest.mark.parametrize(
    ("deviation", "needed"), [(0.0, 2), (0.1, 4), (0.3, 10), (0.6, 34), (3.0, 787)]
)
def test_seeds_that_show_a_difference_of_a_third_of_a_point(deviation, needed):
    # standard tables of the paired t test (two-sided 5 %, power 80 %): d = 1: 10, d = 0.5: 34
    assert seeds_needed(deviation) == pytest.approx(needed, abs=1)


def schedules_found(constant=86.0, m0975=90.0, updates=2346):
    """Numbers of imagenet_schedules, for its verdict."""
    finals = {"decay_lr": 90.0, "warm_up": 90.1, "constant": constant, "m0975": m0975}
    counts = {"decay_lr": 14_076, "first_fall": 5630, "m090": 5865, "m095": 3519, "m0975": updates}
    arms = []
    for arm in imagenet_schedules.ARMS:
        middle = finals.get(arm.name, 90.0)
        if arm.x is not None:
            middle = 80.0 if arm.x > 200_000 and "0.06" in arm.label else 85.0
        about = {"name": arm.name, "label": arm.label, "x": arm.x, "train_samples": 1_281_167}
        values = [middle - 0.1, middle, middle + 0.1]
        # not the same difference for each seed
        values[0] += 0.01 * len(arm.name)
        about |= {"finals": values, "seeds": [0, 1, 2], "updates": counts.get(arm.name, 14_076)}
        arms.append(about)
    return {"arms": arms}


def test_the_verdict_on_imagenets_schedules():
    verdict = imagenet_schedules.judge(schedules_found())
    assert verdict.outcome is Outcome.HELD
    assert "lr 0.06 at B 8,192: kept to B = 131,072 (0.10 N), lost from 262,144" in verdict.sentence
    assert "lr 0.015 at B 8,192: kept to B = 640,583 (0.50 N), lost by none" in verdict.sentence
    assert imagenet_schedules.judge(schedules_found(m0975=88.0)).outcome is Outcome.NO
    assert imagenet_schedules.judge(schedules_found(m0975=89.5)).outcome is Outcome.UNDECIDED
    # a design whose control does not lose could not have said no
    assert imagenet_schedules.judge(schedules_found(constant=90.0)).outcome is Outcome.UNDECIDED
    assert imagenet_schedules.judge(schedules_found(updates=14_076)).outcome is Outcome.NO


def test_imagenets_schedules_have_the_papers_updates():
    for scale in STUDIES["imagenet_schedules"].values():
        updates = {}
        for arm in scale.arms:
            recipe = load_recipe(arm.recipe, arm.overrides)
            updates[arm.name] = make_plan(recipe.schedule, recipe.data.train_samples).updates
        if scale.scale == "laptop":
            grown = [updates[name] for name in ("decay_lr", *imagenet_schedules.GROWN)]
            assert grown == [14_076, 5865, 5630, 3519, 2346]
        else:
            assert max(updates.values()) < 1500
