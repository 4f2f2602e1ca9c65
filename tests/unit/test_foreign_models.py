"""Networks by timm:, torchvision: and package.module:function: made, tested, or refused."""

import random
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt.errors import UserError
from hvd_lbt.models import (
    build_model,
    check_network,
    foreign,
    load_pretrained,
    samples_of,
    unused_settings,
)
from hvd_lbt.recipe import ModelRecipe

OUTPUTS = 5


class Net(nn.Module):
    """A small network that may do one thing more."""

    def __init__(self, num_classes, forward=None, **layers):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.more = forward or (lambda net, x: x)

    def forward(self, x):
        return self.more(self, self.fc(F.softplus(self.norm(self.conv(x))).mean((2, 3))))


class Counts(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return x


class EvalOnly(nn.Module):
    """Whitens over the batch, in eval mode."""

    def forward(self, x):
        return x if self.training else x - x.mean(0)


@pytest.fixture
def made(monkeypatch):
    """build(make, **settings): the network of a module of one's own, tested as before training."""
    module = types.ModuleType("nets_of_a_test")
    monkeypatch.setitem(sys.modules, "nets_of_a_test", module)

    def build(make, **settings):
        module.make = make
        recipe = ModelRecipe(name="nets_of_a_test:make", **settings)
        model = build_model(recipe, OUTPUTS, 4, image_size=8)
        notes = check_network(model, "made", image_size=8, outputs=OUTPUTS)
        return model, notes

    return build


def test_a_network_of_ones_own_is_called_with_its_arguments(made):
    model, notes = made(
        lambda num_classes, width: nn.Sequential(
            nn.Flatten(), nn.Linear(192, width), nn.Linear(width, num_classes)
        ),
        arguments={"width": 7},
    )
    assert model[1].weight.shape == (7, 192)
    assert notes == []


def test_the_test_leaves_everything_as_it_was(made):
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate()
    model, notes = made(
        lambda num_classes: Net(num_classes, lambda net, x: F.dropout(x, 0.1, net.training))
    )
    fresh = Net(OUTPUTS)
    torch.set_rng_state(states[0])
    again = Net(OUTPUTS)
    del fresh
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert random.getstate() == states[1]
    assert model.training
    assert not model.norm.collected.any()
    assert model.norm.ghost_batch == 4
    assert all(p.grad is None for p in model.parameters())
    assert samples_of(model).by_ghost_batch
    assert "each ghost batch is computed on its own" in notes[0]


class Flat(nn.Module):
    """Dropout over tokens first: the rows of its input are no samples."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x[None].expand(len(x), -1, -1)).mean(0)


def test_dropout_over_another_dimension_is_computed_by_ghost_batch(made):
    model, _ = made(lambda num_classes: Net(num_classes, lambda net, x: net.flat(x), flat=Flat()))
    assert samples_of(model).by_ghost_batch


REFUSED = {
    "tuple": (lambda net, x: (x, x), r"returns tuple\(\(4, 5\), \(4, 5\)\) in train mode"),
    "dict": (lambda net, x: {"out": x}, r"returns dict\('out' \(4, 5\)\).*logits alone"),
    "shape": (lambda net, x: x[:, :3], r"returns \(4, 3\) for 4 images.*\(4, 5\)"),
    "softmax": (lambda net, x: x.softmax(1), "probabilities, not logits"),
    "nan": (lambda net, x: x / 0, "infinite or NaN logits"),
    "detached": (lambda net, x: x.detach(), "without a gradient"),
    "batch norm by hand": (lambda net, x: x - x.mean(0), "norm or attention over the whole batch"),
    "python": (lambda net, x: x * random.random(), "Python's random or numpy.random"),
    "numpy": (lambda net, x: x * np.random.rand(), "Python's random or numpy.random"),
    "dropout in eval": (lambda net, x: F.dropout(x, 0.5), "random numbers in eval mode too"),
    "fails": (lambda net, x: x.no_such(), r"forward of images \(4, 3, 8, 8\) fails \(AttributeErr"),
    "counts": (lambda net, x: net.counts(x), r"changes the buffer counts.seen \(of Counts\)"),
    "instance norm": (
        lambda net, x: net.instance(x[:, :, None] * torch.arange(2))[..., 0],  # of two values each
        "changes the buffer instance.running_mean",
    ),
    "eval": (lambda net, x: net.only(x), "another output in eval mode"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_wrong_in_silence_is_refused(made, kind):
    forward, reason = REFUSED[kind]
    layers = {
        "counts": Counts(),
        "instance": nn.InstanceNorm1d(5, track_running_stats=True),
        "only": EvalOnly(),
    }
    with pytest.raises(
        UserError, match=f"^model.name: made .*{reason}|^model.name: made: .*{reason}"
    ):
        made(lambda num_classes: Net(num_classes, forward, **layers))


class Bare(nn.BatchNorm2d):
    """Repeats the norm instead of calling it."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


NOT_MADE = {
    "no module": (lambda num_classes: 3, "returned a int; it must return a torch nn.Module"),
    "raises": (lambda num_classes: 1 // 0, r"could not be made with num_classes=5 \(ZeroDivision"),
    "arguments": (lambda classes: None, "TypeError: .*num_classes"),
    "half": (lambda num_classes: Net(num_classes).bfloat16(), "conv.weight is torch.bfloat16"),
    "frozen": (lambda num_classes: Net(num_classes).requires_grad_(False), "nothing to train"),
    "parallel": (lambda num_classes: nn.DataParallel(Net(num_classes)), "returned a DataParallel"),
    "meta": (lambda num_classes: Net(num_classes).to("meta"), "on the meta device"),
    "eval layer": (
        lambda num_classes: Net(num_classes, layer=nn.BatchNorm2d(3).eval()),
        r"layers in eval mode \(layer\)",
    ),
    "gaps": (
        lambda num_classes: Net(num_classes, w=nn.ParameterList([torch.ones(1).expand(3)])),
        "w.0 has gaps in its memory",
    ),
    "own norm": (lambda num_classes: Net(num_classes, own=Bare(3)), "own .Bare. has a forward of"),
}


@pytest.mark.parametrize("kind", NOT_MADE)
def test_what_cannot_be_trained_is_refused(made, kind):
    make, reason = NOT_MADE[kind]
    with pytest.raises(UserError, match=f"^model.*{reason}"):
        made(make)


def test_a_network_in_eval_mode_is_trained(made):
    model, _ = made(lambda num_classes: Net(num_classes).eval())
    assert model.norm.training


def test_lazy_layers_get_their_sizes(made):
    model, _ = made(
        lambda num_classes: nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes)
        )
    )
    assert model[3].weight.shape == (5, 144)
    assert type(model[1]).__name__ == "GhostBatchNorm2d"


