"""How much memory this worker may use, and how much of that an attempt took at its peak.

On a GPU memory is the device's. On a CPU it is the tightest of the node's memory, the limits of the
control groups (Slurm, containers), both shared with the node's other workers, and RLIMIT_AS.
"""

import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SPARE = 0.08  # of all memory, which an attempt must leave: for fragmentation, and for what varies
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Memory that is shared by the workers of a node. total, free: bytes."""

    name: str
    total: int
    free: int


class Memory:
    """What an attempt may use; `share` is of the last one since `begin`.

    hardware: what the limits are of, in words, the same wherever an attempt would go alike.
    """

    hardware: str

    def begin(self) -> None:
        """Forget the peak so far."""
        raise NotImplementedError

    def share(self, more: int = 0) -> float:
        """The peak and `more` bytes, over what may be used; above 1 it does not fit."""
        raise NotImplementedError


class DeviceMemory(Memory):
    """Of a GPU: torch's reserved memory, which has the fragments in it, and that of all others."""

    def __init__(self, device: torch.device):
        self._device = device
        self._total = torch.cuda.mem_get_info(device)[1]
        self.begin()
        name = torch.cuda.get_device_name(device)
        self.hardware = f"{name}, {self._total / 2**30:.1f} GiB"

    def begin(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        free = torch.cuda.mem_get_info(self._device)[0]
        # the context, NCCL's buffers since the first sum, and other processes
        self._others = self._total - free - torch.cuda.memory_reserved(self._device)

    def share(self, more: int = 0) -> float:
        peak = torch.cuda.max_memory_reserved(self._device) + self._others + more
        return peak / ((1 - SPARE) * self._total)


class HostMemory(Memory):
    """Of a process on a CPU: its resident memory, and its addresses where RLIMIT_AS limits them.

    workers: of this node, which share what is free; make it before any of them attempts something.
    """

    def __init__(self, workers: int):
        limits = [*_shared_limits()]
        self._room = max(1.0, min((one.free - SPARE * one.total) / workers for one in limits))
        tightest = min(limits, key=lambda one: one.total)
        words = f"{tightest.total / 2**30:.1f} GiB of {tightest.name}"
        words += f" for {workers} workers" if workers > 1 else ""
        self._first = self._before = _status()
        self._addresses = float("inf")
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            self._addresses = max(1.0, (1 - SPARE) * limit - self._first["VmSize"])
            words += f", RLIMIT_AS {limit / 2**30:.1f} GiB"
        self.hardware = f"CPU, {torch.get_num_threads()} threads, {words}"

    def begin(self) -> None:
        with suppress(OSError):  # where it is not possible, only a new peak of the process is seen
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status()

    def share(self, more: int = 0) -> float:
        now = _status()

        def grown(peak: str, present: str) -> int:
            top = now[peak] if now[peak] > self._before[peak] else now[present]
            return max(0, top - self._first[present])

        resident, addresses = grown("VmHWM", "VmRSS"), grown("VmPeak", "VmSize")
        return max((resident + more) / self._room, (addresses + more) / self._addresses)


def memory_of(device: torch.device, local_size: int) -> Memory:
    """The memory that a worker on this device may use. local_size: workers of this node."""
    return DeviceMemory(device) if device.type == "cuda" else HostMemory(local_size)


def _status() -> dict[str, int]:
    """This process's resident memory and addresses, now and at their peaks, in bytes."""
    wanted = ("VmPeak", "VmSize", "VmHWM", "VmRSS")
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        words[0][:-1]: 1024 * int(words[1]) for words in lines if words and words[0][:-1] in wanted
    }


def _shared_limits() -> Iterator[Limit]:
    words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    node = {line[0][:-1]: 1024 * int(line[1]) for line in words}
    yield Limit(name="the node's memory", total=node["MemTotal"], free=node["MemAvailable"])
    for folder, names in _control_groups():
        with suppress(OSError, ValueError, KeyError):  # `max`, or no such file: no limit
            total = int((folder / names[0]).read_text())
            used = int((folder / names[1]).read_text())
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # files that were read count as used, and make room when it is needed
            used -= {line[0]: int(line[1]) for line in lines}[names[2]]
            if total < node["MemTotal"]:
                yield Limit(name="a control group", total=total, free=max(0, total - used))


def _control_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The groups of this process and those above them, version 1 and 2; and their files' names."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        # in a container the path is the host's, and its own group is the root
        for folder in (own, *own.parents) if own.is_dir() else (root,):
            if folder == root or root in folder.parents:
                yield folder, names
