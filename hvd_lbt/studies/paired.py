"""Verdicts with a test: differences paired by seed, their interval, and how many seeds it takes.

Two arms of a study that share a seed share the network's first weights and the samples' order, so
their difference varies less than either. Intervals are Student's t for the mean of the differences
(pure but for SciPy's quantiles).
"""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the intervals
POWER = 0.8  # with which `needed` seeds show a difference of SEEN
SEEN = 0.3  # percentage points: what the papers' tables tell apart
MOST_SEEDS = 10_000


class Outcome(StrEnum):
    """What a study says about a claim; UNDECIDED where the interval is wider than the claim."""

    HELD = "held"
    NO = "did not hold"
    UNDECIDED = "is undecided"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences and its 95 % interval, all in percentage points.

    pairs: how many seeds; with one the interval is infinite. needed: the seeds with which a
    difference of 0.3 points would show (two-sided 5 %, power 80 %) at this spread;
    None with one seed.
    """

    mean: float
    low: float
    high: float
    pairs: int
    needed: int | None

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def within(self, margin: float) -> Outcome:
        """Whether the true difference lies within ± `margin`."""
        if -margin <= self.low and self.high <= margin:
            return Outcome.HELD
        return Outcome.NO if self.low > margin or self.high < -margin else Outcome.UNDECIDED

    def above(self, least: float) -> Outcome:
        """Whether the true difference exceeds `least`: -margin asks for "loses at most margin"."""
        if self.low >= least:
            return Outcome.HELD
        return Outcome.NO if self.high < least else Outcome.UNDECIDED


def paired(arm: dict[str, Any], other: dict[str, Any], key: str = "finals") -> Difference:
    """`arm` minus `other` over the seeds that both have; key: their values, one a seed."""
    theirs = dict(zip(other["seeds"], other[key], strict=True))
    return interval(
        [v - theirs[s] for s, v in zip(arm["seeds"], arm[key], strict=True) if s in theirs]
    )


def interval(differences: Iterable[float]) -> Difference:
    """The mean of independent values, and its interval. ValueError if there are none."""
    values = np.array(list(differences), dtype=float)
    if not len(values):
        raise ValueError("no seed is in both arms")
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Difference(mean=mean, low=-math.inf, high=math.inf, pairs=count, needed=None)
    deviation = float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Difference(
        mean=mean, low=mean - half, high=mean + half, pairs=count, needed=seeds_needed(deviation)
    )


def seeds_needed(deviation: float, seen: float = SEEN) -> int:
    """Seeds with which a paired t test shows a difference of `seen` at this standard deviation.

    Two-sided at 1 − LEVEL, with a power of POWER, by the usual approximation
    n ≥ ((t_(1+LEVEL)/2 + t_POWER) · deviation/seen)² with t of n − 1 degrees of freedom; at most
    10,000.
    """

    def suffices(count: int) -> bool:
        quantiles = stats.t.ppf([(1 + LEVEL) / 2, POWER], count - 1).sum()
        return bool(count >= (quantiles * deviation / seen) ** 2)

    return bisect.bisect_left(range(MOST_SEEDS), True, lo=2, key=suffices)


def all_of(outcomes: Iterable[Outcome]) -> Outcome:
    """NO if one is, else UNDECIDED if one is, else HELD."""
    seen = set(outcomes)
    return next((one for one in (Outcome.NO, Outcome.UNDECIDED) if one in seen), Outcome.HELD)


def held_if(condition: bool) -> Outcome:
    """For what has no interval, such as numbers of updates."""
    return Outcome.HELD if condition else Outcome.NO
