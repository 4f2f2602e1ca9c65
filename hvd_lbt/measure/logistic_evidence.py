"""The evidence of many L2-regularised logistic regressions at once.

The same minimum, Hessian and −ln P as `evidence.find_evidence` (tests compare them), written out
for σ(Xw) in numpy: Newton's steps of all problems in one batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.measure.evidence import COST_ERROR

Floats = NDArray[np.float64]
MOST_STEPS = 200
FLATTEST = 1e-4  # of a step's predicted fall in cost that a line search must reach


@dataclass(frozen=True, kw_only=True)
class Evidences:
    """Of s problems at one λ. weights: the minima, (s, p); cost + occam, each (s,), is −ln P."""

    weights: Floats
    cost: Floats
    occam: Floats

    @property
    def negative_log(self) -> Floats:
        """−ln P(data | model), (s,), in nats."""
        return self.cost + self.occam


def cross_entropies(logits: Floats, targets: Floats) -> Floats:
    """−ln of the probability of each target, 0 or 1, under σ(logits); shapes broadcast."""
    return np.logaddexp(0, logits) - targets * logits


def logistic_evidences(
    inputs: Floats, targets: Floats, precisions: Sequence[float]
) -> Iterator[Evidences]:
    """At each λ of `precisions` in turn, from the minima of the one before.

    inputs: (s, n, p); targets: 0 or 1, (s, n). Cost: Σ cross-entropy + ½ λ|w|², minimised to within
    1e-9 nats. Raises ArithmeticError where Newton's steps do not get there.
    """
    weights = np.zeros((len(inputs), inputs.shape[2]))
    for precision in precisions:
        weights = _minimise(inputs, targets, precision, weights)
        _, hessian = _derivatives(inputs, targets, precision, weights)
        logarithm = np.linalg.slogdet(hessian)[1]
        yield Evidences(
            weights=weights,
            cost=_cost(inputs, targets, precision, weights),
            occam=0.5 * (logarithm - inputs.shape[2] * np.log(precision)),
        )


def _logits(inputs: Floats, weights: Floats) -> Floats:
    return (inputs @ weights[:, :, None])[:, :, 0]


def _cost(inputs: Floats, targets: Floats, precision: float, weights: Floats) -> Floats:
    losses = cross_entropies(_logits(inputs, weights), targets).sum(1)
    return np.asarray(losses + 0.5 * precision * (weights**2).sum(1))


def _derivatives(
    inputs: Floats, targets: Floats, precision: float, weights: Floats
) -> tuple[Floats, Floats]:
    right = 0.5 * (1 + np.tanh(0.5 * _logits(inputs, weights)))  # σ, without overflow
    across = inputs.transpose(0, 2, 1)
    gradient = (across @ (right - targets)[:, :, None])[:, :, 0] + precision * weights
    hessian = across @ (inputs * (right * (1 - right))[:, :, None])
    hessian += precision * np.eye(inputs.shape[2])
    return gradient, hessian


def _minimise(inputs: Floats, targets: Floats, precision: float, start: Floats) -> Floats:
    weights = start.copy()
    left = np.arange(len(weights))  # problems whose minimum is not found yet
    for _ in range(MOST_STEPS):
        x, y = inputs[left], targets[left]
        gradient, hessian = _derivatives(x, y, precision, weights[left])
        # C is λ-strongly convex: C(w) − C(w₀) ≤ |∇C|²/(2λ).
        far = (gradient**2).sum(1) > 2 * precision * COST_ERROR
        if not far.any():
            break
        left, x, y, gradient, hessian = (a[far] for a in (left, x, y, gradient, hessian))
        step = -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        slope = (gradient * step).sum(1)
        cost = _cost(x, y, precision, weights[left])
        size = np.ones(len(left))
        for _ in range(40):
            moved = _cost(x, y, precision, weights[left] + size[:, None] * step)
            # rounding of a cost of n nats: near the minimum a fall cannot be seen any more
            high = moved > cost + FLATTEST * size * slope + 1e-12 * np.abs(cost)
            if not high.any():
                break
            size[high] /= 2
        weights[left] += size[:, None] * step
    else:
        raise ArithmeticError(
            f"no minimum was found in {MOST_STEPS} Newton steps at λ = {precision:g} for "
            f"{len(left)} of {len(weights)} problems"
        )
    # The Hessian changes to first order in what is left: one step more, with quadratic convergence.
    gradient, hessian = _derivatives(inputs, targets, precision, weights)
    return np.asarray(weights - np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0])
