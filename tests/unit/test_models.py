"""The networks: published sizes, and ghost batch norm against plain batch norm."""

import pytest
import torch
from torch import nn

from hvd_lbt.errors import UserError
from hvd_lbt.models import GhostBatchNorm2d, RunningStatistics, build_model, check_one_sample
from hvd_lbt.recipe import ModelRecipe


def settings(name: str, **others) -> ModelRecipe:
    return ModelRecipe.model_validate({"name": name, "stem": "imagenet", **others})


# Parameters as published with torchvision's weights; WRN-16-4 has 2.7 M (Zagoruyko & Komodakis,
# table 4).
@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet18", 1000, 11_689_512),
        ("resnet34", 1000, 21_797_672),
        ("resnet50", 1000, 25_557_032),
        ("wide_resnet16_4", 10, 2_748_890),
    ],
)
def test_sizes_are_the_published_ones(name, classes, parameters):
    model = build_model(settings(name), classes, ghost_batch=8)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, classes)


def test_resnet50_has_torchvisions_names():
    names = build_model(settings("resnet50"), 1000, ghost_batch=8).state_dict().keys()
    assert len(names) == 320
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.weight"} <= names
    assert {"layer4.2.conv3.weight", "layer4.2.bn3.num_batches_tracked", "fc.bias"} <= names


def test_inception_resnet_v2_is_timms():
    """Names, shapes and size as timm's inception_resnet_v2 publishes them: 55.84 M for 1,000
    classes.
    """
    with torch.device("meta"):  # names and shapes alone
        model = build_model(settings("inception_resnet_v2"), 1000, ghost_batch=2)
    assert sum(p.numel() for p in model.parameters()) == 55_843_464
    tensors = model.state_dict()
    assert len(tensors) == 1306
    shapes = {
        "conv2d_1a.conv.weight": (32, 3, 3, 3),
        "mixed_5b.branch3.1.conv.weight": (64, 192, 1, 1),
        "repeat.9.branch2.2.bn.running_var": (64,),
        "mixed_6a.branch0.conv.weight": (384, 320, 3, 3),
        "repeat_1.19.branch1.1.conv.weight": (160, 128, 1, 7),
        "repeat_1.0.conv2d.bias": (1088,),
        "mixed_7a.branch2.2.conv.weight": (320, 288, 3, 3),
        "repeat_2.8.branch1.2.conv.weight": (256, 224, 3, 1),
        "block8.conv2d.weight": (2080, 448, 1, 1),
        "conv2d_7b.bn.num_batches_tracked": (),
        "classif.weight": (1000, 1536),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}


def test_inception_resnet_v2_reaches_every_parameter():
    torch.manual_seed(0)
    model = build_model(settings("inception_resnet_v2"), 10, ghost_batch=2)
    statistics = RunningStatistics(model)
    logits = model(torch.randn(2, 3, 75, 75))  # the smallest there is
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    statistics.fold(global_batch=2)
    assert model.eval()(torch.randn(1, 3, 75, 75)).isfinite().all()


@pytest.mark.parametrize("name", ["resnet19", "wide_resnet17_4", "vgg16"])
def test_unknown_network_is_named(name):
    with pytest.raises(UserError, match=f"model.name: '{name}'"):
        build_model(settings("resnet18").model_copy(update={"name": name}), 10, ghost_batch=8)


def test_too_few_outputs_are_refused():
    with pytest.raises(UserError, match=r"model.num_classes: 5 .* 10 classes"):
        build_model(settings("resnet18", num_classes=5), 10, ghost_batch=8)


def test_one_group_is_plain_batch_norm():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 5, 5) * 3 + 1
    ghost, plain = GhostBatchNorm2d(3, ghost_batch=8), nn.BatchNorm2d(3)
    statistics = RunningStatistics(nn.Sequential(ghost))
    torch.testing.assert_close(ghost(images), plain(images), rtol=0, atol=0)
    statistics.fold(global_batch=8)
    torch.testing.assert_close(ghost.running_mean, plain.running_mean)
    torch.testing.assert_close(ghost.running_var, plain.running_var)
    ghost.eval(), plain.eval()
    torch.testing.assert_close(ghost(images), plain(images))


