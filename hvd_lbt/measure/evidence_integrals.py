"""The evidence of a logistic regression as the integral that Laplace's method approximates.

−ln ∫ P(data | w) P(w) dw with the prior N(0, 1/λ) on every weight: by quadrature for one to three
weights, by annealed importance sampling with Hamiltonian transitions for any number.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from hvd_lbt.measure.logistic_evidence import cross_entropies

Floats = NDArray[np.float64]
NODES = {1: 401, 2: 101, 3: 41}  # of the grid, each weight
WIDEST = 10.0  # in standard deviations of Laplace's Gaussian, each way
LEAPFROGS, STEP = 4, 0.6  # of a transition; the step in units of the curvature's bound


@dataclass(frozen=True, kw_only=True)
class Integral:
    """−ln P in nats, and its error: of a grid half as fine, or standard, of the groups' mean."""

    negative_log: float
    error: float
    accepted: float = 1.0
    """Share of the sampler's proposals."""


def integrate(inputs: Floats, targets: Floats, precision: float, minimum: Floats) -> Integral:
    """By the trapezoidal rule around the minimum (p,), p ≤ 3. inputs (n, p), targets (n,)."""
    size = inputs.shape[1]
    right = 1 / (1 + np.exp(-inputs @ minimum))
    hessian = inputs.T @ (inputs * (right * (1 - right))[:, None]) + precision * np.eye(size)
    scale = np.linalg.inv(np.linalg.cholesky(hessian)).T  # w = minimum + scale·z

    def by(nodes: int) -> float:
        stretched = np.linspace(-np.arcsinh(WIDEST), np.arcsinh(WIDEST), nodes)
        axis = np.sinh(stretched)
        weight = np.log(np.cosh(stretched)) + np.log(stretched[1] - stretched[0])
        places = np.stack(np.meshgrid(*(axis,) * size, indexing="ij"), -1).reshape(-1, size)
        volumes = np.sum(np.meshgrid(*(weight,) * size, indexing="ij"), axis=0).ravel()
        total = -np.inf
        for part in np.array_split(np.arange(len(places)), max(1, len(places) // 20_000)):
            weights = minimum + places[part] @ scale.T
            logs = volumes[part] - _cost(inputs, targets, precision, weights)
            total = np.logaddexp(total, logsumexp(logs))
        outside = -0.5 * size * np.log(2 * np.pi / precision) + np.linalg.slogdet(scale)[1]
        return float(-total - outside)

    fine = by(NODES[size])
    return Integral(negative_log=fine, error=abs(fine - by(NODES[size] // 2 + 1)))


def _cost(inputs: Floats, targets: Floats, precision: float, weights: Floats) -> Floats:
    losses = cross_entropies(weights @ inputs.T, targets).sum(1)
    return np.asarray(losses + 0.5 * precision * (weights**2).sum(1))


def sample_evidence(
    inputs: Floats,
    targets: Floats,
    precision: float,
    *,
    seed: int,
    groups: int = 8,
    chains: int = 16,
    temperatures: int = 300,
) -> Integral:
    """By annealed importance sampling (R. M. Neal, Statistics and Computing 11, 2001).

    Chains start from the prior and end at the posterior, P(w)·P(data | w)^β with β from 0 to 1 by
    fourth powers; between, a Hamiltonian transition leaves each distribution invariant. The mean of
    a chain's weight is the evidence exactly; −ln of a group's mean is too large by half its
    variance, which the error shows. inputs: (n, p), targets: (n,).
    """
    generator = np.random.default_rng(seed)
    bounds, basis = np.linalg.eigh(inputs.T @ inputs / 4)  # of the losses' Hessian
    rotated, bounds = inputs @ basis, np.maximum(bounds, 0)
    count = groups * chains
    weights = generator.standard_normal((count, len(bounds))) / np.sqrt(precision)
    logs, accepted = np.zeros(count), 0.0
    betas = np.linspace(0, 1, temperatures + 1) ** 4

    def losses(at: Floats) -> Floats:
        return np.asarray(cross_entropies(at @ rotated.T, targets).sum(1))

    def force(at: Floats, beta: float) -> Floats:
        wrong = 0.5 * (1 + np.tanh(0.5 * at @ rotated.T)) - targets
        return np.asarray(-beta * wrong @ rotated - precision * at)

    current = losses(weights)
    for before, beta in pairwise(betas):
        logs -= (beta - before) * current
        if beta == 1:
            break
        mass = precision + beta * bounds
        momenta = generator.standard_normal(weights.shape) * np.sqrt(mass)
        step = STEP * generator.uniform(0.8, 1.2)
        moved, speed = weights.copy(), momenta + 0.5 * step * force(weights, beta)
        for place in range(LEAPFROGS):
            moved += step * speed / mass
            last = place == LEAPFROGS - 1
            speed += (0.5 if last else 1.0) * step * force(moved, beta)
        reached = losses(moved)
        rise = beta * (reached - current) + 0.5 * (
            precision * (moved**2 - weights**2) + (speed**2 - momenta**2) / mass
        ).sum(1)
        taken = np.log(generator.uniform(size=count)) < -rise
        weights = np.where(taken[:, None], moved, weights)
        current = np.where(taken, reached, current)
        accepted += float(taken.mean()) / (temperatures - 1)
    means = logsumexp(logs.reshape(groups, chains), axis=1) - np.log(chains)
    return Integral(
        negative_log=float(-means.mean()),
        error=float(means.std(ddof=1) / np.sqrt(groups)),
        accepted=accepted,
    )
