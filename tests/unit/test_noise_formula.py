"""The study of the noise formula: its simulation against the exact forms, its rules, its page."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_studies import settings as arguments

from hvd_lbt.errors import UserError
from hvd_lbt.schedule import stationary_variance
from hvd_lbt.studies import noise_formula as study
from hvd_lbt.studies.paired import Outcome
from hvd_lbt.studies.quadratic import (
    Setting,
    batch_means,
    difference_from_reference,
    end_of_epoch_variance,
    make_samples,
    settings_of_equal_noise,
    simulate,
)
from hvd_lbt.study import main

COMMITTED = Path(__file__).parents[2] / "docs/studies"
CURVATURES = np.array([1.0, 3.0, 10.0])
SAMPLES, BATCH, TRAININGS = 40, 8, 50
BOTH = ((0.8, False), (0.8, True))


@pytest.mark.parametrize("sampling", study.SAMPLINGS)
def test_simulated_variances_are_the_exact_ones(sampling):
    samples = make_samples(SAMPLES, len(CURVATURES), seed=1)
    settings = settings_of_equal_noise(1.0, SAMPLES, (BATCH,), BOTH)
    burn_in = max(one.burn_in(CURVATURES, SAMPLES // BATCH) for one in settings)
    means = batch_means(samples, BATCH, sampling, TRAININGS, burn_in + 60)
    for one, squares in zip(
        settings, simulate(settings, CURVATURES, means, burn_in, TRAININGS), strict=True
    ):
        for place, curvature in enumerate(CURVATURES):
            measured = squares.mean[:, place]
            error = measured.std(ddof=1) / np.sqrt(TRAININGS)
            exact = stationary_variance(
                **dataclasses.asdict(one),
                train_samples=SAMPLES,
                curvature=float(curvature),
                sampling=sampling,
            )
            assert error < 0.05 * exact
            assert abs(measured.mean() - exact) < 4.5 * error
            if sampling == "epoch":
                end = squares.end[:, place]
                exact = end_of_epoch_variance(one, float(curvature), SAMPLES)
                assert abs(end.mean() - exact) < 4.5 * end.std(ddof=1) / np.sqrt(TRAININGS)
                assert abs(exact / measured.mean() - 1) > 0.01  # it is another variance


def test_batches_are_drawn_as_said():
    samples = np.arange(12, dtype=np.float32)[:, None]
    epochs = {
        name: np.stack([m.numpy() for m in batch_means(samples, 3, name, 5, 400)])
        for name in study.SAMPLINGS
    }  # (epochs, 4 updates, 5 trainings, 1)
    once = epochs["epoch"].mean(1)
    np.testing.assert_allclose(once, 5.5)  # each epoch has every sample
    assert len(np.unique(epochs["epoch"][:, 0])) > 10
    spread = {name: means.var() for name, means in epochs.items()}
    population = samples.var()
    assert spread["independent"] == pytest.approx(population / 3, rel=0.05)
    assert spread["subset"] == pytest.approx(population / 3 * 9 / 11, rel=0.05)
    assert spread["epoch"] == pytest.approx(population / 3 * 9 / 11, rel=0.05)
    assert epochs["subset"].mean(1).var() > 0.1  # and not once an epoch


def test_the_update_is_that_of_plain_torch_and_what_diverges_is_left_out():
    samples = make_samples(SAMPLES, 3, seed=1)
    for one in settings_of_equal_noise(1.0, SAMPLES, (BATCH,), BOTH):
        assert difference_from_reference(samples, CURVATURES, one, 50) < 1e-5
    # the difference sees another momentum
    wrong = Setting(lr=0.02, momentum=0.8, global_batch=BATCH, nesterov=True)
    right = dataclasses.replace(wrong, nesterov=False)
    means = [
        simulate([one], CURVATURES, batch_means(samples, BATCH, "epoch", 2, 3), 0, 2)[0].mean
        for one in (wrong, right)
    ]
    assert np.abs(means[0] / means[1] - 1).max() > 0.02
    steep = Setting(lr=1.0, momentum=0.0, global_batch=BATCH, nesterov=False)
    squares = simulate([steep], CURVATURES, batch_means(samples, BATCH, "epoch", 2, 3), 0, 2)[0]
    assert np.isnan(squares.mean).tolist() == [[False, True, True]] * 2
    assert end_of_epoch_variance(steep, 3.0, SAMPLES) == np.inf


@pytest.mark.parametrize(
    ("of_g", "outcome"),
    [
        ([(1.0, 0.01), (1.04, 0.01)], Outcome.HELD),
        ([(1.0, 0.01), (1.09, 0.01)], Outcome.UNDECIDED),
        ([(1.0, 0.2), (1.0, 0.2)], Outcome.UNDECIDED),  # the interval is wider than the claim
        ([(1.0, 0.01), (0.8, 0.01)], Outcome.NO),
    ],
)
def test_the_rule_has_three_outcomes(of_g, outcome):
    points = [{"sampling": "epoch", "of_g": list(one)} for one in of_g]
    found = {"settings": {"trainings": 200}, "points": points}
    assert study.judge(found, "epoch", "of_g")[0] is outcome


def test_a_stopped_study_keeps_its_parts(tmp_path, monkeypatch):
    settings = study.settings_of_study(trainings=3, epochs=1, batches=(500,))
    monkeypatch.setattr(study, "COMPARED_UPDATES", 5)
    simulated = []

    def stop_at_the_last(*args):
        simulated.append(args[-1])
        if len(simulated) == 3:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(study, "_measure_one", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        study.measure(settings, tmp_path)
    study.measure(settings, tmp_path)
    assert simulated == ["independent", "subset", "epoch", "epoch"]
    study.measure(settings | {"trainings": 4}, tmp_path)  # other settings: all anew
    assert len(simulated) == 7


def test_the_committed_page_is_that_of_the_committed_numbers(tmp_path, monkeypatch):
    shutil.copy(COMMITTED / "noise_formula.json", tmp_path)

    def measured_again(*args):
        raise AssertionError("the numbers are there")

    monkeypatch.setattr(study, "measure", measured_again)
    sentence = study.study(tmp_path)
    page = (tmp_path / "noise_formula.md").read_text(encoding="utf-8")
    assert sentence in page
    assert page == (COMMITTED / "noise_formula.md").read_text(encoding="utf-8")
    assert (tmp_path / "noise_formula.png").stat().st_size > 50_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 2}, "--jobs 2 has no effect on noise_formula"),
        ({"scale": "gpu"}, "noise_formula has only the scale laptop"),
        ({"updates": 3}, "--updates 3 has no effect"),
        ({"redraw": True}, r"--redraw: .*noise_formula\.json does not exist"),
    ],
)
def test_settings_without_effect_are_errors(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(arguments(name="noise_formula", out=tmp_path, **changes))
