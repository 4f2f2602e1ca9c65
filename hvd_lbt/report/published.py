"""A run's updates to an accuracy among published ones: ResNet-50 on ImageNet, top-1 75.9 %."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hvd_lbt.errors import UserError
from hvd_lbt.report.pictures import FONTS, PLAIN, _png
from hvd_lbt.report.runs import Group, Run
from hvd_lbt.terminal import printable

FILE = Path(__file__).with_name("published_updates.csv")
TARGET = 0.759  # top-1, MLPerf's for ResNet-50
TRAIN_SAMPLES = 1_281_167
NETWORKS = ("resnet50", "timm:resnet50", "torchvision:resnet50")
MARKERS = {"LARS": "s", "Nesterov": "^", "SGD": "o"}


@dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """A row of published_updates.csv. global_batch: the largest of the run, in samples; epochs:
    None where the source gives none; reached: the accuracy after the updates.
    """

    source: str
    optimizer: str
    global_batch: int
    epochs: float | None
    updates: int
    reached: str


@cache
def published_points() -> tuple[PublishedPoint, ...]:
    """The published points, each with its source."""
    lines = [line for line in FILE.read_text("utf-8").splitlines() if not line.startswith("#")]
    return tuple(
        PublishedPoint(
            source=row["source"],
            optimizer=row["optimizer"],
            global_batch=int(row["global_batch"]),
            epochs=float(row["epochs"]) if row["epochs"] else None,
            updates=int(row["updates"]),
            reached=row["reached"],
        )
        for row in csv.DictReader(lines)
    )


def updates_to(run: Run, top1: float = TARGET) -> int | None:
    """Updates until the run's first evaluation of at least this test accuracy; None: never."""
    return next((int(one["update"]) for one in run.evals if one["top1"] >= top1), None)


def check_comparable(runs: Iterable[Run]) -> None:
    """Raise UserError unless every run trained ResNet-50 on ImageNet's training images."""
    for run in runs:
        network, samples = run.about["recipe"]["model"]["name"], run.about["plan"]["train_samples"]
        if network not in NETWORKS or samples != TRAIN_SAMPLES:
            raise UserError(
                f"--published: {run.folder} trained {network} on {samples:,} images, and the "
                f"published points are of ResNet-50 on ImageNet's {TRAIN_SAMPLES:,}. Leave "
                "--published out, or give runs of that."
            )


def published_lines(groups: Sequence[Group]) -> list[str]:
    """What each run reached, and the published points, as lines of text."""
    lines = []
    for run in (run for group in groups for run in group.runs):
        updates = updates_to(run)
        best = max((float(one["top1"]) for one in run.evals), default=0.0)
        reached = (
            f"{updates:,} updates to top-1 {TARGET:.1%} (measured)"
            if updates is not None
            else f"top-1 {TARGET:.1%} not reached; best {best:.2%}"
        )
        lines.append(f"{run.folder}: {reached}")
    for point in sorted(published_points(), key=lambda point: point.updates):
        lines.append(
            f"published: {point.updates:>6,} updates, {point.optimizer}, global batch up to "
            f"{point.global_batch:,}, {point.reached}; {point.source}"
        )
    return lines


def draw_published(groups: Sequence[Group]) -> bytes:
    """Updates to 75.9 % top-1 against the largest global batch: published points, and the runs.

    A run that has not reached it is named in the legend and has no point.
    """
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(12, 6), layout="constrained")
        axes = figure.subplots()
        for optimizer, marker in MARKERS.items():
            points = [point for point in published_points() if point.optimizer == optimizer]
            axes.plot(
                [point.global_batch for point in points],
                [point.updates for point in points],
                marker,
                color="#8a8a8a",
                label=f"published: {optimizer}",
            )
        for group in groups:
            reached = [(run, updates_to(run)) for run in group.runs]
            batches = [
                max(stage["global_batch"] for stage in run.about["plan"]["stages"])
                for run, updates in reached
                if updates is not None
            ]
            missing = sum(updates is None for _, updates in reached)
            label = f"measured: {printable(group.label)}" + (
                f" ({missing} of {len(reached)} did not reach it)" if missing else ""
            )
            counts = [updates for _, updates in reached if updates is not None]
            axes.plot(batches, counts, "*", color=group.style["color"], markersize=16, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PLAIN)
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("largest global batch")
        axes.set_ylabel(f"updates to top-1 {TARGET:.1%}")
        legend = figure.legend(loc="outside upper center", ncols=3, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return _png(figure)
