"""Exact evaluation: every test image once, on any number of workers."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_lbt import checkpoint, comm, ops
from hvd_lbt.data.batches import batch_maker
from hvd_lbt.data.digits import write_digits
from hvd_lbt.data.identity import same_on_all_ranks
from hvd_lbt.data.samples import Batch
from hvd_lbt.data.store import Store, open_test_split
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.errors import OutOfMemoryError, SampleError, UserError
from hvd_lbt.models import build_model
from hvd_lbt.out_of_memory import is_out_of_memory, release_cached_memory
from hvd_lbt.recipe import DataRecipe, Recipe
from hvd_lbt.world import World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """loss: mean cross-entropy; top1, top5: accuracies in 0..1; samples: how many were counted."""

    loss: float
    top1: float
    top5: float
    samples: int


def evaluate(
    model: nn.Module,
    store: Store | SyntheticStore,
    data: DataRecipe,
    *,
    micro_batch: int,
    world: World,
    allreduce: Callable[[Tensor, str], Tensor],
    device: torch.device,
    on_skipped: Callable[[SampleError], None] | None = None,
    on_smaller: Callable[[OutOfMemoryError, int], None] | None = None,
) -> Evaluation:
    """Evaluate on all of `store`; each rank takes a contiguous share, sums are exact counts.

    on_skipped: see `train_batches`; what is skipped is counted nowhere. If the memory of any rank
    runs out, all ranks evaluate again with half of the micro-batch, which goes to `on_smaller`;
    with a micro-batch of one sample they raise OutOfMemoryError.
    """
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
            return _evaluate(model, batches, len(store), micro_batch, world, allreduce, device)
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
    # loss, right, right among five, samples; and by rank whether its memory ran out
    sums = torch.zeros(4 + world.size, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for batch in make_batches(ranges):
            sums[:4] += _counted(model, batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sums[4 + world.rank] = 1  # the others wait for this rank's sums
    model.train(was_training)
    loss, right, among_five, samples, *ran_out = allreduce(sums, "evaluation").tolist()
    if any(ran_out):
        ranks = {rank: "the evaluation" for rank, there in enumerate(ran_out) if there}
        raise OutOfMemoryError(ranks, "The evaluation needs smaller micro-batches.")
    if not samples:
        raise UserError("All test images were skipped: none of them can be decoded.")
    return Evaluation(
        loss=loss / samples, top1=right / samples, top5=among_five / samples, samples=int(samples)
    )


def _counted(model: nn.Module, batch: Batch) -> Tensor:
    """(4,) float64: loss, right answers, those among five, samples that are not skipped."""
    logits = model(batch.images).float()
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
    model = build_model(recipe.model, len(state["classes"]), recipe.layout.ghost_batch)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The checkpoint {args.checkpoint} does not hold the weights of its recipe's network: "
            f"{reason}."
        ) from error
    world = comm.init()
    device = local_device(world)
    store = open_test_split(
        args.data or write_digits(),
        tuple(state["classes"]),
        recipe.data.classes,
        recipe.data.timeout,
    )
    same_on_all_ranks({"test": store}, comm.allgather_object)
    result = evaluate(
        model.to(device),
        store,
        recipe.data,
        micro_batch=_micro_batch(state, recipe),
        world=world,
        allreduce=comm.allreduce_,
        device=device,
        on_smaller=lambda error, size: print(
            f"{error.who}. All ranks evaluate again with a micro-batch of {size}.",
            file=sys.stderr,
            flush=True,
        ),
    )
    if world.rank == 0:
        print(json.dumps(asdict(result)), flush=True)
    comm.shutdown()
    return 0


def _micro_batch(state: Mapping[str, Any], recipe: Recipe) -> int:
    """The recipe's, or what the run had found for it."""
    if recipe.layout.micro_batch != "auto":
        return recipe.layout.micro_batch
    found: int = state["micro_batch"]["evaluation"]
    return found


def local_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", world.device)
    ops.require_on(device)
    return device
