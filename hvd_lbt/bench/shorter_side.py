"""`hvd_lbt bench input --shorter-side N`: the training input before and after a conversion.

The same training images as WebDataset shards, once as they are and once made smaller by
`hvd_lbt data convert --shorter-side N`: images a second with the recipe's crops and image size, the
bytes, and how far the evaluation images (resized and cropped as the recipe says) move.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hvd_lbt.bench.harness import Lines, Subject, speedup, time_interleaved
from hvd_lbt.data.convert import convert
from hvd_lbt.data.pipeline import evaluation_batches
from hvd_lbt.data.shrink import Shrink
from hvd_lbt.data.store import Store, open_train_split
from hvd_lbt.recipe import DataRecipe

BEFORE, AFTER = "as they are", "made smaller"


def measure(
    source: Path,
    data: DataRecipe,
    shrink: Shrink,
    batches: Callable[..., Iterator[Tensor]],
    *,
    micro_batch: int,
    count: int,
    repetitions: int,
    threads: int,
    device: torch.device,
    lines: Lines,
) -> None:
    """Convert SOURCE twice, compare, time. batches: of a store, as training reads it; count: of one
    timing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        stores: dict[str, Store] = {}
        for name, its in ((BEFORE, None), (AFTER, shrink)):
            out, began = Path(scratch, name), time.perf_counter()
            convert(source, out, form="webdataset", samples_per_shard=500, jobs=threads, shrink=its)
            seconds = time.perf_counter() - began
            stores[name] = open_train_split(out)
            lines.result(
                case=f"convert, {name}",
                images_per_second=len(stores[name]) / seconds,
                bytes=sum(len(stores[name].read(at)) for at in range(len(stores[name]))),
                **({} if its is None else its.about()),
            )
        if data.eval_resize is not None:
            _compare(stores, data, micro_batch, device, lines)
        streams = {name: batches(its, data, micro_batch, device) for name, its in stores.items()}

        def take(name: str, times: int) -> None:
            for _ in range(times):
                next(streams[name])

        subjects = {
            name: Subject(run=partial(take, name, count), prepare=partial(_settle, take, name))
            for name in streams
        }
        waits = {"synchronize": torch.cuda.synchronize} if device.type == "cuda" else {}
        times = time_interleaved(subjects, repetitions=repetitions, warmups=1, **waits)
        for name, taken in times.items():
            lines.result(
                case=f"training input, {name}",
                images_per_second=count * micro_batch / taken.median,
                against={} if name == BEFORE else {BEFORE: speedup(taken, times[BEFORE])},
                **taken.summary(),
            )


def _settle(take: Callable[[str, int], None], name: str) -> None:
    """Use up what was prepared while the other was timed."""
    time.sleep(1.0)
    take(name, 4)


def _compare(
    stores: dict[str, Store],
    data: DataRecipe,
    micro_batch: int,
    device: torch.device,
    lines: Lines,
) -> None:
    """The mean absolute difference of the evaluation images' pixels, of 255."""
    count = len(stores[BEFORE])
    ranges = [(at, min(micro_batch, count - at)) for at in range(0, count, micro_batch)]
    std = torch.tensor(data.std).view(3, 1, 1)
    made = [
        evaluation_batches(its, data, ranges, micro_batch=micro_batch, device=device)
        for its in (stores[BEFORE], stores[AFTER])
    ]
    differences = [
        ((before.images - after.images).cpu() * std).abs().double().mean(dim=(1, 2, 3))
        for before, after in zip(*made, strict=True)
    ]
    each = torch.cat(differences)
    lines.result(
        case="evaluation images, before against after",
        images=count,
        mean_absolute_difference=each.mean().item(),
        worst_image=each.max().item(),
    )
