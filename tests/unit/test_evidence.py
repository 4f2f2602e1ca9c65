"""The evidence against closed forms, finite differences, and Lanczos against exact determinants."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn import functional as F

from hvd_lbt.measure.evidence import (
    estimate_occam,
    exact_hessian,
    find_evidence,
    flat_weights,
    hessian_product,
    minimise,
    null_evidence,
    regularised,
    total_loss,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def two_classes(samples: int, features: int, seed: int = 0):
    inputs = normal(samples, features, seed=seed)
    hidden = normal(features, seed=seed + 1)
    return inputs, (inputs @ hidden + normal(samples, seed=seed + 2) > 0).double()


def logistic(inputs, labels):
    """Σ cross-entropy of a linear model, written out for the tests."""
    return lambda weights: F.binary_cross_entropy_with_logits(
        inputs @ weights, labels, reduction="sum"
    )


@pytest.mark.parametrize("precision", [1e-3, 0.7, 50.0])
@pytest.mark.parametrize(("samples", "features"), [(30, 4), (8, 20)])
def test_a_gaussian_linear_model_has_the_evidence_of_its_closed_form(precision, samples, features):
    """y = X w + noise of variance 1, w ~ N(0, 1/λ): y is Gaussian, −ln P(y) is known exactly."""
    inputs, outputs = normal(samples, features), normal(samples, seed=3)

    def losses(weights):  # −ln P(y | w), normalised
        return 0.5 * ((inputs @ weights - outputs) ** 2 + math.log(2 * math.pi)).sum()

    evidence = find_evidence(losses, torch.zeros(features, dtype=torch.float64), precision)
    covariance = torch.eye(samples, dtype=torch.float64) + inputs @ inputs.T / precision
    marginal = torch.distributions.MultivariateNormal(torch.zeros_like(outputs), covariance)
    assert evidence.negative_log == pytest.approx(-float(marginal.log_prob(outputs)), abs=1e-6)


def test_one_weight_against_the_integral():
    """−ln ∫ P(data | w) P(w) dw on a grid; Laplace's method is off by O(1/N), here 0.2 %."""
    inputs, labels = two_classes(200, 1)
    precision = 2.0
    evidence = find_evidence(logistic(inputs, labels), torch.zeros(1).double(), precision)
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    cost = F.binary_cross_entropy_with_logits(
        inputs * grid, labels[:, None].expand(-1, len(grid)), reduction="none"
    ).sum(0)
    log_prior = 0.5 * math.log(precision / (2 * math.pi)) - 0.5 * precision * grid**2
    log_integral = torch.logsumexp(log_prior - cost, 0) + math.log(float(grid[1] - grid[0]))
    assert evidence.negative_log == pytest.approx(-float(log_integral), rel=2e-3)


def test_the_evidence_knows_nothing_of_a_reparametrisation():
    """w = k·u with the prior changed alike is the same model."""
    inputs, labels = two_classes(60, 5)
    one = find_evidence(logistic(inputs, labels), torch.zeros(5).double(), 0.5)
    other = find_evidence(logistic(7 * inputs, labels), torch.zeros(5).double(), 0.5 * 49)
    assert one.negative_log == pytest.approx(other.negative_log, abs=1e-6)


@pytest.fixture(scope="module")
def network():
    """A small network of 55 weights at a minimum of its regularised cost: (losses, λ, w₀)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2), nn.Flatten()).double()
    inputs, labels = two_classes(80, 5)

    def loss(logits, targets):
        return F.cross_entropy(logits, targets, reduction="sum")

    losses = total_loss(model, loss, inputs, labels.long())
    assert float(losses(flat_weights(model))) == pytest.approx(
        float(loss(model(inputs), labels.long()).detach())
    )
    weights = minimise(regularised(losses, 0.5), flat_weights(model), 1e-7)
    return losses, 0.5, weights


def test_the_minimum_is_one_and_its_hessian_is_that_of_finite_differences(network):
    losses, precision, weights = network
    cost = regularised(losses, precision)
    evidence = find_evidence(losses, weights, precision)
    assert evidence.gradient_norm < 1e-4
    for direction in normal(5, len(weights), seed=9):
        moved = weights + 0.1 * direction
        assert cost(moved) > evidence.cost
    exact = exact_hessian(cost)(weights)
    step = 1e-4  # errors of order step² and eps / step
    for place in range(0, len(weights), 7):
        unit = torch.zeros_like(weights)
        unit[place] = step
        ahead, behind = (grad(cost)(weights + sign * unit) for sign in (1, -1))
        torch.testing.assert_close(
            exact[:, place], (ahead - behind) / (2 * step), rtol=0, atol=1e-5
        )
    torch.testing.assert_close(
        hessian_product(cost, weights)(unit), exact @ unit, rtol=1e-9, atol=1e-12
    )


def test_lanczos_finds_the_occam_factor_of_a_network(network):
    losses, precision, weights = network
    exact = find_evidence(losses, weights, precision).occam
    product = hessian_product(regularised(losses, precision), weights)
    found = estimate_occam(product, weights, precision, probes=12, steps=25, generator=generator())
    assert found.truncation < 1e-3 * exact
    assert 0 < found.standard_error < 0.1 * exact
    assert abs(found.occam - exact) < 4 * found.standard_error + found.truncation


def test_lanczos_errors_are_what_is_said_of_them():
    """300 dimensions, eigenvalues over four decades; 20 estimates are spread as their own errors
    say.
    """
    size, precision = 300, 1e-2
    values = torch.logspace(-2, 2, size, dtype=torch.float64)
    basis = torch.linalg.qr(normal(size, size)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    exact = 0.5 * float((values / precision).log().sum())
    sharp = [
        estimate_occam(
            lambda v: matrix @ v, values, precision, probes=4, steps=60, generator=generator(seed)
        )
        for seed in range(20)
    ]
    assert max(one.truncation for one in sharp) < 0.02 * exact
    off = torch.tensor([(one.occam - exact) / one.standard_error for one in sharp])
    assert off.abs().median() < 1.5  # Student's t with 3 degrees of freedom: 0.76
    rough = estimate_occam(
        lambda v: matrix @ v, values, precision, probes=4, steps=4, generator=generator()
    )
    assert rough.occam - exact > 0.1 * exact  # too large, and it says so
    assert rough.truncation > 0.1 * exact


def test_lanczos_is_exact_on_a_multiple_of_one():
    one = torch.ones(50, dtype=torch.float64)
    found = estimate_occam(lambda v: 3 * v, one, 0.5)
    assert found.occam == pytest.approx(25 * math.log(6))
    assert found.standard_error < 1e-9


def test_what_is_no_minimum_is_refused(network):
    weights = network[-1]
    with pytest.raises(ArithmeticError, match="no minimum"):
        estimate_occam(lambda v: -v, weights, 1.0)
    with pytest.raises(ArithmeticError, match="the gradient's norm is"):
        minimise(lambda w: w.sum(), torch.zeros(2, dtype=torch.float64), 1e-3)
    with pytest.raises(ValueError, match="probes=1"):
        estimate_occam(lambda v: v, weights, 1.0, probes=1)


def test_the_null_model():
    assert null_evidence(100, 2) == pytest.approx(100 * math.log(2))
