"""Laplace's evidence of logistic regressions, in a batch, by quadrature and by sampling."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hvd_lbt.measure.evidence import find_evidence
from hvd_lbt.measure.evidence_integrals import integrate, sample_evidence
from hvd_lbt.measure.logistic_evidence import logistic_evidences
from hvd_lbt.studies.evidence_checks import components, enlarged, rescaled


def problem(samples, features, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((samples, features))
    return inputs, (inputs[:, 0] + generator.standard_normal(samples) > 0).astype(float)


def test_a_batch_has_the_evidences_of_its_problems():
    problems = [problem(30, 4, seed) for seed in range(2)]
    problems[1][1][:] = problems[1][0][:, 1] > 0  # separable
    inputs, targets = (np.stack([one[part] for one in problems]) for part in (0, 1))
    precisions = (30.0, 1.0, 1e-3)
    found = list(logistic_evidences(inputs, targets, precisions))
    for place in range(len(problems)):
        x, y = torch.from_numpy(inputs[place]), torch.from_numpy(targets[place])
        for precision, batch in zip(precisions, found, strict=True):
            one = find_evidence(
                lambda w, x=x, y=y: F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum"),
                torch.zeros(4, dtype=torch.float64),
                precision,
            )
            assert batch.cost[place] == pytest.approx(one.cost, abs=2e-9)
            assert batch.negative_log[place] == pytest.approx(one.negative_log, abs=1e-6)


def test_one_weight_against_a_plain_grid():
    inputs, targets = problem(40, 1)
    (laplace,) = logistic_evidences(inputs[None], targets[None], (0.3,))
    truth = integrate(inputs, targets, 0.3, laplace.weights[0])
    grid = np.linspace(-30, 30, 60_001)
    logits = inputs[:, :1] * grid
    logs = -(np.logaddexp(0, logits) - targets[:, None] * logits).sum(0)
    logs += 0.5 * np.log(0.3 / (2 * np.pi)) - 0.15 * grid**2
    plain = -np.log(np.exp(logs).sum() * (grid[1] - grid[0]))
    assert truth.negative_log == pytest.approx(plain, abs=1e-9)
    assert truth.error < 1e-9
    assert 1e-4 < abs(laplace.negative_log[0] - plain) < 0.1  # Laplace's method is close, not exact


@pytest.mark.parametrize("size", [2, 3])
def test_weights_that_do_not_meet_have_a_product_of_integrals(size):
    parts = [problem(12, 1, seed) for seed in range(size)]
    inputs = np.zeros((12 * size, size))
    for place, (x, _) in enumerate(parts):
        inputs[12 * place : 12 * (place + 1), place] = x[:, 0]
    targets = np.concatenate([y for _, y in parts])
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((size, size)))[0]
    rotated = inputs @ rotation  # the prior is the same in every direction

    def by_quadrature(x, y):
        (laplace,) = logistic_evidences(x[None], y[None], (0.5,))
        return integrate(x, y, 0.5, laplace.weights[0])

    whole = by_quadrature(rotated, targets)
    single = sum(by_quadrature(x, y).negative_log for x, y in parts)
    assert whole.negative_log == pytest.approx(single, abs=1e-6)
    assert whole.error < 1e-5


def test_the_sampler_finds_the_integral_of_the_grid():
    inputs, targets = problem(30, 3)
    (laplace,) = logistic_evidences(inputs[None], targets[None], (0.2,))
    truth = integrate(inputs, targets, 0.2, laplace.weights[0]).negative_log
    sampled = sample_evidence(inputs, targets, 0.2, seed=1, temperatures=150)
    assert sampled.error < 0.1
    assert abs(sampled.negative_log - truth) < 4.5 * sampled.error
    assert sampled.accepted > 0.5
    other = sample_evidence(inputs, targets, 2.0, seed=1, temperatures=150)
    assert abs(other.negative_log - truth) > 5 * other.error  # it is no other prior's


def test_the_evidence_does_not_change_with_the_weights_scale_and_flatness_does():
    inputs, targets = problem(30, 3)
    rows = rescaled(inputs, targets, (10.0, 1.0, 0.1))
    evidences = [row["negative_log"] for row in rows]
    assert max(evidences) - min(evidences) < 1e-8
    flatness = [row["half_log_determinant"] for row in rows]
    assert flatness[0] - flatness[2] == pytest.approx(3 * np.log(1e4))
    assert rows[0]["largest_eigenvalue"] == pytest.approx(1e8 * rows[2]["largest_eigenvalue"])


def test_the_images_of_the_checks():
    images = np.c_[np.arange(2 * 64.0).reshape(2, 64), np.ones(2)]
    larger = enlarged(images)
    assert larger.shape == (2, 785)
    assert (larger[:, -1] == 1).all()
    assert larger[1, 0] == 64  # corners stay
    inputs = np.c_[problem(20, 5)[0], np.ones(20)]
    along = components(inputs, 2)
    assert along.var(0)[0] > along.var(0)[1]
    assert along.mean(0) == pytest.approx([0, 0])
