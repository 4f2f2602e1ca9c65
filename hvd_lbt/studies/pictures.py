"""The figures of the studies, from their collected numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter

from hvd_lbt.report.colours import COLOURS, POLICIES, assign
from hvd_lbt.report.pictures import FONTS, PLAIN
from hvd_lbt.whole_file import write_whole

Results = dict[str, Any]
BANDS = "Lines: mean of the seeds; bands: their range."


def write_report(out: Path, stem: str, figure: Figure, page: str) -> None:
    """Write OUT/STEM.png and OUT/STEM.md, a study's figure and page."""
    figure.savefig(out / f"{stem}.png", dpi=100)
    write_whole(out / f"{stem}.md", page)


def draw_curves(found: Results) -> Figure:
    """For each panel the training loss and the test accuracy, against epochs and updates."""
    panels = list(dict.fromkeys(arm["panel"] for arm in found["arms"]))
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9.5, 6 * len(panels) + 0.9), layout="constrained")
        for part, panel in zip(_parts(figure, len(panels)), panels, strict=True):
            arms = [arm for arm in found["arms"] if arm["panel"] == panel]
            if panel:
                part.suptitle(panel, x=0.02, ha="left", fontweight="bold")
            for row, quantity in zip(part.subplots(2, 2), ("loss", "accuracy"), strict=True):
                for axes, against in zip(row, ("epochs", "updates"), strict=True):
                    _draw_curve(axes, arms, quantity, against)
        first = figure.subfigs[0].axes[0]
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel(BANDS, fontsize=11)
    return figure


def _parts(figure: Figure, count: int) -> list[SubFigure]:
    parts = figure.subfigures(count, 1, squeeze=False)
    return [row[0] for row in parts]


def _draw_curve(axes: Axes, arms: Sequence[Results], quantity: str, against: str) -> None:
    for place, (arm, colour) in enumerate(zip(arms, _colours(arms), strict=True)):
        curve = arm[quantity]
        x = curve[against]
        width = max(1.3, 2.6 - 0.5 * place)
        axes.plot(x, curve["mean"], color=colour, linewidth=width, label=arm["label"])
        axes.plot(x[-1:], curve["mean"][-1:], "o", color=colour, clip_on=False)
        axes.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(against)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    if quantity == "loss":
        axes.set_ylabel("train loss")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylabel("test accuracy, %")
        axes.set_ylim(*late_range(arms))


def _colours(arms: Sequence[Results]) -> list[str]:
    """As reports colour them, by the policy that an arm's name ends with; else in order."""
    policies = [
        next((policy for policy in POLICIES if arm["name"].endswith(policy)), "") for arm in arms
    ]
    if not any(policies):
        return [COLOURS[place % len(COLOURS)] for place in range(len(arms))]
    return [COLOURS[place] for place, _ in assign(policies)]


def late_range(
    arms: Sequence[Results], quantity: str = "accuracy", left_out: float = 1 / 5
) -> tuple[float, float]:
    """The range of the curves after this first share of the run, and some room."""
    late = [
        value
        for arm in arms
        for epoch, low, high in zip(
            *(arm[quantity][key] for key in ("epochs", "low", "high")), strict=True
        )
        if epoch >= left_out * arm[quantity]["epochs"][-1]
        for value in (low, high)
    ]
    room = 0.08 * (max(late) - min(late)) or 0.5
    return min(late) - room, max(late) + room
