"""FusedSGD as users of torch.optim.SGD know it."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.testing._internal.common_optimizers import (
    optim_error_inputs_func_sgd,
    optim_inputs_func_sgd,
)

from hvd_lbt.optim import FusedSGD, StepGradients

EPS = 2.0**-24
# torch's configurations that FusedSGD refuses, by what is in them, with the reason:
REFUSED = {
    "dampening": "the first update would be an exception; scale lr by 1 - dampening instead",
}
# Keys of torch's that choose between its own implementations.
IMPLEMENTATIONS = ("foreach", "fused", "differentiable", "capturable")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 3))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, updates: int, seed=1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(5, 7, generator=generator)).square().mean().backward()
        optimizer.step()


def assert_same(one: torch.nn.Module, other: torch.nn.Module, updates: int) -> None:
    # each update rounds four times; weights are below 1
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= 8 * updates * EPS


CONFIGURATIONS = {config.desc: config for config in optim_inputs_func_sgd("cpu")}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_torchs_own_configurations(name):
    settings = {
        key: value
        for key, value in CONFIGURATIONS[name].kwargs.items()
        if key not in IMPLEMENTATIONS
    }
    ours, theirs = network(), network()
    peer = torch.optim.SGD(theirs.parameters(), **copy.deepcopy(settings))
    if settings.get("dampening"):
        with pytest.raises(ValueError, match="dampening"):
            FusedSGD(ours.parameters(), **settings)
        assert "dampening" in REFUSED
        return
    optimizer = FusedSGD(ours.parameters(), **copy.deepcopy(settings))
    train(ours, optimizer, 50)
    train(theirs, peer, 50)
    assert_same(ours, theirs, 50)


@pytest.mark.parametrize("case", optim_error_inputs_func_sgd("cpu", torch.float32))
def test_torchs_own_errors(case):
    bad = case.optimizer_error_input
    parameters = [torch.nn.Parameter(torch.zeros(2))] if bad.params is None else bad.params
    kwargs = {key: value for key, value in bad.kwargs.items() if key not in IMPLEMENTATIONS}
    with pytest.raises((case.error_type, ValueError, TypeError)):
        FusedSGD(parameters, **kwargs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_goes_to_torch_and_back(momentum):
    ours, theirs = network(), network()
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
    optimizer = FusedSGD(ours.parameters(), **settings)
    peer = torch.optim.SGD(theirs.parameters(), **settings)
    train(ours, optimizer, 5)
    train(theirs, peer, 5)
    # change places: each goes on with the other's state
    to_torch, to_us = network(), network()
    to_torch.load_state_dict(ours.state_dict())
    to_us.load_state_dict(theirs.state_dict())
    new_peer = torch.optim.SGD(to_torch.parameters(), lr=9.0, momentum=0.5)
    new_peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the buffers
    new_optimizer = FusedSGD(to_us.parameters(), lr=9.0, momentum=0.5)
    new_optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    train(ours, optimizer, 5, seed=2)
    train(to_torch, new_peer, 5, seed=2)
    train(to_us, new_optimizer, 5, seed=2)
    assert_same(ours, to_torch, 10)
    assert_same(ours, to_us, 10)


def test_it_can_be_pickled_and_copied():
    model = network()
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 3)
    other = pickle.loads(pickle.dumps(optimizer))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    FusedSGD(network().parameters(), lr=0.1).load_state_dict(torch.load(file, weights_only=True))


def test_groups_schedulers_and_hooks():
    models = [network(), network()]
    optimizers = []
    for model, kind in zip(models, (FusedSGD, torch.optim.SGD), strict=True):
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}]
        optimizers.append(kind(groups, lr=0.2, momentum=0.9))
    calls = []
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in optimizers]
    for round_ in range(4):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            train(model, optimizer, 2, seed=round_)
            scheduler.step()
    assert_same(*models, 8)
    assert calls == ["before", "after"] * 16


def test_a_closure_and_a_parameter_without_gradient():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([used, unused], lr=0.5, momentum=0.9, weight_decay=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    torch.testing.assert_close(used.detach(), torch.full((3,), 1 - 0.5 * 1.1))
    assert torch.equal(unused.detach(), torch.ones(3))
    assert unused not in optimizer.state


def test_what_is_refused_is_said():
    sparse = torch.nn.Parameter(torch.zeros(4, 2))
    sparse.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is sparse"):
        FusedSGD([sparse], lr=0.1).step()
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is torch.float64"):
        FusedSGD([torch.zeros(2, dtype=torch.float64, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="parameter 0 of group 0 has gaps"):
        FusedSGD([torch.zeros(4, 4)[:, :2].requires_grad_()], lr=0.1)
    with pytest.raises(ValueError, match="nesterov in group 0 needs a momentum"):
        FusedSGD([torch.zeros(2, requires_grad=True)], lr=0.1, nesterov=True)


def test_channels_last_weights_and_gradients():
    model = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    ours = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    peer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn(p.shape)  # contiguous: not as the weight lies
        q.grad = p.grad.clone()
    ours.step()
    peer.step()
    assert_same(model, twin, 1)


@pytest.mark.parametrize("first_is_bad", [True, False])
def test_grad_scaler_needs_no_unscaling(first_is_bad):
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = FusedSGD([parameter], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if first_is_bad:
        scaler.scale(parameter.sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameter.detach(), torch.ones(5))
        assert scaler.get_scale() == 512
        optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(parameter.detach(), torch.full((5,), 0.9))


def test_a_gradient_source_replaces_grad():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = FusedSGD([parameter], lr=0.5, momentum=0.9)
    wire = torch.full((4,), 8.0, dtype=torch.float16)
    given = StepGradients(grads={parameter: wire}, grad_scale=torch.tensor(4.0))
    optimizer.set_gradient_source(lambda: given)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.zeros(4))


def test_step_under_compile():
    model, twin = network(), network()
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    peer = FusedSGD(twin.parameters(), lr=0.1, momentum=0.9)

    @torch.compile(backend="aot_eager")
    def update(images):
        loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(3)
    for _ in range(3):
        images = torch.randn(5, 7)
        update(images)
        peer.zero_grad()
        twin(images).square().mean().backward()
        peer.step()
    assert_same(model, twin, 3)


def test_rescaling_ends_the_settling_of_a_raised_momentum():
    """On f = w²/2 + noise-free drift: after m rises, updates are short until the buffer settles.

    With a constant gradient 1 the buffer settles at 1/(1-m). Raised from 0.9 to 0.99 without
    rescaling, the first update after the change moves 0.1 of its steady length, with it 1.0.
    """
    lengths = {}
    for rescale in (False, True):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = FusedSGD([weight], lr=0.01, momentum=0.9)
        for update in range(400):
            if update == 200:
                optimizer.param_groups[0]["momentum"] = 0.99
                if rescale:
                    optimizer.rescale_momentum((1 - 0.9) / (1 - 0.99))
            before = weight.item()
            weight.grad = torch.ones(1)
            optimizer.step()
            lengths[rescale, update] = before - weight.item()
    steady = 0.01 / (1 - 0.99)
    assert lengths[False, 200] == pytest.approx(steady * (0.1 * 0.99 + 0.01), rel=1e-3)
    assert lengths[True, 200] == pytest.approx(steady, rel=1e-3)
    # settle time 1/(1-m) = 100 updates: 63 % of the gap is closed without help
    assert lengths[False, 299] == pytest.approx(steady * (1 - 0.9 * 0.99**100), rel=1e-3)


def test_rescaling_on_a_quadratic_keeps_its_course():
    """f = w²/2 with momentum falls as w ~ exp(-t·lr/(1-m)): the same before and after a change of m
    that keeps lr/(1-m). With the rescale it goes on at once, without it the weight waits until the
    buffer has settled (Smith et al., 2018, section 4: the cost of a large momentum).
    """
    ends = {}
    for change in ("none", "keep", "rescale"):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = FusedSGD([weight], lr=1e-4, momentum=0.9)
        for update in range(2100):
            if update == 2000 and change != "none":
                optimizer.param_groups[0].update(momentum=0.99, lr=1e-5)
                if change == "rescale":
                    optimizer.rescale_momentum((1 - 0.9) / (1 - 0.99))
            weight.grad = weight.detach().clone()
            optimizer.step()
        ends[change] = weight.item()
    # 100 updates of 1e-3 each; m lr/(1-m)² = 0.1 of them is heavy ball's second order
    assert abs(math.log(ends["rescale"] / ends["none"])) < 0.1 * 0.1 + 0.002
    # the buffer lacks 0.9·0.99^t of its length t updates after the change
    lag = 1e-3 * 0.9 * sum(0.99**t for t in range(1, 101))
    assert math.log(ends["keep"] / ends["none"]) == pytest.approx(lag, abs=0.012)
