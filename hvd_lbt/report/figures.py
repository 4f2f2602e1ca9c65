"""The interactive figures of a report, as data for Plotly: curves over the switchable x-axis.

`FIGURES` lists the functions that make them, in the order of the page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from hvd_lbt.report.curves import (
    AXES,
    BINS,
    Band,
    Floats,
    decided_at,
    evaluated,
    in_percent,
    measured,
    scheduled,
    share_from_differences,
)
from hvd_lbt.report.rank_strip import caption, strips, traces
from hvd_lbt.report.runs import Group
from hvd_lbt.terminal import printable

POINTS = 2000  # of a curve; a cosine has as many as the run has updates
NAME = 40  # characters of a group's name beside a point
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # matplotlib's: Plotly's


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the page.

    traces: Plotly's, with two keys of ours. `x` may be a list, or a dictionary with one list for
    each of AXES, which follows the switch of the page. `group`: the place of the group that it
    belongs to, which gives its colour and lets the reader hide it; without it, it has the colour of
    the text. layout: Plotly's, laid over the page's own. Text of a user in either must go through
    `plain`. No traces: the page says that there is nothing to draw yet.
    """

    name: str
    title: str
    caption: str
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)


def plain(text: object, length: int = NAME) -> str:
    """Text for Plotly, which reads tags and entities in names and labels."""
    shown = printable(text)
    return escape(shown if len(shown) <= length else f"{shown[: length - 1]}…")


def train_loss(groups: Sequence[Group]) -> Figure:
    """Train loss."""
    return _curves(
        groups,
        name="loss",
        title="Train loss",
        caption=f"Averaged over 1/{BINS} of the run at each point.",
        bands=[measured(group, "loss") for group in groups],
        scale="log",
    )


def test_accuracy(groups: Sequence[Group]) -> Figure:
    """Test accuracy."""
    return _curves(
        groups,
        name="accuracy",
        title="Test accuracy, %",
        caption="Top-1 at each evaluation.",
        bands=[evaluated(group) for group in groups],
        scale="percent",
    )


def _schedule(key: str, title: str, scale: str = "log") -> Callable[[Sequence[Group]], Figure]:
    def figure(groups: Sequence[Group]) -> Figure:
        return _curves(
            groups,
            name=key,
            title=title,
            caption="As the updates used it. The plan's last update, if smaller, is not drawn.",
            bands=[scheduled(group, key) for group in groups],
            scale=scale,
        )

    return figure


def gradient_noise(groups: Sequence[Group]) -> Figure | None:
    """The gradient's simple noise scale, where it was measured."""
    bands = [measured(group, "gradient_noise") for group in groups]
    if not any(len(band.mean) for band in bands):
        return None
    share = share_from_differences(groups)
    marked = (
        f" {share:.0%} of it is from differences of consecutive updates, which are one micro-batch "
        "each: less exact."
        if share
        else ""
    )
    return _curves(
        groups,
        name="gradient_noise",
        title="Measured tr(Σ)/|G|², samples",
        caption="The gradient's simple noise scale." + marked,
        bands=bands,
        scale="log",
    )


def growth(groups: Sequence[Group]) -> Figure | None:
    """What decided about the batch, in the first run of each group whose batch was measured."""
    lines = []
    for place, group in enumerate(groups):
        run = next((run for run in group.runs if run.decisions), None)
        if run is None:
            continue
        x = decided_at(run)
        least = [
            min((value for value in one["bounds"].values() if value is not None), default=None)
            for one in run.decisions
        ]
        for name, values, line in (
            ("global batch", [one["global_batch"] for one in run.decisions], {"shape": "hv"}),
            ("B* = √(φ·a/b)", [one["fastest"] for one in run.decisions], {"dash": "dot"}),
            ("φ = tr(Σ)/|G|²", [one["noise"] for one in run.decisions], {"dash": "dash"}),
            ("other bounds", least, {"dash": "dashdot", "width": 1}),
        ):
            lines.append(
                {
                    "group": place,
                    "name": plain(f"{name} · {group.label}"),
                    "x": x,
                    "y": [value or None for value in values],  # 0 has no place on the axis
                    "mode": "lines",
                    "line": {"width": 2, **line},
                }
            )
    if not lines:
        return None
    return Figure(
        name="growth",
        title="Batch by measurement, samples",
        caption="At each decision: the batch taken (solid), the fastest batch B* (dotted), the "
        "gradient's noise scale φ (dashed), and the least of the other bounds. Gaps: too large to "
        "tell, or 0.",
        traces=lines,
        layout={"yaxis": {"type": "log"}},
    )


