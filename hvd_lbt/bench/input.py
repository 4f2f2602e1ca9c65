"""`hvd_lbt bench input`: images a second of the training input, and what an index costs.

The same files as a folder, as WebDataset, TFRecord and RecordIO, against a bare DALI pipeline with
its own file reader and against torch's DataLoader with PIL and as many workers as there are
threads. All crop, resize, flip and normalise, and hand over a tensor of the program's own. First
our pixels
are compared: all formats to the bit, the evaluation images with PIL's.

DALI's reader keeps every file mapped that lies in its shuffle buffer: a folder of fewer files than
that it opens once, and then never reads. A small folder is therefore timed under many names.
"""

import argparse
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hvd_lbt import arguments
from hvd_lbt.auto_micro_batch import number_of
from hvd_lbt.bench import shorter_side
from hvd_lbt.bench.harness import (
    Lines,
    Subject,
    add_common_arguments,
    device_of,
    speedup,
    time_interleaved,
)
from hvd_lbt.bench.native import SHUFFLED, native_batches, native_decoding
from hvd_lbt.bench.order import memory_mb
from hvd_lbt.data.convert import ENDINGS, convert, quality
from hvd_lbt.data.index import TICK
from hvd_lbt.data.pipeline import evaluation_batches, train_batches
from hvd_lbt.data.shrink import QUALITY, Shrink
from hvd_lbt.data.store import Store, open_train_split
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import DataRecipe, load_recipe

