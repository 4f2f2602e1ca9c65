"""How large the batch grows where it is measured: the batch that takes least time, and what bounds
it (pure).

Of an update of B samples only a part moves the weights ahead: reaching a loss takes (1 + φ/B) times
as many updates as without noise, with the simple noise scale φ = tr(Σ)/|G|² (McCandlish et al.
2018, arXiv:1812.06162, eq. 2.11). If an update takes a + b·B seconds, the time is proportional to
(1 + φ/B)(a + b·B), which is least at B* = √(φ·a/b): Pollux's goodput (Qiao et al., OSDI 2021, eq. 4
and 6) in closed form. A larger batch costs more samples, a smaller one more updates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt

STEP = sqrt(2)  # from one batch to the next
PER_EPOCH = 4  # decisions
MEASUREMENTS = 10  # of the gradient's noise since the last change, before another
PART_OF_DATA = 10  # the batch is at most so small a part of the N samples (Smith & Le 2018: B ≪ N)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """From `samples_seen` on, where an update ends, the global batch is `global_batch`.

    multiple: of which the batch is one, where a smaller one must be found (schedule.max_lr).
    """

    samples_seen: int
    global_batch: int
    multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of an update: a seconds, whatever its batch, and b seconds a sample, on all workers."""

    fixed: float
    a_sample: float

    @property
    def overhead(self) -> float:
        """a/b in samples."""
        return self.fixed / self.a_sample if self.a_sample > 0 else inf

    @classmethod
    def of(cls, seconds: Callable[[int], float], global_batch: int) -> "Costs":
        """a and b of the line through the seconds of this batch and of twice as many samples."""
        once, twice = seconds(global_batch), seconds(2 * global_batch)
        a_sample = min(max((twice - once) / global_batch, 0.0), once / global_batch)
        fixed = once - a_sample * global_batch
        return cls(fixed=fixed if fixed > 1e-9 * once else 0.0, a_sample=a_sample)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a decision rests on.

    noise: φ in samples; inf where |G|² is not distinguishable from 0. overhead: a/b, the samples
    that take as long as what an update takes beside its samples; inf where b is 0. measurements: of
    φ, since the last change.
    """

    noise: float
    overhead: float
    measurements: int


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of the global batch beside φ, in samples, each as far as the recipe has it."""

    data: float = inf
    max_lr: float = inf
    max_global_batch: float = inf


@dataclass(frozen=True, kw_only=True)
class Choice:
    """global_batch: from now on. fastest: B*, in samples. bound: what keeps it from being larger.

    bound: `time` (B* is), `noise`, `data`, `max_lr`, `max_global_batch`, or `step`: the next batch,
    beyond which B* would go.
    """

    global_batch: int
    fastest: float
    bound: str


def fastest_batch(noise: float, overhead: float) -> float:
    """B* = √(φ·a/b) in samples; noise: φ in samples, overhead: a/b in samples."""
    return sqrt(max(noise, 0.0) * max(overhead, 0.0)) if min(noise, overhead) > 0 else 0.0


def choose(
    global_batch: int, measured: Measured, bounds: Bounds, *, first: int, multiple: int = 1
) -> Choice:
    """The batch that follows `global_batch`: the same, or the next of `batches`.

    first: global batch at which the run began; multiple: of the batches that are allowed.
    """
    fastest = fastest_batch(measured.noise, measured.overhead)
    limits = {
        "time": fastest,
        "noise": measured.noise,
        "data": bounds.data,
        "max_lr": bounds.max_lr,
        "max_global_batch": bounds.max_global_batch,
    }
    bound = min(limits, key=limits.__getitem__)
    larger = next_batch(global_batch, first=first, multiple=multiple)
    if larger > limits[bound]:
        return Choice(global_batch=global_batch, fastest=fastest, bound=bound)
    beyond = next_batch(larger, first=first, multiple=multiple)
    return Choice(
        global_batch=larger, fastest=fastest, bound="step" if beyond <= limits[bound] else bound
    )


def next_batch(global_batch: int, *, first: int, multiple: int = 1) -> int:
    """The least of first·√2^k (k = 1, 2, …), rounded down to a multiple, above `global_batch`."""
    power = 1
    while (batch := int(first * STEP**power * (1 + 1e-9)) // multiple * multiple) <= global_batch:
        power += 1
    return batch


def is_due(before: int, seen: int, train_samples: int) -> bool:
    """Whether an update from `before` to `seen` samples ends one of the parts of an epoch after
    which the batch is decided.
    """
    return seen * PER_EPOCH // train_samples > before * PER_EPOCH // train_samples
