"""The exact variance of a weight under SGD, against sums over its response to every sample, and
against updates that are made; and the plan's note where g overstates the noise.
"""

import math

import numpy as np
import pytest

from hvd_lbt.cli import main
from hvd_lbt.data.order import SampleStream
from hvd_lbt.schedule import (
    epoch_share,
    half_noise_curvature,
    noise_scale,
    predicted_variance,
    stationary_variance,
)
from hvd_lbt.schedule.plan_warnings import sampling_note
from hvd_lbt.schedule.weight_variance import HALF, largest_curvature


def responses(lr, momentum, curvature, nesterov, count=20_000):
    """The weight after each update, where the first update alone has a noise of 1."""
    weight = buffer = 0.0
    answers = []
    for update in range(count):
        gradient = curvature * weight + (update == 0)
        buffer = momentum * buffer + gradient
        weight -= lr * (gradient + momentum * buffer if nesterov else buffer)
        answers.append(weight)
    return np.array(answers)


def summed(answers, samples, batch):
    """Variance with every sample once an epoch: each epoch's samples less their own mean, averaged
    over all places of an update in the epoch.
    """
    each = np.repeat(answers, batch) / batch  # of each sample, back in time
    before = np.concatenate([[0], np.cumsum(each)])
    places = range(0, samples, math.gcd(samples, batch))
    lost = 0.0
    for place in places:
        cuts = [0, *range(place or samples, len(each), samples)]
        lost += (np.diff(before[cuts]) ** 2).sum() / samples
    whole = (each**2).sum()
    return (whole - lost / len(places)) * samples / (samples - 1)


@pytest.mark.parametrize(
    ("lr", "momentum", "curvature", "nesterov", "samples", "batch"),
    [
        (0.1, 0.0, 0.5, False, 40, 4),
        (0.1, 0.9, 0.5, False, 40, 4),
        (0.1, 0.9, 0.5, True, 40, 4),
        (0.3, 0.5, 2.0, False, 37, 10),  # batches that straddle epochs
        (0.1, 0.9, 0.5, True, 40, 6),
        (0.1, 0.9, 0.5, False, 20, 33),  # batches larger than an epoch
        (0.1, 0.9, 0.5, False, 20, 20),
    ],
)
def test_the_variance_is_the_sum_over_all_responses(
    lr, momentum, curvature, nesterov, samples, batch
):
    answers = responses(lr, momentum, curvature, nesterov)
    settings = {
        "lr": lr,
        "momentum": momentum,
        "train_samples": samples,
        "global_batch": batch,
        "curvature": curvature,
        "nesterov": nesterov,
    }
    independent = stationary_variance(**settings, sampling="independent")
    assert independent == pytest.approx((answers**2).sum() / batch, rel=1e-9)
    epoch = stationary_variance(**settings)
    assert epoch == pytest.approx(summed(answers, samples, batch), rel=1e-7, abs=1e-12)
    assert epoch < independent
    if batch <= samples:
        subset = stationary_variance(**settings, sampling="subset")
        assert subset == pytest.approx(independent * (samples - batch) / (samples - 1))


@pytest.mark.parametrize(("batch", "nesterov"), [(5, False), (8, True)])
def test_updates_in_this_packages_order_have_that_variance(batch, nesterov):
    """SGD in plain numpy, on the order of the sampler; 8 does not divide the 60 samples."""
    samples, lr, momentum, curvature, updates = 60, 0.05, 0.8, 0.3, 12_000
    gradients = np.random.default_rng(3).standard_normal(samples)
    gradients = (gradients - gradients.mean()) / gradients.std()
    stream = SampleStream(samples, seed=5)
    noise = gradients[stream.indices(0, updates * batch)].reshape(updates, batch).mean(1)
    weight = buffer = 0.0
    squares = []
    for one in noise.tolist():
        gradient = curvature * weight + one
        buffer = momentum * buffer + gradient
        weight -= lr * (gradient + momentum * buffer if nesterov else buffer)
        squares.append(weight**2)
    settings = {"lr": lr, "momentum": momentum, "train_samples": samples, "global_batch": batch}
    exact = stationary_variance(**settings, curvature=curvature, nesterov=nesterov)
    blocks = np.array(squares[2_000:]).reshape(20, 500).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(len(blocks))
    assert error < 0.1 * exact
    assert abs(blocks.mean() - exact) < 4 * error
    # The formula that knows nothing of epochs is far off.
    wrong = stationary_variance(**settings, curvature=curvature, sampling="independent")
    assert abs(blocks.mean() - wrong) > 10 * error