def speed(groups: Sequence[Group]) -> Figure:
    """Images per second."""
    return _curves(
        groups,
        name="speed",
        title="Images per second",
        caption=f"Averaged over 1/{BINS} of the run.",
        bands=[measured(group, "images_per_second") for group in groups],
        scale="from zero",
    )


def data_wait(groups: Sequence[Group]) -> Figure:
    """The share of the time that rank 0 waited for images."""
    return _curves(
        groups,
        name="data_wait",
        title="Waiting for data, % of the time",
        caption=f"Of rank 0, averaged over 1/{BINS} of the run.",
        bands=[in_percent(measured(group, "data_wait")) for group in groups],
        scale="from zero",
    )


def rank_times(groups: Sequence[Group]) -> Figure | None:
    """A strip of ranks over time, of the first run that has one."""
    found = strips(groups)
    if not found:
        return None
    run, strip = found[0]
    return Figure(
        name="ranks",
        title="Ranks over time",
        caption=f"{caption(groups)} The run is {printable(run.folder.name)[:NAME]}.",
        traces=traces(strip),
        layout={"yaxis": {"autorange": "reversed", "type": "category"}},
    )


FIGURES: list[Callable[[Sequence[Group]], Figure | None]] = [
    train_loss,
    test_accuracy,
    _schedule("global_batch", "Global batch"),
    _schedule("lr", "Learning rate"),
    _schedule("momentum", "Momentum", "linear"),
    _schedule("noise_scale", "Noise scale g"),
    gradient_noise,
    growth,
    speed,
    data_wait,
    rank_times,
]


def _curves(
    groups: Sequence[Group],
    *,
    name: str,
    title: str,
    caption: str,
    bands: Sequence[Band],
    scale: str = "linear",
) -> Figure:
    """One line a group, and the range of its runs as a band.

    scale: linear, percent, from zero, or log (if the values span a factor of 8 or more).
    """
    ranges, lines = [], []
    for place, (group, band) in enumerate(zip(groups, bands, strict=True)):
        if len(band.mean):
            lines.append(_line(place, group, band))
            if np.any(band.high > band.low):
                ranges.append(_range(place, band))
    values = np.concatenate([np.r_[band.low, band.high] for band in bands])
    return Figure(
        name=name,
        title=title,
        caption=caption,
        traces=ranges + lines,
        layout={"yaxis": _axis(values, scale)},
    )


def _line(place: int, group: Group, band: Band) -> dict[str, Any]:
    points = _points(band)
    sizes = [5] * len(points) if len(points) <= 30 else [0] * (len(points) - 1) + [7]
    return {
        "group": place,
        "name": plain(group.label),
        "x": {axis: _numbers(getattr(band, axis)[points]) for axis in AXES},
        "y": _numbers(band.mean[points], 6),
        "mode": "lines+markers",
        "line": {"dash": DASHES[group.style["linestyle"]], "width": group.style["linewidth"]},
        "marker": {"size": sizes},
    }


def _range(place: int, band: Band) -> dict[str, Any]:
    """There along the highest values and back along the lowest."""
    points = _points(band)
    ring = np.r_[points, points[::-1]]
    edge = np.r_[band.high[points], band.low[points[::-1]]]
    return {
        "group": place,
        "x": {axis: _numbers(getattr(band, axis)[ring]) for axis in AXES},
        "y": _numbers(edge, 6),
        "mode": "lines",
        "fill": "toself",
        "hoverinfo": "skip",
        "line": {"width": 0},
    }


def _points(band: Band) -> Any:
    """All points of a band, or as many as can be seen, the last included."""
    count = len(band.mean)
    if count <= POINTS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, POINTS).round().astype(np.int64))


def _axis(values: Floats, scale: str) -> dict[str, Any]:
    if not len(values):
        return {}
    low, high = float(values.min()), float(values.max())
    if scale == "from zero":
        return {"rangemode": "tozero"} if high > 0 else {"range": [0, 1]}
    if low == high:  # a scale of its own would make much of nothing
        room = 1.0 if scale == "percent" else 0.1 * abs(low) or 1.0
        return {"range": [low - room, high + room]}
    return {"type": "log"} if scale == "log" and low > 0 and high >= 8 * low else {}


def _numbers(values: Floats, digits: int = 10) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]
