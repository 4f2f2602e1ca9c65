"""The verdicts of the studies whose networks are trained side by side, on numbers made up."""

import numpy as np
import pytest

from hvd_lbt.studies import linear_scaling as ls
from hvd_lbt.studies import optimum_batch as ob
from hvd_lbt.studies import stage_noise as sn
from hvd_lbt.studies import weight_decay as wd
from hvd_lbt.studies.paired import Outcome

MADE = {"versions": {"torch": "2"}, "revision": ""}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(ob, "RESAMPLED", 40)
    monkeypatch.setattr(ls, "RESAMPLED", 40)


def peaked(power, *, base=90.0, spread=0.3):
    """Results that are best at base·(quantity/base's)^power, for every seed with an offset."""
    generator = np.random.default_rng(0)
    cells = []
    for cell in ob.cells():
        shift = sum(np.log2(cell[name] / ob.BASE[name]) for name in ob.SWEEPS)
        tops = np.log2(base) + power * shift + spread * generator.standard_normal(len(ob.SEEDS))
        bent = (np.log2(cell["batch"]) - tops) ** 2
        cells.append(cell | {"accuracy": list(90 - bent), "test_loss": list(1 + 0.2 * bent)})
    return {"cells": cells, **MADE}


@pytest.mark.parametrize(
    ("power", "spread", "outcome"),
    [
        (1.0, 0.1, Outcome.HELD),
        (0.8, 0.1, Outcome.HELD),
        (0.2, 0.1, Outcome.NO),
        (1.8, 0.1, Outcome.NO),
        (1.0, 2.0, Outcome.UNDECIDED),  # seeds that say nothing
        (0.5, 0.3, Outcome.UNDECIDED),
    ],
)
def test_the_best_batch_is_found_with_its_interval(power, spread, outcome):
    found = peaked(power, spread=spread)
    for name in ob.SWEEPS:
        for measure in ob.MEASURES:
            own = ob.exponent(found, name, measure)
            assert own.low < own.value < own.high
            if spread < 0.2 and power <= 1:  # a steeper one leaves the grid
                assert own.value == pytest.approx(power, abs=0.15)
    assert f"The claim {outcome}." in ob.finding(found)


def test_a_best_batch_at_the_end_of_the_grid_is_only_a_bound():
    own = ob.exponent(peaked(1.0, base=25.0, spread=0.0), "N", "accuracy")
    assert own.at_edge == 1  # 11 where the smallest is 16
    assert own.low > 1 - ob.MARGIN
    assert own.outcome is Outcome.UNDECIDED


def test_the_peak_of_a_parabola_and_of_a_slope():
    assert ob.peak(-((np.arange(11) - 4.6) ** 2)) == pytest.approx(4.6)
    assert ob.peak(np.arange(11.0)) == 10  # no peak within: the end, nothing beyond
    assert ob.peak(-np.arange(11.0)) == 0


def test_the_smallest_batch_that_costs_little_is_interpolated():
    heights = np.array([0.0, 2.0, 4.0, 5.0, 4.5])
    assert ob.harmless(heights, 2.0) == pytest.approx(1.5)  # 3.0 lies between 2.0 and 4.0
    assert ob.harmless(heights, 9.0) == 0


def test_all_settings_are_trained_once_and_equally_long():
    cells = ob.cells()
    assert len(
        {tuple(cell[key] for key in ("lr", "N", "1/(1−m)", "batch")) for cell in cells}
    ) == len(cells)
    for cell in cells:
        total = cell["1/(1−m)"]
        assert ob.updates_of(cell["lr"], total) * cell["lr"] * total == ob.TRAVELLED
    assert ob.batches_of("lr", 0.25)[:7] == [4, 6, 8, 11, 16, 23, 32]


def test_figure_and_page_of_optimum_batch(tmp_path):
    found = peaked(1.0)
    ob.draw(found).savefig(tmp_path / "figure.png", dpi=20)
    assert ob.finding(found) in ob.page(found)


def decayed(**accuracies):
    """Numbers of all cells; accuracies: by policy and treatment, 50 unless given."""
    cells = []
    for cell in wd.cells("0", 5000):
        mean = accuracies.get(f"{cell['policy']}_{cell['treatment']}", 50.0)
        wave = 0.2 * np.sin(np.arange(len(wd.SEEDS)) + len(cells))
        numbers = list(mean + wave)
        more = {"test_loss": [1.0] * len(numbers), "train_loss": [1.0] * len(numbers)}
        cells.append(cell | {"updates": 900, "accuracy": numbers, **more})
    return {"cells": cells, **MADE}


@pytest.mark.parametrize(
    ("accuracies", "outcome"),
    [
        ({}, Outcome.UNDECIDED),  # no effect of weight decay is seen
        ({"decay_lr_none": 45.0}, Outcome.HELD),
        ({"grow_batch_kept": 48.0}, Outcome.NO),
        ({"grow_batch_kept": 49.0, "grow_batch_equal_epochs": 49.0}, Outcome.UNDECIDED),
        ({"decay_lr_equal_epochs": 50.9}, Outcome.NO),
        ({"decay_lr_equal_epochs": 49.0, "decay_lr_none": 45.0}, Outcome.HELD),
    ],
)
def test_weight_decay_is_judged(accuracies, outcome, tmp_path):
    found = decayed(**accuracies)
    assert f"may stay as it is {outcome}." in wd.finding(found)
    assert wd.finding(found) in wd.page(found)


def test_figure_of_weight_decay(tmp_path):
    wd.draw(decayed()).savefig(tmp_path / "figure.png", dpi=20)


