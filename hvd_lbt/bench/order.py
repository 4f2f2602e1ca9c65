"""`hvd_lbt bench order`: time and memory of an epoch's order, by position and as a sorted array.

`by position` is what trainings use (`data.order`): batch after batch, no array of N numbers.
`sorted array` is the stable sort of N random words, which it replaced. Each is measured in a
process of its own, so that its memory is its own; times are of the CPU. Before that, the order by
position is checked: each sample exactly once where N flags fit, else that the inverse leads back
from many positions.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hvd_lbt import arguments
from hvd_lbt.bench.harness import Lines, add_common_arguments
from hvd_lbt.data.order import SampleStream, epoch_permutation
from hvd_lbt.data.permutation import LARGEST

FLAGS = 2 * 10**8  # bytes that a check of each sample may take
CHECKED = 10**6  # positions of a larger order that are checked
SORT_BYTES = 40  # a sample: words, their copy in the sort, its buffer, the result as int64


def samples(text: str) -> int:
    """A number of samples, 1 to 2^62; 1e10 is understood."""
    try:
        value = float(text) if "e" in text.lower() else int(text)
    except ValueError:
        value = -1
    if not 1 <= value <= LARGEST or value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text[:40]} is not allowed; it must be a whole number from 1 to 2^62"
        )
    return int(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench order`."""
    parser.add_argument(
        "--samples",
        type=samples,
        nargs="+",
        default=[10**6, 10**8, 10**10],
        metavar="N",
        help="samples of the training set [1e6 1e8 1e10]",
    )
    parser.add_argument(
        "--batch", type=arguments.count, default=8192, help="positions asked for at once [8192]"
    )
    parser.add_argument(
        "--positions",
        type=arguments.count,
        default=10**7,
        help="positions timed where an epoch has more [10,000,000]",
    )
    parser.add_argument(
        "--sort-at-most",
        type=arguments.count_or_zero,
        default=10**8,
        metavar="N",
        help="larger orders are not sorted, nor those that do not fit into memory [100,000,000]",
    )
    add_common_arguments(parser, repetitions=3)


def main(args: argparse.Namespace) -> int:
    """Check each order, then measure it."""
    lines = Lines("order", settings=vars(args), path=args.out)
    for n in args.samples:
        checked = check(n)
        lines.result(case="checked", samples=n, **checked)
        ways = {"by position": (min(n, args.positions), args.batch)}
        if n <= args.sort_at_most and SORT_BYTES * n < _free_bytes():
            ways["sorted array"] = (n, n)
        for way, (positions, batch) in ways.items():
            runs = [_in_its_own_process(way, n, positions, batch) for _ in range(args.repetitions)]
            seconds = float(np.median([run["seconds"] for run in runs]))
            lines.result(
                case=way,
                samples=n,
                positions=positions,
                first_batch_cpu_us=1e6 * float(np.median([run["first"] for run in runs])),
                cpu_seconds=seconds,
                cpu_ns_per_position=1e9 * seconds / positions,
                mb_at_most=max(run["mb"] for run in runs),
                repetitions=args.repetitions,
            )
    return 0


def check(n: int) -> dict[str, object]:
    """Raise AssertionError unless the order is one; what was checked."""
    if n <= FLAGS:
        stream, seen = SampleStream(n, 0), np.zeros(n, dtype=bool)
        for first in range(0, n, 2**20):
            seen[stream.indices(first, min(2**20, n - first))] = True
        if not seen.all():
            raise AssertionError(f"{n:,} samples: some are in the order never. Nothing is timed.")
        return {"each_sample_once": n}
    order = epoch_permutation(0, 0, n)
    positions = np.linspace(0, n - 1, CHECKED).astype(np.int64)
    positions = np.unique(positions[(positions >= 0) & (positions < n)])
    indices = order.at(positions)
    inside = (indices >= 0) & (indices < n)
    if not (inside.all() and np.array_equal(order.positions_of(indices), positions)):
        raise AssertionError(f"{n:,} samples: the inverse does not lead back. Nothing is timed.")
    return {"inverse_leads_back": len(positions)}


def _in_its_own_process(way: str, n: int, positions: int, batch: int) -> dict[str, float]:
    module = "hvd_lbt.bench.order"
    program = f"import {module}; {module}.measure({way!r}, {n}, {positions}, {batch})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{way}, {n:,} samples: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(way: str, n: int, positions: int, batch: int) -> None:
    """Print CPU seconds to the first batch and of all positions, and MB at the most for it."""
    before, began = memory_mb("VmRSS"), time.process_time()
    if way == "sorted array":
        words = np.random.Philox(key=0).random_raw(n)
        order = np.argsort(words, kind="stable")
        assert len(order) == n
        first = time.process_time() - began
    else:
        stream = SampleStream(n, 0)
        stream.indices(0, min(batch, n))
        first, began = time.process_time() - began, time.process_time()
        for at in range(0, positions, batch):
            stream.indices(at, min(batch, positions - at))
    seconds = time.process_time() - began
    print(json.dumps({"first": first, "seconds": seconds, "mb": memory_mb("VmHWM") - before}))


def memory_mb(name: str) -> float:
    """VmRSS: now; VmHWM: at the most, of this program alone (getrusage also knows its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) / 1024


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
