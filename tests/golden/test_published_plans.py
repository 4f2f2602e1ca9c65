"""The plans of the shipped recipes, as literals.

Update counts: the schedules of Smith et al. 2018, computed by the rule of make_plan. Stages: first
update, updates, first sample, samples, global batch, lr.
"""

import re

import pytest

from hvd_lbt.recipe import SHIPPED, load_recipe, shipped_recipes
from hvd_lbt.report.published import published_points
from hvd_lbt.schedule.plan import make_plan

PUBLISHED_UPDATES = {
    "cifar10_decay_lr": 78_125,
    "cifar10_grow_batch": 29_140,
    "cifar10_grow_batch_lr": 6_406,
    "cifar10_grow_batch_lr_momentum": 2_305,
    "imagenet_inception_m090": 5_865,
    "imagenet_inception_m095": 3_519,
    "imagenet_inception_m0975": 2_346,
}
STAGES = {
    "cifar10_decay_lr": [
        (0, 23_437, 0, 2_999_936, 128, 0.1),
        (23_437, 23_438, 2_999_936, 3_000_064, 128, 0.02),
        (46_875, 15_625, 6_000_000, 2_000_000, 128, 0.004),
        (62_500, 15_625, 8_000_000, 2_000_000, 128, 0.0008),
    ],
    "cifar10_grow_batch": [
        (0, 23_437, 0, 2_999_936, 128, 0.1),
        (23_437, 4_687, 2_999_936, 2_999_680, 640, 0.1),
        (28_124, 625, 5_999_616, 2_000_000, 3_200, 0.1),
        (28_749, 391, 7_999_616, 2_000_384, 5_120, 0.032),
    ],
    "cifar10_grow_batch_lr": [
        (0, 4_687, 0, 2_999_680, 640, 0.5),
        (4_687, 937, 2_999_680, 2_998_400, 3_200, 0.5),
        (5_624, 391, 5_998_080, 2_001_920, 5_120, 0.16),
        (6_015, 391, 8_000_000, 2_000_000, 5_120, 0.032),
    ],
    "cifar10_grow_batch_lr_momentum": [
        (0, 937, 0, 2_998_400, 3_200, 0.5),
        (937, 586, 2_998_400, 3_000_320, 5_120, 0.16),
        (1_523, 390, 5_998_720, 1_996_800, 5_120, 0.032),
        (1_913, 392, 7_995_520, 2_004_480, 5_120, 0.0064),
    ],
    "imagenet_inception_m090": [
        (0, 4_691, 0, 38_428_672, 8_192, 3.0),
        (4_691, 586, 38_428_672, 38_404_096, 65_536, 2.4),
        (5_277, 391, 76_832_768, 25_624_576, 65_536, 0.24),
        (5_668, 197, 102_457_344, 12_847_686, 65_536, 0.024),
    ],
    "imagenet_inception_m095": [
        (0, 2_345, 0, 38_420_480, 16_384, 3.0),
        (2_345, 586, 38_420_480, 38_404_096, 65_536, 1.2),
        (2_931, 391, 76_824_576, 25_624_576, 65_536, 0.12),
        (3_322, 197, 102_449_152, 12_855_878, 65_536, 0.012),
    ],
    "imagenet_inception_m0975": [
        (0, 1_172, 0, 38_404_096, 32_768, 3.0),
        (1_172, 586, 38_404_096, 38_404_096, 65_536, 0.6),
        (1_758, 391, 76_808_192, 25_624_576, 65_536, 0.06),
        (2_149, 197, 102_432_768, 12_872_262, 65_536, 0.006),
    ],
    "cifar10_cosine_grow_batch": [
        (0, 39_062, 0, 4_999_936, 128, 0.1),
        (39_062, 6_510, 4_999_936, 1_666_560, 256, 0.100002010619),
        (45_572, 2_017, 6_666_496, 1_032_704, 512, 0.100009286796),
        (47_589, 675, 7_699_200, 691_200, 1_024, 0.100022063943),
        (48_264, 233, 8_390_400, 477_184, 2_048, 0.100120190375),
        (48_497, 29, 8_867_584, 118_784, 4_096, 0.100188151813),
        (48_526, 198, 8_986_368, 1_013_632, 5_120, 0.100551206623),
    ],
    "imagenet_resnet50": [
        (0, 781, 0, 6_397_952, 8_192, 0.1),
        (781, 3_910, 6_397_952, 32_030_720, 8_192, 3.2),
        (4_691, 2_346, 38_428_672, 38_436_864, 16_384, 0.64),
        (7_037, 1_564, 76_865_536, 25_624_576, 16_384, 0.064),
        (8_601, 783, 102_490_112, 12_814_918, 16_384, 0.0064),
    ],
    "imagenet_resnet50_decay_lr": [
        (0, 781, 0, 6_397_952, 8_192, 0.1),
        (781, 3_910, 6_397_952, 32_030_720, 8_192, 3.2),
        (4_691, 4_692, 38_428_672, 38_436_864, 8_192, 0.32),
        (9_383, 3_128, 76_865_536, 25_624_576, 8_192, 0.032),
        (12_511, 1_565, 102_490_112, 12_814_918, 8_192, 0.0032),
    ],
    "imagenet_resnet50_m095": [
        (0, 2_345, 0, 38_420_480, 16_384, 3.2),
        (2_345, 586, 38_420_480, 38_404_096, 65_536, 1.28),
        (2_931, 391, 76_824_576, 25_624_576, 65_536, 0.128),
        (3_322, 197, 102_449_152, 12_855_878, 65_536, 0.0128),
    ],
    "imagenet_resnet50_fewest_updates": [
        (0, 625, 0, 20_480_000, 32_768, 0.1),
        (625, 469, 20_480_000, 15_368_192, 32_768, 6.4),
        (1_094, 81, 35_848_192, 2_654_208, 32_768, 3.60382315478),
        (1_175, 311, 38_502_400, 20_381_696, 65_536, 6.4023663007),
        (1_486, 353, 58_884_096, 23_110_592, 65_536, 1.80774907723),
    ],
}
FEWEST = "imagenet_resnet50_fewest_updates"
# g at the start, and the factor by which each stage lowers it
NOISE = {"cifar10": (390.625, 5), "imagenet_inception": (4691.773682, 10)}