def test_groups_do_not_know_of_each_other_nor_of_the_micro_batch():
    torch.manual_seed(0)
    images = torch.randn(10, 3, 4, 4)
    whole = GhostBatchNorm2d(3, ghost_batch=4)
    parts = GhostBatchNorm2d(3, ghost_batch=4)
    folds = [RunningStatistics(nn.Sequential(norm)) for norm in (whole, parts)]
    together = whole(images)
    apart = torch.cat([parts(images[:4]), parts(images[4:8]), parts(images[8:])])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)
    for fold in folds:
        fold.fold(global_batch=10)
    torch.testing.assert_close(whole.running_var, parts.running_var)


def test_a_rest_of_one_sample_joins_the_group_before_it():
    torch.manual_seed(0)
    images = torch.randn(9, 3, 1, 1)  # one value a channel: a group of one has no variance
    norm, by_hand = GhostBatchNorm2d(3, ghost_batch=4), GhostBatchNorm2d(3, ghost_batch=5)
    folds = [RunningStatistics(nn.Sequential(norm)) for norm in (norm, by_hand)]
    together = norm(images)
    assert torch.equal(together[4:], by_hand(images[4:]))
    by_hand.ghost_batch = 4
    assert torch.equal(together[:4], by_hand(images[:4]))
    for fold in folds:
        fold.fold(global_batch=9)
    torch.testing.assert_close(norm.running_var, by_hand.running_var)  # summed in another order
    assert norm.running_mean.abs().max() > 0


@pytest.mark.parametrize("samples", [1, 4, 5, 8, 9, 10])
def test_compiled_code_has_the_same_groups(monkeypatch, samples):
    torch.manual_seed(0)
    images = torch.randn(samples, 3, 2, 2)
    eager, compiled = GhostBatchNorm2d(3, ghost_batch=4), GhostBatchNorm2d(3, ghost_batch=4)
    expected = eager(images)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(compiled(images), expected)
    torch.testing.assert_close(compiled.collected, eager.collected)


def test_one_sample_is_refused_before_training_where_a_feature_map_is_one_pixel():
    torch.manual_seed(0)
    model = build_model(settings("wide_resnet10_1"), 10, ghost_batch=1)
    statistics = RunningStatistics(model)
    with pytest.raises(UserError, match=r"ghost batch of one sample.*1×1 feature map.*ghost_batch"):
        check_one_sample(model, 4)
    assert not statistics.collected.any()
    random = torch.get_rng_state()
    check_one_sample(model, 32)  # 8×8 is the smallest map: one sample has a variance there
    assert not statistics.collected.any()
    assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(UserError, match="ghost batch of one"):
        GhostBatchNorm2d(3, ghost_batch=1)(torch.randn(4, 3, 1, 1))


def test_an_update_of_many_groups_moves_the_average_as_far_as_that_many_updates():
    norm = GhostBatchNorm2d(1, ghost_batch=2)
    statistics = RunningStatistics(nn.Sequential(norm))
    norm(torch.full((6, 1, 1, 2), 5.0))  # three groups, each of mean 5
    statistics.fold(global_batch=6)
    assert norm.running_mean.item() == pytest.approx(5 * (1 - 0.9**3))
    assert not statistics.collected.any()


def test_the_ghost_batch_may_change_between_updates():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 2, 2)
    changed, fresh = GhostBatchNorm2d(3, ghost_batch=8), GhostBatchNorm2d(3, ghost_batch=4)
    RunningStatistics(changed).use_ghost_batch(4)
    assert torch.equal(changed(images), fresh(images))


def test_the_perceptron_has_no_norm_and_its_running_statistics_are_none():
    model = build_model(settings("perceptron", width=5), 10, ghost_batch=1)
    statistics = RunningStatistics(model)
    statistics.fold(4)
    assert statistics.collected.numel() == 0
    assert sum(p.numel() for p in model.parameters()) == 192 * 5 + 5 + 5 * 10 + 10
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
