"""DALI turns sample positions into batches: read, cut out, decode, resize, flip, normalise.

Every random number comes from `order.sample_uniforms` and enters DALI as an input, so the pixels
of a sample are a function of (seed, epoch, position) alone: not of the micro-batch, the number of
workers, the threads, or where a run was resumed.
"""

import io
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hvd_lbt.data.order import epoch_order, sample_uniforms, stream_ranges
from hvd_lbt.data.store import ImageFolder
from hvd_lbt.errors import SampleError, UserError
from hvd_lbt.recipe import DataRecipe

try:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali import math as dali_math
except ImportError as error:
    raise UserError(
        f"NVIDIA DALI makes the images, and it does not import ({error}). "
        "`launch/setup` installs the build that fits; `hvd_lbt doctor` says what is missing."
    ) from error

# The uniforms of one sample, by place. Unused ones are drawn all the same.
AREA, RATIO, LEFT, TOP, FLIP, DRAWS = 0, 1, 2, 3, 4, 8


@dataclass(frozen=True)
class Batch:
    """images: fp32 (n, 3, H, W), normalised; labels: int64 (n,)."""

    images: Tensor
    labels: Tensor


class TrainSamples:
    """The stream of training samples, epoch after epoch, each in its own order."""

    def __init__(self, store: ImageFolder, seed: int):
        self.store, self.seed = store, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, first: int, count: int) -> np.ndarray:
        """The store's indices of the stream's samples [first, first + count): int64 (count,)."""
        pieces = []
        for epoch, position, length in stream_ranges(first, count, len(self.store)):
            if epoch != self._epoch:
                self._epoch, self._order = (epoch, epoch_order(self.seed, epoch, len(self.store)))
            pieces.append(self._order[position : position + length])
        return np.concatenate(pieces)

    def uniforms(self, first: int, count: int) -> np.ndarray:
        """Their random numbers: fp32 (count, DRAWS) in [0, 1)."""
        pieces = [
            sample_uniforms(self.seed, epoch, position, length, DRAWS)
            for epoch, position, length in stream_ranges(first, count, len(self.store))
        ]
        # fp32 could round up to 1.0, which would be a position past the end
        return np.minimum(np.concatenate(pieces), 1 - 2**-24).astype(np.float32)


def train_batches(
    store: ImageFolder,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int]],
    *,
    seed: int,
    micro_batch: int,
    device: torch.device,
) -> Iterator[Batch]:
    """One batch for each (first sample of the stream, count ≤ micro_batch) of `ranges`, in order.

    Raises SampleError naming the first file that cannot be read or decoded.
    """
    samples = TrainSamples(store, seed)

    # DALI warns of an input that the graph does not use.
    uniforms = samples.uniforms if data.augment != "none" or data.flip else None
    return _run(store, data, ranges, samples.indices, uniforms, _augmented, micro_batch, device)


def test_batches(
    store: ImageFolder,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int]],
    *,
    micro_batch: int,
    device: torch.device,
) -> Iterator[Batch]:
    """One batch for each (first index of the store, count) of `ranges`; nothing is random."""

    def indices(first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count)

    return _run(store, data, ranges, indices, None, _plain, micro_batch, device)