def test_parameters_that_the_loss_does_not_reach_are_named(made):
    _, notes = made(lambda num_classes: Net(num_classes, spare=nn.Linear(2, 2)))
    assert re.search(r"does not reach 2 of 8 parameters \(spare.weight, spare.bias\)", notes[0])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "resnet18"}, "model.stem: resnet18 needs it"),
        ({"name": "perceptron", "arguments": {"a": 1}}, "would have no effect on perceptron"),
        ({"name": "a:b", "arguments": {"num_classes": 1}}, "model.num_classes"),
        ({"name": "a:b", "arguments": {"a b": 1}}, "cannot be the name of an argument"),
        ({"name": "a:b", "pretrained_skip": ["fc"]}, "no effect without model.pretrained"),
        ({"name": "timm:hf-hub:x/y"}, "timm:NAME"),
    ],
)
def test_settings_without_effect_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ModelRecipe(**settings)


def test_settings_of_our_own_networks_are_named():
    shipped = ModelRecipe(name="timm:resnet50d", stem="imagenet", zero_init_residual=True)
    (line,) = unused_settings(shipped)
    assert line.startswith("Not used by timm:resnet50d: model.stem, model.zero_init_residual;")
    assert unused_settings(ModelRecipe(name="timm:resnet50d")) == []


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, library):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it was not installed
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=rf"needs {library}, .*pip install 'hvd_lbt\[{library}\]'"):
        build_model(ModelRecipe(name=f"{library}:resnet18"), 5, 4)


def test_weights_are_not_fetched_in_silence():
    for name, arguments in (
        ("timm:resnet18", {"pretrained": True}),
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
    ):
        with pytest.raises(UserError, match=r"fetch weights over the network.*model\.pretrained"):
            build_model(ModelRecipe(name=name, arguments=arguments), 5, 4)


@pytest.fixture(scope="module")
def timm():
    return foreign._library("timm")


