"""GradientReducer in one process: whatever autograd leaves in `.grad` is what the update is made
of.
"""

import pytest
import torch
from torch import nn

from hvd_lbt.errors import UserError
from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

LARGE = 1e5  # times FIRST_SCALE it does not fit fp16: the update is sent again in fp32


def reducer_of(model, optimizer, wire):
    return GradientReducer(
        model,
        optimizer,
        world=World(),
        allreduce_async=lambda tensor, name: tensor,
        synchronize=lambda handle: handle,
        wire=wire,
    )


class Dot(torch.autograd.Function):
    """Σ x·(a + b), with both gradients in one piece of memory, as fused layers make them."""

    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(x)
        return (x * (a + b.view_as(a))).sum()

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        both = (grad_output * x).flatten().repeat(2)
        return None, both[: x.numel()].view_as(x), both[x.numel() :]


class Views(nn.Module):
    """Two parameters whose gradients are views of the same memory."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(4, 6))
        self.b = nn.Parameter(torch.ones(24))

    def forward(self, x):
        return Dot.apply(x, self.a, self.b)


class Transposed(nn.Module):
    """A weight in channels_last, and a gradient that comes in another order than its weight."""

    def __init__(self):
        super().__init__()
        kernel = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
        self.weight = nn.Parameter(kernel)
        self.matrix = nn.Parameter(torch.randn(24, 4))

    def forward(self, x):
        return (x * (self.weight.mean(dim=(1, 2, 3))[:4, None] + self.matrix.t())).sum()


@pytest.mark.parametrize("network", [Views, Transposed])
@pytest.mark.parametrize("optimizer", [FusedSGD, torch.optim.SGD])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("size", [1.0, LARGE])
def test_gradients_wherever_they_lie_give_torchs_update(
    network, optimizer, wire, micro_batches, size
):
    torch.manual_seed(0)
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    x = size * torch.randn(4, 6 if network is Views else 24)
    ours = optimizer(model.parameters(), lr=0.5 / size, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.5 / size, momentum=0.9)
    reducer = reducer_of(model, ours, wire)
    for _ in range(2):
        for number in range(micro_batches):
            reducer.backward(model(x * (number + 1)), last=number == micro_batches - 1)
            twin(x * (number + 1)).backward()
        ours.step()
        theirs.step()
        theirs.zero_grad()
    tolerance = 2.0**-10 if wire == "fp16" else 2.0**-22
    for own, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert own.grad is None
        torch.testing.assert_close(own, its, rtol=0, atol=20 * tolerance)
    assert reducer.stats()["overflows"] == (2 if size == LARGE and wire == "fp16" else 0)


def test_a_gradient_is_neither_copied_nor_kept():
    model = nn.Linear(64, 64, bias=False)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    reducer = reducer_of(model, optimizer, "fp16")
    seen = []
    for last in (False, True):
        reducer.backward(model(torch.ones(2, 64)).sum(), last=last)
        seen.append(model.weight.grad.data_ptr())
    assert seen[0] == seen[1]
    assert model.weight.grad.eq(4).all()
    optimizer.step()
    assert all(slot.gradient is None for slot in reducer._slots)


def test_a_step_that_failed_leaves_nothing_behind(monkeypatch):
    def fail(*arguments):
        raise MemoryError

    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reducer = reducer_of(model, optimizer, "fp32")
    with monkeypatch.context() as failing:
        failing.setattr(optimizer, "_init_group", fail)
        reducer.backward(model(torch.ones(1, 4)).sum())
        with pytest.raises(MemoryError):
            optimizer.step()
    reducer.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    assert torch.equal(model.weight, before - 1)


def test_a_sparse_gradient_is_named():
    model = nn.Embedding(10, 4, sparse=True)
    reducer = reducer_of(model, FusedSGD(model.parameters(), lr=0.1), "fp16")
    with pytest.raises(UserError, match=r"the gradient of weight is sparse.*sparse=False"):
        reducer.backward(model(torch.tensor([1, 2])).sum())
