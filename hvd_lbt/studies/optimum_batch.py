"""Is there a batch of the best test result, and does it grow as εN and as 1/(1−m)?

Source: S. L. Smith, Q. V. Le, "A Bayesian Perspective on Generalization and Stochastic Gradient
Descent", ICLR 2018 (arXiv:1710.06451), section 5: a perceptron on MNIST, trained for a fixed number
of updates at a constant lr. Here: a perceptron that over-fits, a data set made by a fixed random
network, two fifths of the training labels random, as many updates whatever N and the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS, PLAIN
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.studies.cells import Cell, kept_cells
from hvd_lbt.studies.paired import Outcome, all_of
from hvd_lbt.studies.pictures import write_report
from hvd_lbt.studies.side_by_side import train_on_teacher
from hvd_lbt.studies.trainings import made_with

Floats = NDArray[np.float64]

NAME = "optimum_batch"
WIDTH, LABEL_NOISE, TEST_SAMPLES = 128, 0.4, 5_000
TRAVELLED = 2_000  # lr·updates/(1−m): what the weights could travel at a constant gradient
SMALLEST, STEPS = 8, 13  # batches of the base, in steps of √2
BASE = {"lr": 0.5, "N": 3_000, "1/(1−m)": 2}
SWEEPS = {
    "N": (750, 1_500, 3_000, 6_000, 12_000),
    "lr": (0.125, 0.25, 0.5, 1.0),
    "1/(1−m)": (1, 2, 4, 8),
}
SEEDS = tuple(range(5))
MEASURES = {"accuracy": 1, "test_loss": -1}  # the sign with which the best is the highest
TITLES = {"accuracy": "test accuracy", "test_loss": "test cross-entropy"}
AROUND = 2  # points on each side of the best one that the peak is fitted through
MARGIN = 0.5  # of an exponent around 1 within which the claim holds
HURTS = {"accuracy": 1.0, "test_loss": 0.05}  # points, nats: worse than the best by so much
RESAMPLED = 1_000
NEAR = 0.5  # steps of √2 from an end of the grid: what lies there is only a bound


def study(out: Path, jobs: int) -> str:
    """Train what is missing; write OUT/optimum_batch.{json,png,md}; sum up in a sentence.

    jobs: processes; 0 trains nothing and draws OUT/optimum_batch.json anew.
    """
    found = kept_cells(out, NAME, cells(), train_cell, jobs)
    write_report(out, NAME, draw(found), page(found))
    return finding(found)


def cells() -> list[Cell]:
    """All batches of all settings; the base is in each sweep and trained once."""
    wanted = {
        (*(BASE | {name: value}).values(), batch)
        for name, values in SWEEPS.items()
        for value in values
        for batch in batches_of(name, value)
    }
    # the longest first, so that all processes end at about the same time
    order = sorted(wanted, key=lambda one: (-one[3] * updates_of(one[0], one[2]), one))
    fixed: dict[str, Any] = {"width": WIDTH, "label_noise": LABEL_NOISE, "travelled": TRAVELLED}
    fixed |= {"test_samples": TEST_SAMPLES, "seeds": [*SEEDS]}
    return [dict(zip((*BASE, "batch"), one, strict=True)) | fixed for one in order]


def batches_of(name: str, value: float) -> list[int]:
    """The batches at one value of a sweep.

    The same for every N. Where lr or 1/(1−m) is multiplied the whole range is, so that no training
    is longer in samples; the best batch is found anywhere in its six octaves.
    """
    ratio = 1 if name == "N" else value / BASE[name]
    return [round(SMALLEST * ratio * 2 ** (step / 2)) for step in range(STEPS)]


def updates_of(lr: float, total: float) -> int:
    """Of a training with this lr and 1/(1−m): whatever its batch and N."""
    return round(TRAVELLED / (lr * total))


def train_cell(cell: Cell) -> dict[str, Any]:
    """The networks of all seeds with these settings."""
    schedule = Schedule(
        policy="decay_lr",
        epochs=updates_of(cell["lr"], cell["1/(1−m)"]) * cell["batch"] / cell["N"],
        lr=cell["lr"],
        momentum=1 - 1 / cell["1/(1−m)"],
        global_batch=cell["batch"],
    )
    plan, outcomes = train_on_teacher(
        schedule,
        train_samples=cell["N"],
        test_samples=TEST_SAMPLES,
        label_noise=LABEL_NOISE,
        width=WIDTH,
        seeds=cell["seeds"],
    )
    return {"updates": plan.updates, **vars(outcomes)}


# --------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """p of batch ∝ quantity^p, with its 95 % interval and the batches that it is fitted through.

    at_edge: how many of them lie at the end of the grid, so that they are bounds only.
    """

    value: float
    low: float
    high: float
    batches: list[float]
    errors: list[float]
    """Standard errors of log2 of the batches."""
    at_edge: int

    @property
    def outcome(self) -> Outcome:
        """Whether it lies within MARGIN of 1; undecided where a batch is only a bound."""
        if self.at_edge:
            return Outcome.UNDECIDED
        if self.low > 1 + MARGIN or self.high < 1 - MARGIN:
            return Outcome.NO
        inside = self.low >= 1 - MARGIN and self.high <= 1 + MARGIN
        return Outcome.HELD if inside else Outcome.UNDECIDED

    def __str__(self) -> str:
        bounds = f", {self.at_edge} of {len(self.batches)} are bounds" if self.at_edge else ""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]{bounds}"


def curves(found: dict[str, Any], name: str, measure: str) -> list[Floats]:
    """Of each value of a sweep: (batches, seeds), higher is better."""
    sign = MEASURES[measure]
    tables = []
    for value in SWEEPS[name]:
        setting = BASE | {name: value}
        own = [cell for cell in found["cells"] if setting.items() <= cell.items()]
        by_batch = {cell["batch"]: cell[measure] for cell in own}
        tables.append(sign * np.array([by_batch[batch] for batch in batches_of(name, value)]))
    return tables


def peak(heights: Floats) -> float:
    """Steps of √2 from the smallest batch to the best result: a parabola through the points around.

    Where the parabola has no top within its points it is their nearest end.
    """
    best = int(np.argmax(heights))
    first = min(max(0, best - AROUND), len(heights) - 2 * AROUND - 1)
    points = heights[first : first + 2 * AROUND + 1]
    # least squares of y = c + slope·x + bend·x² for x = −2 … 2
    x = np.arange(-AROUND, AROUND + 1)
    slope = x @ points / (x @ x)
    square = x**2 - np.mean(x**2)
    bend = square @ points / (square @ square)
    if bend >= 0:
        return float(best)
    return first + AROUND + min(max(-slope / (2 * bend), -AROUND), AROUND)


def harmless(heights: Floats, allowed: float) -> float:
    """Steps of √2 to the smallest batch whose noise costs at most `allowed` against the best.

    Interpolated on the flank of small batches; the smallest of all if none costs as much.
    """
    lost = np.max(heights) - heights - allowed
    for step in range(int(np.argmax(heights)), 0, -1):
        if lost[step - 1] > 0:
            return float(step - lost[step] / (lost[step] - lost[step - 1]))
    return 0.0


def exponent(
    found: dict[str, Any], name: str, measure: str, place: Callable[[Floats], float] = peak
) -> Exponent:
    """By least squares in logarithms; the interval by drawing seeds anew, a thousand times.

    place: of a curve, the steps of √2 to the batch that is followed.
    """
    tables = curves(found, name, measure)
    x = np.log2(SWEEPS[name]) - np.mean(np.log2(SWEEPS[name]))
    weights = x / np.sum(x**2)
    steps = np.array([place(table.mean(1)) for table in tables])
    smallest = np.log2([batches_of(name, value)[0] for value in SWEEPS[name]])
    generator = np.random.default_rng(0)
    seeds = tables[0].shape[1]
    drawn = []
    for _ in range(RESAMPLED):
        chosen = [generator.integers(0, seeds, seeds) for _ in tables]
        drawn.append([place(t[:, c].mean(1)) for t, c in zip(tables, chosen, strict=True)])
    low, high = np.quantile((smallest + np.array(drawn) / 2) @ weights, (0.025, 0.975))
    return Exponent(
        value=float(weights @ (smallest + steps / 2)),
        low=float(low),
        high=float(high),
        batches=list(2 ** (smallest + steps / 2)),
        errors=list(np.std(drawn, axis=0) / 2),
        at_edge=int(((steps < NEAR) | (steps > len(tables[0]) - 1 - NEAR)).sum()),
    )


def flank(measure: str) -> Callable[[Floats], float]:
    """`harmless` at the loss that is allowed for this measure."""
    return lambda heights: harmless(heights, HURTS[measure])


def finding(found: dict[str, Any]) -> str:
    """What held, with its numbers."""
    outcomes, parts = [], []
    for measure, title in TITLES.items():
        powers = {name: exponent(found, name, measure) for name in SWEEPS}
        outcomes += [power.outcome for power in powers.values()]
        listed = ", ".join(f"{n}^{p} ({p.outcome})" for n, p in powers.items())
        parts.append(f"The batch of the best {title} goes as {listed}.")
    flanks = {name: exponent(found, name, "test_loss", flank("test_loss")) for name in SWEEPS}
    listed = ", ".join(f"{name}^{power}" for name, power in flanks.items())
    return (
        f"The claim {all_of(outcomes)}. {' '.join(parts)} The smallest batch whose noise costs at "
        f"most {HURTS['test_loss']:g} nats goes as {listed}. Brackets are 95 % intervals; the "
        "prediction is an exponent of 1 for each. (Held: the interval lies between "
        f"{1 - MARGIN:g} and {1 + MARGIN:g}, and no best batch is at an end of the grid; did not "
        "hold: wholly outside; undecided: else. The worst of the six decides.)"
    )


# ---------------------------------------------------------------------------------- figure, page


def draw(found: dict[str, Any]) -> Figure:
    """A row a sweep: accuracy and cross-entropy against batch, and where the best batch is."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(11, 3.1 * len(SWEEPS) + 0.4), layout="constrained")
        rows = figure.subplots(len(SWEEPS), 3)
        for row, name in zip(rows, SWEEPS, strict=True):
            for axes, measure in zip(row, MEASURES, strict=False):
                _draw_curves(axes, found, name, measure)
            row[0].legend(frameon=False, title=name, loc="lower right", ncols=2)
            _draw_peaks(row[2], found, name)
        for axes, title in zip(rows[0], (*TITLES.values(), "the best batch"), strict=True):
            axes.set_title(title, loc="left")
        for axes in rows[-1, :2]:
            axes.set_xlabel("global batch B")
    return figure


