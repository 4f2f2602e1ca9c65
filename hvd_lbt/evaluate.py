"""Exact evaluation: every test image once, on any number of workers."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_lbt import checkpoint, comm, ops
from hvd_lbt.data.batches import batch_maker
from hvd_lbt.data.identity import same_on_all_ranks
from hvd_lbt.data.samples import Batch, Images
from hvd_lbt.data.store import open_test_data
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.errors import OutOfMemoryError, SampleError, UserError, one_line
from hvd_lbt.growing import Growing
from hvd_lbt.models import build_model
from hvd_lbt.out_of_memory import is_out_of_memory, reason, release_cached_memory
from hvd_lbt.recipe import DataRecipe, Recipe
from hvd_lbt.world import World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """loss: mean cross-entropy; top1, top5: accuracies in 0..1; samples: how many were counted.

    ema_…: the same of the averaged weights, where there are such.
    """

    loss: float
    top1: float
    top5: float
    samples: int
    ema_loss: float | None = None
    ema_top1: float | None = None
    ema_top5: float | None = None

    @property
    def best_top1(self) -> float:
        """What the best checkpoint is chosen by: of the averaged weights, where there are such."""
        return self.top1 if self.ema_top1 is None else self.ema_top1

    def to_dict(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    store: Images | SyntheticStore,
    data: DataRecipe,
    *,
    micro_batch: int,
    world: World,
    allreduce: Callable[[Tensor, str], Tensor],
    device: torch.device,
    on_skipped: Callable[[SampleError], None] | None = None,
    on_smaller: Callable[[OutOfMemoryError, int], None] | None = None,
    averages: Mapping[str, Tensor] | None = None,
    image_size: int | None = None,
) -> Evaluation:
    """Evaluate on all of `store`; each rank takes a contiguous share, sums are exact counts.

    on_skipped: see `train_batches`; what is skipped is counted nowhere. If the memory of any rank
    runs out, all ranks evaluate again with half of the micro-batch, which goes to `on_smaller`;
    with a micro-batch of one sample they raise OutOfMemoryError. averages: of the weights, to be
    evaluated too, on the same batches. image_size: of the training images, None: data.image_size;
    `DataRecipe.for_evaluation` says what that of the test images is then.
    """
    data = data.for_evaluation(image_size)
    micro_batch = min(micro_batch, -(-len(store) // world.size))
    while True:
        batches = partial(
            batch_maker(data).evaluation_batches,
            store,
            data,
            micro_batch=micro_batch,
            device=device,
            local_size=world.local_size,
            on_skipped=on_skipped,
        )
        try:
            return _evaluate(
                model, averages, batches, len(store), micro_batch, world, allreduce, device
            )
        except OutOfMemoryError as error:
            release_cached_memory()
            if micro_batch == 1:
                raise
            micro_batch = -(-micro_batch // 2)
            if on_smaller:
                on_smaller(error, micro_batch)


@torch.inference_mode()
def _evaluate(
    model: nn.Module,
    averages: Mapping[str, Tensor] | None,
    make_batches: Callable[[list[tuple[int, int]]], Iterator[Batch]],
    test_samples: int,
    micro_batch: int,
    world: World,
    allreduce: Callable[[Tensor, str], Tensor],
    device: torch.device,
) -> Evaluation:
    """Raises OutOfMemoryError, on all ranks, if the memory of any rank runs out."""
    first, end = (test_samples * rank // world.size for rank in (world.rank, world.rank + 1))
    ranges = [(at, min(micro_batch, end - at)) for at in range(first, end, micro_batch)]
    # loss, right, right among five, samples; the same of the averages; and by rank whether its
    # memory ran out
    sums = torch.zeros(8 + world.size, dtype=torch.float64, device=device)
    was_training, own = model.training, ""
    model.eval()
    try:
        for batch in make_batches(ranges):
            sums[:4] += _counted(model(batch.images), batch)
            if averages:
                sums[4:8] += _counted(_with_weights(model, averages, batch.images), batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        own = reason(error)
        sums[8 + world.rank] = 1  # the others wait for this rank's sums
    model.train(was_training)
    found = allreduce(sums, "evaluation").tolist()
    of_weights, of_averages, ran_out = found[:4], found[4:8], found[8:]
    if any(ran_out):
        ranks = {rank: "the evaluation" for rank, there in enumerate(ran_out) if there}
        raise OutOfMemoryError(ranks, "The evaluation needs smaller micro-batches.", own)
    samples = of_weights[3]
    if not samples:
        raise UserError("All test images were skipped: none of them can be decoded.")
    loss, top1, top5 = (value / samples for value in of_weights[:3])
    measured = Evaluation(loss=loss, top1=top1, top5=top5, samples=int(samples))
    if not averages:
        return measured
    loss, top1, top5 = (value / samples for value in of_averages[:3])
    return replace(measured, ema_loss=loss, ema_top1=top1, ema_top5=top5)


def _with_weights(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The model's logits with other weights; its own are not touched."""
    # tied weights are there under each of their names
    return torch.func.functional_call(model, dict(weights), (images,), tie_weights=False)


def _counted(logits: Tensor, batch: Batch) -> Tensor:
    """(4,) float64: loss, right answers, those among five, samples that are not skipped."""
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
    loss = F.cross_entropy(logits, batch.labels, reduction="sum")
    counted = (loss, best[:, 0].sum(), best.sum(), (batch.labels >= 0).sum())
    return torch.stack([value.double() for value in counted])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt evaluate`."""
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/update-NNNNNNNN.pt")
    parser.add_argument("--data", type=Path, help="a data set in any format [digits]")


def main(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint on any number of ranks and print the result as a JSON line."""
    state, recipe = checkpoint.load_trained(args.checkpoint)
    model = build_model(
        recipe.model,
        len(state["classes"]),
        recipe.layout.ghost_batch,
        image_size=recipe.data.image_size,
    )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = one_line(error)
        raise UserError(
            f"The checkpoint {args.checkpoint} does not hold the weights of its recipe's network: "
            f"{reason}."
        ) from error
    world = comm.init()
    device = local_device(world)
    averages = {name: value.to(device) for name, value in checkpoint.averages_in(state).items()}
    store = open_test_data(args.data, tuple(state["classes"]), recipe)
    same_on_all_ranks({"test": store}, comm.allgather_object)
    result = evaluate(
        model.to(device),
        store,
        recipe.data,
        micro_batch=_micro_batch(state, recipe),
        world=world,
        allreduce=comm.allreduce_,
        device=device,
        averages=averages,
        image_size=trained_image_size(state, recipe),
        on_smaller=lambda error, size: print(
            f"{error.who}. All ranks evaluate again with a micro-batch of {size}.",
            file=sys.stderr,
            flush=True,
        ),
    )
    if world.rank == 0:
        print(json.dumps(result.to_dict()), flush=True)
    comm.shutdown()
    return 0


def _micro_batch(state: Mapping[str, Any], recipe: Recipe) -> int:
    """The recipe's, or what the run had found for it."""
    if recipe.layout.micro_batch != "auto":
        return recipe.layout.micro_batch
    found: int = state["micro_batch"]["evaluation"]
    return found


def trained_image_size(state: Mapping[str, Any], recipe: Recipe) -> int | None:
    """The size of the training images at the checkpoint's last update, None: data.image_size."""
    samples, done = state.get("train_samples"), state["update"]
    if not isinstance(samples, int) or not done:
        return None
    plan = Growing(recipe, samples, state.get("growing")).plan
    return plan.at(min(done, plan.updates) - 1).image_size


def local_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", world.device)
    ops.require_on(device)
    return device