def test_weight_decay_reads_small_images(tmp_path, monkeypatch):
    from PIL import Image

    for split, count in (("train", 3), ("test", 2)):
        for place, label in enumerate(("a", "b")):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (32, 32), (200 * place, 10 * n, 0)).save(folder / f"{n}.png")
    images = wd._images.__wrapped__(str(tmp_path))
    assert images.inputs.shape == (1, 6, 3 * wd.SIDE**2)
    assert images.labels.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert images.test_labels.tolist() == [0, 0, 1, 1]
    assert float(images.inputs.mean()) == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(wd, "MOST_IMAGES", 5)
    with pytest.raises(wd.UserError, match="at most 5 training images; this data set has 6"):
        wd._images.__wrapped__(str(tmp_path))


def scaled(bends, *, flat=20.0, spread=0.1):
    """Errors that are flat up to 2^bends[setting, warm-up] and rise 3 points a doubling beyond."""
    cells = []
    for cell in ls.cells():
        setting = next(
            name for name, s in ls.SETTINGS.items() if all(cell[k] == v for k, v in s.items())
        )
        past = max(0.0, np.log2(cell["batch"]) - bends[setting, cell["warm_up"]])
        wave = spread * np.sin(np.arange(len(ls.SEEDS)) + len(cells))
        cells.append(cell | {"updates": 9, "accuracy": list(100 - flat - 3 * past + wave)})
    return {"cells": cells, **MADE}


def bent(warm, cold, *, quarter=0.0):
    """Where each setting bends; quarter: how much later with a quarter of N."""
    moves = {"base": 0.0, "a quarter of N": quarter, "half the lr": 1.0}
    return {
        (setting, is_warm): (warm if is_warm else cold) + move
        for setting, move in moves.items()
        for is_warm in (True, False)
    }


@pytest.mark.parametrize(
    ("warm", "cold", "spread", "outcome"),
    [
        (8.0, 6.5, 0.1, Outcome.HELD),
        (5.0, 4.5, 0.1, Outcome.NO),  # 6 points more at 8×
        (8.0, 8.0, 0.3, Outcome.UNDECIDED),  # the warm-up moves nothing
        (8.0, 9.0, 0.1, Outcome.NO),
        (11.0, 11.0, 0.1, Outcome.NO),  # the line does not bend
    ],
)
def test_linear_scaling_is_judged(warm, cold, spread, outcome, tmp_path):
    found = scaled(bent(warm, cold), spread=spread)
    assert f"The claim {outcome}." in ls.finding(found)
    assert ls.finding(found) in ls.page(found)


def test_the_bend_is_a_point_above_the_smallest_batch(tmp_path):
    found = scaled(bent(7.0, 6.0, quarter=-2.0), spread=0.0)
    # between 7 and 8 the error rises by 3 points
    assert ls.bends(found, "base", True)[0] == pytest.approx(7 + 1 / 3)
    assert ls.bends(found, "half the lr", True)[0] == pytest.approx(8 + 1 / 3)
    assert ls.bends(found, "a quarter of N", True)[0] == pytest.approx(5 + 1 / 3)
    ls.draw(found).savefig(tmp_path / "figure.png", dpi=20)


def fallen(*, helps=3.0, optimum=8, costs=1.0, grown=0.0, spread=0.1):
    """Accuracies that are best where the noise fell by `optimum`; grown: of growing the batch."""
    cells = []
    for cell in sn.cells():
        away = np.log2(cell["factor"] / optimum)
        mean = 80 + helps * (cell["factor"] > 1) - costs * max(0.0, away)
        mean += grown * (cell["policy"] == "grow_batch")
        numbers = list(mean + spread * np.sin(np.arange(len(sn.SEEDS)) + len(cells)))
        more = {"updates": 9, "end": 80 / cell["factor"], "test_loss": [1.0] * len(numbers)}
        cells.append(cell | {"accuracy": numbers, **more})
    return {"cells": cells, **MADE}


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({}, Outcome.HELD, "optimum between"),
        ({"costs": 0.0}, Outcome.HELD, "no optimum is seen"),
        ({"grown": -2.0}, Outcome.NO, "policies"),
        ({"grown": -0.95}, Outcome.UNDECIDED, "policies"),
        ({"helps": -2.0, "costs": 0.0}, Outcome.NO, "no optimum is seen"),  # no fall is best
    ],
)
def test_stage_noise_is_judged(changes, outcome, said, tmp_path):
    found = fallen(**changes)
    assert f"The claim {outcome}." in sn.finding(found)
    assert said in sn.finding(found)
    assert sn.finding(found) in sn.page(found)


def test_figure_of_stage_noise(tmp_path):
    sn.draw(fallen()).savefig(tmp_path / "figure.png", dpi=20)


@pytest.mark.parametrize("module", [ls, sn, ob])
def test_a_cell_is_trained_as_its_settings_say(module, monkeypatch):
    """Real trainings, tiny: the largest batch of all, on few seeds."""
    monkeypatch.setattr(module, "TEST_SAMPLES", 50)
    monkeypatch.setattr(module, "EPOCHS", 10, raising=False)
    monkeypatch.setattr(sn, "N", 320)
    monkeypatch.setattr(ob, "TRAVELLED", 20)
    (cell,) = [max(module.cells(), key=lambda cell: cell.get("factor", cell["batch"]))]
    cell |= {"seeds": [0, 1]} | ({"N": 400, "batch": 64} if "N" in cell else {})
    found = module.train_cell(cell)
    assert len(found["accuracy"]) == len(found["test_loss"]) == 2
    if module is ob:
        assert found["updates"] == ob.updates_of(cell["lr"], cell["1/(1−m)"])
    if module is sn:
        assert found["end"] == pytest.approx(0.05 * 320 / (16 * 0.1) / cell["factor"])
