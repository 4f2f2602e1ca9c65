"""The largest batch that loses nothing: a rule for branches of several batches and seeds (pure).

Compared are logarithms of test losses: losses are positive and skewed, and a branch that nearly
diverges would hide itself in the width of its own interval. For each batch, those of its branches
minus those of B with the same seeds: their mean, and an interval in which it lies with 90 %
(Student's t, seeds − 1 degrees of freedom; each side is wrong in 5 %). The noise of the seeds is
the standard deviation of B's own. A batch

- loses nothing, if the whole interval is at or below that noise;
- else loses, if the whole interval is above 0;
- else cannot be told: the interval is too wide for these seeds.

The critical batch is the largest that loses nothing, among those below the smallest that loses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import expm1, inf, isfinite, log, sqrt
from statistics import mean, stdev
from typing import Any, Literal

CONFIDENCE = 0.9
RULE = (
    "Rule, set before the branches are trained: log test losses are compared with those of B, pair "
    f"by pair of the same seed; their mean difference has a {CONFIDENCE:.0%} interval (Student's "
    "t). A batch loses nothing if the interval ends at or below the noise of the seeds, the "
    "standard deviation of B's own; else it loses if the interval begins above 0; else it cannot "
    "be told."
)
Outcome = Literal["nothing lost", "loses", "cannot be told"]


SMALLEST = 1e-30  # a loss that is 0 in fp32 counts as this
LARGEST = 700.0  # of a logarithm: its exponential is a number


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One batch against B. above: by which share its test losses are above B's, in the geometric
    mean (0.1: 10 %); low, high: the interval. All inf where some branch diverged.
    """

    batch: int
    above: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """noise: of the seeds, as a share of the test loss. critical: the largest batch that loses
    nothing, None where none is; losing: the smallest that loses, None where none does.
    """

    noise: float
    compared: tuple[Compared, ...]
    critical: int | None
    losing: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        found = asdict(self)
        for one in found["compared"]:
            for key in ("above", "low", "high"):
                one[key] = one[key] if isfinite(one[key]) else None
        return {**found, "compared": list(found["compared"])}


def judge(losses: Mapping[int, Sequence[float]]) -> Verdict:
    """The verdict on the test losses of each batch, by seed in the same order; B comes first.

    A loss that is not finite is of a branch that diverged.
    """
    (_, base), *others = losses.items()
    alive = all(map(isfinite, base)) and len(base) > 1
    noise = stdev(map(_log, base)) if alive else 0.0
    compared = tuple(_compare(batch, base, its, noise) for batch, its in others)
    losing = next((one.batch for one in compared if one.outcome == "loses"), None)
    good = [
        one.batch
        for one in compared
        if one.outcome == "nothing lost" and (losing is None or one.batch < losing)
    ]
    return Verdict(
        noise=_share(noise), compared=compared, critical=max(good, default=None), losing=losing
    )


def _compare(batch: int, base: Sequence[float], its: Sequence[float], noise: float) -> Compared:
    if not all(map(isfinite, base)):
        return Compared(batch=batch, above=inf, low=-1.0, high=inf, outcome="cannot be told")
    if not all(map(isfinite, its)):
        return Compared(batch=batch, above=inf, low=inf, high=inf, outcome="loses")
    differences = [_log(own) - _log(of_base) for own, of_base in zip(its, base, strict=True)]
    middle, half = mean(differences), half_width(differences)
    low, high = middle - half, middle + half
    outcome: Outcome = "cannot be told"
    if high <= noise:
        outcome = "nothing lost"
    elif low > 0:
        outcome = "loses"
    return Compared(
        batch=batch, above=_share(middle), low=_share(low), high=_share(high), outcome=outcome
    )


def _log(loss: float) -> float:
    return log(max(loss, SMALLEST))


def _share(difference: float) -> float:
    """By which share a loss is larger whose logarithm is larger by this."""
    return expm1(difference) if difference < LARGEST else inf


def half_width(values: Sequence[float]) -> float:
    """Half of the interval around the mean of `values` in which it lies with CONFIDENCE."""
    if len(values) < 2:
        return inf
    from scipy.special import stdtrit  # slow to import

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * stdev(values) / sqrt(len(values))
