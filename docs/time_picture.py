"""Draw docs/images/time_predicted.svg and print the rows of docs/time.md.

`python docs/time_picture.py`

Predicted against published seconds of an update, from the CSV files in tests/golden: the held-out
rows of the published tables, and of the traces of a shared network. The same rows give the same
bytes.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests" / "golden"))

from speed_rows import CONGESTION, Prediction, growth_steps, line_rate_rows, table_rows, trace_rows  # noqa: E402

from hvd_lbt.recipe import load_recipe  # noqa: E402
from hvd_lbt.schedule.plan_time import Cluster, policy_plans, stage_times, total_seconds  # noqa: E402
from hvd_lbt.speed_profile import load_profile  # noqa: E402

INK, GRID, DOTS = "#1f2328", "#d8dee4", ("#6e7781", "#0969da", "#bc4c00")


def held_out(rows: Iterable[Prediction]) -> list[Prediction]:
    """The rows that have not calibrated anything."""
    return [row for row in rows if row.role == "held out"]


def markdown() -> list[str]:
    """The table of docs/time.md: one line for each held-out row and growth step."""
    lines = ["| table | workers | published | predicted | error |", "| -- | -- | -- | -- | -- |"]
    for row in held_out(table_rows()):
        lines.append(
            f"| {row.what} | {row.workers} | {1e3 * row.published:.0f} ms | "
            f"{1e3 * row.predicted:.0f} ms | {100 * row.error:+.1f} % |"
        )
    for row in growth_steps():
        lines.append(
            f"| {row.what} | {row.workers} | {row.published:.2f}× | {row.predicted:.2f}× | "
            f"{100 * row.error:+.1f} % |"
        )
    return lines


def line_rate_markdown() -> list[str]:
    """Horovod's tables, predicted from one GPU and the line rate."""
    lines = ["| table | workers | published | predicted | error |", "| -- | -- | -- | -- | -- |"]
    for row in line_rate_rows():
        lines.append(
            f"| {row.what} | {row.workers} | {1e3 * row.published:.0f} ms | "
            f"{1e3 * row.predicted:.0f} ms | {100 * row.error:+.1f} % |"
        )
    return lines


def trace_markdown() -> list[str]:
    """Mean error, bias and share of rows above 10 % of the traces, by workers, for both models."""
    models = {
        "ring": held_out(trace_rows(0.0)),
        f"ring, κ = {CONGESTION:.2g}": held_out(trace_rows(CONGESTION)),
    }
    spans = ((5, 8), (9, 16), (17, 47), (48, 64), (5, 64))
    lines = ["| model | " + " | ".join(f"{low}–{high} workers" for low, high in spans) + " |"]
    lines.append("| -- |" + " -- |" * len(spans))
    for name, rows in models.items():
        cells = []
        for low, high in spans:
            errors = [row.error for row in rows if low <= row.workers <= high]
            above = mean(abs(error) > 0.1 for error in errors)
            cells.append(
                f"{100 * mean(map(abs, errors)):.1f}, {100 * mean(errors):+.1f}, {above:.0%}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def example_markdown() -> list[str]:
    """The worked example: decay_lr and grow_batch on 64 and 512 GPUs, at 2.5 dollars an hour."""
    recipe = load_recipe("imagenet_resnet50", ["schedule.max_global_batch=65536"])
    profile = load_profile("v100_infiniband")
    assert recipe.data.train_samples is not None
    plans = policy_plans(recipe.schedule, recipe.data.train_samples)
    lines = [
        "| GPUs | batch | updates | hours | saved | cost |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for workers in (64, 512):
        base = None
        for policy, batch in (("decay_lr", "8,192"), ("grow_batch", "8,192 → 65,536")):
            plan = plans[policy]
            assert not isinstance(plan, str)
            cluster = Cluster(
                workers=workers,
                micro_batch=recipe.layout.micro_batch,
                ghost_batch=recipe.layout.ghost_batch,
                image_size=recipe.data.image_size,
            )
            seconds = total_seconds(stage_times(plan, profile, cluster))
            assert seconds is not None
            saved = f"{1 - seconds / base:.0%}" if base else ""
            base = seconds
            lines.append(
                f"| {workers} | {batch} | {plan.updates:,} | {seconds / 3600:.3f} | {saved} | "
                f"${seconds / 3600 * workers * 2.5:,.2f} |"
            )
    return lines


def _panel(axes: Axes, title: str, groups: dict[str, Any]) -> None:
    """groups: for each label its rows, its colour, the size of a dot, and whether it is filled."""
    every = [row.published for rows, *_ in groups.values() for row in rows]
    ends = [0.9 * min(every), 1.1 * max(every)]
    axes.fill_between(
        ends,
        [0.9 * end for end in ends],
        [1.1 * end for end in ends],
        color=GRID,
        alpha=0.6,
        linewidth=0,
        label="within 10 %",
    )
    axes.plot(ends, ends, color=DOTS[0], linewidth=1)
    for label, (rows, colour, size, face) in groups.items():
        axes.scatter(
            [row.published for row in rows],
            [row.predicted for row in rows],
            s=size,
            linewidths=1,
            edgecolors=DOTS[colour],
            facecolors=DOTS[colour] if face else "none",
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.FixedLocator([0.2, 0.3, 0.4, 0.6, 0.8, 1.0]))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel("published, seconds of an update", color=INK)
    axes.set_ylabel("predicted", color=INK)
    axes.tick_params(colors=INK)
    for side in axes.spines.values():
        side.set_color(GRID)
    axes.legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=8)


def draw() -> Figure:
    """Left the tables of published speeds, right the traces of a shared network."""
    figure = Figure(figsize=(9, 4.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    tables, traces = table_rows(), held_out(trace_rows())
    _panel(
        left,
        "ResNet-50, 17 published tables, V100",
        {
            "calibrates: 1 GPU, 1 and 2 nodes": (
                [row for row in tables if row.role == "calibrates"],
                0,
                14,
                False,
            ),
            "held out: 32, 64 and 128 GPUs": (held_out(tables), 1, 26, True),
        },
    )
    _panel(
        right,
        "ResNet-50, AdaptDL's traces, T4, held-out rows",
        {
            "5 to 47 GPUs": ([row for row in traces if row.workers < 48], 1, 8, True),
            "48 to 64 GPUs": ([row for row in traces if row.workers >= 48], 2, 18, True),
        },
    )
    return figure


def main() -> None:
    """Write the picture and print the tables."""
    matplotlib.rcParams.update({"svg.hashsalt": "hvd_lbt", "svg.fonttype": "path", "font.size": 10})
    draw().savefig(DOCS / "images" / "time_predicted.svg", metadata={"Date": None})
    for table in (markdown(), line_rate_markdown(), trace_markdown(), example_markdown()):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