def plan_of(name):
    recipe = load_recipe(name)
    return make_plan(recipe.schedule, recipe.data.train_samples)


@pytest.mark.parametrize(("name", "updates"), PUBLISHED_UPDATES.items())
def test_published_update_counts(name, updates):
    assert plan_of(name).updates == updates


@pytest.mark.parametrize(("name", "stages"), STAGES.items())
def test_stage_tables(name, stages):
    found = plan_of(name).stages
    assert [
        (s.first_update, s.updates, s.first_sample, s.samples, s.global_batch) for s in found
    ] == [row[:5] for row in stages]
    # the literals of the cosine have 12 digits
    assert [s.lr for s in found] == pytest.approx([row[5] for row in stages], rel=1e-11)


@pytest.mark.parametrize("name", PUBLISHED_UPDATES)
def test_all_published_schedules_of_a_kind_have_the_same_noise(name):
    first, factor = next(noise for kind, noise in NOISE.items() if name.startswith(kind))
    found = [stage.noise_scale for stage in plan_of(name).stages]
    assert found == pytest.approx([first / factor**fall for fall in range(4)], rel=1e-9)


def test_exact_noise_is_reported_beside_the_approximation():
    # 0.1 / 0.1 · (50,000/128 − 1) and 0.032 / 0.1 · (50,000/5,120 − 1)
    stages = plan_of("cifar10_grow_batch").stages
    assert stages[0].exact_noise_scale == pytest.approx(389.625)
    assert stages[3].exact_noise_scale == pytest.approx(2.805)


def test_both_cosine_recipes_have_the_same_noise_at_the_same_epoch():
    decay, grow = plan_of("cifar10_cosine"), plan_of("cifar10_cosine_grow_batch")
    assert (decay.updates, grow.updates) == (78_125, 48_724)
    for index in range(0, grow.updates - 1, 61):
        update = grow.at(index)
        twin = decay.at(update.samples_seen // 128)  # all batches are multiples of 128
        assert twin.samples_seen == update.samples_seen
        assert update.noise_scale == pytest.approx(twin.noise_scale, rel=1e-9)
        assert update.lr < 0.1006  # what one update of 5,120 before its time is above 0.1


def test_momentum_of_the_raised_schedules():
    assert {s.momentum for s in plan_of("cifar10_grow_batch_lr_momentum").stages} == {0.98}
    assert {s.momentum for s in plan_of("imagenet_inception_m0975").stages} == {0.975}


def test_the_recipe_with_the_fewest_updates_has_fewer_than_published_without_lars():
    plan, recipe = plan_of(FEWEST), load_recipe(FEWEST)
    without_lars = [point.updates for point in published_points() if point.optimizer != "LARS"]
    assert sorted(without_lars) == [2_512, 3_282, 3_596]
    assert plan.updates == 1_839 < min(without_lars)
    assert [stage.image_size or recipe.data.image_size for stage in plan.stages] == [
        *(128, 128, 192, 192, 224)
    ]
    goyal = plan_of("imagenet_resnet50").stages[1].noise_scale
    assert plan.stages[1].noise_scale == pytest.approx(goyal)
    assert recipe.loss.label_smoothing == 0.1
    assert not recipe.optimizer.decay_norm_and_bias


def test_the_last_update_takes_the_samples_left():
    plan = plan_of("imagenet_inception_m0975")
    assert plan.at(2_345).global_batch == 27_206
    assert plan.samples == 90 * 1_281_167


@pytest.mark.parametrize("name", shipped_recipes())
def test_head_comment_says_what_a_reader_needs(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line[:1] == "#")
    for word in ("Paper:", "Hardware:", "Expected", f"Planned updates: {plan_of(name).updates:,} "):
        assert word in head
    assert re.search(rf"Command: .*hvd_lbt train {name}( |$)", head)


def test_the_digits_recipes_differ_in_nothing_but_the_policy():
    settings = {}
    for policy, name in (
        ("grow_batch", "digits"),
        ("decay_lr", "digits_decay_lr"),
        ("hybrid", "digits_hybrid"),
    ):
        one = load_recipe(name).to_dict()
        assert one.pop("name") == name
        assert one["schedule"].pop("policy") == policy
        settings[name] = one
    assert settings["digits"] == settings["digits_decay_lr"] == settings["digits_hybrid"]