def _draw_curves(axes: Axes, found: dict[str, Any], name: str, measure: str) -> None:
    """Mean and standard error over the seeds, one line a value of the sweep."""
    sign = MEASURES[measure]
    for place, (value, table) in enumerate(
        zip(SWEEPS[name], curves(found, name, measure), strict=True)
    ):
        means, errors = table.mean(1), table.std(1, ddof=1) / np.sqrt(table.shape[1])
        # all on one scale: relative to the best of each curve
        lost = sign * (means - means.max())
        colour = COLOURS[place % len(COLOURS)]
        width = 2.6 if value == BASE[name] else 1.4
        batches = batches_of(name, value)
        axes.errorbar(
            batches, lost, errors, color=colour, linewidth=width, capsize=2, label=f"{value:,}"
        )
        axes.plot(
            batches[0] * 2 ** (peak(means) / 2), 0, "v", color=colour, markersize=9, clip_on=False
        )
    limit = {"accuracy": 10.0, "test_loss": 0.8}[measure]  # what diverges is far beyond
    axes.set_ylim((-limit, limit / 10) if sign > 0 else (-limit / 10, limit))
    axes.set_ylabel("points from the best" if sign > 0 else "nats from the best")
    every = {batch for value in SWEEPS[name] for batch in batches_of(name, value)[::4]}
    _doubling(axes, sorted(every))


