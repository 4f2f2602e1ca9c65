"""How much of the planned noise reaches a weight, by how samples are drawn (pure).

The noise scale g stands for a variance of the weights. On a quadratic loss of curvature h, with
samples whose gradients have the variance σ², the stochastic differential equation of Smith & Le
2018 (arXiv:1710.06451, section 5) has the stationary variance g·σ²/(2hN). Here are the exact
variances of SGD's own, discrete updates, for three ways to draw samples.

**One update.** With n the noise of the batch's gradient, b ← m·b + h·w + n and w ← w − ε·b make w
an ARMA(2, 1) process (Nesterov's momentum: w ← w − ε·(h·w + n + m·b)):

    wₜ + a₁·wₜ₋₁ + a₂·wₜ₋₂ = −ε·(nₜ₋₁ + c·nₜ₋₂)·s

whose variance and autocorrelation ρ(τ) have a closed form (Box, Jenkins, Reinsel, *Time Series
Analysis*, section 3.4). Heavy ball with independent noise: 1/(1 − εh/(2(1+m))) times g's variance.

**Every sample once an epoch.** The deviations of one epoch's samples sum to zero: each is an
independent deviation less the mean of its epoch's. An epoch has k = N/B updates; averaged over the
place in the epoch, the noise has its autocovariance less (1/k)·(1 − τ/k) for τ < k. A linear filter
answers with

    V = V_independent · (1 − (1/k)·Σ (1 − |τ|/k)·ρ(τ)),   the sum over |τ| < k

which is the variance of w about its own mean over k updates. With small steps and little momentum
V/V_independent = 1 − 2/x + 2·(1 − e⁻ˣ)/x² with x = g·h, the number of relaxation times in an epoch:
nearly 1 for x ≫ 1, and x/3 for x ≪ 1.
"""

from dataclasses import dataclass
from math import comb, exp, gcd, inf, log
from typing import Literal

from hvd_lbt.schedule.noise import noise_scale

Sampling = Literal["independent", "subset", "epoch"]
HALF = 2.5563  # the x at which `epoch_share` is ½
SERIES_BELOW = 1e-2  # of x, where the closed form of `epoch_share` would cancel
SEARCHED = (1e-4, 100)  # smallest g·h, and steps on a log scale from there to the largest stable h


@dataclass(frozen=True, kw_only=True)
class _Filter:
    """What one weight makes of unit noise: wₜ = −a₁wₜ₋₁ − a₂wₜ₋₂ + b₀nₜ + b₁nₜ₋₁."""

    a1: float
    a2: float
    b0: float
    b1: float

    @property
    def variance(self) -> float:
        """Stationary, for independent noise of variance 1; inf where the updates diverge."""
        if not (abs(self.a2) < 1 and abs(self.a1) < 1 + self.a2):
            return inf
        power = (self.b0**2 + self.b1**2) * (1 + self.a2) - 2 * self.b0 * self.b1 * self.a1
        return power / ((1 - self.a2) * ((1 + self.a2) ** 2 - self.a1**2))

    @property
    def next_correlation(self) -> float:
        """ρ(1); ρ(τ) = −a₁ρ(τ−1) − a₂ρ(τ−2) from τ = 2 on."""
        return (self.b0 * self.b1 / self.variance - self.a1) / (1 + self.a2)


def predicted_variance(noise_scale: float, curvature: float, train_samples: int) -> float:
    """g/(2hN): a weight's stationary variance by the stochastic differential equation.

    In units of σ², the variance of one sample's gradient (over all N, divided by N). curvature: h >
    0 of the mean loss, along one of its Hessian's eigenvectors.
    """
    return noise_scale / (2 * curvature * train_samples)


def stationary_variance(
    *,
    lr: float,
    momentum: float,
    train_samples: int,
    global_batch: int,
    curvature: float,
    nesterov: bool = False,
    sampling: Sampling = "epoch",
) -> float:
    """A weight's variance under SGD on a quadratic loss, exact, averaged over the updates.

    In units of σ² as `predicted_variance`; inf where the updates diverge (heavy ball: εh ≥ 2(1+m);
    Nesterov's momentum: εh ≥ 2(1+m)/(1+2m)). sampling: independent (each sample of a batch drawn
    from all N), subset (B different samples of the N, anew for each update), epoch (every sample
    once an epoch, in a new order: what this package does; a batch may straddle epochs). Derivation:
    this module's docstring. Takes N/B steps for epoch. ValueError for a subset larger than N, and
    for N < 2 where samples are not independent.
    """
    filtered = _filter(lr, momentum, curvature, nesterov)
    independent = filtered.variance / global_batch
    if sampling == "independent" or independent == inf:
        return independent
    if train_samples < 2:
        raise ValueError(f"{train_samples=}: a single sample has no variance")
    unbiased = train_samples / (train_samples - 1)
    if sampling == "subset":
        if global_batch > train_samples:
            raise ValueError(f"{global_batch=} different samples of {train_samples}: too many")
        return independent * unbiased * (1 - global_batch / train_samples)
    return independent * unbiased * _share(filtered, train_samples, global_batch)


