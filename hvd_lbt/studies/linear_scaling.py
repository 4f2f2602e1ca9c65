"""How far can the batch grow with lr ∝ B before the error rises, and what sets the limit?

Source: P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour" (arXiv
1706.02677), figure 1 and section 2: with lr ∝ B and a gradual warm-up the error of a ResNet-50
stays at 23.6 % up to a batch of 8,192 and rises beyond; without warm-up it rises earlier. Here:
perceptrons on a data set made by a fixed random network, for three settings that tell a limit in
lr from a limit in B/N.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS, PLAIN
from hvd_lbt.schedule.settings import Milestone, Schedule, WarmUp
from hvd_lbt.studies.cells import Cell, find_cell, kept_cells
from hvd_lbt.studies.paired import Outcome, all_of, paired
from hvd_lbt.studies.pictures import write_report
from hvd_lbt.studies.side_by_side import train_on_teacher
from hvd_lbt.studies.trainings import made_with

Floats = NDArray[np.float64]

NAME = "linear_scaling"
WIDTH, TEST_SAMPLES, EPOCHS, MOMENTUM = 64, 5_000, 10, 0.9
MILESTONES, WARM_UP = (6, 8), 1  # epochs
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
# N and the lr of the smallest batch; the lr of the others is in proportion
SETTINGS = {
    "base": {"N": 8_000, "lr": 0.05},
    "a quarter of N": {"N": 2_000, "lr": 0.05},
    "half the lr": {"N": 8_000, "lr": 0.025},
}
SEEDS = tuple(range(6))
ALLOWED = 1.0  # points of error above that of the smallest batch: there the line bends
FLAT = 8  # times the smallest batch, up to which the error has to stay
RESAMPLED = 1_000


def study(out: Path, jobs: int) -> str:
    """Train what is missing; write OUT/linear_scaling.{json,png,md}; sum up in a sentence.

    jobs: processes; 0 trains nothing and draws OUT/linear_scaling.json anew.
    """
    found = kept_cells(out, NAME, cells(), train_cell, jobs)
    write_report(out, NAME, draw(found), page(found))
    return finding(found)


def cells() -> list[Cell]:
    """Every batch of every setting, with and without warm-up; the longest first."""
    fixed: dict[str, Any] = {
        "width": WIDTH,
        "epochs": EPOCHS,
        "momentum": MOMENTUM,
        "test_samples": TEST_SAMPLES,
    }
    fixed |= {"milestones": [*MILESTONES], "warm_up_epochs": WARM_UP, "seeds": [*SEEDS]}
    return [
        {"N": s["N"], "lr": s["lr"], "batch": batch, "warm_up": warm, **fixed}
        for batch in BATCHES
        for s in SETTINGS.values()
        for warm in (False, True)
        if batch > BATCHES[0] or not warm
    ]


def train_cell(cell: Cell) -> dict[str, Any]:
    """The networks of all seeds with these settings."""
    schedule = Schedule(
        policy="decay_lr",
        epochs=EPOCHS,
        lr=cell["lr"] * cell["batch"] / BATCHES[0],
        momentum=MOMENTUM,
        global_batch=cell["batch"],
        milestones=tuple(Milestone(epoch=epoch, factor=10) for epoch in MILESTONES),
        warm_up=WarmUp(epochs=WARM_UP, first_lr=cell["lr"]) if cell["warm_up"] else None,
    )
    plan, outcomes = train_on_teacher(
        schedule,
        train_samples=cell["N"],
        test_samples=TEST_SAMPLES,
        label_noise=0.0,
        width=WIDTH,
        seeds=cell["seeds"],
    )
    return {"updates": plan.updates, **vars(outcomes)}


# --------------------------------------------------------------------------------------- numbers


def find(found: dict[str, Any], setting: str, batch: int, warm: bool) -> Cell:
    """The cell of a setting; the smallest batch needs no warm-up and has none."""
    wanted = SETTINGS[setting] | {"batch": batch, "warm_up": warm and batch > BATCHES[0]}
    return find_cell(found, wanted)


def errors(found: dict[str, Any], setting: str, warm: bool) -> Floats:
    """Test errors in percent, (batches, seeds)."""
    return 100 - np.array([find(found, setting, b, warm)["accuracy"] for b in BATCHES])


def bend(means: Floats) -> float:
    """log2 of the batch from which on the error is ALLOWED points above the smallest batch's.

    Interpolated in log2 B; the largest batch if the line does not bend.
    """
    above = means - means[0] - ALLOWED
    x = np.log2(BATCHES)
    for place in range(len(BATCHES) - 1, 0, -1):
        if above[place] > 0 >= above[place - 1]:
            step = above[place - 1] / (above[place - 1] - above[place])
            return float(x[place - 1] + step * (x[place] - x[place - 1]))
    return float(x[-1])


def bends(found: dict[str, Any], setting: str, warm: bool) -> Floats:
    """The bend, then that of RESAMPLED draws of the seeds: the same draws for all settings."""
    table = errors(found, setting, warm)
    generator = np.random.default_rng(0)
    draws = generator.integers(0, table.shape[1], (RESAMPLED, table.shape[1]))
    return np.array([bend(table.mean(1)), *(bend(table[:, draw].mean(1)) for draw in draws)])


def _interval(values: Floats, digits: int = 1) -> str:
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{values[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def finding(found: dict[str, Any]) -> str:
    """What held, with its numbers."""
    smallest = find(found, "base", BATCHES[0], False)
    flat_batch = FLAT * BATCHES[0]
    flat = paired(smallest, find(found, "base", flat_batch, True), "accuracy")  # error minus error
    last = paired(smallest, find(found, "base", BATCHES[-1], True), "accuracy")
    warm, cold = (bends(found, "base", is_warm) for is_warm in (True, False))
    won = warm - cold
    low, high = np.quantile(won[1:], (0.025, 0.975))
    later = Outcome.HELD if low > 0 else Outcome.NO if high <= 0 else Outcome.UNDECIDED
    outcomes = [flat.within(ALLOWED), last.above(ALLOWED), later]
    moved = [
        f"{setting}: {_interval(2 ** (bends(found, setting, True) - warm), 2)} times with warm-up, "
        f"{_interval(2 ** (bends(found, setting, False) - cold), 2)} without"
        for setting in SETTINGS
        if setting != "base"
    ]
    return (
        f"The claim {all_of(outcomes)}. With warm-up the error is {flat} points above that of "
        f"batch {BATCHES[0]} at {FLAT}× the batch and lr ({outcomes[0]}), and {last} points at "
        f"{BATCHES[-1] // BATCHES[0]}× ({outcomes[1]}). The line bends (error {ALLOWED:g} point "
        f"higher) at a batch of {_interval(2**warm, 0)} with warm-up and "
        f"{_interval(2**cold, 0)} without: the warm-up moves it {_interval(2**won, 2)} times as "
        f"far ({later}). With other settings the bend is at another batch: "
        f"{'; '.join(moved)}. A limit in lr would give 1 and 2 times, a limit in B/N 0.25 and 1. "
        f"Brackets are 95 % intervals. (Held: within {ALLOWED:g} point up to {FLAT}×, more than "
        "that at the largest batch, and the bend is later with warm-up beyond its interval.)"
    )


# ---------------------------------------------------------------------------------- figure, page


def draw(found: dict[str, Any]) -> Figure:
    """Goyal's figure for each setting: error against batch, with and without warm-up."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        for axes, setting in zip(figure.subplots(1, len(SETTINGS)), SETTINGS, strict=True):
            for place, (warm, label) in enumerate(((True, "warm-up"), (False, "no warm-up"))):
                table = errors(found, setting, warm)
                spread = table.std(1, ddof=1) / np.sqrt(table.shape[1])
                colour = COLOURS[place]
                axes.errorbar(
                    BATCHES, table.mean(1), spread, color=colour, fmt="o-", capsize=3, label=label
                )
                axes.axvline(2 ** bend(table.mean(1)), color=colour, linestyle=":")
            base = errors(found, setting, False)[0].mean()
            axes.axhline(base, color="#555555", linewidth=0.8)
            axes.set_ylim(base - 1.5, base + 12)
            axes.set_xscale("log", base=2)
            axes.set_xticks(BATCHES[::2])
            axes.xaxis.set_major_formatter(PLAIN)
            axes.xaxis.set_minor_formatter(NullFormatter())
            values = SETTINGS[setting]
            axes.set_title(f"N {values['N']:,}, lr {values['lr']:g}·B/16", loc="left")
            axes.set_xlabel("global batch B")
        first = figure.axes[0]
        first.set_ylabel("test error, %")
        first.legend(frameon=False, loc="upper left")
        figure.supxlabel("Bars: standard error of the mean; dotted: the bend.", fontsize=11)
    return figure