def _draw_peaks(axes: Axes, found: dict[str, Any], name: str) -> None:
    for place, (label, measure, where) in enumerate(
        (
            ("best accuracy", "accuracy", peak),
            ("best cross-entropy", "test_loss", peak),
            (f"costs {HURTS['test_loss']:g} nats", "test_loss", flank("test_loss")),
        )
    ):
        power = exponent(found, name, measure, where)
        tops, errors = np.array(power.batches), np.array(power.errors)
        axes.errorbar(
            np.array(SWEEPS[name]) * 1.06 ** (place - 1),
            tops,
            [tops - tops / 2**errors, tops * 2**errors - tops],
            fmt="osD"[place],
            color=COLOURS[place],
            capsize=3,
            label=f"{label}: {power.value:.2f}",
        )
        if place == 1:
            middle = np.exp(np.mean(np.log(tops / np.array(SWEEPS[name]))))
            axes.plot(SWEEPS[name], middle * np.array(SWEEPS[name]), "--", color="#555555")
    _doubling(axes, SWEEPS[name])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{name} (dashed: ∝ {name})")
    axes.legend(frameon=False, fontsize="small")


def _doubling(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def page(found: dict[str, Any]) -> str:
    """The study's page, in Markdown."""
    rows = []
    for name in SWEEPS:
        for label, measure, where in (
            ("best accuracy", "accuracy", peak),
            ("best cross-entropy", "test_loss", peak),
            (f"costs at most {HURTS['accuracy']:g} point", "accuracy", flank("accuracy")),
            (f"costs at most {HURTS['test_loss']:g} nats", "test_loss", flank("test_loss")),
        ):
            power = exponent(found, name, measure, where)
            batches = ", ".join(f"{batch:.0f}" for batch in power.batches)
            verdict = power.outcome if where is peak else "–"
            rows.append(f"| {name} | {label} | {batches} | {power} | {verdict} |")
    values = "; ".join(f"{n} {', '.join(f'{v:,}' for v in vs)}" for n, vs in SWEEPS.items())
    count = len(found["cells"]) * len(SEEDS)
    setting = (
        f"Here: {count:,} perceptrons of {WIDTH} hidden units, 16 normal inputs, 10 classes given "
        f"by a fixed random network of 32 hidden units, {LABEL_NOISE:.0%} of the training labels "
        f"random, constant lr and momentum. The base is lr {BASE['lr']:g}, N {BASE['N']:,}, m 0.5 "
        f"and {updates_of(0.5, 2):,} updates whatever N and the batch; the sweeps: {values}; "
        f"batches from {SMALLEST} to {batches_of('N', 1)[-1]:,} in steps of √2. A smaller lr or "
        "1/(1−m) has so many more updates that lr·updates/(1−m), how far the weights can travel, "
        "is the same: else it is a shorter training, which over-fits less whatever its noise. "
        f"{len(SEEDS)} seeds; a seed has its own training samples, label noise, first weights and "
        "order of samples. Ranges, label noise and width were chosen by sweeps with seeds 100 "
        "and 200 to 203; the rule for the verdict was written before the first full run. N = 750 "
        "and the two smallest batches of each curve were added after it, since four of its points "
        "lay at the end of the grid."
    )
    how = (
        "A best batch is the top of a parabola in log2 B through five points around the best mean. "
        f"Intervals: seeds drawn anew {RESAMPLED:,} times. A bar in the figure is one standard "
        "error; a triangle is the best batch of a curve. `optimum_batch.json` has every network's "
        "accuracy and cross-entropy on test and training samples."
    )
    return "\n".join(
        [
            "# The batch of the best test result",
            "",
            (
                f"`hvd_lbt study {NAME}`. Smith & Le 2018 (arXiv:1710.06451), section 5: at a "
                "fixed lr there is a batch of the highest test accuracy, and it grows as εN; as "
                "1/(1−m) too."
            ),
            "",
            finding(found),
            "",
            f"![Test accuracy and cross-entropy against the batch]({NAME}.png)",
            "",
            setting,
            "",
            "| sweep | batch | at each value | exponent | verdict |",
            "|---|---|---|---|---|",
            *rows,
            "",
            how,
            "",
            made_with(found),
            "",
        ]
    )
