"""Where each rank's time goes in an update: forward and backward, data, sums.

A rank measures its own parts and adds them to the small sum that every update has anyway, one
update later: the time at the sums is known only when they are over. So no further message is sent,
and nothing waits for the device. The rows are 16 bytes a rank; so that the message does not grow
with the ranks without end, more than ROWS ranks send them in every second update only, or every
third, and so on.
"""

import os
import threading
import time
from contextlib import suppress

import torch
from torch import Tensor

from hvd_lbt.world import World

ROWS = 256  # of ranks, that an update carries on average at most
# Seconds of an update, in the order of a rank's row. compute: forward and backward of all its
# micro-batches; data: it waited for images; sums: from the end of its last backward until the
# ranks' sums were there; delayed: outside of the sums, it was ready to run and had no CPU core.
PARTS = ("compute", "data", "sums", "delayed")


class RankTimes:
    """Measures this rank's parts of each update, in seconds.

        times.begin()
        for batch in batches: times.begin_part(batches.waited); …; times.end_part()
        times.end_compute(batches.waited)  # the last backward is over
        times.end_sums()  # the ranks' sums are there

    On a CPU by the clock. On a GPU by CUDA events, which are read an update later, when the host
    has waited for the device already: compute and sums are the device's time, and data is the part
    of the host's wait in which the device had nothing to do.
    """

    def __init__(self, device: torch.device, world: World):
        self._rank, self._size = world.rank, world.size
        self._every = -(-world.size // ROWS)
        self.unknown = torch.zeros(world.size, len(PARTS), device=device)
        self._clock = _Events(device) if device.type == "cuda" else _Clock()
        self._schedule = _Schedule()
        self._delay = self._last_delay = 0.0
        self._delayed_before = self._schedule.delayed()

    def begin(self) -> None:
        """An update begins."""
        self._clock.begin()

    def begin_part(self, waited: float) -> None:
        """A micro-batch is there, on its device; waited: seconds for data so far."""
        self._clock.begin_part(waited)

    def end_part(self) -> None:
        """Its forward and backward are over."""
        self._clock.end_part()

    def end_compute(self, waited: float) -> None:
        """The last backward is over; waited: seconds for data in this update."""
        self._clock.end_compute(waited)
        self._delay = self._schedule.delayed() - self._delayed_before

    def end_sums(self) -> None:
        """The sums are there. If it is called again in an update, the last call counts."""
        self._clock.end_sums()

    def numbers(self, update: int) -> int:
        """How many numbers the rows of all ranks are in this update: 4·ranks, or 0."""
        return 0 if update % self._every else len(PARTS) * self._size

    def fill(self, rows: Tensor) -> None:
        """Write this rank's row, `PARTS` of the update before, into (4·ranks,) zeros; or (0,)."""
        row = self._clock.row() if len(rows) else None
        if row is not None:
            place = len(PARTS) * self._rank
            own = torch.tensor((*row, self._last_delay))
            rows[place : place + len(PARTS)].copy_(own, non_blocking=True)

    def end(self) -> None:
        """The update is over: the next one sends what was measured."""
        self._clock.end()
        self._last_delay, self._delayed_before = self._delay, self._schedule.delayed()


class _Clock:
    """The parts of an update on a CPU."""

    def __init__(self) -> None:
        self._last: tuple[float, float, float] | None = None

    def begin(self) -> None:
        self._compute = self._sums = 0.0

    def begin_part(self, waited: float) -> None:
        self._at = time.perf_counter()

    def end_part(self) -> None:
        self._compute += time.perf_counter() - self._at

    def end_compute(self, waited: float) -> None:
        self._data, self._at = waited, time.perf_counter()

    def end_sums(self) -> None:
        self._sums = time.perf_counter() - self._at

    def end(self) -> None:
        self._last = (self._compute, self._data, self._sums)

    def row(self) -> tuple[float, float, float] | None:
        """compute, data and sums of the update before."""
        return self._last


class _Events:
    """The parts of an update on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Event] = []
        self._now: list[torch.cuda.Event] = []  # begin and end of each micro-batch, then the sums'
        self._before: tuple[list[torch.cuda.Event], float, float] | None = None

    def _record(self) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._now.append(event)

    def begin(self) -> None:
        self._free += self._now  # of an update that failed
        self._now = []
        self._first_wait = self._data = 0.0

    def begin_part(self, waited: float) -> None:
        if not self._now:
            self._first_wait = waited
        self._record()

    def end_part(self) -> None:
        self._record()

    def end_compute(self, waited: float) -> None:
        self._data = waited
        if not self._now:  # a rank without samples: nothing from here to here
            self._record()
            self._record()
        self._parts = len(self._now)

    def end_sums(self) -> None:
        self._free += self._now[self._parts :]
        del self._now[self._parts :]
        self._record()

    def end(self) -> None:
        if self._before:
            self._free += self._before[0]
        self._before = (self._now, self._first_wait, self._data)
        self._now = []

    def row(self) -> tuple[float, float, float] | None:
        """compute, data and sums of the update before; None if the device is not that far."""
        if self._before is None:
            return None
        events, first_wait, waited = self._before
        if len(events) < 3 or not events[-1].query():
            return None
        *parts, received = events
        begins, ends = parts[::2], parts[1::2]
        compute = sum(a.elapsed_time(b) for a, b in zip(begins, ends, strict=True))
        gaps = sum(a.elapsed_time(b) for a, b in zip(ends, begins[1:], strict=False))
        # the host may wait for the next micro-batch while the device computes this one
        data = first_wait + min(waited - first_wait, gaps / 1000)
        return compute / 1000, data, ends[-1].elapsed_time(received) / 1000


class _Schedule:
    """How long this thread was ready to run while other threads had its CPU cores (Linux)."""

    def __init__(self) -> None:
        self._thread, self._file = -1, -1

    def delayed(self) -> float:
        """Seconds since the thread began; 0 where the kernel does not count them."""
        if self._thread != threading.get_ident():
            self._close()
            self._thread = threading.get_ident()
            with suppress(OSError):
                self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        if self._file < 0:
            return 0.0
        try:
            return int(os.pread(self._file, 64, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        self._close()