def page(found: dict[str, Any]) -> str:
    """The study's page, in Markdown."""
    rows = []
    for setting, values in SETTINGS.items():
        for warm in (True, False):
            table = errors(found, setting, warm)
            cut = 2 ** bends(found, setting, warm)
            listed = ", ".join(f"{error:.1f}" for error in table.mean(1))
            lr = cut * values["lr"] / BATCHES[0]
            rows.append(
                f"| {values['N']:,} | {values['lr']:g} | {'yes' if warm else 'no'} | {listed} | "
                f"{_interval(cut, 0)} | {_interval(cut / values['N'], 3)} | {_interval(lr, 2)} |"
            )
    return "\n".join(
        [
            "# The range of linear scaling",
            "",
            (
                f"`hvd_lbt study {NAME}`. Goyal et al. 2017 (arXiv:1706.02677), figure 1: with lr "
                "∝ B and a gradual warm-up the top-1 error of a ResNet-50 stays at 23.6 to 23.7 % "
                "up to a batch of 8,192 (32 times 256) and rises beyond."
            ),
            "",
            finding(found),
            "",
            f"![Test error against the batch]({NAME}.png)",
            "",
            (
                f"Here: perceptrons of {WIDTH} hidden units, 16 normal inputs, 10 classes given by "
                f"a fixed random network, {EPOCHS} epochs, m {MOMENTUM:g}, the lr in proportion to "
                "the batch and 10 times smaller from epochs 6 and 8 on, the warm-up over 1 epoch "
                f"from the lr of the smallest batch; {len(SEEDS)} seeds with training samples of "
                "their own. The rule was written before the first run; nothing was tuned."
            ),
            "",
            (
                f"| N | lr of batch {BATCHES[0]} | warm-up | error in % at batch "
                f"{', '.join(map(str, BATCHES))} | bend, batch | bend, B/N | bend, lr |"
            ),
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            (
                f"The bend is where the error is {ALLOWED:g} point above that of the smallest "
                "batch; an end of the range where it is not within. Intervals: seeds drawn anew "
                f"{RESAMPLED:,} times. Bars in the figure are standard errors, dotted lines the "
                "bends, the thin line is the smallest batch."
            ),
            "",
            made_with(found),
            "",
        ]
    )
