"""The rule of schedule/growth.py replayed on measured noise, against constant batches.

The noise is AdaptDL's (Apache-2.0, github.com/petuum/adaptdl, branch osdi21-artifact, commit
c793c708, simulator/traces): seven trainings of ResNet-50 on ImageNet, each with a constant batch.
growth_noise.csv is derived from them, a line for each span of progress:

- progress counts updates of 200 samples: an update of B samples makes as much as its gain,
  (1 + φ/200)/(1 + φ/B) (AdaScale; Pollux eq. 4 and 5). updates: of B samples, so far.
- noise: φ = 200·grad_var/grad_sqr in samples, as logged at the span's end; their grad_var is the
  variance of the mean gradient of 200 samples. In the first span φ falls and rises again; there
  it is what the log's own updates say (at a batch of 200 they say nothing: as logged).

A cluster's a and b are of speed_traces.csv, AdaptDL's too; speed_rows.py says how they are kept.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import ceil, inf, log
from typing import Protocol

import speed_rows

from hvd_lbt.schedule import growth
from hvd_lbt.schedule.growth import (
    MEASUREMENTS,
    PART_OF_DATA,
    PER_EPOCH,
    Bounds,
    Measured,
    choose,
)
from hvd_lbt.schedule.speed import SpeedProfile, Work, fit_line, update_time

# `choose` asks for it 800,000 times here, and only ever about some hundred batches.
next_batch = growth.next_batch = cache(growth.next_batch)
TRAIN_SAMPLES = 1_281_167  # ImageNet
UNIT = 200  # samples of an update of progress 1
MOVING_AVERAGE = 0.9  # what a measurement leaves of the average (measure/gradient_noise.py)
NOISE_EVERY = 10  # updates from one measurement to the next (run.noise_every)
LOCAL_BATCHES = (20, 28, 40, 57, 81, 115, 163, 200)  # of the traces, images a GPU
WIDER, SOONER = 4.0, 64  # φ a batch may be, and decisions an epoch, of the changes that are tried
SEARCHED = tuple(round(200 * 2 ** (step / 16)) for step in range(16 * 11 + 1))  # to 409,600


class Noise(Protocol):
    """φ over a training, by spans of progress. ends: the progress at which each ends."""

    @property
    def ends(self) -> tuple[float, ...]: ...

    def at(self, span: int, batch: float) -> float: ...

    def __hash__(self) -> int: ...  # kept results are of one object


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """φ of one training, whatever the batch; updates: that it had made at each of the ends."""

    batch: int
    ends: tuple[float, ...]
    updates: tuple[int, ...]
    noise: tuple[float, ...]

    def at(self, span: int, batch: float) -> float:
        return self.noise[span]


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """φ at the batch in use: between the two trainings of the next batches, log φ over log B.

    Pollux's simulator interpolates between them too. Beyond the smallest and the largest batch,
    theirs. Their spans end within 20 updates of 200 of each other.
    """

    every: tuple[Series, ...]

    @property
    def ends(self) -> tuple[float, ...]:
        return self.every[0].ends

    def at(self, span: int, batch: float) -> float:
        batches = [own.batch for own in self.every]
        after = min(max(bisect_right(batches, batch), 1), len(batches) - 1)
        left, right = self.every[after - 1], self.every[after]
        part = log(batch / left.batch) / log(right.batch / left.batch)
        part = min(max(part, 0.0), 1.0)
        return left.noise[span] ** (1 - part) * right.noise[span] ** part


@cache
def series() -> tuple[Series, ...]:
    """The seven trainings, the smallest batch first."""
    rows = speed_rows.read("growth_noise.csv")
    return tuple(
        Series(
            batch=batch,
            ends=tuple(float(row["progress"]) for row in rows if int(row["batch"]) == batch),
            updates=tuple(int(row["updates"]) for row in rows if int(row["batch"]) == batch),
            noise=tuple(float(row["noise"]) for row in rows if int(row["batch"]) == batch),
        )
        for batch in sorted({int(row["batch"]) for row in rows})
    )


@cache
def noises() -> dict[str, Noise]:
    """φ of each training by its batch, and of all together."""
    return {f"{own.batch:,}": own for own in series()} | {"all": Together(every=series())}


@dataclass(frozen=True, kw_only=True, eq=False)
class Cluster:
    """seconds: of an update by its batch. overhead: a/b in samples, by the batch and the next."""

    name: str
    gpus: int
    seconds: Callable[[float], float]
    overhead: Callable[[int, int], float]

    @property
    def first(self) -> int:
        """20 images a GPU, the fewest of the traces, but at least AdaptDL's first batch, 200."""
        return max(UNIT, min(LOCAL_BATCHES) * self.gpus)


