"""`hvd_lbt bench allreduce_step`: from accumulated gradients to updated weights, on real ranks.

Run it under a launcher: `launch/local 2 bench allreduce_step`. ResNet-50's parameters; the backward
is replaced by one that hands out gradients that are there already, one after the other, last
parameter first, as a real one does. What plain autograd takes for that, accumulation included, is
measured
beside and taken off: the rest is communication and update. The peers in the same run, both with
torch's fused SGD: Horovod's DistributedOptimizer with its fp16 compression, and torch's
DistributedDataParallel with its fp16 hook on Gloo. `--hidden` times a real backward instead, and
tells how much of the communication it hides.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hvd_lbt import comm
from hvd_lbt.arguments import count, positive
from hvd_lbt.bench.harness import (
    Lines,
    Times,
    add_common_arguments,
    add_model_argument,
    check_equal,
    model_recipe,
    speedup,
    time_interleaved,
)
from hvd_lbt.errors import UserError
from hvd_lbt.evaluate import local_device
from hvd_lbt.models import build_model
from hvd_lbt.optim import FusedSGD
from hvd_lbt.recipe import ModelRecipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-5}
# fp16 has 11 bits; gradients are of order 0.01 and lr/(1-m) is 1
TOLERANCE = 2 * 2.0**-11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench allreduce_step`."""
    parser.add_argument("--accumulate", type=count, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--bucket-mb", type=positive, default=25.0)
    parser.add_argument("--hidden", action="store_true", help="what a real backward hides")
    parser.add_argument("--pixels", type=count, default=64, help="with --hidden: image side [64]")
    parser.add_argument("--images", type=count, default=2, help="with --hidden: on each rank [2]")
    add_model_argument(parser)
    add_common_arguments(parser, repetitions=30)


class _Given(torch.autograd.Function):
    """A layer whose backward hands its parameter a given gradient."""

    @staticmethod
    def forward(ctx, before: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return before.view_as(before)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, ctx.gradient.clone(), None


class _GivenModel(nn.Module):
    """A model of such layers; its output is the loss. DistributedDataParallel can wrap it."""

    def __init__(self, model: nn.Module, gradients: list[Tensor]) -> None:
        super().__init__()
        self.model, self.gradients = model, gradients

    def forward(self) -> Tensor:
        loss = self.gradients[0].new_zeros((), requires_grad=True)
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            loss = _Given.apply(loss, parameter, gradient)
        return loss


def main(args: argparse.Namespace) -> int:
    """Check that all give the same weights, then time them side by side."""
    recipe = model_recipe(args.model)
    if args.hidden and (args.pixels < 32 or args.images < 2):
        raise UserError(
            f"--pixels {args.pixels} and --images {args.images}: batch norm needs at least 2 "
            "images of 32 pixels."
        )
    world = comm.init()
    device = local_device(world)
    lines = Lines(
        "allreduce_step",
        settings={
            "network": args.model,
            "world_size": world.size,
            "device": device.type,
            "repetitions": args.repetitions,
            "bucket_mb": args.bucket_mb,
        },
        path=args.out,
        speaks=world.rank == 0,
    )
    if args.hidden:
        _measure_hidden(args, recipe, world, device, lines)
    else:
        _join_process_group(world)
        for accumulate in args.accumulate:
            _measure(accumulate, args, recipe, world, device, lines)
        distributed.destroy_process_group()
    comm.shutdown()
    return 0


def _join_process_group(world: World) -> None:
    """Let torch.distributed's Gloo find the same ranks, for DistributedDataParallel."""
    host, port = "127.0.0.1", 0  # its peers are measured on one machine
    store = None
    if world.rank == 0:
        store = distributed.TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
        port = store.port
    port = comm.broadcast_object(port)
    if store is None:
        store = distributed.TCPStore(host, port, world.size, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


def _models(recipe: ModelRecipe, copies: int, device: torch.device) -> list[nn.Module]:
    """The same network so many times."""
    models = []
    for _ in range(copies):
        torch.manual_seed(0)
        models.append(build_model(recipe, 1000, 32).to(device))
    return models


def _synchronizer(device: torch.device) -> Callable[[], None]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        comm.barrier()

    return wait


def _measure(
    accumulate: int,
    args: argparse.Namespace,
    recipe: ModelRecipe,
    world: World,
    device: torch.device,
    lines: Lines,
) -> None:  # long: three ways to do one thing, side by side, so that they can be compared
    hvd = comm.horovod()
    mine, horovods, ddps, alone = _models(recipe, 4, device)
    torch.manual_seed(world.rank)
    parts = world.size * accumulate
    gradients = [torch.randn_like(p) / 100 / parts for p in mine.parameters()]

    my_model = _GivenModel(mine, gradients)
    optimizer = FusedSGD(mine.parameters(), **SETTINGS)
    reducer = GradientReducer(
        mine,
        optimizer,
        world=world,
        allreduce_async=comm.allreduce_async_,
        synchronize=comm.synchronize,
        bucket_mb=args.bucket_mb,
        name=f"ours{accumulate}",
    )

    def ours() -> None:
        for index in range(accumulate):
            reducer.backward(my_model(), last=index == accumulate - 1)
        optimizer.step()

    peer = hvd.DistributedOptimizer(
        torch.optim.SGD(horovods.parameters(), fused=True, **SETTINGS),
        named_parameters=[(f"{accumulate}.{n}", p) for n, p in horovods.named_parameters()],
        compression=hvd.Compression.fp16,
        op=hvd.Sum,
        backward_passes_per_step=accumulate,
    )

    horovods_model = _GivenModel(horovods, gradients)

    def horovod() -> None:
        for _ in range(accumulate):
            horovods_model().backward()
        peer.step()
        peer.zero_grad()

    # It averages over the ranks: given so many times the gradient, the average is the sum.
    wrapped = DistributedDataParallel(
        _GivenModel(ddps, [world.size * gradient for gradient in gradients]),
        bucket_cap_mb=args.bucket_mb,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, fp16_compress_hook)
    ddp_optimizer = torch.optim.SGD(ddps.parameters(), fused=True, **SETTINGS)

    def ddp() -> None:
        for index in range(accumulate):
            with nullcontext() if index == accumulate - 1 else wrapped.no_sync():
                wrapped().backward()
        ddp_optimizer.step()
        ddp_optimizer.zero_grad()

    model_alone = _GivenModel(alone, gradients)

    def only_backward() -> None:
        for _ in range(accumulate):
            model_alone().backward()
        alone.zero_grad()

    peers = {"hvd.DistributedOptimizer, fp16": horovod, "DistributedDataParallel, fp16, Gloo": ddp}
    for _ in range(2):
        ours()
        horovod()
        ddp()
    differences = {
        name: check_equal(name, mine.parameters(), model.parameters(), tolerance=TOLERANCE)
        for name, model in zip(peers, (horovods, ddps), strict=True)
    }
    times = time_interleaved(
        {"ours": ours, **peers, "backward": only_backward},
        repetitions=args.repetitions,
        synchronize=_synchronizer(device),
    )
    rest = {name: _without(times[name], times["backward"]) for name in ("ours", *peers)}
    lines.result(
        case=f"communication and update, accumulation of {accumulate}",
        largest_differences=differences,
        backward_ms=1e3 * times["backward"].median,
        ms_without_backward={name: 1e3 * its.median for name, its in rest.items()},
        against={name: speedup(rest["ours"], rest[name]) for name in peers},
        against_with_backward={name: speedup(times["ours"], times[name]) for name in peers},
        **times["ours"].summary(),
    )


def _without(times: Times, part: Times) -> Times:
    """What is left of each repetition without the part that was timed beside it."""
    pairs = zip(times.seconds, part.seconds, strict=True)
    return Times(tuple(whole - less for whole, less in pairs))


def _measure_hidden(
    args: argparse.Namespace,
    recipe: ModelRecipe,
    world: World,
    device: torch.device,
    lines: Lines,
) -> None:
    """An update with a real backward: sent during it, sent after it, and not sent at all."""
    ways: dict[str, dict[str, Any]] = {
        "during": {"overlap": True},
        "after": {"overlap": False},
        # each rank by itself: all the work but the communication
        "never": {
            "world": World(),
            "allreduce_async": lambda tensor, name: tensor,
            "synchronize": lambda handle: handle,
        },
    }
    models = dict(zip(ways, _models(recipe, len(ways), device), strict=True))
    torch.manual_seed(world.rank)
    images = torch.randn(args.images, 3, args.pixels, args.pixels, device=device)
    labels = torch.randint(0, 1000, (args.images,), device=device)

    def make(way: str) -> Callable[[], None]:
        model = models[way]
        # so small an lr that the ranks of "never" stay alike in what they compute
        optimizer = FusedSGD(model.parameters(), lr=1e-6, momentum=0.9)
        usual: dict[str, Any] = {
            "world": world,
            "allreduce_async": comm.allreduce_async_,
            "synchronize": comm.synchronize,
            "bucket_mb": args.bucket_mb,
            "name": way,
        }
        reducer = GradientReducer(model, optimizer, **(usual | ways[way]))

        def run() -> None:
            loss = F.cross_entropy(model(images), labels, reduction="sum")
            reducer.backward(loss / (len(images) * world.size), last=True)
            optimizer.step()

        return run

    runs = {way: make(way) for way in ways}
    for run in runs.values():
        run()
    difference = check_equal(
        "sent during or after",
        models["during"].parameters(),
        models["after"].parameters(),
        tolerance=TOLERANCE,
    )
    times = time_interleaved(runs, repetitions=args.repetitions, synchronize=_synchronizer(device))
    # Paired by repetition, as the ratios are: the machine's slow drift drops out.
    sides = [[1e3 * seconds for seconds in times[way].seconds] for way in ways]
    communication = median(after - never for _, after, never in zip(*sides, strict=True))
    hidden = median(after - during for during, after, _ in zip(*sides, strict=True))
    lines.result(
        case=f"hidden behind backward, {args.images} images of {args.pixels} pixels a rank",
        largest_difference=difference,
        ms_by_when_sent={way: 1e3 * times[way].median for way in ways},
        communication_ms=communication,
        # nothing to tell where the communication is less than the machine's noise
        hidden_share=hidden / communication if communication > 0 else None,
        against={"sent after": speedup(times["during"], times["after"])},
        repetitions=args.repetitions,
    )
