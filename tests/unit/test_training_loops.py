"""What strangers' training loops do around a reducer: it works, or is refused at once."""

import copy
import pickle

import pytest
import torch
from thread_ranks import SEEDING, Ranks, reducer_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvd_lbt.errors import UserError
from hvd_lbt.optim import FusedSGD

OPTIMIZERS = [FusedSGD, torch.optim.SGD]


def network(seed=0):
    with SEEDING:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def setting(kind=FusedSGD, **settings):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, reducer_of(model, optimizer, **settings)


def loss_of(model, seed=0):
    return model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().mean()


def same_weights(model, twin):
    for own, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-5, atol=1e-6)


# -- gradients that are changed, or come from elsewhere -------------------------------------------


EDITS = {
    "clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "clip_grad_value_": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-3),
    "in place": lambda m: m[0].weight.grad.mul_(0.5),
    "through .data": lambda m: [p.grad.data.mul_(0.5) for p in m.parameters()],
    "replaced": lambda m: setattr(m[0].weight, "grad", m[0].weight.grad * 0.5),
    "deleted": lambda m: setattr(m[0].weight, "grad", None),
    "zero_grad": lambda m: m.zero_grad(),
    "zero_grad in place": lambda m: m.zero_grad(set_to_none=False),
    "another backward": lambda m: loss_of(m, 1).backward(),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_gradients_changed_after_they_were_sent_are_refused(kind, overlap, edit):
    model, optimizer, reducer = setting(kind, overlap=overlap)
    reducer.backward(loss_of(model))
    EDITS[edit](model)
    with pytest.raises(UserError, match=r"the gradient of .* was changed .*clip_grad_norm_"):
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_hook_that_changes_a_gradient_after_it_was_packed_is_refused(kind):
    """Registered after the reducer's own, it runs when the bucket has left."""
    model, optimizer, reducer = setting(kind)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: (p.grad.mul_(2), None)[1])
    reducer.backward(loss_of(model))
    with pytest.raises(UserError, match=r"the gradient of 0\.weight was changed"):
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
@pytest.mark.parametrize("size", [1.0, 1e6])
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_the_reducer_clips_the_norm_of_the_sum(kind, wire, size, max_norm):
    model, optimizer, reducer = setting(kind, wire=wire)
    twin = network()
    peer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for update in range(3):
        reducer.backward(size * loss_of(model, update), last=False)
        reducer.backward(size * loss_of(model, update + 9))
        norm = reducer.clip_grad_norm_(max_norm)
        optimizer.step()
        (size * loss_of(twin, update) + size * loss_of(twin, update + 9)).backward()
        wanted = nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        peer.step()
        peer.zero_grad()
        torch.testing.assert_close(norm, wanted, rtol=1e-3, atol=0)
        if wire == "fp32":  # before clipping: the gradient's noise is measured of that
            assert float(reducer.squared_norm()) == pytest.approx(float(wanted) ** 2, rel=1e-3)
    for own, its in zip(model.parameters(), twin.parameters(), strict=True):
        largest = its.detach().abs().max()
        torch.testing.assert_close(own, its, rtol=0, atol=float(2e-3 * largest))


