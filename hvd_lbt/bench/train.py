"""`hvd_lbt bench train`: images a second of the training step against a bare PyTorch loop.

Synthetic images that lie in memory, the same network twice: once with the reducer, the wire, ghost
batch norm's statistics and FusedSGD, by the `Training` of `hvd_lbt train`; once with
loss.backward() and torch.optim.SGD(fused=True). A third update measures the gradient's noise:
`gradient_noise_costs` is what that adds to training, as a share, when done every `run.noise_every`
updates. The batch grows on the way. Precision, channels_last and compile are the recipe's;
compiled, both are.
"""

import argparse
import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hvd_lbt import comm
from hvd_lbt.arguments import count
from hvd_lbt.auto_micro_batch import find, fixed
from hvd_lbt.bench.harness import (
    Lines,
    add_common_arguments,
    check_equal,
    speedup,
    time_interleaved,
)
from hvd_lbt.errors import UserError
from hvd_lbt.evaluate import local_device
from hvd_lbt.hyperparameters import make_optimizer
from hvd_lbt.memory import memory_of
from hvd_lbt.models import build_model, compiled
from hvd_lbt.probe import Demand
from hvd_lbt.recipe import Recipe, load_recipe
from hvd_lbt.sampler import by_update
from hvd_lbt.schedule.layout import largest_share, make_layout
from hvd_lbt.schedule.plan import Update, layout_of
from hvd_lbt.training import Training, make_training
from hvd_lbt.world import World

LR = 0.01


class BareLoop:
    """What the training is compared with: the same weights and images, in plain PyTorch."""

    def __init__(self, recipe: Recipe, world: World, device: torch.device, graphs: int):
        torch.manual_seed(recipe.run.seed)
        model = build_model(recipe.model, 10, recipe.layout.ghost_batch).to(device)
        memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.recipe, self.world, self.device = recipe, world, device
        schedule = recipe.schedule
        like = make_optimizer(self.model, recipe.optimizer, LR, schedule.momentum)
        keys = ("params", "weight_decay", "lr", "momentum", "nesterov")
        groups = [{key: group[key] for key in keys} for group in like.param_groups]
        self.optimizer = torch.optim.SGD(groups, fused=True)
        self.forward = compiled(self._forward, graphs) if recipe.run.compile else self._forward

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        bf16 = self.recipe.run.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), logits.detach()

    def update(self, global_batch: int, images: Tensor, labels: Tensor) -> None:
        """One update of this rank's share alone."""
        mine = global_batch // self.world.size
        layout = self.recipe.layout.model_dump()
        for part in make_layout(mine, rank=0, size=1, **layout).micro_batches:
            loss, _ = self.forward(images[: len(part)], labels[: len(part)])
            (loss / mine).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _check_plain(recipe: Recipe) -> None:
    """Raise UserError for what the bare loop does not do."""
    kept = {
        "loss.label_smoothing": recipe.loss.label_smoothing,
        "loss.mixup": recipe.loss.mixup,
        "loss.cutmix": recipe.loss.cutmix,
        "loss.function": recipe.loss.function,
        "ema.decay": recipe.ema.decay,
        "optimizer.clip_norm": recipe.optimizer.clip_norm,
    }
    for key, value in kept.items():
        if value:
            off = 0 if key in ("loss.label_smoothing", "loss.mixup", "loss.cutmix") else "null"
            raise UserError(
                f"{key}: {value} is not what the bare loop does, which `bench train` is "
                f"compared with; add --set {key}={off}."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench train`."""
    parser.add_argument("--recipe", default="cifar10_small", help="whose network [cifar10_small]")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=count, nargs="+", default=[128, 512], metavar="B")
    add_common_arguments(parser, repetitions=10)


def _with_number(recipe: Recipe, global_batch: int, training: Training, world: World) -> Recipe:
    """The recipe with what layout.micro_batch: auto finds for this batch, on all ranks."""
    memory = memory_of(training.device, world.local_size)
    comm.barrier()
    ghosts = recipe.layout.ghost_batch
    demand = Demand(
        image_size=recipe.data.image_size,
        ghost_batch=ghosts,
        most=largest_share(global_batch, ghosts, world.size),
    )
    gather = comm.allgather_object
    found = find(recipe, [demand], training, memory, classes=10, gather=gather)
    return fixed(recipe, found.sizes[0])


def main(args: argparse.Namespace) -> int:  # long: both loops and what they share, in order
    """Check that both loops give the same weights, then time one update of each global batch."""
    load_recipe(args.recipe, args.settings)  # an error of it comes before anything starts
    world = comm.init()
    if min(args.batches) < 2 * world.size:
        raise UserError(
            f"--batches {min(args.batches)}: each of {world.size} ranks needs at least 2 samples."
        )
    device = local_device(world)
    one_rank = ["wire.form=fp32"] if world.size == 1 else []
    recipe = load_recipe(args.recipe, [*one_rank, *args.settings])
    _check_plain(recipe)
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
    every = recipe.run.noise_every
    graphs = 2 * len(args.batches)
    training = make_training(recipe, 10, world=world, device=device, graphs=graphs, train_samples=1)
    if recipe.layout.micro_batch == "auto":
        recipe = _with_number(recipe, max(args.batches), training, world)
    settings["micro_batch"] = recipe.layout.micro_batch
    lines = Lines("train", settings=settings, path=args.out, speaks=world.rank == 0)
    bare = BareLoop(recipe, world, device, graphs)

    measured_updates = itertools.count()

    def step(global_batch: int, measure: bool = False) -> None:
        # Those that measure are consecutive: an update of one micro-batch is compared with the one
        # before it.
        training.noise.every = int(measure)
        update = Update(
            index=next(measured_updates) if measure else 0,
            stage=0,
            epoch=0.0,
            samples_seen=0,
            global_batch=global_batch,
            lr=LR,
            momentum=recipe.schedule.momentum,
            noise_scale=0.0,
            settled=1.0,
            ghost_batch=None,
        )
        layout = recipe.layout.model_dump()
        parts = layout_of(update, world, **layout).micro_batches
        source = ((images[: len(part)], labels[: len(part)]) for part in parts)
        for _, batches in by_update([update], source, world, **layout):
            training.update(update, batches)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        comm.barrier()

    side = recipe.data.image_size
    memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    # one more: a single sample that is left joins the last micro-batch
    assert recipe.layout.micro_batch != "auto"
    shape = (recipe.layout.micro_batch + 1, 3, side, side)
    images = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 10, shape[:1], device=device)
    step(args.batches[0])
    bare.update(args.batches[0], images, labels)
    if world.size == 1:  # on several ranks the bare loops do not know of each other
        tolerance = 1e-5 if recipe.run.precision == "fp32" and device.type == "cpu" else 1e-2
        check_equal(
            "weights",
            training.model.parameters(),
            bare.model.parameters(),
            tolerance=tolerance,
        )
    for batch in args.batches:
        times = time_interleaved(
            {
                "ours": partial(step, batch),
                "measured": partial(step, batch, measure=True),
                "bare": partial(bare.update, batch, images, labels),
            },
            repetitions=args.repetitions,
            warmups=1,
            synchronize=wait,
        )
        measured = speedup(times["ours"], times["measured"])
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
