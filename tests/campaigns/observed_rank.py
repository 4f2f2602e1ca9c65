"""One rank of many_ranks.py: `hvd_lbt WORDS`, with notes on its start, traffic and resources.

    python observed_rank.py train digits …

Writes $HVD_LBT_NOTES/RANK.json at the end. Softplus stands in for ReLU, as in tests/dist/smooth.py:
trainings on different numbers of ranks can then be compared.
"""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

WARM = 5  # updates before the traffic of updates is counted: connections are made, responses cached
IDLE_SECONDS = 2.0
BARE_SUMS = 50  # one after the other, of one small tensor, to compare an update with


def clock() -> float:
    """Seconds since boot, the same for all processes of this machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def traffic() -> dict[str, float]:
    """What the established TCP connections of this network namespace have sent: bytes, segments.

    Both ends of a connection within the namespace are counted, each what it sends; segments with
    data only, no bare acknowledgements.
    """
    shown = subprocess.run(["ss", "-tinH", "state", "established"], capture_output=True, text=True)
    sent = re.findall(r"bytes_sent:(\d+)", shown.stdout)
    segments = re.findall(r"data_segs_out:(\d+)", shown.stdout)
    return {"bytes": sum(map(int, sent)), "messages": sum(map(int, segments))}


def processor_seconds() -> float:
    """User and system time of this process, all threads."""
    return time.process_time()


def open_files() -> list[str]:
    """What each file descriptor of this process is."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return links


def resources() -> dict[str, int]:
    """Threads, descriptors, TCP connections and memory of this process."""
    links = open_files()
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    connected = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "01":
                connected.add(words[9])
    memory = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text()))
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(links),
        "connections": len(inodes & connected),
        "rss": 1024 * int(memory["Rss"]),
        "pss": 1024 * int(memory["Pss"]),
    }


def left_open() -> dict[str, Any]:
    """What a process that ends should not have more of than at its start."""
    links = open_files()
    return {
        "sockets": sum(link.startswith("socket:") for link in links),
        "python_threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": len(links),
    }


class Notes:
    """What one rank sees of itself; its patches only look, and call what they replace."""

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        self.values: dict[str, Any] = {"start": {"process": ticks / os.sysconf("SC_CLK_TCK")}}
        self.sums: Counter[str] = Counter()
        self.sum_bytes: Counter[str] = Counter()
        self.samples: list[np.ndarray] = []
        self.marks: list[dict[str, Any]] = []
        self.updates = 0
        self.counts_traffic = False

    def reached(self, what: str) -> None:
        """Note the moment of the start."""
        self.values["start"].setdefault(what, clock())

    def mark(self) -> None:
        """Note the counters as they are now."""
        self.marks.append(
            {
                "update": self.updates,
                "clock": clock(),
                "processor": processor_seconds(),
                "sums": dict(self.sums),
                "sum_bytes": dict(self.sum_bytes),
                "traffic": traffic() if self.counts_traffic else None,
            }
        )

    def install(self) -> None:
        """Replace what is looked at."""
        from hvd_lbt import comm, training
        from hvd_lbt.data.order import SampleStream

        init, sum_, shutdown = comm.init, comm.allreduce_async_, comm.shutdown
        update, indices = training.Training.update, SampleStream.indices

        def noted_init(*args: Any, **options: Any) -> Any:
            self.reached("before_init")
            world = init(*args, **options)
            self.reached("connected")
            self.counts_traffic = world.local_rank == 0
            self.values |= {"rank": world.rank, "size": world.size}
            return world

        def noted_sum(tensor: Any, name: str) -> int:
            self.sums[name] += 1
            self.sum_bytes[name] += tensor.numel() * tensor.element_size()
            return sum_(tensor, name)

        def noted_update(training_: Any, planned: Any, *rest: Any) -> Any:
            result = update(training_, planned, *rest)
            self.updates += 1
            self.reached("first_update")
            if self.updates in (WARM, self.last):
                self.mark()
            return result

        def noted_indices(stream: Any, first: int, count: int) -> Any:
            found = indices(stream, first, count)
            self.samples.append(np.stack([np.arange(first, first + count), found]))
            return found

        def noted_shutdown() -> None:
            self.values["resources"] = resources()
            self.after_training(comm, sum_)
            shutdown()

        comm.init, comm.allreduce_async_, comm.shutdown = noted_init, noted_sum, noted_shutdown
        training.Training.update, SampleStream.indices = noted_update, noted_indices

    @property
    def last(self) -> int:
        """Updates of the first stage: that many are measured, all of one size."""
        return int(os.environ["HVD_LBT_NOTES_UPDATES"])

    def after_training(self, comm: Any, sum_: Any) -> None:
        """Traffic while nothing is summed, and while one small tensor is, again and again."""
        import torch

        comm.barrier()
        time.sleep(0.3)
        self.mark()
        time.sleep(IDLE_SECONDS)
        self.mark()
        comm.barrier()
        tensor = torch.zeros(256, dtype=torch.float32)
        for _ in range(WARM):
            comm.synchronize(sum_(tensor, "bare"))
        self.mark()
        for _ in range(BARE_SUMS):
            comm.synchronize(sum_(tensor, "bare"))
        self.mark()
        comm.barrier()

    def write(self, code: int) -> None:
        """Everything, for the launcher to read."""
        folder = Path(os.environ["HVD_LBT_NOTES"])
        self.values |= {"code": code, "updates": self.updates, "marks": self.marks}
        self.values["left"] = left_open()
        samples = np.concatenate(self.samples, 1) if self.samples else np.zeros((2, 0))
        rank = self.values.get("rank", f"none-{os.getpid()}")
        np.save(folder / f"{rank}.npy", samples.astype(np.int64))
        (folder / f"{rank}.json").write_text(json.dumps(self.values))


def main() -> int:
    """Run `hvd_lbt` as this rank."""
    notes = Notes()
    from torch import nn

    if os.environ.get("HOROVOD_CONTROLLER") != "gloo":
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False  # as hvd_lbt.comm does
        from mpi4py import MPI  # noqa: F401
    import horovod.torch  # noqa: F401

    import hvd_lbt.cli
    import hvd_lbt.data.on_device

    nn.ReLU = lambda inplace=False: nn.Softplus()  # type: ignore[assignment,misc]
    notes.reached("imported")
    import hvd_lbt.comm  # calls MPI_Init

    notes.install()
    import hvd_lbt.train

    notes.reached("mpi")
    notes.values["before"] = left_open()
    code = hvd_lbt.cli.main(sys.argv[1:])
    gc.collect()
    notes.write(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
