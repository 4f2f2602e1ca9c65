"""The Bayesian evidence for a minimum: how deep it is, and how broad.

Source: S. L. Smith, Q. V. Le, "A Bayesian Perspective on Generalization and Stochastic Gradient
Descent", ICLR 2018 (arXiv:1710.06451), section 2. With a Gaussian prior of precision λ on every
weight and the cost C(w) = Σ losses of the training samples + ½ λ |w|², Laplace's method at the
minimum w₀ gives

    −ln P(data | model) ≈ C(w₀) + ½ Σ ln(λᵢ/λ)        λᵢ: eigenvalues of C's Hessian at w₀

The second term, the Occam factor, is what a minimum costs by being narrow. It is exact where C is a
parabola. Small models: `find_evidence`, by the exact Hessian. Networks: `estimate_occam`, by
products with the Hessian alone (stochastic Lanczos quadrature: Ubaru, Chen, Saad 2017).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp

Cost = Callable[[Tensor], Tensor]  # weights (n,) → a scalar, twice differentiable
Product = Callable[[Tensor], Tensor]  # v (n,) → A·v

COST_ERROR = 1e-9  # nats that a minimum may be away from the true one in C, in a convex cost


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """−ln P = cost + occam, in nats. weights: the minimum w₀, (n,); gradient_norm: |∇C(w₀)|."""

    cost: float
    occam: float
    weights: Tensor
    gradient_norm: float

    @property
    def negative_log(self) -> float:
        """−ln P(data | model)."""
        return self.cost + self.occam


@dataclass(frozen=True, kw_only=True)
class OccamEstimate:
    """An estimate of ½ Σ ln(λᵢ/λ), in nats.

    standard_error: of the mean over the random probes. truncation: how far the same probes' mean
    moved from half the Lanczos steps to all of them; where that is not small, take more steps (what
    is missing makes the estimate too large, by Gauss' rule for a logarithm).
    """

    occam: float
    standard_error: float
    truncation: float


def flat_weights(model: nn.Module) -> Tensor:
    """The model's parameters as one vector, (n,), float64."""
    parts = [parameter.detach().double().flatten() for parameter in model.parameters()]
    return torch.cat(parts)


def total_loss(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> Cost:
    """The function weights (n,) → loss(model(inputs), targets), which must be a *sum* over samples.

    weights are laid out as by `flat_weights`; the model itself is not changed.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def cost(weights: Tensor) -> Tensor:
        parts = weights.split(sizes)
        named = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return loss(functional_call(model, named, (inputs,)), targets)

    return cost


def regularised(losses: Cost, precision: float) -> Cost:
    """C(w) = losses(w) + ½ λ |w|². precision: λ > 0."""
    return lambda weights: losses(weights) + 0.5 * precision * weights.square().sum()


def minimise(cost: Cost, start: Tensor, tolerance: float) -> Tensor:
    """A minimum of `cost` by Newton steps within a trust region; `start`: (n,), float64.

    Raises ArithmeticError unless |∇C| ≤ tolerance there.
    """

    def by(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda weights: function(torch.from_numpy(weights)).detach().numpy()

    found = optimize.minimize(
        lambda weights: float(cost(torch.from_numpy(weights))),
        start.numpy(),
        method="trust-exact",
        jac=by(grad(cost)),
        hess=by(exact_hessian(cost)),
        options={"gtol": tolerance, "maxiter": 1000},
    )
    weights = torch.from_numpy(found.x)
    norm = float(grad(cost)(weights).norm())
    if not norm <= tolerance:
        raise ArithmeticError(
            f"no minimum was found: the gradient's norm is {norm:.3g} after {found.nit} Newton "
            f"steps, and {tolerance:.3g} was asked for ({found.message})"
        )
    return weights


def find_evidence(losses: Cost, start: Tensor, precision: float) -> Evidence:
    """Minimise losses(w) + ½ λ |w|² from `start` (n,), and take the exact Hessian there.

    Costs n³; meant for up to some thousand weights. Raises ArithmeticError if no minimum is found.
    """
    cost = regularised(losses, precision)
    # The losses of a convex model leave C λ-strongly convex: C(w) − C(w₀) ≤ |∇C|² / (2λ).
    weights = minimise(cost, start, math.sqrt(2 * precision * COST_ERROR))
    # The Hessian changes to first order in what is left, so one Newton step more.
    slope, hessian = grad(cost), exact_hessian(cost)
    closer = weights - torch.linalg.solve(hessian(weights), slope(weights))
    if slope(closer).norm() < slope(weights).norm():
        weights = closer
    eigenvalues = torch.linalg.eigvalsh(hessian(weights))
    return Evidence(
        cost=float(cost(weights)),
        occam=_occam(eigenvalues, torch.full_like(eigenvalues, 0.5), precision),
        weights=weights,
        gradient_norm=float(grad(cost)(weights).norm()),
    )


def null_evidence(samples: int, classes: int) -> float:
    """−ln P of the model that gives every class the same probability: N ln(classes), in nats."""
    return samples * math.log(classes)


def exact_hessian(cost: Cost) -> Callable[[Tensor], Tensor]:
    """w (n,) → ∇²C(w), (n, n), backwards twice (forwards torch scripts code, and warns of it)."""
    return jacrev(grad(cost))


def hessian_product(cost: Cost, weights: Tensor) -> Product:
    """v → ∇²C(w)·v, for about the time of two gradients."""
    backward = vjp(grad(cost), weights)[1]
    return lambda vector: backward(vector)[0]


def estimate_occam(
    product: Product,
    like: Tensor,
    precision: float,
    *,
    probes: int = 10,
    steps: int = 40,
    generator: torch.Generator | None = None,
) -> OccamEstimate:
    """½ Σ ln(λᵢ/λ) of the symmetric matrix A of which `product` gives A·v, never A itself.

    like: a vector (n,) of A's type and device, such as the weights; probes ≥ 2: random vectors of
    ±1; steps: products a probe, whose vectors are all kept (steps · n numbers). Raises
    ArithmeticError if A shows an eigenvalue that is not above 0: no minimum.
    """
    if probes < 2 or steps < 2:
        raise ValueError(f"{probes=} and {steps=} must both be at least 2")
    whole, half = [], []
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        diagonal, off_diagonal = _lanczos(product, (2 * signs - 1).to(like.dtype), steps)
        whole.append(_quadrature(diagonal, off_diagonal, len(like), precision))
        count = -(-len(diagonal) // 2)
        half.append(_quadrature(diagonal[:count], off_diagonal[: count - 1], len(like), precision))
    values = np.array(whole)
    return OccamEstimate(
        occam=float(values.mean()),
        standard_error=float(values.std(ddof=1) / math.sqrt(probes)),
        truncation=abs(float(values.mean() - np.mean(half))),
    )


def _lanczos(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The tridiagonal matrix of A on the Krylov space of `start`: diagonal (k,), next (k − 1,).

    k < steps where the space is exhausted. Every vector is made orthogonal to all before it, twice:
    rounding would otherwise bring back directions that were found already.
    """
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    largest = 0.0
    for _ in range(min(steps, len(start))):
        following = product(basis[-1])
        diagonal.append(following @ basis[-1])
        so_far = torch.stack(basis)
        for _ in range(2):
            following = following - so_far.T @ (so_far @ following)
        length = following.norm()
        largest = max(largest, float(diagonal[-1].abs()), float(length))
        if float(length) <= largest * len(start) * torch.finfo(start.dtype).eps:
            break
        off_diagonal.append(length)
        basis.append(following / length)
    return torch.stack(diagonal), torch.stack([*off_diagonal, diagonal[0]])[: len(diagonal) - 1]


def _quadrature(diagonal: Tensor, off_diagonal: Tensor, size: int, precision: float) -> float:
    """vᵀ·½ ln(A/λ)·v for a probe of ±1, by Gauss' rule: nodes and weights from T's eigenvectors."""
    tridiagonal = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal.double().cpu())
    return _occam(nodes, 0.5 * size * vectors[0].square(), precision)


def _occam(eigenvalues: Tensor, weights: Tensor, precision: float) -> float:
    """Σ weight · ln(eigenvalue / λ)."""
    if not float(eigenvalues.min()) > 0:
        raise ArithmeticError(
            f"the Hessian has an eigenvalue of {float(eigenvalues.min()):.3g}: this is no minimum, "
            "and has no evidence. Go on minimising, or raise the regulariser."
        )
    return float(weights @ (eigenvalues / precision).log())
