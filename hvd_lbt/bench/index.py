"""`hvd_lbt bench index`: time and memory of the index of many samples, on one rank and on a node.

The data set is one shard of small images under many names (hard links), which takes little space.
One process scans the shard once and indexes it under all its names: scanning all of them would take
samples · scan_us_per_sample, which is calculated. Then `--ranks` processes open the index at once,
compare the data as a training does, and look up samples. Memory is what the kernel says of each
(PSS counts a page that k processes share as 1/k), less what the process had before.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hvd_lbt import arguments
from hvd_lbt.bench.harness import Lines, add_common_arguments
from hvd_lbt.bench.order import samples
from hvd_lbt.data.convert import ENDINGS, convert
from hvd_lbt.data.digits import write_digits
from hvd_lbt.data.formats import SCANS, Extents
from hvd_lbt.data.identity import identity
from hvd_lbt.data.index import TICK, Index, index_file, index_of, keep
from hvd_lbt.data.source import find_source
from hvd_lbt.data.store import open_train_split

SHARD = 100_000  # samples of a shard
LOOKED_UP = 100_000  # samples that each rank looks up
KINDS = tuple(kind for kind in ENDINGS if kind != "webdataset")  # two tars are not one tar
RANK = "import hvd_lbt.bench.index as b; b.one_rank({data!r})"
BUILD = "import hvd_lbt.bench.index as b; b.build({data!r})"
FIELDS = ("Rss", "Pss", "Private_Clean", "Private_Dirty")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench index`."""
    parser.add_argument(
        "--samples", type=samples, default=10**8, metavar="N", help="samples, 1e8 [100,000,000]"
    )
    parser.add_argument("--kind", choices=KINDS, default="tfrecord", help="[tfrecord]")
    parser.add_argument(
        "--ranks", type=arguments.threads, default=8, help="processes that open it at once [8]"
    )
    parser.add_argument("--folder", type=Path, help="where to put the data [a temporary folder]")
    add_common_arguments(parser, repetitions=1)


def main(args: argparse.Namespace) -> int:
    """Build the index, check that all shards are in it, then measure one rank and many."""
    lines = Lines("index", settings=vars(args), path=args.out)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        data = Path(scratch, "data")
        count = write_shards(data, args.kind, args.samples, Path(scratch, "made"))
        time.sleep(TICK)  # so soon after a change an index is not trusted a second time
        built = subprocess.run(
            [sys.executable, "-c", BUILD.format(data=str(data))],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            raise AssertionError(built.stderr[-2000:])
        scanned, seconds, megabytes = map(float, built.stdout.split())
        shards = len(list((data / "train").iterdir()))
        lines.result(
            case="built",
            samples=count,
            shards=shards,
            scan_seconds_of_a_shard=scanned,
            scan_us_per_sample=1e6 * scanned * shards / count,
            seconds_after_the_scan=seconds,
            mb_at_most=megabytes,
            mb_file=index_file(data, "train").stat().st_size / 2**20,
        )
        for ranks in dict.fromkeys((1, args.ranks)):
            lines.result(case=f"{ranks} ranks", samples=count, **_opened(data, ranks))
    return 0


def write_shards(data: Path, kind: str, count: int, scratch: Path) -> int:
    """DATA/train with at least `count` samples, in names of one shard; how many it has."""
    convert(write_digits(), scratch, form=kind, samples_per_shard=10**6)
    (digits,) = (scratch / "train").glob(f"*.{ENDINGS[kind]}")
    each = len(open_train_split(scratch))
    times = max(1, min(SHARD, count) // each)
    shards = -(-count // (each * times))
    train = data / "train"
    train.mkdir(parents=True)
    first = train / f"{0:06}.{ENDINGS[kind]}"
    with first.open("wb") as stream:
        for _ in range(times):
            with digits.open("rb") as records:
                shutil.copyfileobj(records, stream)
    for number in range(1, shards):
        os.link(first, train / f"{number:06}.{ENDINGS[kind]}")
    return each * times * shards


def build(data: str) -> None:
    """Print the seconds to scan one shard, to index all and write, and the MB at the most."""
    source = find_source(Path(data), "train", [])
    before, begun, began = memory()["Rss"], time.time(), time.perf_counter()
    part = Extents()
    SCANS[source.kind](source.root / source.parts[0], part)
    scanned, began = time.perf_counter() - began, time.perf_counter()
    file = index_file(Path(data), "train")
    file.parent.mkdir(parents=True, exist_ok=True)
    keep(source, file, index_of(source, [part] * len(source.parts)), begun)
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    _check(open_train_split(Path(data)).index)
    print(scanned, seconds, peak - before)


def _check(its: Index) -> None:
    """Raise AssertionError unless the last shard's samples are those of the first."""
    assert its.extents is not None
    each = int(np.searchsorted(its.extents[:, 0], 1)) or len(its)
    assert len(its) % each == 0
    assert np.array_equal(its.extents[:each, 1:], its.extents[-each:, 1:])
    assert np.array_equal(its.tokens[:each], its.tokens[-each:])


def one_rank(data: str) -> None:
    """A rank: open the index, compare the data, look samples up; a line of stdin starts each."""
    sys.stdin.readline()
    print("started", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    store = open_train_split(Path(data))
    opened = time.perf_counter() - began
    began = time.perf_counter()
    identity(store)
    compared = time.perf_counter() - began
    began = time.perf_counter()
    some = np.random.default_rng(os.getpid()).integers(0, len(store), LOOKED_UP)
    assert store.index.extents is not None
    store.index.extents[some].sum() + store.labels[some].sum()
    looked_up = time.perf_counter() - began
    print(opened, compared, looked_up, flush=True)
    sys.stdin.readline()


def _opened(data: Path, ranks: int) -> dict[str, float]:
    """Seconds (median of the ranks) and memory (MB beyond the start) with so many at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(data=str(data))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(ranks)
    ]

    def step() -> list[str]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.stdout.readline() for process in processes if process.stdout is not None]

    try:
        step()
        before = [memory(str(process.pid)) for process in processes]
        times = np.array([[float(word) for word in line.split()] for line in step()])
        after = [memory(str(process.pid)) for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")
    more = {
        field: [late[field] - early[field] for early, late in zip(before, after, strict=True)]
        for field in FIELDS
    }
    private = np.add(more["Private_Clean"], more["Private_Dirty"])
    if ranks == 1:  # the file's pages are private to the only process that has them mapped
        private = np.array(more["Private_Dirty"])
    opened, compared, looked_up = np.median(times, axis=0)
    return {
        "open_seconds": float(opened),
        "compare_seconds": float(compared),
        "look_up_us_per_sample": 1e6 * float(looked_up) / LOOKED_UP,
        "mb_of_a_rank_pss": float(np.median(more["Pss"])),
        "mb_of_a_rank_private": float(np.median(private)),
        "mb_of_the_node": float(np.sum(more["Pss"])),
    }


def memory(process: str = "self") -> dict[str, float]:
    """The MB that a process has of each kind (smaps_rollup)."""
    name = process if process.isdecimal() else "self"
    lines = [line.split() for line in Path(f"/proc/{name}/smaps_rollup").read_text().splitlines()]
    sizes = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines[1:]}
    return {field: sizes[field] for field in FIELDS}
