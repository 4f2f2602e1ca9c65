"""What a run's updates cost, as rank 0 adds it up from the rows of all ranks (`rank_times`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.measure.rank_times import PARTS
from hvd_lbt.measure.slow_ranks import SlowRank, SlowRanks
from hvd_lbt.schedule.layout import make_layout
from hvd_lbt.schedule.plan import Update
from hvd_lbt.schedule.time_left import TimeLeft, hours_and_minutes

Floats = NDArray[np.float64]
BINS = 200  # lines of all ranks' times in a run's metrics, at most about


@dataclass(kw_only=True)
class StageTimes:
    """The updates of one stage. seconds, samples: of all of them; timed: seconds of those whose
    parts are known; parts: of these, a rank's mean seconds in compute, data, sums and waiting.
    """

    updates: int = 0
    seconds: float = 0.0
    samples: int = 0
    timed: float = 0.0
    parts: Floats = field(default_factory=lambda: np.zeros(4))

    @property
    def images_per_second(self) -> float:
        """Samples / seconds of its updates."""
        return self.samples / max(self.seconds, 1e-9)

    @property
    def shares(self) -> dict[str, float]:
        """Of the workers' time in updates: compute, data, sums, waiting (for slower ranks)."""
        names = ("compute", "data", "sums", "waiting")
        return {
            name: float(part / self.timed) if self.timed else 0.0
            for name, part in zip(names, self.parts, strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class RanksLine:
    """Each rank's mean seconds an update, of consecutive updates."""

    first_update: int
    updates: int
    times: Floats  # (ranks, 4)

    def values(self) -> dict[str, Any]:
        """As a line of metrics.jsonl has it: three digits are enough to draw."""
        rows = zip(PARTS, self.times.T.tolist(), strict=True)
        parts = {name: [float(f"{seconds:.3g}") for seconds in row] for name, row in rows}
        return {"first_update": self.first_update, "updates": self.updates, **parts}


def summary_text(summary: dict[str, Any], seconds: float) -> str:
    """`RunTimes.summary` for people: a line for all, and one a stage."""
    beside = [
        f"{name} {summary[name] / seconds:.1%}"
        for name in ("evaluations", "checkpoints")
        if summary.get(name)
    ]
    lines = [
        f"{hours_and_minutes(seconds)} ({seconds:,.1f} s), {summary['worker_hours']:.3g} "
        "worker-hours" + (f", of which {', '.join(beside)}" if beside else "")
    ]
    for stage in summary["stages"]:
        predicted = stage["predicted_images_per_second"]
        lines.append(
            f"stage {stage['stage'] + 1}: {stage['updates']:,} updates, "
            f"{stage['images_per_second']:,.0f} images/s"
            + (f" (predicted when it began: {predicted:,.0f})" if predicted else "")
            + f" · forward and backward {stage['compute']:.1%}, waiting for data "
            f"{stage['data']:.1%}, sums {stage['sums']:.1%}, waiting for slower ranks "
            f"{stage['waiting']:.1%}"
        )
    return "\n".join(lines)


class RunTimes:
    """Adds up the times of updates, and finds the ranks that are slow.

    hosts: of each rank; planned: updates of the whole plan; ghost_batch: of the layout.
    left: learns from them how long the rest takes.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        planned: int,
        ghost_batch: int,
        left: TimeLeft | None = None,
    ) -> None:
        self.hosts, self._planned, self._left = list(hosts), planned, left
        self._ghost_batch = ghost_batch
        self.slow = SlowRanks(hosts)
        self._parts: dict[tuple[int, int], Floats] = {}  # compute and data by rank, of each size
        self.stages: dict[int, StageTimes] = {}
        self._before: tuple[Update, float] | None = None  # whose row comes with the next update
        self._samples_of: dict[tuple[int, int], Floats] = {}
        self._bin: tuple[int, int, int] | None = None  # number, first update, updates
        self._binned = np.zeros((len(hosts), len(PARTS)))

    def add(
        self, updates: Sequence[tuple[Update, float]], rows: Floats
    ) -> Iterator[SlowRank | RanksLine]:
        """Take finished updates and their seconds; gives what a log should say, in order.

        rows: (U, ranks, 4), that came with these updates: each is of the update before.
        """
        for update, seconds in updates:
            stage = self.stages.setdefault(update.stage, StageTimes())
            stage.updates += 1
            stage.seconds += seconds
            stage.samples += update.global_batch
        of = [self._before, *updates[:-1]]
        self._before = updates[-1]
        first = 0 if of[0] is not None else 1
        done = [one for one in of if one is not None]
        rows = rows[first:]
        if not done:
            return
        lasted = np.array([value for _, value in done])
        if self._left:
            for (update, _), row in zip(done, rows, strict=True):
                if row.any():
                    # The mean of the rank that is slowest on average: the mean of each update's
                    # slowest would take noise for work, which a larger batch has more of.
                    key = update.stage, update.global_batch
                    total = self._parts.setdefault(key, np.zeros((len(self.hosts), 2)))
                    total += row[:, :2]
                    slowest = int(total.sum(1).argmax())
                    self._left.parts(update, *row[slowest, :2].tolist())
        self._count([update for update, _ in done], lasted, rows)
        samples = np.stack([self._samples(update) for update, _ in done])
        indices = [update.index for update, _ in done]
        yield from self.slow.add(indices, rows, samples, lasted)
        yield from self._lines(indices, rows)

    def _samples(self, update: Update) -> Floats:
        """(ranks,): samples of each in this update."""
        ghost_batch = update.ghost_batch or self._ghost_batch
        key = (update.global_batch, ghost_batch)
        if key not in self._samples_of:
            size = len(self.hosts)
            layouts = (
                make_layout(
                    update.global_batch,
                    rank=rank,
                    size=size,
                    micro_batch=ghost_batch,  # how a share is cut does not matter here
                    ghost_batch=ghost_batch,
                )
                for rank in range(size)
            )
            self._samples_of[key] = np.array([layout.local_batch for layout in layouts], float)
        return self._samples_of[key]

    def _count(self, updates: Sequence[Update], seconds: Floats, rows: Floats) -> None:
        known = rows.any((1, 2))
        sums = rows[:, :, 2]
        least = sums.min(1)  # what no rank spends waiting for another
        parts = np.stack(
            [rows[:, :, 0].mean(1), rows[:, :, 1].mean(1), least, sums.mean(1) - least], axis=1
        )
        numbers = np.array([update.stage for update in updates])
        for number in np.unique(numbers[known]):
            of = known & (numbers == number)
            stage = self.stages.setdefault(int(number), StageTimes())
            stage.timed += float(seconds[of].sum())
            stage.parts += parts[of].sum(0)

    def _lines(self, indices: Sequence[int], rows: Floats) -> Iterator[RanksLine]:
        for index, row in zip(indices, rows, strict=True):
            number = index * BINS // self._planned
            if self._bin is not None and self._bin[0] != number:
                yield from self.last_line()
            if not row.any():
                continue
            _, first, count = self._bin or (number, index, 0)
            self._bin = (number, first, count + 1)
            self._binned += row

    def summary(self, seconds: float) -> dict[str, Any]:
        """What this part of the run cost, for its `end` line.

        seconds: of this part. By stage: images/s, what `TimeLeft` had predicted when it began (None
        for the first stage of this part), and the shares of the workers' time.
        """
        predicted = self._left.at_first if self._left else {}
        stages = [
            {
                "stage": number,
                "updates": stage.updates,
                "seconds": stage.seconds,
                "images_per_second": stage.images_per_second,
                "predicted_images_per_second": predicted.get(number),
                **stage.shares,
            }
            for number, stage in sorted(self.stages.items())
        ]
        return {
            "stages": stages,
            "worker_hours": seconds * len(self.hosts) / 3600,
            **(self._left.beside_updates if self._left else {}),
        }

    def last_line(self) -> Iterator[RanksLine]:
        """What is not given yet of the ranks' times."""
        if self._bin is not None and len(self.hosts) > 1:
            _, first, count = self._bin
            yield RanksLine(first_update=first, updates=count, times=self._binned / count)
        self._bin = None
        self._binned[:] = 0
