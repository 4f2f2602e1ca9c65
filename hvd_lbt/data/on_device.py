"""A data set of small images whole in the device's memory: decoded once, cropped and mirrored
there.

For CIFAR-10 and its like, where decoding every epoch anew is most of the work, and for machines
without DALI. Order, crops and mirroring are those of the DALI pipeline, from the same numbers; so
are the pixels (`pixels`), of JPEG files as far as the two decoders round alike (libjpeg-turbo's
here, in Pillow).
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hvd_lbt.data.crops import FLIP, pad_crops
from hvd_lbt.data.label_noise import noisy_labels
from hvd_lbt.data.reading import Readers
from hvd_lbt.data.samples import Batch, Images, TrainSamples
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.data.teacher import TeacherStore
from hvd_lbt.errors import ReadError, SampleError, UserError
from hvd_lbt.recipe import DataRecipe

DECODED_AT_ONCE = 256  # samples of one task
# All images of a store, uint8 (N, H, W, 3), on one device; gone with the store.
_kept: WeakKeyDictionary[Images, Tensor] = WeakKeyDictionary()


def train_batches(
    store: Images | SyntheticStore,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int, int]],
    *,
    seed: int,
    micro_batch: int,
    device: torch.device,
    local_size: int = 1,
    on_skipped: Callable[[SampleError], None] | None = None,
) -> Iterator[Batch]:
    """One batch for each (first sample of the stream, count, ghost batch) of `ranges`, in order.

    As the DALI pipeline's, without a limit to `micro_batch`. Raises SampleError naming an image
    that cannot be decoded or is not of data.image_size, UserError if all do not fit into memory.
    """
    samples = TrainSamples(_of_files(store), seed, data)
    for first, count, _ in ranges:
        indices, crops, mirror = samples.indices(first, count), None, None
        if data.augment == "pad_crop" or data.flip:
            uniforms = samples.uniforms(first, count)
            crops = pad_crops(uniforms, data.pad) if data.augment == "pad_crop" else None
            mirror = (uniforms[:, FLIP] >= 0.5) & data.flip
        yield _batch(samples.store, data, indices, crops, mirror, device, data.label_noise)


def keep_images(
    stores: Iterable[Images | SyntheticStore], data: DataRecipe, device: torch.device
) -> None:
    """Decode all images of these stores and keep them on the device now, before the first batch."""
    for store in stores:
        _all_images(_of_files(store), data, device)


def evaluation_batches(
    store: Images | SyntheticStore,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int]],
    *,
    micro_batch: int,
    device: torch.device,
    local_size: int = 1,
    on_skipped: Callable[[SampleError], None] | None = None,
) -> Iterator[Batch]:
    """One batch for each (first index of the store, count) of `ranges`; nothing is random."""
    for first, count in ranges:
        yield _batch(_of_files(store), data, np.arange(first, first + count), None, None, device)


def _batch(
    store: Images,
    data: DataRecipe,
    indices: np.ndarray,
    crops: np.ndarray | None,
    mirror: np.ndarray | None,
    device: torch.device,
    label_noise: float = 0.0,
) -> Batch:
    """Crop, mirror, normalise. crops: (left, top) of each, in pixels; outside of the image is
    black. mirror: whether, of each.
    """
    images = _all_images(store, data, device)
    all_labels = noisy_labels(store.labels[indices], indices, len(store.classes), label_noise)
    mean, std = (torch.tensor(value, device=device) for value in (data.mean, data.std))
    if crops is None and mirror is None:
        where, labels = torch.from_numpy(np.stack([indices, all_labels])).to(device)
        whole = images.index_select(0, where).permute(0, 3, 1, 2).contiguous()
        normal = torch.sub(whole, mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
        return Batch(normal, labels.clone())
    nothing = np.zeros((len(indices), 2))
    crops = nothing if crops is None else crops
    mirror = nothing[:, 0] if mirror is None else mirror
    # one transfer: index, left, top, mirror, label
    numbers = np.c_[indices, crops, mirror, all_labels].astype(np.int64)
    where, left, top, mirrored, labels = torch.from_numpy(numbers).to(device).unbind(1)
    side = torch.arange(data.image_size, device=device)
    rows = top[:, None] + side
    columns = left[:, None] + torch.where(mirrored[:, None] > 0, side.flip(0), side)
    last = data.image_size - 1
    inside = ((rows >= 0) & (rows <= last))[:, :, None] & ((columns >= 0) & (columns <= last))[
        :, None
    ]
    pixels = images[
        where[:, None, None], rows.clamp(0, last)[:, :, None], columns.clamp(0, last)[:, None]
    ]
    normal = (pixels * inside[..., None] - mean) / std
    return Batch(normal.permute(0, 3, 1, 2), labels.clone())


def _of_files(store: Images | SyntheticStore) -> Images:
    if isinstance(store, SyntheticStore):
        raise UserError("data.cache_on_device has no effect with --data synthetic: leave it out.")
    return store


def _all_images(store: Images, data: DataRecipe, device: torch.device) -> Tensor:
    """All images of the store, decoded when they are first asked for."""
    if store not in _kept:
        _check_room(len(store) * 3 * data.image_size**2, device)
        if isinstance(store, TeacherStore):
            _kept[store] = torch.from_numpy(np.concatenate(list(store.pixels()))).to(device)
            return _kept[store]
        images = torch.empty(len(store), data.image_size, data.image_size, 3, dtype=torch.uint8)
        readers = Readers(data.readers)
        parts = np.arange(0, len(store), DECODED_AT_ONCE)
        tasks = [
            readers.submit(_decode, store, images.numpy(), int(first), data.image_size)
            for first in parts
        ]
        try:
            for first, task in zip(parts, tasks, strict=True):
                try:
                    task.result(data.timeout)
                except TimeoutError as error:
                    raise ReadError(
                        f"{store.name(int(first))} and those after it were not read within "
                        f"{data.timeout:g} s (data.timeout): does their storage answer?"
                    ) from error
        finally:
            for task in tasks:
                task.cancel()
            readers.close()
        _kept[store] = images.to(device)
    return _kept[store]


def _decode(store: Images, images: np.ndarray, first: int, size: int) -> None:
    """Decode samples [first, first + DECODED_AT_ONCE) into their places."""
    for index in range(first, min(first + DECODED_AT_ONCE, len(store))):
        encoded = store.image(index)
        if (encoded.height, encoded.width) != (size, size):
            raise SampleError(
                f"{store.name(index)} has {encoded.width}×{encoded.height} pixels: "
                f"data.cache_on_device keeps images of data.image_size only, {size}×{size}. Leave "
                "data.cache_on_device out, or resize the files."
            )
        try:
            with Image.open(io.BytesIO(encoded.data.tobytes())) as image:
                images[index] = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise SampleError(
                f"{store.name(index)} cannot be decoded: {error}. Replace or remove it."
            ) from error


def _check_room(size: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > 0.8 * free:
        raise UserError(
            f"data.cache_on_device: all images take {size / 2**30:,.1f} GiB, and {device} has "
            f"{free / 2**30:,.1f} GiB free. Leave data.cache_on_device out: DALI then makes them "
            "as they are needed."
        )
