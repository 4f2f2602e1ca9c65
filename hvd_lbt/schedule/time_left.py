"""How long the rest of a run takes, from the run's own updates (pure).

The seconds of an update are a + b·w, where w is the work of the rank with most samples: the cost of
each of its micro-batches. a and b are fitted to the updates' mean seconds in each stage, so two
batch sizes suffice, and a growth ahead is in the estimate. Before a second size has been seen, b·w
is the measured time of forward and backward and of the wait for data, and a the rest of an update:
the sums, the optimizer and all else. What a micro-batch of another size costs is measured once
(`micro_batch_costs`), or taken in proportion to its samples, which is an upper bound where batches
grow.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log1p
from statistics import median

from hvd_lbt.schedule.growth import Costs
from hvd_lbt.schedule.layout import make_layout
from hvd_lbt.schedule.plan import Plan, Stage, Update

WARMUP = 3  # updates at the start that count nowhere: memory is allocated, kernels are chosen
ENOUGH = 8  # updates of a size, from which its own mean counts
KEPT = 512  # updates of a size that are remembered, the newest
HICCUP = 4.0  # medians; what an update takes beyond is no habit of this run
INPUT_BOUND = 0.25  # share of an update that waits for data, from which the input sets the speed
Key = tuple[int, int, int, int]  # global batch, ghost batch, micro-batch, image size
FORWARD = 1 / 3  # of forward and backward

# What an estimate rests on.
MEASURED = "measured"  # every size of update ahead has been timed in this run
FITTED = "fitted"  # to two sizes or more, or to one and the cost of the micro-batches ahead
UPPER_BOUND = "upper bound"  # one size only, and larger ones in proportion to their samples


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """seconds: until the run ends; basis: MEASURED, FITTED or UPPER_BOUND."""

    seconds: float
    basis: str


@dataclass(kw_only=True)
class _Size:
    """Updates of one global batch, as far as they were timed."""

    micro_batches: tuple[int, ...]  # samples of each, of the rank with most samples
    samples: int
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    compute: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    data: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    count: int = 0


def robust_mean(values: Sequence[float]) -> float:
    """The mean, with what is above four times the median counted as that."""
    ordered = sorted(values)
    limit = HICCUP * ordered[len(ordered) // 2]
    return sum(min(value, limit) for value in ordered) / len(ordered)


class TimeLeft:
    """Learns from a run's updates, evaluations and saves how long the rest of the plan takes.

        left.updated(update, seconds); left.parts(update, compute, data)
        left.evaluated(seconds); left.saved(seconds)
        left.after(update)  # Estimate, or None as long as there is nothing to go by

    plan: of the run, which may be resumed anywhere; workers: as many as there are now. A part with
    another number of workers begins a new one. micro_batches: samples of one, at most, by stage;
    ghost_batch: of the layout; eval_every: epochs; test_samples: of an evaluation; image_size: of
    stages that have none of their own. Estimates are of these workers to the end.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        workers: int,
        micro_batches: Sequence[int],
        ghost_batch: int,
        eval_every: int,
        test_samples: int,
        image_size: int = 1,
    ) -> None:
        self.plan = plan
        self._workers, self._micro_batches = workers, tuple(micro_batches)
        self._ghost_batch, self._image_size = ghost_batch, image_size
        self._span, self._test_samples = eval_every * plan.train_samples, test_samples
        self._sizes: dict[Key, _Size] = {}
        self._costs: dict[int, float] = {}
        self._timed = 0
        self._evaluations: list[float] = []
        self._saves: list[float] = []
        self._saved_by_evaluations = 0
        self._predicted: dict[Key, float] = {}  # seconds of an update, cached
        self._basis = UPPER_BOUND
        self._stale = 1  # updates until the cache is made anew
        self.at_first: dict[int, float | None] = {}  # stage → images/s predicted when it began

    # -- what the run tells -----------------------------------------------------------------------

    def updated(self, update: Update, seconds: float) -> None:
        """An update took so many seconds, without evaluations and saves before it."""
        self._timed += 1
        if update.stage not in self.at_first:
            known = self._predicted.get(self._key(update.stage)) if self.at_first else None
            self.at_first[update.stage] = known and update.global_batch / known
        size = self._size(self._key(update.stage, update.global_batch))
        size.count += 1
        # The first of a size allocates its memory and chooses its kernels.
        if self._timed > WARMUP and size.count > 1:
            size.seconds.append(seconds)
        self._stale -= 1
        if len(size.seconds) in (2, ENOUGH):
            self._stale = 0

    def parts(self, update: Update, compute: float, data: float) -> None:
        """Of an update: seconds of forward and backward, and of the wait for data, of the rank that
        is slowest on average.
        """
        size = self._size(self._key(update.stage, update.global_batch))
        if self._timed > WARMUP + 1 and size.count > 1:
            size.compute.append(compute)
            size.data.append(data)

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so many seconds."""
        self._evaluations.append(seconds)

    def saved(self, seconds: float, *, at_end_of_stage: bool) -> None:
        """A checkpoint took so many seconds of the loop's time."""
        self._saves.append(seconds)
        self._saved_by_evaluations += not at_end_of_stage

    def use(self, micro_batches: Sequence[int]) -> None:
        """From now on micro-batches are of at most so many samples, by stage."""
        self._micro_batches = tuple(micro_batches)
        self._stale = 0

    def learn_costs(self, costs: Mapping[int, float]) -> None:
        """Seconds of forward and backward of a micro-batch, by its samples."""
        self._costs = dict(costs)
        self._stale = 0

    @property
    def beside_updates(self) -> dict[str, float]:
        """Seconds of all evaluations and of all checkpoints so far."""
        return {"evaluations": sum(self._evaluations), "checkpoints": sum(self._saves)}

    # -- what follows from it ---------------------------------------------------------------------

    def after(self, update: Update) -> Estimate | None:
        """The time that is left when this update is done; None before there is enough to go by."""
        self._refresh()
        if not self._predicted:
            return None
        stage = self.plan.stages[update.stage]
        left = stage.first_update + stage.updates - update.index - 1
        seconds = left * self._seconds_of(stage)
        for later in self.plan.stages[update.stage + 1 :]:
            seconds += later.updates * self._seconds_of(later)
        evaluations = self._evaluations_after(update)
        seconds += evaluations * self._evaluation_seconds()
        seconds += self._saves_after(update, evaluations) * _mean(self._saves)
        return Estimate(seconds=seconds, basis=self._basis)

    def images_per_second(self, stage: Stage) -> float | None:
        """Of this stage's updates, by what is known now."""
        self._refresh()
        return stage.global_batch / self._seconds_of(stage) if self._predicted else None

    def costs(self, stage: Stage) -> Costs | None:
        """Of updates near the stage's; None before it can be known.

        Where the input sets the speed no batch is faster, and a is 0.
        """
        key = self._key(stage.index)
        size = self._size(key)
        timed, means, work = self._known()
        if key not in means:
            return None
        if median(size.data or (0.0,)) > INPUT_BOUND * means[key]:
            return Costs(fixed=0.0, a_sample=means[key] / stage.global_batch)
        fit = self._fit(timed, means, work)

        def seconds(global_batch: int) -> float:
            its = self._key(stage.index, global_batch)
            return fit(self._work(its, self._size(its)))

        return Costs.of(seconds, stage.global_batch)

    def replan(self, plan: Plan, micro_batches: Sequence[int]) -> None:
        """Go on with another plan, which differs from the next update on."""
        self.plan = plan
        self.use(micro_batches)
        self._refresh()

    def micro_batches_ahead(self, update: int) -> list[int]:
        """The different sizes of a micro-batch from this update on, of the rank with most.

        With policy measured also those of an update of twice as many samples, which may come.
        """
        stages = [s for s in self.plan.stages if s.first_update + s.updates > update]
        keys = [self._key(s.index) for s in stages]
        if self.plan.schedule.policy == "measured":
            keys += [self._key(s.index, 2 * s.global_batch) for s in stages]
        return sorted({size for key in keys for size in self._size(key).micro_batches})

    def _key(self, stage: int, global_batch: int | None = None) -> Key:
        """Global batch, ghost batch, micro-batch and image size of a stage's updates."""
        of = self.plan.stages[stage]
        ghost_batch = of.ghost_batch or self._ghost_batch
        image_size = of.image_size or self._image_size
        return global_batch or of.global_batch, ghost_batch, self._micro_batches[stage], image_size

    def _size(self, key: Key) -> _Size:
        if key not in self._sizes:
            global_batch, ghost_batch, micro_batch, _ = key
            layout = make_layout(
                global_batch,
                rank=self._workers - 1,  # no rank has more samples than the last
                size=self._workers,
                micro_batch=micro_batch,
                ghost_batch=ghost_batch,
            )
            sizes = tuple(len(part) for part in layout.micro_batches)
            self._sizes[key] = _Size(micro_batches=sizes, samples=global_batch)
        return self._sizes[key]

    def _seconds_of(self, stage: Stage) -> float:
        return self._predicted[self._key(stage.index)]

    def _work(self, key: Key, size: _Size) -> float:
        """Of an update, for the rank with most samples: it grows as the images' pixels."""
        return sum(map(self._cost, size.micro_batches)) * (key[3] / self._image_size) ** 2

    def _cost(self, size: int) -> float:
        """Of a micro-batch: measured, on the line through the two nearest measured, or samples."""
        if size in self._costs or len(self._costs) < 2:
            return self._costs.get(size, float(size))
        one, other = sorted(sorted(self._costs, key=lambda known: abs(known - size))[:2])
        slope = (self._costs[other] - self._costs[one]) / (other - one)
        return max(self._costs[one] + slope * (size - one), 0.1 * self._costs[one])

    def _refresh(self) -> None:
        """Make the seconds of an update of each stage anew, if enough has happened since."""
        if self._stale > 0 and self._predicted:
            return
        timed, means, work = self._known()
        if not timed:
            return
        self._stale = max(1, self._timed // 20)
        fit = self._fit(timed, means, work)
        keys = [self._key(stage.index) for stage in self.plan.stages]
        ahead = {key: self._size(key) for key in keys}
        rate = self._input_rate(timed, means)
        self._predicted = {
            key: means[key]
            if key in means
            else max(fit(self._work(key, size)), size.samples / rate)
            for key, size in ahead.items()
        }
        several = len({round(work[key], 9) for key in timed}) > 1
        known = all(size in self._costs for one in ahead.values() for size in one.micro_batches)
        same = len({size for one in ahead.values() for size in one.micro_batches}) == 1
        unseen = [key for key in ahead if key not in means]
        self._basis = (
            MEASURED if not unseen else FITTED if several or known or same else UPPER_BOUND
        )

    def _known(self) -> tuple[dict[Key, _Size], dict[Key, float], dict[Key, float]]:
        """The sizes that were timed often enough, their mean seconds, and the work of all sizes."""
        timed: dict[Key, _Size] = {}
        for enough in (2, ENOUGH):
            often = {k: size for k, size in self._sizes.items() if len(size.seconds) >= enough}
            timed = often or timed
        means = {key: robust_mean(size.seconds) for key, size in timed.items()}
        work = {key: self._work(key, size) for key, size in self._sizes.items()}
        return timed, means, work

    def _fit(
        self,
        timed: Mapping[Key, _Size],
        means: Mapping[Key, float],
        work: Mapping[Key, float],
    ) -> Callable[[float], float]:
        """Seconds of an update by its work: a + b·w, by least squares relative to each mean.

        Of one size alone, forward and backward and the wait for data are b·w, at most what its
        micro-batches took when they were tried.
        """
        points = sorted((work[key], means[key], len(size.seconds)) for key, size in timed.items())
        if len({round(w, 9) for w, _, _ in points}) > 1:
            weights = [count / mean**2 for _, mean, count in points]
            total = sum(weights)
            middle = sum(s * w for s, (w, _, _) in zip(weights, points, strict=True)) / total
            mean = sum(s * m for s, (_, m, _) in zip(weights, points, strict=True)) / total
            above = sum(
                s * (w - middle) * (m - mean) for s, (w, m, _) in zip(weights, points, strict=True)
            )
            below = sum(s * (w - middle) ** 2 for s, (w, _, _) in zip(weights, points, strict=True))
            b = min(max(above / below, 0.0), mean / middle)  # neither part may be negative
            a = mean - b * middle
            return lambda w: a + b * w
        key = max(timed, key=lambda one: len(timed[one].seconds))
        size = timed[key]
        whole = means[key]
        compute = min(robust_mean(size.compute), whole) if size.compute else whole
        data = min(_mean(size.data), whole - compute)
        b = compute / work[key]
        if self._costs:
            # What an update computes beyond its micro-batches as they were tried, without the
            # hooks and copies of each gradient, does not grow with their samples.
            b = min(b, 1.0)
        b += data / work[key]
        return lambda w: whole + b * (w - work[key])

    def _input_rate(self, timed: Mapping[Key, _Size], means: Mapping[Key, float]) -> float:
        """Images/s that the input gives, where updates wait for it; else infinite."""
        rates = [
            size.samples / means[key]
            for key, size in timed.items()
            if size.data and median(size.data) > INPUT_BOUND * means[key]
        ]
        return max(rates, default=float("inf"))

    def _evaluations_after(self, update: Update) -> int:
        """Evaluations still to come: after each span of `eval_every` epochs, and at the end."""
        seen, done = update.samples_seen + update.global_batch, update.index + 1
        if done == self.plan.updates:
            return 0
        count = 0
        for stage in self.plan.stages[update.stage :]:
            begin, end = max(seen, stage.first_sample), stage.first_sample + stage.samples
            crossed = end // self._span - begin // self._span
            left = stage.first_update + stage.updates - max(done, stage.first_update)
            count += min(crossed, left)
        last_is_due = self.plan.samples % self._span == 0
        return count + (not last_is_due)

    def _evaluation_seconds(self) -> float:
        if self._evaluations:
            return robust_mean(self._evaluations)
        size = max(self._sizes.values(), key=lambda one: len(one.compute), default=None)
        if size is None or not size.compute:
            return 0.0
        local = sum(size.micro_batches)
        each = robust_mean(size.compute) / max(local, 1)
        return FORWARD * each * self._test_samples / self._workers

    def _saves_after(self, update: Update, evaluations: int) -> float:
        """Checkpoints still to come: at the end of a stage, and where the accuracy is best."""
        # The k-th of many evaluations that no longer improve is the best with probability 1/k; so
        # far some share more or less of them was.
        far = len(self._evaluations)
        best = self._saved_by_evaluations * log1p(evaluations / far) if far else 0.0
        return len(self.plan.stages) - update.stage + min(best, evaluations)


def _mean(values: Sequence[float]) -> float:
    return robust_mean(values) if values else 0.0


def hours_and_minutes(seconds: float) -> str:
    """Seconds as h:min: `2:05 h`; `<0:01 h` below a minute."""
    if seconds < 60:
        return "<0:01 h"
    minutes = round(seconds / 60 + 1e-9)
    return f"{minutes // 60}:{minutes % 60:02} h"
