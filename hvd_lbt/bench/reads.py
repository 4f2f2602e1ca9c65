"""`hvd_lbt bench reads`: samples a second from cold files, in sequence, in blocks, and at random.

The same files as a folder and as shards. Before each pass the kernel is asked to drop each file
from the page cache (POSIX_FADV_DONTNEED), which is checked: what of it stays is in the result.
Nothing is decoded. `device_reads` are what the disk was asked for: where a seek costs milliseconds,
they are what counts. `--data` measures the storage that it lies on.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from collections import deque
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np

from hvd_lbt import arguments
from hvd_lbt.bench.harness import Lines, Subject, add_common_arguments, time_interleaved
from hvd_lbt.bench.input import write_photographs
from hvd_lbt.data.convert import ENDINGS, convert
from hvd_lbt.data.order import SampleStream
from hvd_lbt.data.read_ahead import ReadAhead
from hvd_lbt.data.reading import Readers
from hvd_lbt.data.store import Store, open_train_split
from hvd_lbt.errors import UserError

READ_AT_ONCE = 16  # samples of one task, as in the input pipeline
IN_FLIGHT = 3  # micro-batches that are read at the same time, as with data.prefetch=2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench reads`."""
    parser.add_argument("--data", type=Path, help="a data set as it is [generated, all formats]")
    parser.add_argument(
        "--samples", type=arguments.count, default=4000, help="generated images [4,000]"
    )
    parser.add_argument("--block", type=arguments.count, default=128, help="samples [128]")
    parser.add_argument("--window", type=arguments.count, default=8, help="blocks [8]")
    parser.add_argument("--micro-batch", type=arguments.count, default=64, help="[64]")
    parser.add_argument("--readers", type=arguments.threads, default=4, help="threads [4]")
    parser.add_argument("--folder", type=Path, help="the disk to write to [a temporary folder]")
    add_common_arguments(parser, repetitions=3)


def main(args: argparse.Namespace) -> int:
    """Check that each order reads each sample once, then time the orders."""
    if args.block < 2:
        raise UserError(f"--block {args.block}: a block has at least 2 samples.")
    lines = Lines("reads", settings=vars(args), path=args.out)
    if args.data is not None:
        _measure(open_train_split(args.data), args, lines)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        data = _many_photographs(Path(scratch, "folder"), args.samples)
        _measure(open_train_split(data), args, lines)
        for form in ENDINGS:
            made = Path(scratch, form)
            convert(data, made, form=form, samples_per_shard=1000)
            _measure(open_train_split(made), args, lines)
            shutil.rmtree(made)
    return 0


def _many_photographs(data: Path, count: int) -> Path:
    """DATA/train/CLASS/*.jpg: copies of 250 photographs, each a file of its own."""
    first = write_photographs(data)
    files = sorted((first / "train/x").glob("*.jpg"))
    for number in range(len(files), count):
        folder = data / f"train/{number // 1000:03}"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(files[number % len(files)], folder / f"{number:06}.jpg")
    return data


def _measure(store: Store, args: argparse.Namespace, lines: Lines) -> None:
    n = len(store)
    streams: dict[str, SampleStream | None] = {
        "in sequence": None,
        "blocks": SampleStream(n, 0, args.block, args.window),
        "at random": SampleStream(n, 0),
    }
    for name, stream in streams.items():
        order = np.arange(n) if stream is None else stream.indices(0, n)
        if not np.array_equal(np.sort(order), np.arange(n)):
            raise AssertionError(f"{name}: not every sample once. Nothing is timed.")
    files = sorted(file for file in store.index.root.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    stays = _evict(files) / size
    asked: dict[str, list[int]] = {name: [] for name in streams}

    def read(name: str, stream: SampleStream | None) -> None:
        before = device_reads(files[0])
        read_all(store, stream, args.micro_batch, args.readers)
        asked[name].append(device_reads(files[0]) - before)

    subjects = {
        name: Subject(
            run=partial(read, name, stream),
            prepare=partial(_evict, files),
        )
        for name, stream in streams.items()
    }
    times = time_interleaved(subjects, repetitions=args.repetitions, warmups=1)
    for name, its in times.items():
        lines.result(
            case=f"{store.index.kind}, {name}",
            samples=n,
            samples_per_second=n / its.median,
            mb_per_second=size / its.median / 1e6,
            share_still_cached=stays,
            device_reads=int(np.median(asked[name])),
            **its.summary(),
        )


def read_all(store: Store, stream: SampleStream | None, micro_batch: int, threads: int) -> int:
    """Read one epoch in this order, None: that of the index; the bytes."""
    readers = Readers(threads)
    ahead = None if stream is None else ReadAhead(store, stream.windows, readers)
    flying: deque[list[Future]] = deque()
    total = 0

    def take() -> int:
        return sum(future.result() for future in flying.popleft())

    for first in range(0, len(store), micro_batch):
        count = min(micro_batch, len(store) - first)
        if stream is None or ahead is None:
            indices = np.arange(first, first + count)
        else:
            ahead.before(first, count)
            indices = stream.indices(first, count)
        parts = [indices[at : at + READ_AT_ONCE] for at in range(0, count, READ_AT_ONCE)]
        flying.append([readers.submit(_read, store, part) for part in parts])
        if len(flying) == IN_FLIGHT:
            total += take()
    while flying:
        total += take()
    readers.close()
    return total


def _read(store: Store, indices: np.ndarray) -> int:
    return sum(len(store.read(index)) for index in map(int, indices))


def device_reads(file: Path) -> int:
    """Reads that the file's block device has completed, of the whole machine; 0 if it has none."""
    device = file.stat().st_dev
    try:
        numbers = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text()
    except OSError:
        return 0
    return int(numbers.split()[0])


def _evict(files: list[Path]) -> float:
    """Drop the files from the page cache; the bytes that stay there, as far as fincore says."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return cached_bytes(files)


def cached_bytes(files: list[Path]) -> float:
    """Bytes of these files in the page cache; NaN where there is no fincore (util-linux)."""
    total = 0.0
    for at in range(0, len(files), 500):
        names = [str(file) for file in files[at : at + 500]]
        try:
            done = subprocess.run(
                ["fincore", "--bytes", "--noheadings", "--output", "RES", *names],
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            return float("nan")
        total += sum(map(float, done.stdout.split()))
    return total