def line(name: str, gpus: int, fixed: float, per_sample: float) -> Cluster:
    return Cluster(
        name=name,
        gpus=gpus,
        seconds=lambda batch: fixed + per_sample * batch,
        overhead=lambda _, __: fixed / per_sample,
    )


@cache
def trace_profile() -> SpeedProfile:
    """The model of an update's time, fitted to the traces' rows of at most 4 GPUs."""
    rows = [row for row in _traces() if row[1] <= 4]
    return speed_rows.fit_trace(rows, speed_rows.CONGESTION)


def _traces() -> list[tuple[int, int, int, float]]:
    return [
        (int(row["nodes"]), int(row["workers"]), int(row["local_batch"]), float(row["seconds"]))
        for row in speed_rows.read("speed_traces.csv")
        if row["network"] == "imagenet"
    ]


@cache
def clusters() -> tuple[Cluster, ...]:
    """By measured lines as far as the traces go; 256 GPUs by the model's line."""
    return measured_line(8), measured_line(64), predicted_line(256)


def measured_line(gpus: int) -> Cluster:
    """a + b·B by least squares through the traces of so many GPUs, four a node."""
    points = [(n * seen, s) for nodes, n, seen, s in _traces() if (nodes, n) == (gpus // 4, gpus)]
    return line(str(gpus), gpus, *fit_line(points))


def predicted_line(gpus: int) -> Cluster:
    """The same, through what the model of an update's time predicts for these GPUs."""
    points = [
        (gpus * local, speed_rows.seconds_of(trace_profile(), gpus, local, nodes=gpus // 4))
        for local in LOCAL_BATCHES
    ]
    return line(f"{gpus} (predicted)", gpus, *fit_line(points))


def modelled(gpus: int) -> Cluster:
    """Seconds by the model itself, in equal micro-batches of at most 200 on the busiest GPU.

    a and b are those of the chord from the batch to its double, as a measured profile gives them.
    """

    @cache
    def seconds(batch: float) -> float:
        local = ceil(batch / gpus)
        parts = -(-local // max(LOCAL_BATCHES))
        work = Work(
            workers=gpus,
            nodes=gpus // 4,
            samples=local,
            micro_batches=parts,
            last_micro_batch=local // parts,
            image_size=224,
        )
        total = update_time(trace_profile(), work).total
        assert total is not None
        return total

    def overhead(batch: int, _: int) -> float:
        slope = (seconds(2 * batch) - seconds(batch)) / batch
        return max(0.0, seconds(batch) / slope - batch) if slope > 0 else inf

    return Cluster(name=str(gpus), gpus=gpus, seconds=seconds, overhead=overhead)


def comparing(cluster: Cluster) -> Cluster:
    """The a/b for which B* reaches the next batch where that batch takes less time than this one.

    (1 + φ/B')·t(B') < (1 + φ/B)·t(B) if and only if B' < √(φ·o), with the o that is returned.
    """

    def overhead(batch: int, larger: int) -> float:
        now, then = cluster.seconds(batch), cluster.seconds(larger)
        if then <= now:
            return inf
        return max(0.0, larger**2 * (now / batch - then / larger) / (then - now))

    return replace(cluster, overhead=overhead)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole training: for each batch in turn where it began, and its updates.

    parts: (progress, batch, updates), the last update in part.
    """

    parts: tuple[tuple[float, int, float], ...]

    @property
    def updates(self) -> float:
        return sum(updates for _, _, updates in self.parts)

    @property
    def samples(self) -> float:
        return sum(batch * updates for _, batch, updates in self.parts)

    def hours(self, cluster: Cluster) -> float:
        return sum(updates * cluster.seconds(batch) for _, batch, updates in self.parts) / 3600


def gain(noise: float, batch: float) -> float:
    """Progress of an update."""
    return (1 + noise / UNIT) / (1 + noise / batch)


def constant(noise: Noise, batch: int) -> Run:
    return Run(parts=((0.0, batch, _updates(noise, batch)),))


@cache
def _updates(noise: Noise, batch: float) -> float:
    """Of a training with this constant batch."""
    return sum(
        length / gain(noise.at(span, batch), batch) for span, length in enumerate(_lengths(noise))
    )


@cache
def _searched(noise: Noise) -> list[list[tuple[float, float]]]:
    """By span and batch of SEARCHED: φ, and the progress of an update."""
    return [
        [(found, gain(found, batch)) for batch in SEARCHED for found in (noise.at(span, batch),)]
        for span in range(len(noise.ends))
    ]


def _lengths(noise: Noise) -> list[float]:
    """Of the spans, in progress."""
    return [end - begin for begin, end in pairwise((0.0, *noise.ends))]


def best_constant(noise: Noise, cluster: Cluster) -> tuple[int, float]:
    """The constant batch of fewest hours, of 16 a doubling from 200 to 409,600, and its hours."""
    hours, batch = min((constant(noise, batch).hours(cluster), batch) for batch in SEARCHED)
    return batch, hours


def equal_samples(noise: Noise, samples: float) -> tuple[float, float]:
    """The constant batch that takes so many samples in all, and its updates."""
    low, high = 10.0, 1e6
    for _ in range(40):
        middle = (low * high) ** 0.5
        if middle * _updates(noise, middle) < samples:
            low = middle
        else:
            high = middle
    return low, samples / low


def replay(
    noise: Noise,
    overhead: Callable[[int, int], float],
    *,
    first: int,
    bound: float = 1.0,
    per_epoch: int = PER_EPOCH,
    seen: float = 1.0,
) -> Run:
    """The training whose batch the rule decides, update by update.

    φ is measured every NOISE_EVERY updates and averaged as in a run; since tr(Σ) changes slowly,
    it is |G|², in proportion to 1/φ, that the average follows. Of what is varied, bound: B is at
    most so many φ; per_epoch: decisions; seen: of the true φ, what is measured.
    """
    bounds = Bounds(data=TRAIN_SAMPLES / PART_OF_DATA)
    batch, progress, updates, samples, span = first, 0.0, 0, 0, 0
    squared = weight = 0.0
    measurements = 0
    parts: list[tuple[float, int, float]] = []
    since = (0.0, 0)  # progress and updates where the batch began
    known = (-1, 0)  # the span and the batch of `found`, `rate` and `ratio`
    while True:
        if known != (span, batch):
            known = (span, batch)
            found = noise.at(span, batch)
            rate = gain(found, batch)
            ratio = overhead(batch, next_batch(batch, first=first))
        to_measure = NOISE_EVERY - updates % NOISE_EVERY
        due = (samples * per_epoch // TRAIN_SAMPLES + 1) * TRAIN_SAMPLES
        to_decide = -(-(due - samples * per_epoch) // (per_epoch * batch))
        number = min(to_measure, to_decide)
        if progress + rate * number >= noise.ends[-1]:
            last = updates - since[1] + (noise.ends[-1] - progress) / rate
            return Run(parts=(*parts, (since[0], batch, last)))
        progress += rate * number
        while progress > noise.ends[span]:
            span += 1
        updates += number
        samples += number * batch
        if number == to_measure:
            squared = MOVING_AVERAGE * squared + (1 - MOVING_AVERAGE) / (seen * found)
            weight = MOVING_AVERAGE * weight + 1 - MOVING_AVERAGE
            measurements += 1
        if number == to_decide and measurements >= MEASUREMENTS:
            # φ·k and a/b/k have the same B*, and k times the bound.
            measured = Measured(
                noise=bound * weight / squared,
                overhead=ratio / bound,
                measurements=measurements,
            )
            chosen = choose(batch, measured, bounds, first=first).global_batch
            if chosen != batch:
                parts.append((since[0], batch, updates - since[1]))
                batch, measurements, since = chosen, 0, (progress, updates)


def best_schedule(
    noise: Noise, cost: Callable[[float], float], bound: float = inf
) -> tuple[float, float]:
    """Updates and samples of a schedule that no other beats, since it knows φ ahead.

    In each span the one of SEARCHED that makes its progress at least cost (of an update, by its
    batch), and is at most `bound` φ (the smallest where φ is smaller).
    """
    updates = samples = 0.0
    costs = [cost(batch) for batch in SEARCHED]
    for length, spans in zip(_lengths(noise), _searched(noise), strict=True):
        _, batch, rate = min(
            (each / rate, batch, rate)
            for batch, each, (found, rate) in zip(SEARCHED, costs, spans, strict=True)
            if batch <= max(UNIT, bound * found)
        )
        made = length / rate
        updates += made
        samples += made * batch
    return updates, samples


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Updates saved, as shares of those of the constant batch `batch` with the same samples.

    rule, best: by the rule, and by the best schedule for the same a/b, each against its own
    constant batch of equal samples. epochs: of the rule's run.
    """

    overhead: float
    batch: float
    epochs: float
    rule: float
    best: float


@cache
def saved(noise: Noise, overhead: float) -> Saved:
    """The rule starts with 200 samples."""
    run = replay(noise, lambda _, __: overhead, first=UNIT)
    batch, updates = equal_samples(noise, run.samples)
    least, samples = best_schedule(noise, lambda batch: overhead + batch)
    return Saved(
        overhead=overhead,
        batch=batch,
        epochs=run.samples / TRAIN_SAMPLES,
        rule=1 - run.updates / updates,
        best=1 - least / equal_samples(noise, samples)[1],
    )


@cache
def saved_against(own: Series) -> Saved:
    """At the a/b with which the rule takes the samples of the constant batch of this training."""
    low, high = 1.0, 1e6
    for _ in range(14):
        middle = (low * high) ** 0.5
        run = replay(own, lambda *_, middle=middle: middle, first=UNIT)
        if run.samples < own.batch * own.updates[-1]:
            low = middle
        else:
            high = middle
    return saved(own, low)


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Hours beyond those of the best constant batch, as shares of them (below 0: fewer).

    rule: as it is, from 20 images a GPU; from_200: from a batch of 200. within_noise: of the best
    schedule that has B ≤ φ. wider: the rule with B ≤ 4φ. sooner: from 200, decided 64 times an
    epoch. both: from 200, with B ≤ 4φ too. half, twice, trained: a constant batch of half and of
    twice the best, and of the largest that was trained.
    """

    best_batch: int
    best_hours: float
    rule: float
    from_200: float
    within_noise: float
    wider: float
    sooner: float
    both: float
    half: float
    twice: float
    trained: float


@cache
def hours(noise: Noise, cluster: Cluster) -> Hours:
    batch, best = best_constant(noise, cluster)
    updates, samples = best_schedule(noise, cluster.seconds, 1.0)
    # on a line, the seconds of any batches follow from their updates and samples
    fixed = cluster.seconds(0.0)
    within = (fixed * updates + (cluster.seconds(1.0) - fixed) * samples) / 3600
    first = cluster.first

    def of(run: Run) -> float:
        return run.hours(cluster) / best - 1

    return Hours(
        best_batch=batch,
        best_hours=best,
        rule=of(replay(noise, cluster.overhead, first=first)),
        from_200=of(replay(noise, cluster.overhead, first=UNIT)),
        within_noise=within / best - 1,
        wider=of(replay(noise, cluster.overhead, first=first, bound=WIDER)),
        sooner=of(replay(noise, cluster.overhead, first=UNIT, per_epoch=SOONER)),
        both=of(replay(noise, cluster.overhead, first=UNIT, bound=WIDER, per_epoch=SOONER)),
        half=of(constant(noise, round(batch / 2))),
        twice=of(constant(noise, 2 * batch)),
        trained=of(constant(noise, series()[-1].batch)),
    )


@cache
def hours_modelled(gpus: int) -> dict[str, tuple[float, float]]:
    """The least and the most over φ of Hours.rule and .wider, each also with `comparing`."""
    cluster = modelled(gpus)
    found: dict[str, list[float]] = {name: [] for name in ("rule", "comparing", "wider", "both")}
    for noise in noises().values():
        _, best = best_constant(noise, cluster)
        for name, of, bound in (
            ("rule", cluster, 1.0),
            ("comparing", comparing(cluster), 1.0),
            ("wider", cluster, WIDER),
            ("both", comparing(cluster), WIDER),
        ):
            run = replay(noise, of.overhead, first=cluster.first, bound=bound)
            found[name].append(run.hours(cluster) / best - 1)
    return {name: (min(values), max(values)) for name, values in found.items()}