def test_clipping_at_another_time_is_refused_and_a_bad_update_has_no_norm():
    model, optimizer, reducer = setting()
    with pytest.raises(UserError, match="before the update's last backward"):
        reducer.clip_grad_norm_(1.0)
    reducer.backward(loss_of(model) * float("nan"))
    assert reducer.clip_grad_norm_(1.0).isnan()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(UserError, match="max_norm"):
        reducer.clip_grad_norm_(0.0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_a_plain_backward_before_the_last_counts(kind, overlap, half):
    if half and kind is FusedSGD:
        pytest.skip("FusedSGD has fp32 weights")
    model, twin = network(), network()
    if half:
        model, twin = model.bfloat16(), twin.bfloat16()
    optimizer = kind(model.parameters(), lr=0.1)
    reducer = reducer_of(model, optimizer, overlap=overlap)
    peer = torch.optim.SGD(twin.parameters(), lr=0.1)
    inputs = torch.randn(3, 5, 4, dtype=twin[0].weight.dtype)

    def losses(model):
        return [model(one).square().mean() for one in inputs]

    for _ in range(3):
        one, two, three = losses(model)
        one.backward()
        reducer.backward(two, last=False)
        three.backward()
        reducer.backward(model(inputs[0]).mean())
        optimizer.step()
        for loss in (*losses(twin), twin(inputs[0]).mean()):
            loss.backward()
        peer.step()
        peer.zero_grad()
    for own, its in zip(model.parameters(), twin.parameters(), strict=True):
        tolerance = 2e-2 if half else 1e-5
        torch.testing.assert_close(own, its, rtol=tolerance, atol=tolerance)


def test_a_grad_scaler_is_refused():
    for kind, options in (
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"fused": True}),
        (FusedSGD, {}),
    ):
        model = network()
        optimizer = kind(model.parameters(), lr=0.1, **options)
        reducer = reducer_of(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = model[0].weight.detach().clone()
        reducer.backward(scaler.scale(loss_of(model)))
        with pytest.raises((UserError, ValueError), match="GradScaler"):
            scaler.step(optimizer)
        assert torch.equal(model[0].weight, before)


# -- steps, closures, two reducers ----------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_without_a_backward_and_a_second_step_are_refused(kind):
    model, optimizer, reducer = setting(kind)
    with pytest.raises(UserError, match="last=True"):
        optimizer.step()
    reducer.backward(loss_of(model))
    optimizer.step()
    with pytest.raises(UserError, match="last=True"):
        optimizer.step()
    reducer.backward(loss_of(model))
    with pytest.raises(UserError, match=r"Call optimizer\.step\(\) first"):
        reducer.backward(loss_of(model))


def test_closures():
    model, optimizer, reducer = setting()

    def closure():
        loss = loss_of(model)
        reducer.backward(loss)
        return loss

    before = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < before
    model, optimizer, reducer = setting(torch.optim.SGD)
    with pytest.raises(UserError, match="closure"):
        optimizer.step(lambda: loss_of(model).backward())
    reducer.backward(loss_of(model))
    with pytest.raises(UserError, match="closure"):
        optimizer.step(closure=lambda: loss_of(model))
    optimizer.step()


def test_a_second_reducer_is_refused_until_the_first_is_closed():
    model, optimizer, reducer = setting()
    with pytest.raises(UserError, match=r"has a GradientReducer already.*close\(\)"):
        reducer_of(model, optimizer, name="second")
    reducer.close()
    with pytest.raises(UserError, match="closed"):
        reducer.backward(loss_of(model))
    second = reducer_of(model, optimizer, name="second")
    before = model[0].weight.detach().clone()
    second.backward(loss_of(model))
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_two_reducers_for_two_parts_of_a_model():
    model, twin = network(), network()
    parts = []
    for number in (0, 2):
        optimizer = FusedSGD(model[number].parameters(), lr=0.1)
        parts.append((optimizer, reducer_of(model[number], optimizer, name=f"part{number}")))
    (one, first), (two, second) = parts
    # one backward gives both their gradients; the second only sends what came
    first.backward(loss_of(model))
    second.backward(None)
    one.step()
    two.step()
    loss_of(twin).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    same_weights(model, twin)


# -- parameters that change -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_unfrozen_later_is_refused_and_trains_with_a_new_reducer(kind):
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = kind(model.parameters(), lr=0.1)
    reducer = reducer_of(model, optimizer)
    before = model[0].weight.detach().clone()
    reducer.backward(loss_of(model))
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"0\.weight requires a gradient now.*close\(\)"):
        reducer.backward(loss_of(model))
    reducer.close()
    reducer = reducer_of(model, optimizer, name="again")
    reducer.backward(loss_of(model))
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_frozen_later_stays_and_moves_again_when_unfrozen(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    reducer = reducer_of(model, optimizer)

    def update():
        before = model[0].weight.detach().clone()
        reducer.backward(loss_of(model), last=False)
        reducer.backward(loss_of(model))
        optimizer.step()
        return not torch.equal(model[0].weight, before)

    moved = [update()]
    for frozen in (True, True, False):
        model[0].weight.requires_grad_(not frozen)
        moved.append(update())
    assert moved == [True, False, False, True]


def test_replaced_parameters_are_refused():
    cases = {
        "requires_grad|add_param_group": lambda m, o: o.add_param_group(
            {"params": [nn.Parameter(torch.ones(3))]}
        ),
        "another tensor in the model": lambda m, o: m.load_state_dict(
            network().state_dict(), assign=True
        ),
        "bfloat16": lambda m, o: m.bfloat16(),
        "float64": lambda m, o: m.double(),
        "0.bias is another": lambda m, o: m[0].to("meta"),
        r"0\.weight was": lambda m, o: setattr(m[0].weight, "data", torch.ones(9, 4)),
        "0.weight is another": lambda m, o: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 4))),
        "parameters changed": lambda m, o: o.param_groups[0]["params"].reverse(),
    }
    for message, change in cases.items():
        model, optimizer, reducer = setting(torch.optim.SGD)
        reducer.backward(loss_of(model))
        optimizer.step()
        change(model, optimizer)
        with pytest.raises(UserError, match=message):
            reducer.backward(torch.zeros((), requires_grad=True))


