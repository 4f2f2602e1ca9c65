"""How far should the noise fall in the last stage, and does it matter by what it falls?

Sources: S. L. Smith, Q. V. Le 2018 (arXiv:1710.06451): test accuracy has an optimum over the noise
scale g; S. L. Smith et al. 2018 (arXiv:1711.00489): it is the same whether g falls by the lr or by
the batch. Here: g is constant for seven of ten epochs and then falls once, by another factor in
each training.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.colours import POLICIES as PLACES
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.schedule.settings import Milestone, Schedule
from hvd_lbt.studies.cells import Cell, find_cell, kept_cells
from hvd_lbt.studies.paired import Difference, Outcome, all_of, paired
from hvd_lbt.studies.pictures import write_report
from hvd_lbt.studies.side_by_side import train_on_teacher
from hvd_lbt.studies.trainings import made_with, spread

Floats = NDArray[np.float64]

NAME = "stage_noise"
WIDTH, N, TEST_SAMPLES, EPOCHS, FALL = 64, 8_000, 5_000, 10, 7
LR, MOMENTUM, BATCH = 0.05, 0.9, 16
FACTORS = (1, 2, 4, 8, 16, 32)  # to a batch of 512, N/16
LABEL_NOISE = (0.0, 0.2)
POLICIES = {"decay_lr": "decay the lr", "grow_batch": "grow the batch"}
SEEDS = tuple(range(6))
SAME = 1.0  # points within which two accuracies count as the same
PLAIN = FuncFormatter(lambda value, _: f"{value:,.4g}")


def study(out: Path, jobs: int) -> str:
    """Train what is missing; write OUT/stage_noise.{json,png,md}; sum up in a sentence.

    jobs: processes; 0 trains nothing and draws OUT/stage_noise.json anew.
    """
    found = kept_cells(out, NAME, cells(), train_cell, jobs)
    write_report(out, NAME, draw(found), page(found))
    return finding(found)


def cells() -> list[Cell]:
    """Every fall by every policy; without a fall the policies are the same training."""
    fixed: dict[str, Any] = {
        "width": WIDTH,
        "N": N,
        "test_samples": TEST_SAMPLES,
        "epochs": EPOCHS,
        "fall": FALL,
    }
    fixed |= {"lr": LR, "momentum": MOMENTUM, "batch": BATCH, "seeds": [*SEEDS]}
    return [
        {"policy": policy, "factor": factor, "label_noise": noise, **fixed}
        for noise in LABEL_NOISE
        for factor in FACTORS
        for policy in POLICIES
        if factor > 1 or policy == "decay_lr"
    ]


def schedule(policy: str, factor: int) -> Schedule:
    """Constant noise, then one fall by `factor`."""
    return Schedule(
        policy=policy,  # type: ignore[arg-type]  # a key of POLICIES
        epochs=EPOCHS,
        lr=LR,
        momentum=MOMENTUM,
        global_batch=BATCH,
        milestones=(Milestone(epoch=FALL, factor=factor),) if factor > 1 else (),
    )


def train_cell(cell: Cell) -> dict[str, Any]:
    """The networks of all seeds with these settings."""
    plan, outcomes = train_on_teacher(
        schedule(cell["policy"], cell["factor"]),
        train_samples=N,
        test_samples=TEST_SAMPLES,
        label_noise=cell["label_noise"],
        width=WIDTH,
        seeds=cell["seeds"],
    )
    return {"updates": plan.updates, "end": plan.stages[-1].noise_scale, **vars(outcomes)}


# --------------------------------------------------------------------------------------- numbers


def find(found: dict[str, Any], noise: float, policy: str, factor: int) -> Cell:
    """The cell of these settings."""
    policy = policy if factor > 1 else "decay_lr"
    return find_cell(found, {"label_noise": noise, "policy": policy, "factor": factor})


def best(found: dict[str, Any], noise: float, policy: str) -> Cell:
    """The fall with the highest mean accuracy; that there is none is no fall."""
    every = [find(found, noise, policy, factor) for factor in FACTORS[1:]]
    return max(every, key=lambda cell: float(np.mean(cell["accuracy"])))


def apart(found: dict[str, Any], noise: float) -> dict[int, Difference]:
    """By the factor of the fall: growing the batch against decaying the lr, in points."""
    return {
        factor: paired(
            find(found, noise, "grow_batch", factor),
            find(found, noise, "decay_lr", factor),
            "accuracy",
        )
        for factor in FACTORS[1:]
    }


def finding(found: dict[str, Any]) -> str:
    """What held, with its numbers."""
    outcomes: list[Outcome] = []
    parts = []
    for noise in LABEL_NOISE:
        none = find(found, noise, "decay_lr", 1)
        least = find(found, noise, "grow_batch", FACTORS[-1])
        top = best(found, noise, "grow_batch")
        helps, optimum = paired(top, none, "accuracy"), paired(top, least, "accuracy")
        differences = apart(found, noise)
        same = all_of(one.within(SAME) for one in differences.values())
        fell = (
            Outcome.HELD if helps.low > 0 else Outcome.NO if helps.high < 0 else Outcome.UNDECIDED
        )
        outcomes += [same, fell]
        largest = max(differences.values(), key=lambda one: abs(one.mean))
        beyond = (
            f"a fall to {least['end']:.3g} is {optimum} points below that, so that there is an "
            "optimum between"
            if optimum.low > 0 and helps.low > 0 and math.isfinite(optimum.high)
            else f"the least noise, {least['end']:.3g}, is not worse beyond its interval "
            f"({optimum}): no optimum is seen"
        )
        parts.append(
            f"With {noise:.0%} random labels: a fall of the noise helps by {helps} points at the "
            f"best end, g = {top['end']:.3g} ({fell}); {beyond}. At equal g growing the batch and "
            f"decaying the lr differ by at most {largest} points ({same}; intervals of all in the "
            "table)."
        )
    return (
        f"The claim {all_of(outcomes)}. {' '.join(parts)} Brackets are 95 % intervals, paired by "
        f"seed. (Held: a fall helps beyond its interval, and at every g the policies are within "
        f"{SAME:g} point of each other; the best end is chosen on the same seeds, which flatters "
        "it.)"
    )


# ---------------------------------------------------------------------------------- figure, page


def draw(found: dict[str, Any]) -> Figure:
    """Final accuracy and test cross-entropy against the noise scale of the last stage."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9, 6.2), layout="constrained")
        grid = figure.subplots(2, len(LABEL_NOISE), sharex=True)
        for column, noise in zip(grid.T, LABEL_NOISE, strict=True):
            for axes, measure in zip(column, ("accuracy", "test_loss"), strict=True):
                for policy, title in POLICIES.items():
                    own = [find(found, noise, policy, factor) for factor in FACTORS]
                    values = np.array([cell[measure] for cell in own])
                    axes.errorbar(
                        [cell["end"] for cell in own],
                        values.mean(1),
                        values.std(1, ddof=1) / np.sqrt(values.shape[1]),
                        fmt="o-",
                        capsize=3,
                        color=COLOURS[PLACES[policy]],
                        linewidth=2.6 if policy == "decay_lr" else 1.4,
                        label=title,
                    )
                axes.axhline(values.mean(1)[0], color="#555555", linewidth=0.8)
                axes.set_xscale("log", base=2)
                axes.set_xticks([cell["end"] for cell in own][::2])
                axes.xaxis.set_major_formatter(PLAIN)
                axes.xaxis.set_minor_formatter(NullFormatter())
            column[0].set_title(f"{noise:.0%} random labels", loc="left")
            column[1].set_xlabel("g of the last stage (thin line: no fall)")
        grid[0, 0].set_ylabel("test accuracy, %")
        grid[1, 0].set_ylabel("test cross-entropy, nats")
        grid[0, 0].legend(frameon=False)
    return figure