CLASSES = 1000
NAMES = 4 * SHUFFLED  # after a pass over so many, e⁻⁴ of them still lie in the shuffle buffer
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench input`."""
    parser.add_argument("--data", type=Path, help="DATA/train/CLASS/FILE [generated images]")
    parser.add_argument("--recipe", default="imagenet_resnet50", help="[imagenet_resnet50]")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=arguments.threads, help="DALI's threads, DataLoader's workers [cores]"
    )
    parser.add_argument("--micro-batch", type=arguments.count, help="[the recipe's]")
    parser.add_argument(
        "--batches", type=arguments.count, default=25, help="micro-batches timed at once [25]"
    )
    parser.add_argument(
        "--index-entries",
        type=arguments.count_or_zero,
        default=1_281_167,
        help="0: no such measurement",
    )
    parser.add_argument(
        "--shorter-side",
        type=arguments.count,
        metavar="PIXELS",
        help="measure `data convert --shorter-side PIXELS` instead: before and after",
    )
    parser.add_argument("--quality", type=quality, metavar="Q", help=f"of its JPEG [{QUALITY}]")
    add_common_arguments(parser, repetitions=5)


def main(args: argparse.Namespace) -> int:
    """Compare the pixels, then time; then index many entries."""
    device = device_of(args.device)
    threads = args.threads or len(os.sched_getaffinity(0))
    recipe = load_recipe(args.recipe, [*args.settings, f"data.threads={threads}"])
    args.threads = threads
    args.micro_batch = args.micro_batch or number_of(recipe, "give --micro-batch N")
    if args.quality is not None and args.shorter_side is None:
        raise UserError(f"--quality {args.quality} has no effect without --shorter-side.")
    lines = Lines("input", settings=vars(args), path=args.out)
    if args.shorter_side is not None:
        _before_and_after(args, recipe.data, device, lines)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or write_photographs(Path(scratch, "folder"))
        stores = {"folder": open_train_split(data)}
        if stores["folder"].index.kind != "folder":
            raise UserError(f"--data {data}: this benchmark begins with DATA/train/CLASS/FILE.")
        for form in ENDINGS:
            convert(data, Path(scratch, form), form=form, samples_per_shard=500, jobs=threads)
            stores[form] = open_train_split(Path(scratch, form))
        _check_pixels(stores, recipe.data, args.micro_batch, device, lines)
        _decode_alone(stores["folder"], lines)
        stores["folder"] = open_train_split(_under_many_names(data, Path(scratch, "names")))
        _time(stores, recipe.data, args, device, lines)
    if args.index_entries:
        for kind in ("folder", *ENDINGS):
            with tempfile.TemporaryDirectory() as scratch:
                data = Path(scratch)
                entries = _many_entries(data, kind, args.index_entries)
                time.sleep(TICK)  # so soon after a change an index is not trusted a second time
                first, second = (_index_cost(data) for _ in range(2))
                lines.result(case=f"index, {kind}", entries=entries, built=first, loaded=second)
    return 0


def _before_and_after(
    args: argparse.Namespace, data: DataRecipe, device: torch.device, lines: Lines
) -> None:
    """Measure `data convert --shorter-side`."""
    with tempfile.TemporaryDirectory() as scratch:
        shorter_side.measure(
            args.data or write_photographs(Path(scratch)),
            data,
            Shrink(shorter_side=args.shorter_side, quality=args.quality or QUALITY),
            _batches,
            micro_batch=args.micro_batch,
            count=args.batches,
            repetitions=args.repetitions,
            threads=args.threads,
            device=device,
            lines=lines,
        )


def write_photographs(data: Path, count: int = 250) -> Path:
    """DATA/train/x/*.jpg: smooth, with edges and noise, in the sizes of ImageNet's; returns
    DATA.
    """
    (data / "train/x").mkdir(parents=True)
    sizes = ((500, 375), (375, 500), (500, 333), (640, 480), (256, 256), (257, 1000), (120, 90))
    for number in range(count):
        rng = np.random.default_rng(number)
        width, height = sizes[number % len(sizes)]
        image = 128 + rng.normal(0, 6, (height, width, 3))
        y, x = np.mgrid[:height, :width][..., None]
        for _ in range(6):
            down, right = rng.uniform(-0.1, 0.1, (2, 3))
            image += rng.uniform(10, 40) * np.sin(x * right + y * down)
        image[height // 3 :, width // 4 : width // 2] = rng.uniform(0, 255, 3)
        pixels = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        pixels.save(data / f"train/x/{number:04}.jpg", quality=90)
    return data


def _under_many_names(data: Path, names: Path) -> Path:
    """DATA, or where it has fewer than NAMES training images a folder that has each of them
    often.
    """
    files = sorted((data / "train").glob("*/*"))
    if len(files) >= NAMES:
        return data
    for file in files:
        first = names / "train" / file.parent.name / file.name
        first.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, first)
        for number in range(1, -(-NAMES // len(files))):
            os.link(first, first.with_name(f"{number}-{file.name}"))
    return names


def _batches(
    store: Store, data: DataRecipe, micro_batch: int, device: torch.device
) -> Iterator[Tensor]:
    ranges = ((at * micro_batch, micro_batch, micro_batch) for at in range(10**9))
    for batch in train_batches(
        store,
        data,
        ranges,
        seed=0,
        micro_batch=micro_batch,
        device=device,
    ):
        yield batch.images


def _check_pixels(
    stores: dict[str, Store],
    data: DataRecipe,
    micro_batch: int,
    device: torch.device,
    lines: Lines,
) -> None:
    first = {name: next(_batches(s, data, micro_batch, device)) for name, s in stores.items()}
    for name, images in first.items():
        if not torch.equal(images, first["folder"]):
            raise AssertionError(f"{name} gives other pixels than the folder. Nothing is timed.")
    store, worst = stores["folder"], torch.zeros(3, dtype=torch.float64)
    if data.eval_resize is None:
        return
    sums = torch.zeros(3, dtype=torch.float64)
    starts = range(0, len(store), micro_batch)
    ranges = [(at, min(micro_batch, len(store) - at)) for at in starts]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    made = evaluation_batches(store, data, ranges, micro_batch=micro_batch, device=device)
    for (at, _), batch in zip(ranges, made, strict=True):
        for place, image in enumerate(batch.images.cpu() * std + mean):
            theirs = reference_evaluation(
                store.read(at + place), resize=data.eval_resize, size=data.image_size
            )
            difference = (image - theirs).abs().double().mean(dim=(1, 2))
            sums += difference
            worst = torch.maximum(worst, difference)
    lines.result(
        case="evaluation against PIL",
        images=len(store),
        mean_absolute_difference=(sums / len(store)).tolist(),
        worst_image=worst.tolist(),
    )


def _decode_alone(store: Store, lines: Lines) -> None:
    """Milliseconds of a core for each image, of the decoders alone: what bounds all of the
    above.
    """
    files = [store.read(index) for index in range(len(store))]
    spent: dict[str, float] = {}

    def pil() -> None:
        for file in files:
            with Image.open(io.BytesIO(file)) as image:
                image.convert("RGB")

    whole, cut = (
        native_decoding(store.index.root, cut=cut, micro_batch=len(files)) for cut in (False, True)
    )
    decoders: dict[str, Callable[[], None]] = {
        "DALI": partial(next, whole),
        "DALI, a cut": partial(next, cut),
        "PIL": pil,
    }
    for name, decode in decoders.items():
        seconds = []
        for _ in range(5):
            began = time.process_time()
            decode()
            seconds.append((time.process_time() - began) / len(files))
        spent[name] = 1e3 * float(np.median(seconds))
    lines.result(case="decoding alone", cpu_ms_per_image=spent)


def _time(
    stores: dict[str, Store],
    data: DataRecipe,
    args: argparse.Namespace,
    device: torch.device,
    lines: Lines,
) -> None:
    micro_batch, threads = args.micro_batch, args.threads
    folder = stores["folder"]
    workers = DataLoader(
        PilImages(folder, data.image_size, data.mean, data.std),
        batch_size=micro_batch,
        sampler=cycle(np.random.default_rng(0).permutation(len(folder)).tolist()),
        num_workers=threads,
    )
    streams = {
        **({"folder, CPU": _batches(folder, data, micro_batch, CPU)} if device != CPU else {}),
        **{name: _batches(store, data, micro_batch, device) for name, store in stores.items()},
        "DALI, its file reader": native_batches(
            folder.index.root, data, micro_batch=micro_batch, threads=threads, device=device
        ),
        "DataLoader, PIL": (images.to(device) for images in workers),
    }

    cpu: dict[str, list[float]] = {name: [] for name in streams}

    def take(name: str) -> None:
        began = time.process_time()
        for _ in range(args.batches):
            next(streams[name])
        cpu[name].append(time.process_time() - began)

    def settle(name: str) -> None:
        time.sleep(1.5)  # what the others make ahead is made, and nothing else runs
        for _ in range(2 * threads + 1):  # a DataLoader has 2 batches a worker in stock
            next(streams[name])

    subjects = {
        name: Subject(run=partial(take, name), prepare=partial(settle, name)) for name in streams
    }
    waits = {"synchronize": torch.cuda.synchronize} if device.type == "cuda" else {}
    times = time_interleaved(subjects, repetitions=args.repetitions, warmups=1, **waits)
    peers = ("DALI, its file reader", "DataLoader, PIL")
    images = args.batches * micro_batch
    for name, its in times.items():
        # the DataLoader's workers are other processes
        spent = None if name == "DataLoader, PIL" else 1e3 * float(np.median(cpu[name])) / images
        lines.result(
            case=name,
            images_per_second=images / its.median,
            cpu_ms_per_image=spent,
            against={peer: speedup(its, times[peer]) for peer in peers if name not in peers},
            **its.summary(),
        )


class PilImages(Dataset[Tensor]):
    """Training images with PIL as torchvision's RandomResizedCrop and flip make them."""

    def __init__(self, store: Store, size: int, mean, std):
        self._store, self._size = store, size
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self._store.read(index))) as file:
            image = file.convert("RGB")
        left, top, width, height = _torchvision_crop(*image.size)
        box = (left, top, left + width, top + height)
        size = (self._size, self._size)
        image = image.crop(box).resize(size, Image.Resampling.BILINEAR)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels.float() - self._mean) / self._std


def _torchvision_crop(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * float(torch.empty(()).uniform_(0.08, 1))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = torch.randint(0, width - w + 1, ()), torch.randint(0, height - h + 1, ())
            return int(left), int(top), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def reference_evaluation(encoded: bytes, *, resize: int, size: int) -> Tensor:
    """torchvision's Resize(resize), CenterCrop(size) with PIL: fp32 (3, size, size) in 0..255."""
    with Image.open(io.BytesIO(encoded)) as file:
        image = file.convert("RGB")
    width, height = image.size
    if width <= height:
        width, height = resize, int(resize * height / width)
    else:
        width, height = int(resize * width / height), resize
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


# ------------------------------------------------------------------------------------- the index


def _many_entries(data: Path, kind: str, entries: int) -> int:
    """DATA/train with so many files, empty in ImageNet's layout, one pixel in shards of 1,000."""
    each = -(-entries // CLASSES)
    if kind == "folder":
        for label in range(CLASSES):
            folder = data / "train" / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(min(each, entries - label * each)):
                os.close(os.open(folder / f"n{label:08}_{number}.JPEG", os.O_CREAT))
        return entries
    image = _smallest_image()
    for number in range(CLASSES):
        file = data / "few/train/x" / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    convert(data / "few", data / "one", form=kind, samples_per_shard=CLASSES)
    (shard,) = (data / "one/train").glob(f"*.{ENDINGS[kind]}")
    (data / "train").mkdir()
    for number in range(each):  # copies: one file under two names is refused
        shutil.copyfile(shard, data / "train" / f"{number:05}.{ENDINGS[kind]}")
    return each * CLASSES


def _smallest_image() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _index_cost(data: Path) -> dict[str, float]:
    """Open DATA's training split in a process of its own: seconds, and the memory it took."""
    module = "hvd_lbt.bench.input"
    command = [sys.executable, "-c", f"import {module}; {module}.open_and_tell({str(data)!r})"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes, peak = map(float, done.stdout.split())
    return {"seconds": seconds, "mb_held": megabytes, "mb_at_most": peak}


def open_and_tell(data: str) -> None:
    """Print seconds, MB held and MB at the most (Linux) that opening the training split takes."""
    before, began = memory_mb("VmRSS"), time.perf_counter()
    store = open_train_split(Path(data))
    seconds = time.perf_counter() - began
    assert len(store)
    print(seconds, memory_mb("VmRSS") - before, memory_mb("VmHWM") - before)
