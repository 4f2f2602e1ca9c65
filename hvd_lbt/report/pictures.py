"""The pictures of a report, as PNG files in memory."""

import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hvd_lbt.report.curves import (
    BINS,
    Band,
    Floats,
    evaluated,
    in_percent,
    measured,
    scheduled,
    share_from_differences,
)
from hvd_lbt.report.rank_strip import CAPTION, draw_ranks
from hvd_lbt.report.runs import Group
from hvd_lbt.terminal import printable

FONTS: dict[Any, Any] = {
    "font.size": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}
PLAIN = FuncFormatter(lambda value, _: f"{value:,.6g}")  # 1,281,167
LABEL = 90  # characters of a label in a legend
LEGEND_WIDTH = 55  # characters of a line in a picture's legend: of the widest, as W, 9 of 12 inches


def draw_loss(groups: Sequence[Group]) -> bytes:
    """Train loss against epochs and against updates."""
    bands = [measured(group, "loss") for group in groups]
    return _picture(groups, [("train loss", bands, _log_if_decades)])


def draw_accuracy(groups: Sequence[Group]) -> bytes:
    """Test accuracy against epochs and against updates; below it the range of the second half."""
    bands = [evaluated(group) for group in groups]

    def enlarge(axes: Axes, values: Floats) -> None:
        late = [
            np.r_[band.low, band.high][np.tile(band.epochs >= band.epochs[-1] / 2, 2)]
            for band in bands
            if len(band.epochs)
        ]
        if late:
            low, high = np.concatenate(late).min(), np.concatenate(late).max()
            margin = 0.06 * (high - low) or 0.5
            axes.set_ylim(low - margin, high + margin)

    rows: list[Row] = [
        ("test accuracy, %", bands, _linear),
        ("the same, %, range of\nthe second half", bands, enlarge),
    ]
    return _picture(groups, rows)


def draw_schedule(groups: Sequence[Group]) -> bytes:
    """Global batch, lr, momentum and noise scale as the updates used them."""
    quantities: tuple[tuple[str, str, Scale], ...] = (
        ("global_batch", "global batch", _log_if_decades),
        ("lr", "lr", _log_if_decades),
        ("momentum", "momentum", _linear),
        ("noise_scale", "noise scale g", _log_if_decades),
    )
    rows: list[Row] = [
        (label, [scheduled(group, key) for group in groups], scale)
        for key, label, scale in quantities
    ]
    noises = [measured(group, "gradient_noise") for group in groups]
    if any(len(noise.mean) for noise in noises):
        share = share_from_differences(groups)
        marked = f"\n({share:.0%} from differences)" if share else ""
        rows.append((f"measured tr(Σ)/|G|²,\nsamples{marked}", noises, _log_if_decades))
    return _picture(groups, rows, height=2.6)


def draw_speed(groups: Sequence[Group]) -> bytes:
    """Images per second, and the share of the time that rank 0 waited for images."""

    def from_zero(axes: Axes, values: Floats) -> None:
        axes.set_ylim(bottom=0)

    def per_second(axes: Axes, values: Floats) -> None:
        _log_if_decades(axes, values)
        if axes.get_yscale() == "linear":
            from_zero(axes, values)

    waits = [measured(group, "data_wait") for group in groups]
    percent = [in_percent(band) for band in waits]
    rows: list[Row] = [
        ("images/s", [measured(group, "images_per_second") for group in groups], per_second),
        ("waiting for data,\n% of the time", percent, from_zero),
    ]
    return _picture(groups, rows, height=3.0)


Scale = Callable[[Axes, Floats], None]
Row = tuple[str, list[Band], Scale]


def _picture(groups: Sequence[Group], rows: Sequence[Row], *, height: float = 3.9) -> bytes:
    """Draw rows of quantities, each against epochs (left) and updates (right), legend on top."""
    with matplotlib.rc_context(FONTS):
        labels = [textwrap.fill(legend_label(group), LEGEND_WIDTH) for group in groups]
        rows_each = [label.split("\n") for label in labels]
        widest = max(len(row) for each in rows_each for row in each)
        columns = max(1, min(3, 110 // (widest + 8)))
        legend_rows = -(-len(groups) // columns) * max(map(len, rows_each))
        size = (12, height * len(rows) + 0.35 * legend_rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
        for (label, bands, scale), pair in zip(rows, panels, strict=True):
            pair[0].set_ylabel(label)
            for axes, x in zip(pair, ("epochs", "updates"), strict=True):
                for group, band in zip(groups, bands, strict=True):
                    _draw(axes, getattr(band, x), band, group)
            values = np.concatenate([np.r_[band.low, band.high] for band in bands])
            scale(pair[0], values)
            if not len(values):
                pair[0].text(0.5, 0.5, "nothing yet", ha="center", transform=pair[0].transAxes)
        for axes, x in zip(panels[-1], ("epochs", "updates"), strict=True):
            axes.set_xlabel(x)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=x == "updates"))
            axes.xaxis.set_major_formatter(PLAIN)
        figure.align_ylabels(panels[:, 0])
        lines = panels[0, 0].get_lines()[::2]  # each line has its end's dot behind it
        legend = figure.legend(
            lines, labels, loc="outside upper center", ncols=columns, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may have a $
        return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it is drawn as a box
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _draw(axes: Axes, x: Floats, band: Band, group: Group) -> None:
    """The line of one group, a dot at its end, and the band of its runs."""
    axes.plot(x, band.mean, **group.style)
    marker = {"color": group.style["color"], "zorder": group.style["zorder"], "markersize": 6}
    axes.plot(x[-1:], band.mean[-1:], "o", **marker, clip_on=False)
    if np.any(band.high > band.low):
        axes.fill_between(x, band.low, band.high, color=marker["color"], alpha=0.2, linewidth=0)


def legend_label(group: Group) -> str:
    """A group's name as a legend shows it: no longer than LABEL, with how many runs it has."""
    count = len(group.runs)
    label = printable(group.label)
    label = label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"
    label = f" {label}" if label.startswith("_") else label  # matplotlib leaves _names out
    return label if count == 1 else f"{label}, mean and range of {count} runs"


def _linear(axes: Axes, values: Floats) -> None:
    """A linear axis; one value alone gets room around it."""
    if len(values) and values.min() == values.max():
        room = 0.1 * abs(values[0]) or 1.0
        axes.set_ylim(values[0] - room, values[0] + room)


def _log_if_decades(axes: Axes, values: Floats) -> None:
    """A log axis with plain numbers if the positive values span a factor of 8 or more."""
    if not len(values) or values.min() <= 0 or values.max() < 8 * values.min():
        _linear(axes, values)
        return
    decades = np.log10(values.max() / values.min())
    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PLAIN)


Drawing = Callable[[Sequence[Group]], bytes | None]  # None: there is nothing to draw
PICTURES: dict[str, tuple[Drawing, str]] = {
    "loss.png": (draw_loss, f"Train loss, averaged over 1/{BINS} of the run at each point."),
    "accuracy.png": (draw_accuracy, "Test accuracy (top-1) at each evaluation."),
    "schedule.png": (
        draw_schedule,
        (
            "What each update used, and the gradient's simple noise scale as it was measured. The "
            "plan's last update, if smaller, is not drawn."
        ),
    ),
    "speed.png": (
        draw_speed,
        (
            f"Speed, averaged over 1/{BINS} of the run, and the share of the time rank 0 waited "
            "for images."
        ),
    ),
    "ranks.png": (draw_ranks, CAPTION),
}
