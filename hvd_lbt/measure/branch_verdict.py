"""The largest batch that loses nothing: a rule for branches of several batches and seeds (pure).

For each batch, the test losses of its branches minus those of B with the same seeds: their mean,
and an interval in which it lies with 90 % (Student's t, seeds − 1 degrees of freedom; each side is
wrong in 5 %). The noise of the seeds is the standard deviation of B's own test losses. A batch

- loses nothing, if the whole interval is at or below that noise;
- else loses, if the whole interval is above 0;
- else cannot be told: the interval is too wide for these seeds.

The critical batch is the largest that loses nothing, among those below the smallest that loses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, sqrt
from statistics import mean, stdev
from typing import Any, Literal

CONFIDENCE = 0.9
RULE = (
    "Rule, set before the branches are trained: of each batch's test losses those of B with the "
    f"same seeds are subtracted; their mean has a {CONFIDENCE:.0%} interval (Student's t). A batch "
    "loses nothing if the interval ends at or below the standard deviation of B's own test losses "
    "among the seeds; else it loses if the interval begins above 0; else it cannot be told."
)
Outcome = Literal["nothing lost", "loses", "cannot be told"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One batch against B. difference: the mean of the paired test losses, low, high: its interval;
    all inf where some branch diverged.
    """

    batch: int
    difference: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """noise: the standard deviation of B's test losses among the seeds. critical: the largest batch
    that loses nothing, None where none is; losing: the smallest that loses, None where none does.
    """

    noise: float
    compared: tuple[Compared, ...]
    critical: int | None
    losing: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite difference is None."""
        found = asdict(self)
        for one in found["compared"]:
            for key in ("difference", "low", "high"):
                one[key] = one[key] if isfinite(one[key]) else None
        return {**found, "compared": list(found["compared"])}


def judge(losses: Mapping[int, Sequence[float]]) -> Verdict:
    """The verdict on the test losses of each batch, by seed in the same order; B comes first.

    A loss that is not finite is of a branch that diverged.
    """
    (_, base), *others = losses.items()
    noise = stdev(base) if all(map(isfinite, base)) and len(base) > 1 else 0.0
    compared = tuple(_compare(batch, base, its, noise) for batch, its in others)
    losing = next((one.batch for one in compared if one.outcome == "loses"), None)
    good = [
        one.batch
        for one in compared
        if one.outcome == "nothing lost" and (losing is None or one.batch < losing)
    ]
    return Verdict(noise=noise, compared=compared, critical=max(good, default=None), losing=losing)


def _compare(batch: int, base: Sequence[float], its: Sequence[float], noise: float) -> Compared:
    if not all(map(isfinite, base)):
        return Compared(batch=batch, difference=inf, low=-inf, high=inf, outcome="cannot be told")
    if not all(map(isfinite, its)):
        return Compared(batch=batch, difference=inf, low=inf, high=inf, outcome="loses")
    differences = [own - of_base for own, of_base in zip(its, base, strict=True)]
    middle, half = mean(differences), half_width(differences)
    low, high = middle - half, middle + half
    outcome: Outcome = "cannot be told"
    if high <= noise:
        outcome = "nothing lost"
    elif low > 0:
        outcome = "loses"
    return Compared(batch=batch, difference=middle, low=low, high=high, outcome=outcome)


def half_width(values: Sequence[float]) -> float:
    """Half of the interval around the mean of `values` in which it lies with CONFIDENCE."""
    if len(values) < 2:
        return inf
    from scipy.special import stdtrit  # slow to import

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * stdev(values) / sqrt(len(values))
