"""`hvd_lbt bench step`: from accumulated gradients to updated weights, on real ranks.

Run it under a launcher: `launch/local 2 bench step`. ResNet-50's parameters; the backward is
replaced by one that hands out gradients that are there already, so that what is timed is
communication and update. The peer in the same run: Horovod's DistributedOptimizer with its fp16
compression and torch's fused SGD.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt import comm
from hvd_lbt.bench.harness import Lines, check_equal, speedup, time_interleaved
from hvd_lbt.models import build_model
from hvd_lbt.optim import FusedSGD
from hvd_lbt.recipe import load_recipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench step`."""
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--bucket-mb", type=float, default=25.0)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")


class _Given(torch.autograd.Function):
    """A loss whose backward hands every parameter a given gradient, last parameter first."""

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return None, *(gradient.clone() for gradient in ctx.gradients)


def main(args: argparse.Namespace) -> int:
    """Check that all give the same weights, then time them side by side."""
    world = comm.init()
    lines = Lines(
        "step",
        settings={
            "network": "resnet50",
            "world_size": world.size,
            "repetitions": args.repetitions,
            "bucket_mb": args.bucket_mb,
        },
        path=args.out,
        speaks=world.rank == 0,
    )
    for accumulate in args.accumulate:
        _measure(accumulate, args, world, lines)
    comm.shutdown()
    return 0


def _measure(accumulate: int, args: argparse.Namespace, world: World, lines: Lines) -> None:
    hvd = comm.horovod()
    recipe = load_recipe("imagenet_resnet50")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build_model(recipe.model, 1000, recipe.layout.ghost_batch))
    torch.manual_seed(world.rank)
    parts = world.size * accumulate
    gradients = [torch.randn_like(p) / 100 / parts for p in models[0].parameters()]

    def backward(model: nn.Module) -> Tensor:
        return _Given.apply(gradients, *model.parameters())

    optimizer = FusedSGD(models[0].parameters(), **SETTINGS)
    reducer = GradientReducer(
        models[0],
        optimizer,
        world=world,
        allreduce_async=comm.allreduce_async_,
        synchronize=comm.synchronize,
        bucket_mb=args.bucket_mb,
        name=f"ours{accumulate}",
    )

    def ours() -> None:
        for index in range(accumulate):
            reducer.backward(backward(models[0]), last=index == accumulate - 1)
        optimizer.step()

    peer = hvd.DistributedOptimizer(
        torch.optim.SGD(models[1].parameters(), fused=True, **SETTINGS),
        named_parameters=[(f"{accumulate}.{n}", p) for n, p in models[1].named_parameters()],
        compression=hvd.Compression.fp16,
        op=hvd.Sum,
        backward_passes_per_step=accumulate,
    )

    def theirs() -> None:
        for _ in range(accumulate):
            backward(models[1]).backward()
        peer.step()
        peer.zero_grad()

    def only_backward() -> None:
        for _ in range(accumulate):
            for gradient in gradients:
                gradient.clone()

    work: dict[str, Callable[[], object]] = {
        "ours": ours,
        "Horovod": theirs,
        "backward": only_backward,
    }
    for _ in range(2):
        ours()
        theirs()
    # fp16 has 11 bits; gradients are of order 0.01 and lr/(1-m) is 1
    largest = check_equal(
        "weights", models[0].parameters(), models[1].parameters(), tolerance=2 * 2.0**-11
    )
    times = time_interleaved(work, repetitions=args.repetitions, synchronize=comm.barrier)
    lines.result(
        case=f"communication and update, accumulation of {accumulate}",
        largest_difference=largest,
        backward_ms=1e3 * times["backward"].median,
        peer_ms=1e3 * times["Horovod"].median,
        against={"hvd.DistributedOptimizer, fp16": speedup(times["ours"], times["Horovod"])},
        **times["ours"].summary(),
    )