def test_a_network_of_timm_is_its_own_again_after_training(timm):
    settings = ModelRecipe(name="timm:test_resnet", arguments={"drop_path_rate": 0.2})
    model = build_model(settings, OUTPUTS, 4, image_size=32)
    assert check_network(model, "it", image_size=32, outputs=OUTPUTS) == []
    assert not samples_of(model).by_ghost_batch
    original = timm.create_model("test_resnet", num_classes=OUTPUTS)
    original.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(original.eval()(x), model.eval()(x))
    model.load_state_dict(original.state_dict(), strict=True)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"GhostBatchNormAct2d", "GhostBatchNorm2d", "SampleDropPath"} & kinds
    assert not {"BatchNorm2d", "BatchNormAct2d", "DropPath"} & kinds


def test_timms_norm_with_activation_is_the_norm_and_the_activation(timm):
    from hvd_lbt.models import prepare_model

    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    norm = timm.layers.BatchNormAct2d(3)
    expected = norm(x)
    ghost = prepare_model(nn.Sequential(timm.layers.BatchNormAct2d(3)), ghost_batch=4)
    torch.testing.assert_close(ghost(x), expected)
    assert (expected >= 0).all()


def test_a_network_that_is_unknown_gets_near_names(timm):
    with pytest.raises(UserError, match=r"timm:resnet5O: timm has no .* Did you mean resnet50"):
        build_model(ModelRecipe(name="timm:resnet5O"), 5, 4)
    with pytest.raises(UserError, match=r"the tag 'a1_in1k' names weights.*Write timm:resnet50,"):
        build_model(ModelRecipe(name="timm:resnet50.a1_in1k"), 5, 4)


@pytest.fixture
def weights(tmp_path):
    def write(content, name="weights.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def test_pretrained_weights_are_all_taken(weights, tmp_path):
    donor, model = Net(5), Net(5)
    for content in (
        donor.state_dict(),
        {"state_dict": {f"module.{k}": v for k, v in donor.state_dict().items()}, "epoch": 3},
    ):
        model = Net(5)
        said = load_pretrained(model, weights(content))
        assert "9 tensors" in said
        assert all(torch.equal(v, donor.state_dict()[k]) for k, v in model.state_dict().items())
    from safetensors.torch import save_file

    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    model = Net(5)
    load_pretrained(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.fc.weight, donor.fc.weight)


def test_a_classifier_of_other_classes_is_left_out_by_name(weights):
    donor, model = Net(7), Net(5)
    before = model.fc.weight.clone()
    file = weights(donor.state_dict())
    with pytest.raises(
        UserError,
        match=r"2 of another size \(fc.weight is \(7, 6\) in the file, \(5, 6\) in the network"
        r".*pretrained_skip=\[fc\]",
    ):
        load_pretrained(model, file)
    assert "2 kept as they were drawn" in load_pretrained(model, file, ["fc"])
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.conv.weight, donor.conv.weight)
    with pytest.raises(UserError, match="the network has no 'head'"):
        load_pretrained(model, file, ["head"])


def test_a_tied_weight_may_be_in_the_file_once(weights):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = model.state_dict()
    del state["b.weight"]
    load_pretrained(model, weights({k: v + 1 for k, v in state.items()}))
    assert torch.equal(model["b"].weight, state["a.weight"])  # the very same tensor, moved


FAULTS = {
    "missing": (lambda s: s.pop("conv.bias"), r"1 missing in the file \(conv.bias\)"),
    "unexpected": (lambda s: s.update(x=torch.ones(2)), r"1 not in the network \(x\)"),
    "nan": (lambda s: s["fc.bias"].fill_(float("nan")), r"1 infinite or NaN \(fc.bias\)"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_weights_that_do_not_fit_are_listed(weights, kind):
    spoil, reason = FAULTS[kind]
    state = {k: v.clone() for k, v in Net(5).state_dict().items()}
    spoil(state)
    with pytest.raises(
        UserError, match=rf"^model.pretrained: the weights in .* do not fit.*{reason}"
    ):
        load_pretrained(Net(5), weights(state))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3}, "holds no state_dict.*it holds 'epoch'"),
        ([1], "holds a list"),
        (Net, "it holds more than tensors"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(weights, content, reason):
    with pytest.raises(UserError, match=reason):
        load_pretrained(Net(5), weights(content))


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_pretrained(Net(5), tmp_path / "gone.pt")
    for name, reason in (
        ("a.pt", "cannot be read: it is no file of torch.save"),
        ("a.safetensors", "as safetensors"),
    ):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(UserError, match=reason):
            load_pretrained(Net(5), tmp_path / name)
