"""The strip of ranks over time: how long each rank's own part of an update was, beside the others.

`strip` makes the numbers of one run; `draw_ranks` and `rank_times` draw them.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.report.runs import Group, Run
from hvd_lbt.terminal import printable

Floats = NDArray[np.float64]
SHOWN = 48  # ranks of a strip: of more, those that were slowest at some time
RUNS = 4  # strips of a report
LOW, HIGH = 0.75, 1.5  # of the colours
CAPTION = (
    "Own time of each rank (forward, backward and its wait for data) as a multiple of the median "
    "rank's, by updates."
)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """ratios: (ranks shown, lines), own time / the median rank's, NaN where a rank was not there.

    edges: (lines + 1,) updates; labels: of the ranks shown, with their hosts; left_out: how many
    ranks are not.
    """

    ratios: Floats
    edges: Floats
    labels: list[str]
    left_out: int


def strip(run: Run) -> Strip | None:
    """The strip of a run; None if it had one rank, or its lines are of an older version."""
    if not run.ranks:
        return None
    size = max(len(line["compute"]) for line in run.ranks)
    ratios = np.full((size, len(run.ranks)), np.nan)
    for place, line in enumerate(run.ranks):
        own = np.array(line["compute"]) + np.array(line["data"])
        there = own[own > 0]  # a rank without samples is none to compare with
        if len(there):
            ratios[: len(own), place] = np.where(own > 0, own / np.median(there), np.nan)
    slowest = np.nan_to_num(ratios).max(1)
    shown = np.sort(np.argsort(-slowest, kind="stable")[:SHOWN])
    hosts = run.about.get("hosts", [])
    labels = [
        f"{rank} {hosts[rank]}" if len(hosts) == size else str(rank) for rank in map(int, shown)
    ]
    begins = [line["first_update"] for line in run.ranks]
    edges = np.array([*begins, begins[-1] + run.ranks[-1]["updates"]], np.float64)
    return Strip(ratios=ratios[shown], edges=edges, labels=labels, left_out=size - len(shown))


def strips(groups: Sequence[Group]) -> list[tuple[Run, Strip]]:
    """Those of the first runs that have one."""
    runs = [run for group in groups for run in group.runs]
    return [(run, found) for run in runs if (found := strip(run))][:RUNS]


def caption(groups: Sequence[Group]) -> str:
    """What the strips show and what they leave out."""
    left_out = [found.left_out for _, found in strips(groups) if found.left_out]
    few = f" The {SHOWN} ranks of a run that were slowest at some time are shown."
    return CAPTION + (few if left_out else "")


def draw_ranks(groups: Sequence[Group]) -> bytes | None:
    """The strips as a PNG, one below the other; None if there is none."""
    from matplotlib.figure import Figure

    found = strips(groups)
    if not found:
        return None
    heights = [1.2 + 0.22 * len(one.labels) for _, one in found]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (run, one), axes in zip(found, panels, strict=True):
        rows = np.arange(len(one.labels) + 1) - 0.5
        mesh = axes.pcolormesh(
            one.edges, rows, one.ratios, cmap="RdBu_r", vmin=LOW, vmax=HIGH, rasterized=True
        )
        axes.set_yticks(range(len(one.labels)), one.labels, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("updates")
        axes.set_title(printable(run.folder.name)[:90], loc="left", parse_math=False)
        figure.colorbar(mesh, ax=axes, label="× median")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def traces(one: Strip) -> list[dict[str, Any]]:
    """The strip for Plotly."""
    values = [
        [None if np.isnan(ratio) else round(float(ratio), 3) for ratio in row] for row in one.ratios
    ]
    return [
        {
            "type": "heatmap",
            "x": [float(edge) for edge in one.edges],
            "y": [printable(label)[:40] for label in one.labels],
            "z": values,
            "zmin": LOW,
            "zmax": HIGH,
            "colorscale": "RdBu",
            "reversescale": True,
            "hovertemplate": "rank %{y}<br>update %{x}<br>%{z:.2f} × the median<extra></extra>",
            "colorbar": {"title": {"text": "× median"}, "thickness": 10},
        }
    ]
