"""Bare DALI pipelines with DALI's own file reader and random numbers: what `bench input` compares
with.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from hvd_lbt.recipe import DataRecipe

SHUFFLED = 1024  # files that DALI's reader draws from: its default


def native_batches(
    root: Path, data: DataRecipe, *, micro_batch: int, threads: int, device: torch.device
) -> Iterator[Tensor]:
    """Images of ROOT/CLASS/FILE as DALI's documentation makes them: shuffled, cut, resized,
    flipped.
    """
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=micro_batch,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=data.prefetch,
        seed=0,
    )
    with pipeline:
        encoded, _ = fn.readers.file(
            file_root=str(root), random_shuffle=True, initial_fill=SHUFFLED
        )
        images = fn.decoders.image_random_crop(encoded, device="mixed" if on_gpu else "cpu")
        images = fn.resize(images, resize_x=data.image_size, resize_y=data.image_size)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=list(data.mean),
            std=list(data.std),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        yield torch.from_dlpack(images.as_tensor())


def native_decoding(root: Path, *, cut: bool, micro_batch: int) -> Iterator[None]:
    """Images of ROOT/CLASS/FILE decoded in one thread and dropped: whole, or a random cut of
    each.
    """
    pipeline = Pipeline(
        batch_size=micro_batch, num_threads=1, device_id=None, prefetch_queue_depth=1, seed=0
    )
    with pipeline:
        encoded, _ = fn.readers.file(file_root=str(root))
        decode = fn.decoders.image_random_crop if cut else fn.decoders.image
        pipeline.set_outputs(decode(encoded))
    pipeline.build()
    while True:
        pipeline.run()
        yield