def decode_one(image: np.ndarray, size: int) -> Tensor:
    """A check of DALI: encode (H, W, 3) as PNG, and have it decoded and resized to (3, size, size)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    encoded = np.frombuffer(file.getvalue(), dtype=np.uint8)
    data = DataRecipe(image_size=size, augment="none", mean=(0, 0, 0), std=(1, 1, 1))
    one_sample = ([encoded], [np.zeros(1, dtype=np.int64)])
    images, _ = _build(data, _plain, itertools.repeat(one_sample), False, 1, 1, 1).run()
    return torch.from_dlpack(images.as_tensor())[0].clone()


def _run(
    store: ImageFolder,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int]],
    indices_of: Callable[[int, int], np.ndarray],
    uniforms_of: Callable[[int, int], np.ndarray] | None,
    graph: Callable,
    micro_batch: int,
    device: torch.device,
) -> Iterator[Batch]:
    todo = iter(ranges)
    in_flight: deque[np.ndarray] = deque()  # what DALI has been given and not yet handed back

    def source() -> tuple:
        first, count = next(todo)
        indices = indices_of(first, count)
        in_flight.append(indices)
        encoded = [store.read(int(index)) for index in indices]
        labels = list(store.labels[indices].reshape(-1, 1))
        uniforms = () if uniforms_of is None else (uniforms_of(first, count),)
        return encoded, labels, *uniforms

    draws = uniforms_of is not None
    pipeline = _build(data, graph, source, draws, micro_batch, data.threads, data.prefetch)
    while True:
        try:
            images, labels = pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            raise _name_the_file(store, data, in_flight, error) from error
        in_flight.popleft()
        # DALI takes its buffers back at the next run: labels are copied, images move or are copied.
        yield Batch(
            torch.from_dlpack(images.as_tensor()).to(device, copy=True),
            torch.from_dlpack(labels.as_tensor()).flatten().to(device, copy=True),
        )


def _build(
    data: DataRecipe,
    graph: Callable,
    source: Callable | Iterable,
    draws: bool,
    batch: int,
    threads: int,
    prefetch: int,
) -> Pipeline:
    pipeline = Pipeline(
        batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=prefetch
    )
    with pipeline:
        encoded, label, *uniforms = fn.external_source(source=source, num_outputs=2 + draws)
        images, mirror = graph(data, encoded, *uniforms)
        images = fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=list(data.mean),
            std=list(data.std),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images, label)
    pipeline.build()
    return pipeline


def _augmented(data: DataRecipe, encoded, uniforms=None):
    """Decoded, cut out and sized training images, and whether to mirror each."""
    size = data.image_size
    if data.augment == "random_resized_crop":
        images = fn.resize(_random_cut(encoded, uniforms), resize_x=size, resize_y=size)
    else:
        images = fn.resize(fn.decoders.image(encoded), resize_x=size, resize_y=size)
    if data.augment == "pad_crop":
        offset = dali_math.floor(uniforms[LEFT : TOP + 1] * (2 * data.pad + 1)) - data.pad
        images = fn.slice(
            images,
            offset,
            [float(size), float(size)],
            axis_names="WH",
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    mirror = fn.cast(uniforms[FLIP] >= 0.5, dtype=types.INT32) if data.flip else 0
    return images, mirror


def _random_cut(encoded, uniforms):
    """Inception's cut: 8 % to 100 % of the area, aspect ratio 3/4 to 4/3, uniform in its logarithm.

    torchvision draws anew when the cut does not fit; here its sides are cropped to the image's,
    so that each sample needs a fixed number of random draws.
    """
    shape = fn.cast(fn.peek_image_shape(encoded), dtype=types.FLOAT)
    height, width = shape[0], shape[1]
    area = height * width * (0.08 + 0.92 * uniforms[AREA])
    log_ratio = math.log(4 / 3)
    ratio = dali_math.exp((2 * uniforms[RATIO] - 1) * log_ratio)
    cut_width = dali_math.clamp(dali_math.floor(dali_math.sqrt(area * ratio) + 0.5), 1.0, width)
    cut_height = dali_math.clamp(dali_math.floor(dali_math.sqrt(area / ratio) + 0.5), 1.0, height)
    left = dali_math.floor(uniforms[LEFT] * (width - cut_width + 1))
    top = dali_math.floor(uniforms[TOP] * (height - cut_height + 1))
    return fn.decoders.image_slice(
        encoded,
        fn.stack(left, top),
        fn.stack(cut_width, cut_height),
        axis_names="WH",
        normalized_anchor=False,
        normalized_shape=False,
    )


def _plain(data: DataRecipe, encoded):
    """Decoded and sized test images: the centre of the image resized to `eval_resize`, if set."""
    images = fn.decoders.image(encoded)
    size = data.image_size
    if data.eval_resize is None:
        return fn.resize(images, resize_x=size, resize_y=size), 0
    images = fn.resize(images, resize_shorter=data.eval_resize)
    return fn.crop(images, crop=(size, size)), 0


def _name_the_file(
    store: ImageFolder, data: DataRecipe, in_flight: Iterable[np.ndarray], error: RuntimeError
) -> Exception:
    """Decode what was in flight one by one, to name the file that DALI's batch error does not."""
    for index in np.concatenate(list(in_flight)):
        one_sample = ([store.read(int(index))], [np.zeros(1, dtype=np.int64)])
        one = _build(data, _plain, itertools.repeat(one_sample), False, 1, 1, 1)
        try:
            one.run()
        except RuntimeError as reason:
            return SampleError(
                f"{store.path(int(index))} cannot be decoded as an image ({_cause(reason)}). "
                "Replace or remove it."
            )
    return error


def _cause(error: RuntimeError) -> str:
    """What DALI says of the cause, without its stack."""
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines()]
    return next(line for line in lines if line)
