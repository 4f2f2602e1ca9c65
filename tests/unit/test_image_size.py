"""Images that change their size at a milestone: in the plan, in the batches, in the evaluation."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from hvd_lbt.data.batches import batches_of
from hvd_lbt.data.digits import write_digits
from hvd_lbt.data.store import open_data
from hvd_lbt.errors import UserError
from hvd_lbt.evaluate import trained_image_size
from hvd_lbt.micro_batch import MicroBatchSizes, UpdateStream
from hvd_lbt.models import build_model, check_image_sizes
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Cosine, Milestone, Polynomial, Schedule, SettingError, WarmUp
from hvd_lbt.world import World

BASE = Schedule(
    policy="grow_batch", epochs=10, lr=0.1, momentum=0.9, global_batch=10, max_global_batch=80
)
SIZES = (Milestone(epoch=1.5, image_size=160), Milestone(epoch=6.25, image_size=224))


@pytest.mark.parametrize(
    "schedule",
    [
        replace(BASE, milestones=(Milestone(epoch=4, factor=3),)),
        replace(BASE, cosine=Cosine(), warm_up=WarmUp(epochs=3, first_lr=0.01)),
        replace(BASE, polynomial=Polynomial(power=2)),
        replace(BASE, policy="decay_lr", polynomial=Polynomial(power=1)),
    ],
)
def test_a_size_changes_nothing_else_of_the_plan(schedule):
    plain = make_plan(schedule, 1000)
    milestones = tuple(sorted((*schedule.milestones, *SIZES), key=lambda one: one.epoch))
    sized = make_plan(replace(schedule, milestones=milestones), 1000)
    assert len(sized.stages) == len(plain.stages) + 2
    assert sized.updates == plain.updates
    for index in range(plain.updates):
        one, other = plain.at(index), sized.at(index)
        size = None if one.epoch < 1.5 else 160 if one.epoch < 6.25 else 224
        # left-over samples of a stage go to the next one, so an update may begin a bit early
        assert other.image_size == size or one.epoch + one.global_batch / 1000 > 1.5
        assert replace(other, image_size=None, stage=one.stage) == replace(
            one, lr=pytest.approx(one.lr), noise_scale=pytest.approx(one.noise_scale)
        )
    assert sized.stages[0].image_size is None
    assert sized.stages[-1].image_size == 224


def test_a_size_may_change_where_the_noise_falls():
    both = Milestone(epoch=4, factor=2, image_size=192)
    plan = make_plan(replace(BASE, milestones=(both, Milestone(epoch=8, factor=2))), 1000)
    assert [(s.image_size, s.global_batch) for s in plan.stages] == [
        (None, 10),
        (192, 20),
        (192, 40),
    ]


def test_milestones_without_a_factor_are_no_falls():
    schedule = replace(
        BASE, policy="hybrid", milestones=(SIZES[0], Milestone(epoch=4, factor=2), SIZES[1])
    )
    assert schedule.growing_milestones == 1
    assert [s.global_batch for s in make_plan(schedule, 1000).stages] == [10, 10, 20, 20]
    with pytest.raises(SettingError, match=r"schedule\.milestones has 1 with a factor"):
        replace(schedule, batch_milestones=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule.milestones=[{epoch: 2}]"], r"milestones\[0\].factor: it is missing"),
        (["schedule.milestones=[{epoch: 2, momentum: 0.5}]"], "factor: it is missing"),
        (
            ["schedule.milestones=[{epoch: 2, image_size: 24, momentum: 0.5}]"],
            "momentum: 0.5 is for a milestone at which the noise scale falls",
        ),
        (["schedule.milestones=[{epoch: 2, image_size: 16}]"], "16 is what data.image_size says"),
        (
            ["schedule.milestones=[{epoch: 2, image_size: 24}, {epoch: 3, image_size: 24}]"],
            r"milestones\[1\].image_size: the images are of 24 pixels before it too",
        ),
        (["schedule.milestones=[{epoch: 2, image_size: 0}]"], "image_size: 0 is not allowed"),
        (["schedule.milestones=[{epoch: 2, image_size: 2.5}]"], "image_size: 2.5 is not allowed"),
        (["schedule.milestones=[{epoch: 2, image_size: true}]"], "true is not allowed"),
        (["schedule.milestones=[{epoch: 30, image_size: 8}]"], "it must be before the end"),
        (
            [
                "schedule.milestones=[{epoch: 2, image_size: 24}]",
                "data.cache_on_device=true",
                "data.augment=pad_crop",
            ],
            "does not go with data.cache_on_device",
        ),
        (
            ["schedule.milestones=[{epoch: 2, factor: 2}]", "schedule.cosine={}"],
            "the noise scale falls along the curve or at schedule.milestones",
        ),
        (
            ["schedule.cosine={}", "schedule.polynomial={power: 2}", "schedule.milestones=[]"],
            "polynomial: schedule.cosine is a curve too",
        ),
        (["schedule.polynomial={}", "schedule.milestones=[]"], "power"),
        (["schedule.polynomial={power: 0}", "schedule.milestones=[]"], "power: 0 is not allowed"),
        (
            ["schedule.polynomial={power: 1}", "schedule.milestones=[]", "schedule.policy=hybrid"],
            "schedule.polynomial has none",
        ),
        (["data.test_image_size=24", "data.eval_resize=20"], "smaller than data.test_image_size"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_recipe("digits", settings)


def test_the_test_images_follow_the_training_images():
    data = load_recipe("imagenet_resnet50", ["data.image_size=128", "data.eval_resize=146"]).data
    sizes = [(d.image_size, d.eval_resize) for d in map(data.for_evaluation, (None, 128, 224))]
    assert sizes == [(128, 146), (128, 146), (224, 256)]
    fixed = load_recipe(
        "imagenet_resnet50", ["data.image_size=128", "data.test_image_size=224"]
    ).data
    sizes = [(d.image_size, d.eval_resize) for d in map(fixed.for_evaluation, (None, 128, 192))]
    assert sizes == [(224, 256)] * 3
    whole = load_recipe("digits").data.for_evaluation(8)
    assert (whole.image_size, whole.eval_resize) == (8, None)


def test_a_checkpoint_is_evaluated_at_the_size_it_was_trained_at():
    recipe = load_recipe("digits", ["schedule.milestones=[{epoch: 2, image_size: 24}]"])
    plan = make_plan(recipe.schedule, 1437)
    last = plan.stages[0].updates
    state = {"train_samples": 1437}
    assert trained_image_size(state | {"update": last}, recipe) is None
    assert trained_image_size(state | {"update": last + 1}, recipe) == 24
    assert trained_image_size(state | {"update": plan.updates}, recipe) == 24
    assert trained_image_size({"update": 3}, recipe) is None


def make_batches(store, data, plan, ranges, micro_batch):
    """The source of an UpdateStream."""
    options = {"seed": 0, "micro_batch": micro_batch, "device": torch.device("cpu")}
    return batches_of(store, data, ranges, plan.image_size_at, **options)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_each_update_has_images_of_its_size_and_the_samples_of_its_positions(prefetch):
    settings = [
        "schedule.epochs=0.2",
        "data.flip=true",
        f"data.prefetch={prefetch}",
        "data.threads=1",
    ]
    plain = load_recipe("digits", [*settings, "schedule.milestones=[]"])
    sized = load_recipe(
        "digits",
        [
            *settings,
            "schedule.milestones=[{epoch: 0.05, image_size: 24}, {epoch: 0.1, image_size: 8}]",
        ],
    )
    store, _ = open_data(write_digits(), plain)
    world, labels = World(rank=1, size=2), []
    for recipe in (plain, sized):
        plan = make_plan(recipe.schedule, len(store))
        updates = [plan.at(index) for index in range(plan.updates)]
        make = partial(make_batches, store, recipe.data, plan)
        sizes = MicroBatchSizes(stages=(64,) * len(plan.stages), evaluation=64)
        stream = UpdateStream(updates, make, world, sizes, [16] * len(plan.stages))
        batches = [batch for _, some in stream for batch in some]
        labels.append(torch.cat([batch.labels for batch in batches]))
        wide = [batch.images.shape[-1] for batch in batches]
    assert wide == [update.image_size or 16 for update in updates]
    assert set(wide) == {8, 16, 24}
    assert torch.equal(*labels)
    everything = UpdateStream(updates, make, world, sizes, [16] * len(plan.stages))
    whole = {(16, 16, None), (16, 16, 24), (16, 16, 8)}
    assert everything.shapes(sizes) == whole | {(15, 16, 8)}  # the last update is smaller


def test_a_network_that_cannot_take_a_size_is_refused_before_training():
    model = build_model(load_recipe("digits").model, 10, 4).train()
    check_image_sizes(model, [8, 16])
    assert model.training
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    check_image_sizes(flat, [16])
    with pytest.raises(UserError, match=r"does not take images of 8 pixels .* images of 8, 16 pix"):
        check_image_sizes(flat, [16, 8])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_noise_scale_falls_as_the_polynomial_with_either_policy(power):
    schedule = replace(
        BASE, polynomial=Polynomial(power=power), warm_up=WarmUp(epochs=2, first_lr=0.01)
    )
    grows = make_plan(schedule, 10_000)
    decays = make_plan(replace(schedule, policy="decay_lr"), 10_000)
    assert [stage.global_batch for stage in grows.stages] == [10, 10, 20, 40, 80]
    first = decays.at(2000).noise_scale
    for plan in (grows, decays):
        for index in range(plan.updates - 1):
            update = plan.at(index)
            passed = (update.epoch - 2) / 8
            if passed < 0:
                continue
            assert update.noise_scale == pytest.approx(first * (1 - passed) ** power, rel=1e-9)
            assert update.lr <= 0.1 * 1.01
    assert grows.updates < decays.updates
