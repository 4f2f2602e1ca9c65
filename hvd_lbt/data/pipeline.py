"""DALI turns sample positions into batches: read, crop, decode, resize, flip, normalise.

Every random number comes from `order.sample_uniforms`, every crop is computed in `crops`, and both
enter DALI as inputs, so the pixels of a sample are a function of (seed, epoch, position) alone: not
of the micro-batch, the number of workers, the threads, or where a run was resumed.
"""

import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hvd_lbt.data.crops import FLIP, center_crops, pad_crops, random_resized_crops
from hvd_lbt.data.label_noise import noisy_labels
from hvd_lbt.data.pixels import Encoded
from hvd_lbt.data.read_ahead import ReadAhead, Windows
from hvd_lbt.data.reading import Readers
from hvd_lbt.data.samples import SKIPPED, Batch, Images, TrainSamples
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.errors import ReadError, SampleError, UserError
from hvd_lbt.out_of_memory import is_out_of_memory
from hvd_lbt.recipe import DataRecipe
from hvd_lbt.schedule.layout import count_ghost_batches

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError as error:
    raise UserError(
        f"NVIDIA DALI makes the images, and it does not import ({error}). "
        "`launch/setup` installs the build that fits; `hvd_lbt doctor` says what is missing."
    ) from error

decoder_failed = False  # DALI may hang when a process ends in which an image was not decodable
READ_AT_ONCE = 8  # samples that one task of a reader reads: handing tasks over has its price


@dataclass
class _Read:
    """Some samples of a micro-batch that one reader reads, one after the other."""

    indices: np.ndarray
    future: Future
    done: list[Encoded | SampleError]


@dataclass
class _Work:
    """A micro-batch on its way."""

    indices: np.ndarray
    uniforms: np.ndarray
    ghost_batch: int
    reads: list[_Read]
    samples: list[Encoded]
    skipped: set[int]  # places within the micro-batch
    inputs: tuple = ()  # DALI reads these arrays where they lie


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
    """One batch for each (first sample of the stream, count, ghost batch) of `ranges`.

    count is at most micro_batch + 1: a last ghost batch may take a remainder of one. Ghost batches
    are counted from a range's first sample. local_size: workers that share this node's cores.
    Raises SampleError naming the first image that cannot be decoded; with
    on_bad_sample: skip that error goes to `on_skipped`, and the sample's place has the label
    SKIPPED and the image of another sample of its ghost batch, so that statistics are of images.
    Raises ReadError when the storage fails or gives nothing for `data.timeout` seconds.
    """
    if isinstance(store, SyntheticStore):
        return _synthetic(
            store, data, ((first, count) for first, count, _ in ranges), micro_batch, device
        )
    samples = TrainSamples(store, seed, data)
    graph = _Augmented(data)
    limits = (micro_batch + 1, device, local_size)
    maker = _Maker(store, data, graph, *limits, data.label_noise, samples.windows)
    return maker.batches(ranges, samples.indices, samples.uniforms, on_skipped)


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

    if isinstance(store, SyntheticStore):
        return _synthetic(store, data, ranges, micro_batch, device)

    def indices(first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count)

    def uniforms(first: int, count: int) -> np.ndarray:
        return np.empty((count, 0))

    maker = _Maker(store, data, _Plain(data), micro_batch, device, local_size)
    return maker.batches(((*part, micro_batch) for part in ranges), indices, uniforms, on_skipped)