def epoch_share(relaxations: float) -> float:
    """V/V_independent = 1 − 2/x + 2(1 − e⁻ˣ)/x² with every sample once an epoch; x: g·h ≥ 0.

    The limit of many small updates an epoch, and of a momentum that averages over a small part of
    it.
    """
    x = relaxations
    if x < SERIES_BELOW:
        return x / 3 - x**2 / 12 + x**3 / 60  # the next term is x⁴/360
    return 1 - 2 / x + 2 * (1 - exp(-x)) / x**2


def largest_curvature(lr: float, momentum: float, nesterov: bool = False) -> float:
    """The h at which updates begin to diverge."""
    return 2 * (1 + momentum) / (lr * (1 + 2 * momentum if nesterov else 1))


def half_noise_curvature(
    *,
    lr: float,
    momentum: float,
    train_samples: int,
    global_batch: int,
    nesterov: bool = False,
) -> float | None:
    """The curvature h below which a weight's variance is less than half of what g predicts.

    With every sample once an epoch. HALF/g where the momentum's memory B/(N(1−m)) is a small part
    of an epoch. None if no curvature that the lr is stable with has half.
    """
    scale = noise_scale(lr, momentum, train_samples, global_batch)

    def has_half(curvature: float) -> bool:
        exact = stationary_variance(
            lr=lr,
            momentum=momentum,
            train_samples=train_samples,
            global_batch=global_batch,
            curvature=curvature,
            nesterov=nesterov,
        )
        return exact >= predicted_variance(scale, curvature, train_samples) / 2

    least, count = SEARCHED
    low, high = least / scale, largest_curvature(lr, momentum, nesterov) * (1 - 1e-9)
    step = log(high / low) / count
    above = next((i for i in range(1, count + 1) if has_half(low * exp(i * step))), None)
    if above is None:
        return None
    outer, inner = (above - 1) * step, above * step
    for _ in range(20):
        middle = (outer + inner) / 2
        outer, inner = (outer, middle) if has_half(low * exp(middle)) else (middle, inner)
    return low * exp(inner)


def _filter(lr: float, momentum: float, curvature: float, nesterov: bool) -> _Filter:
    step = lr * curvature
    if nesterov:
        # (1 − z⁻¹)(1 − m·z⁻¹)·w = −ε·z⁻¹·(1 + m − m·z⁻¹)·(h·w + n)
        return _Filter(
            a1=-(1 + momentum) * (1 - step),
            a2=momentum * (1 - step),
            b0=-lr * (1 + momentum),
            b1=lr * momentum,
        )
    return _Filter(a1=step - (1 + momentum), a2=momentum, b0=-lr, b1=0.0)


def _share(filtered: _Filter, train_samples: int, global_batch: int) -> float:
    """1 − (1/k)·Σ c(τ)·ρ(τ): what is left of the variance with every sample once an epoch.

    c(τ) is the share of pairs, one sample of each of two batches τ updates apart, that are of one
    epoch: 1 − |τ|/k where B divides N. Where it does not, batches straddle epochs, at all multiples
    of the greatest common divisor alike.
    """
    unit = gcd(train_samples, global_batch)
    batch, epoch = global_batch // unit, train_samples // unit
    correlation, following = 1.0, filtered.next_correlation
    summed = _of_one_epoch(0, batch, epoch)
    for apart in range(1, -(-epoch // batch) + 1):
        correlation, following = (
            following,
            -filtered.a1 * following - filtered.a2 * correlation,
        )
        summed += 2 * _of_one_epoch(apart, batch, epoch) * correlation
    return max(0.0, 1 - batch / epoch * summed)


def _of_one_epoch(apart: int, batch: int, epoch: int) -> float:
    """c(τ): the mean of (1 − |τ·batch + d|/epoch)₊ over d, whose weights are batch − |d|."""
    if apart == 0:
        short, long = sorted((batch, epoch))
        return (long * short**2 - (short**3 - short) / 3) / (batch**2 * epoch)
    left = epoch - apart * batch
    if left >= batch:
        return left / epoch
    # (left − d)₊ summed over a triangle of weights: third powers, whose second difference it is.
    third = comb(max(0, left + batch + 1), 3) - 2 * comb(max(0, left + 1), 3)
    return third / (batch**2 * epoch)
