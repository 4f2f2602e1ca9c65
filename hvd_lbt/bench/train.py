"""`hvd_lbt bench train`: images a second of the training step against a bare PyTorch loop.

Synthetic images that lie in memory, the same network twice: once with the reducer, the wire, ghost
batch norm's statistics and FusedSGD, as `hvd_lbt train` runs it; once with loss.backward() and
torch.optim.SGD(fused=True). A third update measures the gradient's noise: `gradient_noise_costs` is what that
adds to training, as a share, when done every `run.noise_every` updates. The batch grows on the way. Precision, channels_last
and compile are the recipe's; compiled, both are.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hvd_lbt import comm
from hvd_lbt.bench.harness import Lines, check_equal, speedup, time_interleaved
from hvd_lbt.evaluate import local_device
from hvd_lbt.measure.gradient_noise import GradientNoise
from hvd_lbt.models import RunningStatistics, build_model, compiled, make_forward
from hvd_lbt.optim import FusedSGD
from hvd_lbt.recipe import load_recipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.schedule.layout import make_layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench train`."""
    parser.add_argument("--recipe", default="cifar10_small", help="whose network [cifar10_small]")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512], metavar="B")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")


def main(args: argparse.Namespace) -> int:
    """Check that both loops give the same weights, then time one update of each global batch."""
    world = comm.init()
    device = local_device(world)
    one_rank = ["wire.form=fp32"] if world.size == 1 else []
    recipe = load_recipe(args.recipe, [*one_rank, *args.settings])
    settings = {
        "recipe": args.recipe,
        "set": args.settings,
        "world_size": world.size,
        "device": device.type,
        "wire": recipe.wire.form,
        "precision": recipe.run.precision,
        "channels_last": recipe.run.channels_last,
        "compile": recipe.run.compile,
    }
    lines = Lines("train", settings=settings, path=args.out, speaks=world.rank == 0)
    memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model(recipe.model, 10, recipe.layout.ghost_batch).to(device)
        models.append(model.to(memory_format=memory_format))  # type: ignore[call-overload]
    ours, theirs = models
    statistics = RunningStatistics(ours)
    momentum, decay = recipe.schedule.momentum, recipe.optimizer.weight_decay
    optimizer = FusedSGD(ours.parameters(), 0.01, momentum, weight_decay=decay)
    peer = torch.optim.SGD(theirs.parameters(), 0.01, momentum, weight_decay=decay, fused=True)
    reducer = GradientReducer(
        ours,
        optimizer,
        world=world,
        allreduce_async=comm.allreduce_async_,
        synchronize=comm.synchronize,
        wire=recipe.wire.form,
    )
    side = recipe.data.image_size

    noise = GradientNoise(ours, 1)

    def bare_forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
            logits = theirs(images)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), logits.detach()

    forwards = [make_forward(ours, recipe.run), bare_forward]
    if recipe.run.compile:
        forwards = [compiled(one, graphs=2 * len(args.batches)) for one in forwards]
    our_forward, their_forward = forwards

    def step(global_batch: int, measure: bool = False) -> None:
        if measure:
            noise.begin(0, global_batch)
        layout = make_layout(
            global_batch, rank=world.rank, size=world.size, **recipe.layout.model_dump()
        )
        for index, part in enumerate(layout.micro_batches):
            loss, _ = our_forward(images[: len(part)], labels[: len(part)])
            reducer.backward(loss / global_batch, last=index == len(layout.micro_batches) - 1)
            noise.add_part(len(part))
        handles = [comm.allreduce_async_(statistics.collected, "statistics")]
        handles += noise.send(comm.allreduce_async_)
        optimizer.step()
        for handle in handles:
            comm.synchronize(handle)
        noise.end(reducer.squared_norm)
        statistics.fold(global_batch)

    def bare(global_batch: int) -> None:
        mine = global_batch // world.size
        for first in range(0, mine, recipe.layout.micro_batch):
            count = min(recipe.layout.micro_batch, mine - first)
            loss, _ = their_forward(images[:count], labels[:count])
            (loss / mine).backward()
        peer.step()
        peer.zero_grad()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        comm.barrier()

    shape = (recipe.layout.micro_batch, 3, side, side)
    images = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 10, shape[:1], device=device)
    step(args.batches[0])
    bare(args.batches[0])
    if world.size == 1:  # on several ranks the bare loops do not know of each other
        tolerance = 1e-5 if recipe.run.precision == "fp32" and device.type == "cpu" else 1e-2
        check_equal("weights", ours.parameters(), theirs.parameters(), tolerance=tolerance)
    for batch in args.batches:
        times = time_interleaved(
            {
                "ours": partial(step, batch),
                "measured": partial(step, batch, measure=True),
                "bare": partial(bare, batch),
            },
            repetitions=args.repetitions,
            warmups=1,
            synchronize=wait,
        )
        measured = speedup(times["ours"], times["measured"])
        every = recipe.run.noise_every
        lines.result(
            case=f"global batch {batch}",
            images_per_second=batch / times["ours"].median,
            against={
                "bare PyTorch loop": speedup(times["ours"], times["bare"]),
                "gradient noise measured in every update": measured,
            },
            gradient_noise_costs=(measured["ratio"] - 1) / every if every else 0.0,
            **times["ours"].summary(),
        )
    comm.shutdown()
    return 0
