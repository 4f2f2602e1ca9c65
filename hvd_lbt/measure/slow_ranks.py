"""Which rank the others wait for, and why: a robust test on the ranks' times (`rank_times`).

Of each update, a rank's own time is compute + data + between, where `between` is what it spends
outside of both (logging, checkpoints, your own code): the ranks leave a sum together, so whoever
has the smallest compute + data + sums spent the most between. Compared are medians over the last
16, 64 and 256 updates. The reference is the low median of the *other* ranks, so it is a rank's that
exists; of two ranks it is the other one, of three the faster other one. Where ranks have unequal
shares of an update, a rank with k times the samples of another may take k times as long, and one
with fewer samples as long as the other: only what is beyond that counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WINDOWS = (16, 64, 256)  # updates: a long one finds in noise what a short one cannot
SLOW = 1.15  # median own time, as a multiple of the reference, of a rank that is named
LEAST_EXCESS = 0.002  # seconds an update; less is the operating system's, and costs nobody much
LEAST_SECONDS = 0.5  # of a window: of short updates the shortest one would show a moment only
FAST = 1.07  # below it the rank is no longer slow
# Standard errors of a difference of medians, by the spread in the window, that it must exceed: a
# run has thousands of windows and ranks, and neighbouring updates are not independent.
CERTAIN = 5.0
WARMUP = 3  # updates that are not judged: memory is allocated, kernels are chosen
# A rank that only had no CPU core may be slow for a moment because of any other process.
HOLD_SECONDS = 5.0

OWN, STEADY = 0, 5  # places in `own_parts`
PLACE = {"compute": 1, "data": 2, "no_core": 3, "between": 4}
CAUSES = {
    "compute": "in forward and backward",
    "data": "waiting for data",
    "no_core": "other processes use its CPU cores",
    "between": "between its updates (logging, checkpoints, own code)",
}


@dataclass(frozen=True, kw_only=True)
class SlowRank:
    """A rank that is slow, or no longer.

    update: by which it was found; ratio: own time / that of the reference, median of the window;
    cause: one of CAUSES; excess: seconds an update that the others wait for it; ended: whether it
    is slow no longer.
    """

    update: int
    rank: int
    host: str
    ratio: float
    cause: str
    excess: float
    ended: bool = False

    def text(self, ranks: int) -> str:
        """For people: `slowest rank 13 on node4: 1.4 × the median, waiting for data`."""
        peers = "the other rank" if ranks == 2 else "the median"
        if self.ended:
            return f"rank {self.rank} on {self.host} is as fast as the others again"
        return (
            f"slowest rank {self.rank} on {self.host}: {self.ratio:.1f} × {peers}, "
            f"{CAUSES[self.cause]}"
        )


@dataclass(frozen=True)
class _Compared:
    """Of one window, by rank: median / reference; slow beyond the noise; so without no_core."""

    window: int
    ratios: Floats
    slow: NDArray[np.bool]
    steady: NDArray[np.bool]


class SlowRanks:
    """Finds the ranks that are slow, by the times of all ranks.

    hosts: of each rank. A rank is named when its median own time over the last 16 (or 64, or 256)
    updates is at least 1.15 times the reference and 2 ms above it, in both halves of them above
    1.07 times, and the difference is beyond the noise in that window. It is cleared when the median
    of as many updates is below 1.07 times the reference. Time in which it was ready to run and had
    no CPU core counts only if that lasts 5 s. Where the ranks' shares of an update change (a new
    stage) the windows begin anew.
    """

    def __init__(self, hosts: Sequence[str]):
        self._hosts = list(hosts)
        self._parts = np.zeros((0, len(hosts), 6))  # of `own_parts`, of the last updates
        self._seconds = np.zeros(0)  # of the same updates
        self._samples = np.zeros(len(hosts))  # of each rank in each of them
        self._since = np.full(len(hosts), np.inf)  # until now slow, by the shortest window
        self._clock = 0.0  # seconds of all updates
        self._left_out = WARMUP
        self._window_of: dict[int, int] = {}  # by which each was found
        self.named: dict[int, SlowRank] = {}

    def add(
        self, updates: Sequence[int], times: Floats, samples: Floats, seconds: Floats
    ) -> Iterator[SlowRank]:
        """Take (U, ranks, 4) `PARTS` of U updates; gives what has changed, in order.

        samples: (U, ranks), of each rank in each update; seconds: (U,), of each update. An update
        in which a rank knows no time is left out, and so are the first three.
        """
        known = (times[:, :, 0] + times[:, :, 2] > 0).all(1)
        keep = np.flatnonzero(known)
        skipped = min(self._left_out, len(keep))
        self._left_out -= skipped
        keep = keep[skipped:]
        if not len(keep) or len(self._hosts) < 2:
            return
        changes = np.flatnonzero((np.diff(samples[keep], axis=0) != 0).any(1)) + 1
        for part in np.split(keep, changes):
            if (samples[part[0]] != self._samples).any():
                self._samples = samples[part[0]]
                self._parts, self._seconds = self._parts[:0], self._seconds[:0]
                self._since[:] = np.inf
            own = own_parts(times[part], samples[part])
            numbers = [updates[int(index)] for index in part]
            yield from self._judge(numbers, own, seconds[part])

    def _judge(self, updates: Sequence[int], parts: Floats, seconds: Floats) -> Iterator[SlowRank]:
        """Take updates with the same shares."""
        self._parts = np.concatenate([self._parts, parts])
        self._seconds = np.concatenate([self._seconds, seconds])
        clock = self._clock + np.cumsum(seconds)
        self._clock = float(clock[-1])
        before = len(self._parts) - len(updates)
        compared: dict[int, list[_Compared]] = {}  # by the place of a window's end
        for window in WINDOWS:
            # Where a window ends with one of the new updates; the long ones end every W/8 updates.
            every = 1 if window == WINDOWS[0] else window // 8
            first = max(before, window - 1)
            ends = [end for end in range(first, len(self._parts)) if end % every == 0]
            if not ends:
                continue
            ratios, slow = self._compare(OWN, ends, window)
            _, steady = self._compare(STEADY, ends, window)
            for end, *found in zip(ends, ratios, slow, steady, strict=True):
                compared.setdefault(end, []).append(_Compared(window, *found))
        for end, windows in sorted(compared.items()):
            yield from self._changes(updates[end - before], clock[end - before], end, windows)
        kept = -WINDOWS[-1]
        self._parts, self._seconds = self._parts[kept:], self._seconds[kept:]

    def _changes(
        self, update: int, now: float, end: int, windows: Sequence[_Compared]
    ) -> Iterator[SlowRank]:
        """What the windows that end with an update say, the shortest first."""
        recent = windows[0].ratios >= FAST
        for compared in windows:
            span = slice(end + 1 - compared.window, end + 1)
            if compared is windows[0]:
                self._since = np.where(compared.slow, np.minimum(self._since, now), np.inf)
                lasts = now - self._since >= HOLD_SECONDS
            else:
                lasts = compared.slow & (self._seconds[span].sum() >= HOLD_SECONDS)
            long_enough = self._seconds[span].sum() >= LEAST_SECONDS
            steady = compared.steady & (compared.ratios >= SLOW) & long_enough
            for rank in map(int, np.flatnonzero((steady | lasts) & recent)):
                if rank in self.named:
                    continue
                found = self._describe(update, rank, span)
                if lasts[rank] or found.cause != "no_core":
                    self.named[rank], self._window_of[rank] = found, compared.window
                    yield found
            for rank, by in [*self._window_of.items()]:
                if by == compared.window and compared.ratios[rank] < FAST:
                    del self._window_of[rank]
                    yield replace(self.named.pop(rank), update=update, ended=True)

    def _compare(
        self, of: int, ends: Sequence[int], window: int
    ) -> tuple[Floats, NDArray[np.bool]]:
        """(windows, ranks): median / reference, and whether a rank is slow beyond the noise."""
        values = np.log(np.maximum(self._parts[:, :, of], 1e-9))
        starts = np.array(ends) + 1 - window
        windows = np.lib.stride_tricks.sliding_window_view(values, window, axis=0)[starts]
        medians = np.median(windows, axis=2)
        peers = reference(np.exp(medians), self._samples)
        there = self._samples > 0
        ratios = np.where(peers > 0, np.exp(medians) / np.maximum(peers, 1e-9), 0.0)
        slow = (ratios >= SLOW) & (np.exp(medians) - peers >= LEAST_EXCESS)
        if not slow.any():
            return ratios, slow
        spread = 1.4826 * np.median(np.abs(windows - medians[:, :, None]), axis=2)
        usual = np.quantile(spread[:, there], 0.75, axis=1, method="higher")
        spread = np.maximum(spread, usual[:, None])
        error = 1.2533 * spread * (2 / window) ** 0.5  # of the difference of two medians
        sure = np.log(np.maximum(ratios, 1e-9)) >= CERTAIN * error
        halves = np.median(windows.reshape(*medians.shape, 2, -1), axis=3).min(2)
        lasting = np.exp(halves) >= FAST * peers
        return ratios, slow & sure & lasting

    def _describe(self, update: int, rank: int, span: slice) -> SlowRank:
        medians = np.median(self._parts[span], axis=0).T  # (parts, ranks)
        peers = reference(medians, self._samples)[:, rank]
        excess = medians[:, rank] - peers
        cause = max(("compute", "data", "between"), key=lambda name: excess[PLACE[name]])
        if excess[PLACE["no_core"]] > 0.5 * excess[OWN]:
            cause = "no_core"
        return SlowRank(
            update=update,
            rank=rank,
            host=self._hosts[rank],
            ratio=float(medians[OWN, rank] / max(peers[OWN], 1e-9)),
            cause=cause,
            excess=float(excess[OWN]),
        )


def own_parts(times: Floats, samples: Floats) -> Floats:
    """(U, ranks, 6) seconds: own time, compute, data, no_core, between, and own − no_core.

    times: (U, ranks, 4) `rank_times.PARTS`; samples: (U, ranks). `between` is counted from the rank
    that has the least of it, of those with samples.
    """
    compute, data, sums, no_core = np.moveaxis(times, 2, 0)
    inside = compute + data + sums
    longest = np.where(samples > 0, inside, -np.inf).max(1, keepdims=True)
    between = np.maximum(0.0, longest - inside)
    own = compute + data + between
    no_core = np.minimum(no_core, own)
    return np.stack([own, compute, data, no_core, between, own - no_core], axis=2)


def reference(values: Floats, samples: Floats) -> Floats:
    """(windows, ranks): for each rank the low median of the other ranks' values.

    values: (windows, ranks); samples: (ranks,). For a rank with k times the samples of another,
    k > 1, the other's value counts k times. Ranks without samples are nobody's reference, and get
    0.
    """
    found = np.zeros_like(values)
    (there,) = np.nonzero(samples > 0)
    if len(there) < 2:
        return found
    middle = (len(there) - 2) // 2
    for count in np.unique(samples[there]):
        scaled = values[:, there] * np.maximum(1.0, count / samples[there])
        ordered = np.partition(scaled, (middle, middle + 1), axis=1)
        low, high = ordered[:, [middle]], ordered[:, [middle + 1]]
        (ranks,) = np.nonzero(samples == count)
        # without itself, what comes after it in the order moves one place down
        found[:, ranks] = np.where(values[:, ranks] > low, low, high)
    return found