def test_new_values_in_the_same_parameters_are_no_change():
    model, optimizer, reducer = setting()
    twin = network()
    model.load_state_dict(twin.state_dict())
    model[0].weight.data = twin[0].weight.detach().clone()
    reducer.backward(loss_of(model))
    optimizer.step()
    loss_of(twin).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    same_weights(model, twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_types_without_a_wire_are_refused(dtype):
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(UserError, match=f"weight is {dtype}"):
        reducer_of([("weight", weight)], torch.optim.SGD([weight], lr=0.1))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_empty_parameters_in_a_bucket_of_their_own_are_sent_again_too(kind, first):
    full, empty = nn.Parameter(torch.ones(300_000)), nn.Parameter(torch.ones(0, 4))
    named = [("empty", empty), ("full", full)][:: 1 if first else -1]
    optimizer = kind([full, empty], lr=1.0)
    # the first bucket is full with one parameter: the empty one has a bucket of its own
    reducer = reducer_of(named, optimizer, wire="fp16", bucket_mb=0.1)
    reducer.backward(1e8 * (full.sum() + empty.sum()))
    optimizer.step()
    assert reducer.stats()["overflows"] == 1
    torch.testing.assert_close(full.detach(), torch.full_like(full, -1e8))


# -- torch's own machinery ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_autocast_and_retained_graphs(kind, reentrant):
    model, optimizer, reducer = setting(kind, overlap=not reentrant)
    twin = network()
    inputs = torch.randn(5, 4, requires_grad=True)
    for net in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(net, inputs, use_reentrant=reentrant).float().square().mean()
        if net is model:
            reducer.backward(loss, last=False, retain_graph=True)
            reducer.backward(loss)
            optimizer.step()
        else:
            loss.backward(retain_graph=True)
            loss.backward()
            torch.optim.SGD(twin.parameters(), lr=0.1).step()
    same_weights(model, twin)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_copies_and_pickles_of_model_and_optimizer_have_no_reducer(kind):
    model, optimizer, reducer = setting(kind)
    reducer.backward(loss_of(model))
    optimizer.step()
    other = copy.deepcopy(model)
    reducer_of(other, kind(other.parameters(), lr=0.1), name="copy")
    again = pickle.loads(pickle.dumps(optimizer))
    again.step()  # it has no gradients, and no reducer to ask
    copy.deepcopy(optimizer).step()


# -- ranks that differ ----------------------------------------------------------------------------


def spoil_weight(rank, model, optimizer):
    with torch.no_grad():
        if rank:
            model[2].bias[1] += 1e-7


def spoil_seed(rank, model, optimizer):
    model.load_state_dict(network(rank).state_dict())


def spoil_momentum(rank, model, optimizer):
    weight = model[0].weight
    optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, float(rank))


def spoil_state(rank, model, optimizer):
    if rank:
        spoil_momentum(rank, model, optimizer)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (spoil_weight, r"2\.bias differs between rank 0 and ranks 1, 2"),
        (spoil_seed, r"0\.weight differs between rank 0 and ranks 1, 2"),
        (spoil_momentum, r"momentum_buffer of parameter 0 differs .* ranks 1, 2"),
        (spoil_state, "what the optimizer's state holds differs"),
    ],
)
def test_ranks_that_begin_with_different_weights_are_told_at_the_first_update(spoil, what):
    def program(rank, make):
        model = network()
        optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        reducer = make(model, optimizer)
        spoil(rank, model, optimizer)
        reducer.backward(loss_of(model))

    for error in Ranks(3).run(program):
        with pytest.raises(UserError, match=what) as raised:
            raise error
        assert "broadcast_(model.state_dict())" in str(raised.value)
        assert "hvd.broadcast_parameters" in str(raised.value)


def test_weights_that_are_sent_after_the_reducer_was_made_are_the_same():
    def program(rank, make):
        model = network()
        spoil_weight(rank, model, None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reducer = make(model, optimizer)
        model.load_state_dict(network().state_dict())  # as a broadcast does
        for update in range(3):
            reducer.backward(loss_of(model, rank + update) / 2)
            optimizer.step()
        return model.state_dict()

    one, other = Ranks(2).run(program)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_that_freeze_different_parameters_are_told():
    def program(rank, make):
        model = network()
        optimizer = FusedSGD(model.parameters(), lr=0.1)
        reducer = make(model, optimizer)
        model[0].weight.requires_grad_(rank != 1)
        reducer.backward(loss_of(model))
        optimizer.step()

    for error in Ranks(3).run(program):
        with pytest.raises(UserError, match=r"frozen different parameters.*rank 0 and rank 1"):
            raise error


def test_ranks_whose_optimizers_have_another_order_of_parameters_train_alike():
    def program(rank, make):
        model = network()
        parameters = list(model.parameters())[:: -1 if rank else 1]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        reducer = make(model, optimizer)
        reducer.backward(loss_of(model, rank) / 2)
        optimizer.step()
        return model.state_dict()

    one, other = Ranks(2).run(program)
    assert all(torch.equal(one[name], other[name]) for name in one)