def _synthetic(
    store: SyntheticStore,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int]],
    micro_batch: int,
    device: torch.device,
) -> Iterator[Batch]:
    shape = (micro_batch, 3, data.image_size, data.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    images = torch.cat([images, images[:1]])  # a last ghost batch may take a remainder of one
    labels = torch.from_numpy(np.resize(store.labels, micro_batch + 1)).to(device)
    for _, count in ranges:
        yield Batch(images[:count], labels[:count])


def decode_one(image: np.ndarray, size: int) -> Tensor:
    """A check of DALI: encode (H, W, 3) as PNG, and have it decoded and resized to (3, size,
    size).
    """
    data = DataRecipe(image_size=size, augment="none", mean=(0, 0, 0), std=(1, 1, 1))
    source = itertools.repeat(([_png(image).data],))
    (images,) = _build(data, _Plain(data), source, 1, 1, 1, torch.device("cpu")).run()
    return torch.from_dlpack(images.as_tensor())[0].clone()


@dataclass
class _Maker:
    """Makes micro-batches from a store with one DALI pipeline, whatever their sizes."""

    store: Images
    data: DataRecipe
    graph: "_Augmented | _Plain"
    micro_batch: int
    device: torch.device
    local_size: int
    label_noise: float = 0.0
    windows_of: Callable[[int, int], Windows] | None = None

    def batches(
        self,
        ranges: Iterable[tuple[int, int, int]],
        indices_of: Callable[[int, int], np.ndarray],
        uniforms_of: Callable[[int, int], np.ndarray],
        on_skipped: Callable[[SampleError], None] | None,
    ) -> Iterator[Batch]:
        """See `train_batches`."""
        self._on_skipped = on_skipped if self.data.on_bad_sample == "skip" else None
        readers = Readers(self.data.readers)
        ahead = ReadAhead(self.store, self.windows_of or (lambda first, count: {}), readers)

        def begin(first: int, count: int, ghost_batch: int) -> _Work:
            ahead.before(first, count)
            return self._begin(
                indices_of(first, count), uniforms_of(first, count), ghost_batch, readers
            )

        begun = itertools.starmap(begin, ranges)
        reading: deque[_Work] = deque()
        decoding: deque[_Work] = deque()  # given to DALI and not yet handed back
        again: deque[_Work] = deque()  # to be given to a new pipeline

        def source() -> tuple:
            if again:
                work = again.popleft()
            else:
                # reads of the next micro-batches continue while this one is waited for
                reading.extend(itertools.islice(begun, 1 + self.data.prefetch - len(reading)))
                if not reading:
                    raise StopIteration
                work = reading.popleft()
                self._finish(work)
            decoding.append(work)
            work.inputs = self._inputs(work, range(len(work.samples)))
            return work.inputs

        pipeline = self._pipeline(source)
        try:
            while True:
                try:
                    (images,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    global decoder_failed
                    decoder_failed = True
                    del pipeline  # its threads must not decode while its samples are tried singly
                    if is_out_of_memory(error):  # which is no fault of a sample
                        raise
                    if not self._find_undecodable(decoding):
                        raise error
                    again.extend(decoding)
                    decoding.clear()
                    pipeline = self._pipeline(source)
                    continue
                work = decoding.popleft()
                labels = noisy_labels(
                    self.store.labels[work.indices],
                    work.indices,
                    len(self.store.classes),
                    self.label_noise,
                )
                labels[list(work.skipped)] = SKIPPED
                # DALI's dynamic executor, its default, leaves outputs alone as long as they are
                # held.
                yield Batch(
                    torch.from_dlpack(images.as_tensor()),
                    torch.from_numpy(labels).to(self.device),
                )
        finally:
            readers.close()

    def _pipeline(self, source: Callable) -> Pipeline:
        threads = self.data.threads or max(1, len(os.sched_getaffinity(0)) // self.local_size)
        limits = (self.micro_batch, threads, self.data.prefetch)
        return _build(self.data, self.graph, source, *limits, self.device)

    def _inputs(self, work: _Work, places: range) -> tuple:
        """What DALI is given: encoded bytes, and the numbers of `graph`."""
        samples = [work.samples[place] for place in places]
        sizes = np.array([(sample.height, sample.width) for sample in samples], dtype=np.int64)
        numbers = self.graph.numbers(sizes, work.uniforms[places.start : places.stop])
        return [sample.data for sample in samples], *numbers

    def _begin(
        self, indices: np.ndarray, uniforms: np.ndarray, ghost_batch: int, readers: Readers
    ) -> _Work:
        reads = []
        for at in range(0, len(indices), READ_AT_ONCE):
            some, done = indices[at : at + READ_AT_ONCE], list[Encoded | SampleError]()
            reads.append(_Read(some, readers.submit(self._read, some, done), done))
        return _Work(indices, uniforms, ghost_batch, reads, [], set())

    def _read(self, indices: np.ndarray, done: list[Encoded | SampleError]) -> None:
        for index in map(int, indices):
            try:
                done.append(self.store.image(index))
            except ReadError:
                raise
            except SampleError as error:
                done.append(error)

    def _finish(self, work: _Work) -> None:
        """Wait for the bytes of a micro-batch; what is bad is skipped, or raised."""
        for read in work.reads:
            before = -1
            while True:
                try:
                    read.future.result(self.data.timeout)
                    break
                except TimeoutError as error:
                    if before < len(read.done) < len(read.indices):
                        before = len(read.done)
                        continue
                    name = self.store.name(int(read.indices[len(read.done)]))
                    raise ReadError(
                        f"{name} was not read within {self.data.timeout:g} s (data.timeout): does "
                        "its storage answer?"
                    ) from error
            for sample in read.done:
                if isinstance(sample, SampleError):
                    self._leave_out(work, len(work.samples), sample)
                    sample = NOTHING
                work.samples.append(sample)
        work.reads.clear()
        self._fill(work)

    def _leave_out(self, work: _Work, place: int, error: SampleError) -> None:
        if self._on_skipped is None:
            raise error
        work.skipped.add(place)
        self._on_skipped(error)

    def _fill(self, work: _Work) -> None:
        """Give each place that was skipped the bytes of the next good one in its ghost batch."""
        for place in work.skipped:
            last = count_ghost_batches(len(work.samples), work.ghost_batch) - 1
            ghost = min(place // work.ghost_batch, last)
            start = ghost * work.ghost_batch
            end = len(work.samples) if ghost == last else start + work.ghost_batch
            group = range(start, end)
            good = [other for other in group if other not in work.skipped]
            donor = next((other for other in good if other > place), good[0] if good else None)
            work.samples[place] = GREY if donor is None else work.samples[donor]

    def _find_undecodable(self, works: Iterable[_Work]) -> bool:
        """Decode what was in flight one by one, to find what DALI's error for a batch does not
        name.
        """
        found = False
        for work in works:
            for place, index in enumerate(map(int, work.indices)):
                if place in work.skipped:
                    continue
                source = itertools.repeat(self._inputs(work, range(place, place + 1)))
                one = _build(self.data, self.graph, source, 1, 1, 1, self.device)
                try:
                    one.run()
                except RuntimeError as reason:
                    if is_out_of_memory(reason):
                        raise
                    found = True
                    what = f"{self.store.name(index)} cannot be decoded as an image"
                    bad = SampleError(f"{what} ({_cause(reason)}). Replace or remove it.")
                    self._leave_out(work, place, bad)
            self._fill(work)
        return found


def _png(image: np.ndarray) -> Encoded:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    data = np.frombuffer(file.getvalue(), dtype=np.uint8)
    return Encoded(data, *image.shape[:2])


NOTHING = Encoded(np.empty(0, dtype=np.uint8), 0, 0)
GREY = _png(np.full((1, 1, 3), 128, dtype=np.uint8))


def _build(
    data: DataRecipe,
    graph: "_Augmented | _Plain",
    source: Callable | Iterable,
    batch: int,
    threads: int,
    prefetch: int,
    device: torch.device,
) -> Pipeline:
    """With a GPU, JPEGs are decoded there (nvJPEG) and everything after it runs there too."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=prefetch,
    )
    with pipeline:
        encoded, *numbers = fn.external_source(
            source=source,
            num_outputs=1 + graph.inputs,
            no_copy=True,  # what `source` returns stays until its images are there
        )
        # EXIF's rotation is ignored, as by torchvision and timm.
        decoding: dict[str, Any] = {"device": "cpu", "adjust_orientation": False}
        if on_gpu:
            # Chroma is upsampled as libjpeg-turbo does. The decoding engine would take a share of
            # each
            # batch: which decoder a sample met would depend on the micro-batch.
            decoding |= {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0}
        images, mirror = graph(encoded, decoding, *numbers)
        images = fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=list(data.mean),
            std=list(data.std),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class _Augmented:
    """Training images: cropped, sized, and whether to mirror each."""

    def __init__(self, data: DataRecipe):
        self._data = data
        # DALI warns of an input that the graph does not use.
        crops = {"random_resized_crop": 2, "pad_crop": 1, "none": 0}[data.augment]
        self.inputs = crops + data.flip

    def numbers(self, sizes: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, ...]:
        """The inputs of the graph beside the images, one row a sample."""
        crops: tuple[np.ndarray, ...] = ()
        if self._data.augment == "random_resized_crop":
            crops = random_resized_crops(sizes, uniforms)
        elif self._data.augment == "pad_crop":
            crops = (pad_crops(uniforms, self._data.pad),)
        mirror = ((uniforms[:, FLIP] >= 0.5).astype(np.int32),) if self._data.flip else ()
        return *(np.ascontiguousarray(crop, np.float32) for crop in crops), *mirror

    def __call__(self, encoded, decoding: dict, *numbers):
        """DALI's graph: images, mirror."""
        size = self._data.image_size
        mirror = numbers[-1] if self._data.flip else 0
        in_pixels: dict[str, Any] = {
            "axis_names": "WH",
            "normalized_anchor": False,
            "normalized_shape": False,
        }
        if self._data.augment == "random_resized_crop":
            images = fn.decoders.image_slice(encoded, *numbers[:2], **in_pixels, **decoding)
            return fn.resize(images, resize_x=size, resize_y=size), mirror
        images = fn.resize(fn.decoders.image(encoded, **decoding), resize_x=size, resize_y=size)
        if self._data.augment == "pad_crop":
            shape = [float(size), float(size)]
            padding: dict[str, Any] = {"out_of_bounds_policy": "pad", "fill_values": 0}
            images = fn.slice(images, numbers[0], shape, **in_pixels, **padding)
        return images, mirror


class _Plain:
    """Test images: the centre of the image resized to `eval_resize`, if set; else all of it."""

    def __init__(self, data: DataRecipe):
        self._data = data
        self.inputs = 0 if data.eval_resize is None else 2

    def numbers(self, sizes: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, ...]:
        """The inputs of the graph beside the images, one row a sample."""
        if self._data.eval_resize is None:
            return ()
        crops = center_crops(sizes, self._data.eval_resize, self._data.image_size)
        return tuple(np.ascontiguousarray(crop, np.float32) for crop in crops)

    def __call__(self, encoded, decoding: dict, *roi):
        """DALI's graph: images, no mirror. Only the cropped part is computed."""
        size = self._data.image_size
        part = dict(zip(("roi_start", "roi_end"), roi, strict=False))
        images = fn.decoders.image(encoded, **decoding)
        return fn.resize(images, resize_x=size, resize_y=size, **part), 0


def _cause(error: RuntimeError) -> str:
    """What DALI says of the cause, without its stack."""
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines()]
    return next(line for line in lines if line)