def test_with_small_steps_the_variances_are_those_of_the_differential_equation():
    for relaxations in (0.003, 0.3, 3.0, 30.0):
        lr, momentum, samples, batch = 1e-3, 0.5, 50_000, 5
        scale = noise_scale(lr, momentum, samples, batch)
        curvature = relaxations / scale
        settings = {"lr": lr, "momentum": momentum, "curvature": curvature}
        predicted = predicted_variance(scale, curvature, samples)
        for sampling, share in (("independent", 1.0), ("epoch", epoch_share(relaxations))):
            exact = stationary_variance(
                **settings, train_samples=samples, global_batch=batch, sampling=sampling
            )
            assert exact / predicted == pytest.approx(share, rel=5e-3)


def test_the_share_of_an_epoch():
    x = np.array([0.0099999, 0.0100001])
    below, above = map(epoch_share, x)
    assert above - below == pytest.approx((x[1] - x[0]) / 3, rel=0.02)  # series and closed form
    assert epoch_share(0.0) == 0.0
    assert epoch_share(HALF) == pytest.approx(0.5, abs=1e-4)
    assert epoch_share(1000.0) == pytest.approx(0.998, abs=1e-5)


def test_half_of_the_noise_and_where_updates_diverge():
    settings = {"lr": 0.1, "momentum": 0.9, "train_samples": 50_000, "global_batch": 5_000}
    half = half_noise_curvature(**settings)
    predicted = predicted_variance(10.0, half, 50_000)
    assert stationary_variance(**settings, curvature=half) == pytest.approx(predicted / 2, rel=1e-4)
    small = {**settings, "momentum": 0.0, "global_batch": 10}
    assert half_noise_curvature(**small) == pytest.approx(HALF / 500, rel=0.01)
    assert half_noise_curvature(**settings | {"global_batch": 50_000}) is None
    for nesterov in (False, True):
        edge = largest_curvature(0.1, 0.9, nesterov)
        at_the_edge = {**settings, "nesterov": nesterov, "sampling": "independent"}
        assert math.isfinite(stationary_variance(**at_the_edge, curvature=0.999 * edge))
        assert stationary_variance(**at_the_edge, curvature=1.001 * edge) == math.inf


def test_what_cannot_be_drawn_is_an_error():
    settings = {"lr": 0.1, "momentum": 0.9, "curvature": 1.0, "global_batch": 5}
    with pytest.raises(ValueError, match="global_batch=5 different samples of 4"):
        stationary_variance(**settings, train_samples=4, sampling="subset")
    with pytest.raises(ValueError, match="train_samples=1"):
        stationary_variance(**settings, train_samples=1)


def test_the_note_names_stages_memory_and_curvature():
    stages = [
        {"index": 0, "global_batch": 100, "lr": 0.1, "momentum": 0.9, "noise_scale": 500.0},
        {"index": 1, "global_batch": 4_000, "lr": 0.1, "momentum": 0.9, "noise_scale": 12.5},
        {"index": 2, "global_batch": 10_000, "lr": 0.1, "momentum": 0.9, "noise_scale": 5.0},
    ]
    note = sampling_note(stages, 50_000, nesterov=False)
    assert "in stages 2, 3 the 1/(1−m) updates" in note
    assert "up to 2 epochs" in note
    half = half_noise_curvature(lr=0.1, momentum=0.9, train_samples=50_000, global_batch=10_000)
    assert f"In stage 3 directions in which the curvature of the mean loss is below {half:.3g}" in (
        note
    )
    assert sampling_note(stages, 50_000, nesterov=True) != note
    assert sampling_note(stages[:1], 50_000, nesterov=False) is None
    whole = [stages[0] | {"global_batch": 50_000}]
    assert "no direction has half" in sampling_note(whole, 50_000, nesterov=False)


def test_the_plan_prints_the_note_where_it_applies(capsys):
    words = "less noise than g says"
    for recipe, applies in (("cifar10_grow_batch", True), ("cifar10_decay_lr", False)):
        assert main(["plan", recipe]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert (words in printed) == applies