def page(found: dict[str, Any]) -> str:
    """The study's page, in Markdown."""
    rows = []
    for noise in LABEL_NOISE:
        for factor in FACTORS:
            decayed, grown = (find(found, noise, policy, factor) for policy in POLICIES)
            difference = apart(found, noise)[factor] if factor > 1 else "–"
            rows.append(
                f"| {noise:.0%} | {factor} | {decayed['end']:.3g} | {spread(decayed['accuracy'])} "
                f"% in {decayed['updates']:,} | {spread(grown['accuracy'])} % in "
                f"{grown['updates']:,} | {difference} | {spread(decayed['test_loss'], 3)} | "
                f"{spread(grown['test_loss'], 3)} |"
            )
    return "\n".join(
        [
            "# The noise at the end against the final accuracy",
            "",
            (
                f"`hvd_lbt study {NAME}`. Smith & Le 2018 (arXiv:1710.06451): accuracy has an "
                "optimum over the noise scale; Smith et al. 2018 (arXiv:1711.00489): it does not "
                "matter whether lr or batch brings the noise there."
            ),
            "",
            finding(found),
            "",
            f"![Accuracy and cross-entropy against the last stage's noise scale]({NAME}.png)",
            "",
            (
                f"Here: perceptrons of {WIDTH} hidden units, 16 normal inputs, 10 classes given by "
                f"a fixed random network, N {N:,}, lr {LR:g}, m {MOMENTUM:g}, B {BATCH}; the noise "
                f"is constant for {FALL} of {EPOCHS} epochs and then falls once. {len(SEEDS)} "
                "seeds with training samples of their own; ± is the standard deviation over them "
                "(n − 1), bars in the figure are standard errors. The rule was written before the "
                "first run; nothing was tuned."
            ),
            "",
            (
                "| random labels | fall | g at the end | decay the lr: accuracy in updates | grow "
                "the batch | difference in points | cross-entropy, lr | cross-entropy, batch |"
            ),
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            made_with(found),
            "",
        ]
    )
