"""What each rank does for test_reducer.py: `reducer_ranks.py CASE FOLDER`; results go to FOLDER.

Rank r writes FOLDER/CASE-SIZE-r.pt. Every update has 24 samples; the shares are unequal on purpose,
and depend on the number of ranks only here, never in what is compared.
"""

import sys
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt import comm
from hvd_lbt.errors import BadUpdatesError, UserError
from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer

SAMPLES, UPDATES = 24, 12
SHARES = {1: [24], 2: [17, 7], 3: [13, 0, 11]}  # one of three ranks has nothing to do


class Net(nn.Module):
    """Smooth, so that rounding stays rounding; a frozen, an unused and a shared parameter."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(5, 5)
        self.first = nn.Linear(10, 32)
        self.tied = nn.Linear(10, 32)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.last = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.tanh(self.first(x)) + torch.tanh(self.tied(x))
        return self.last(torch.tanh(self.frozen(x)))


def network():
    torch.manual_seed(0)
    return Net()


def samples(update):
    generator = torch.Generator().manual_seed(update)
    images = torch.randn(SAMPLES, 10, generator=generator)
    return images, torch.randint(0, 10, (SAMPLES,), generator=generator)


def allreduce_async(tensor, name):
    """Horovod's sum; it has none in bfloat16, which here goes by way of float32."""
    carrier = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return comm.allreduce_async_(carrier, name), carrier, tensor


def synchronize(handle):
    number, carrier, tensor = handle
    comm.synchronize(number)
    if carrier is not tensor:
        tensor.copy_(carrier)


def make(model, optimizer, **settings):
    return GradientReducer(
        model,
        optimizer,
        world=WORLD,
        allreduce_async=allreduce_async,
        synchronize=synchronize,
        **settings,
    )


def sgd(model, kind=FusedSGD):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return kind(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(model, optimizer, reducer, *, micro_batches, spoil=lambda update, loss: loss):
    first = sum(SHARES[WORLD.size][: WORLD.rank])
    mine = slice(first, first + SHARES[WORLD.size][WORLD.rank])
    checksums = []
    for update in range(UPDATES):
        images, labels = (t[mine] for t in samples(update))
        parts = (
            []
            if len(images) == 0
            else list(zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        )
        for index, (image, label) in enumerate(parts):
            loss = F.cross_entropy(model(image), label, reduction="sum") / SAMPLES
            reducer.backward(spoil(update, loss), last=index == len(parts) - 1)
        if not parts:
            reducer.backward(None, last=True)
        optimizer.step()
        data = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()
        checksums.append(zlib.crc32(data))
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "checksums": checksums,
        "stats": reducer.stats(),
    }


def exact(wire):
    results = {}
    for micro_batches in (1, 3, 8):
        model = network()
        optimizer = sgd(model)
        # small buckets: several of them, so that order and overlap matter
        reducer = make(model, optimizer, wire=wire, bucket_mb=0.001, name=f"g{micro_batches}")
        results[micro_batches] = train(model, optimizer, reducer, micro_batches=micro_batches)
    return results


def overflow():
    def spoil(update, loss):
        # in update 5 the gradients of one rank are too large for fp16 at any usual scale
        return loss * 1e6 if update == 5 and WORLD.rank == 0 else loss

    results = {}
    for wire in ("fp16", "fp32"):
        model = network()
        optimizer = sgd(model)
        reducer = make(model, optimizer, wire=wire, name=wire)
        results[wire] = train(model, optimizer, reducer, micro_batches=3, spoil=spoil)
    return results


def nan():
    model = network()
    optimizer = sgd(model)
    reducer = make(model, optimizer, max_bad_updates=3)

    def spoil(update, loss):
        return loss * float("nan") if update in (4, 6) and WORLD.rank == WORLD.size - 1 else loss

    result = train(model, optimizer, reducer, micro_batches=2, spoil=spoil)
    try:
        train(model, optimizer, reducer, micro_batches=2, spoil=lambda u, loss: loss * float("inf"))
    except BadUpdatesError as error:
        result["error"] = str(error)
    return result


def peer_optimizer():
    """Any torch optimizer finds the world's sum in .grad."""
    model = network()
    optimizer = sgd(model, torch.optim.SGD)
    reducer = make(model, optimizer, wire="fp32", bucket_mb=0.001)
    return train(model, optimizer, reducer, micro_batches=3)


def disagreement():
    """A layer of another size on the last rank, then other settings: an error on every rank."""
    errors = []
    model = network()
    if WORLD.rank == WORLD.size - 1:
        model.last = nn.Linear(32, 11)
    try:
        make(model, sgd(model), name="shapes")
    except UserError as error:
        errors.append(str(error))
    model = network()
    try:
        make(model, sgd(model), bucket_mb=25.0 + WORLD.rank, name="settings")
    except UserError as error:
        errors.append(str(error))
    return errors


def weights():
    """Other weights on all ranks but the first: an error at the first update."""
    model = network()
    with torch.no_grad():
        model.last.bias += 1e-3 * (WORLD.rank > 0)
    reducer = make(model, sgd(model), name="weights")
    try:
        reducer.backward(None)
    except UserError as error:
        return str(error)
    return ""


def overlap():
    """When what is sent: gradients are noted as they come, sums as they begin."""
    model = network()
    optimizer = sgd(model)
    story = []

    def allreduce_async(tensor, name):
        story.append(f"send {name}")
        return comm.allreduce_async_(tensor, name)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, n=name: story.append(n))
    reducer = GradientReducer(
        model,
        optimizer,
        world=WORLD,
        allreduce_async=allreduce_async,
        synchronize=comm.synchronize,
        bucket_mb=0.001,
    )
    story.clear()
    images, labels = samples(0)
    for last in (False, True):
        story.append("backward")
        reducer.backward(F.cross_entropy(model(images), labels) / WORLD.size / 2, last=last)
    optimizer.step()
    return story


CASES = {
    "fp32": lambda: exact("fp32"),
    "fp16": lambda: exact("fp16"),
    "bf16": lambda: exact("bf16"),
    "overflow": overflow,
    "nan": nan,
    "peer_optimizer": peer_optimizer,
    "disagreement": disagreement,
    "weights": weights,
    "overlap": overlap,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    WORLD = comm.init()
    results = {name: case() for name, case in CASES.items()}
    torch.save(results, folder / f"{WORLD.size}-{WORLD.rank}.pt")
    comm.shutdown()
