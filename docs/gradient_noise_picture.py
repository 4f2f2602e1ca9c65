"""Draw docs/images/gradient_noise.svg and print the tables of docs/gradient_noise.md.

`python docs/gradient_noise_picture.py`

From docs/gradient_noise.json, which docs/gradient_noise_data.py measures. The same numbers give the
same bytes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
DATA = json.loads((DOCS / "gradient_noise.json").read_text())
INK, GRID, LINES = "#1f2328", "#d8dee4", ("#6e7781", "#0969da", "#bc4c00")
COUNTS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
SHOWN = (1, 5, 10, 20, 50, 100)
MEMORY = 0.9
EFFECTIVE = (1 + MEMORY) / (1 - MEMORY)  # plain measurements with the variance of the average
DRAWS = 4000
HALVES = ("parts", "differences")


def singles(state: dict[str, Any], source: str) -> np.ndarray:
    """(2, measurements): tr(Σ) and |G|² of each update at weights that do not move."""
    first = 2 + 2 * HALVES.index(source)
    return np.array(state["rows"])[:, first : first + 2].T


def noise_scale(values: np.ndarray) -> float:
    """The ratio of the averages of (2, measurements)."""
    variance, squared = values.mean(-1)
    return float(variance / squared)


def averages(values: np.ndarray, true: float) -> dict[str, np.ndarray]:
    """Ratios over `true` of averages of measurements drawn from `values`, (DRAWS,), by count."""
    generator = np.random.default_rng(0)
    drawn = values[:, generator.integers(values.shape[1], size=(DRAWS, max(COUNTS)))]
    weights = MEMORY ** np.arange(max(COUNTS))
    means = {str(n): drawn[..., :n].mean(-1) for n in COUNTS}
    means["memory"] = (drawn * weights).sum(-1) / weights.sum()
    return {
        name: np.where(mean[1] > 0, mean[0] / np.maximum(mean[1], 1e-300), np.inf) / true
        for name, mean in means.items()
    }


def band(ratios: np.ndarray) -> tuple[float, float, float]:
    """The 16 %, 50 % and 84 % quantiles."""
    low, middle, high = np.quantile(ratios, (0.16, 0.5, 0.84), method="lower")
    return float(low), float(middle), float(high)


def cell(low: float, high: float) -> str:
    """Two factors, the larger one ∞ where |G|² is not positive."""
    return f"{low:.2f}–{high:.2f}" if high < 100 else f"{low:.2f}–∞"


def of_known(last: list[str], cells: Callable[[dict], list[str]]) -> list[str]:
    """A table of the cases with Gaussian gradients; last: the headings after those of SHOWN."""
    headings = ["B/φ", "K", *(f"n = {n}" for n in SHOWN), *last]
    lines = [f"| {' | '.join(headings)} |", "|" + " -- |" * len(headings)]
    for case in DATA["known"]:
        lines.append(f"| {case['share']:g} | {case['parts']} | {' | '.join(cells(case))} |")
    return lines


def known_markdown() -> list[str]:
    """Of Gaussian gradients: the 16–84 % range of told over true, and where nothing is told."""

    def cells(case: dict) -> list[str]:
        ranges = [*(case["averaged"][str(n)] for n in SHOWN), case["memory"]]
        none = ", ".join(f"{case['none'][n]:.1%}" for n in ("1", "10"))
        return [*(cell(one[1], one[3]) for one in ranges), none]

    return of_known(["0.9", "no value at n = 1, 10"], cells)


def bias_markdown() -> list[str]:
    """Of Gaussian gradients: median, and mean where each draw has a value, of told over true."""

    def cells(case: dict) -> list[str]:
        means = [case["mean"][str(n)] for n in SHOWN]
        medians = [case["averaged"][str(n)][2] for n in SHOWN]
        both = zip(medians, means, strict=True)
        shown = [f"{middle:.2f}, {'–' if mean is None else f'{mean:.2f}'}" for middle, mean in both]
        return [*shown, f"{case['memory'][2]:.2f}"]

    return of_known(["0.9, median"], cells)


def frozen_markdown() -> list[str]:
    """Of the digits at weights that do not move: the same ranges, for both kinds."""
    lines = [
        f"| weights of | B | from | measured φ | {' | '.join(f'n = {n}' for n in SHOWN)} | 0.9 |",
        "| -- | -- | -- | -- |" + " -- |" * (len(SHOWN) + 1),
    ]
    for state in DATA["frozen"]:
        true = noise_scale(singles(state, "parts"))
        for source in HALVES:
            values = singles(state, source)
            ratios = averages(values, true)
            bands = [band(ratios[name]) for name in [*map(str, SHOWN), "memory"]]
            cells = " | ".join(cell(low, high) for low, _, high in bands)
            lines.append(
                f"| {state['state']} | {state['global_batch']} | {source} | "
                f"{noise_scale(values):.3g} | {cells} |"
            )
    return lines


def moving_markdown() -> list[str]:
    """Differences and parts of the same updates: mean and standard deviation of the seeds."""
    square = r"\|G\|²"
    heads = ["m", "epochs", "tr(Σ) ratio", f"parts {square}", f"differences {square}"]
    heads += ["parts φ", "differences φ"]
    lines = [f"| {' | '.join(heads)} |", "|" + " -- |" * len(heads)]
    for momentum, runs in DATA["moving"].items():
        for first, last in ((0, 1), (1, 4), (4, 6), (6, 10)):
            found = []
            for rows in runs:
                values = np.array(rows)
                epoch = (values[:, 0] + 0.5) * 32 / 1437
                inside = (first <= epoch) & (epoch < last) & (values[:, 1] == 32)
                found.append(values[inside, 2:].mean(0))
            averages = np.array(found)  # (seeds, 4): tr(Σ) and |G|² of parts, of differences
            cells = [_spread(averages[:, 2] / averages[:, 0])]
            cells += [_spread(averages[:, column]) for column in (1, 3)]
            middle = averages.mean(0)
            for variance, squared in (middle[:2], middle[2:]):
                cells.append(f"{variance / squared:,.3g}" if squared > 0 else "no value")
            lines.append(f"| {momentum} | {first}–{last} | {' | '.join(cells)} |")
    return lines


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def _panel(axes: Axes, title: str) -> None:
    axes.axhline(1, color=GRID, linewidth=1, zorder=0)
    axes.axvline(EFFECTIVE, color=INK, linewidth=0.8, linestyle=":")
    axes.text(EFFECTIVE * 1.05, 0.225, "0.9", color=INK, fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(1, 100), ylim=(0.2, 8))
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_yticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    axes.minorticks_off()
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel("measurements that are averaged", color=INK)
    axes.set_ylabel("measured tr(Σ)/|G|² over the true one", color=INK)
    axes.tick_params(colors=INK)
    for side in axes.spines.values():
        side.set_color(GRID)


def _draw(axes: Axes, bands: list[tuple[float, float, float]], colour: str, label: str) -> None:
    low, middle, high = np.minimum(np.array(bands).T, 1e3)
    axes.fill_between(COUNTS, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(COUNTS, middle, color=colour, linewidth=1.5, label=label)
    axes.plot(COUNTS, low, color=colour, linewidth=0.6)
    axes.plot(COUNTS, high, color=colour, linewidth=0.6)


def draw() -> Figure:
    """Left Gaussian gradients with K = 2, right the digits at weights that do not move."""
    figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, "Gaussian gradients, two parts")
    for case, colour in zip([c for c in DATA["known"] if c["parts"] == 2], LINES, strict=True):
        quantiles = [case["averaged"][str(n)] for n in COUNTS]
        _draw(left, [(q[1], q[2], q[3]) for q in quantiles], colour, f"B = {case['share']:g} φ")
    _panel(right, "digits, weights that do not move")
    right.set_ylabel("")
    colours = iter(LINES[1:])
    for state in DATA["frozen"]:
        true = noise_scale(singles(state, "parts"))
        ratios = averages(singles(state, "parts"), true)
        bands = [band(ratios[str(n)]) for n in COUNTS]
        if bands[-1][2] > 1e2:  # not known from all measurements together
            continue
        colour = next(colours)
        share = state["global_batch"] / true
        _draw(right, bands, colour, f"{state['state']}, B = {share:.2g} φ")
        other = averages(singles(state, "differences"), true)
        for edge in (0, 2):
            line = [min(band(other[str(n)])[edge], 1e3) for n in COUNTS]
            right.plot(COUNTS, line, color=colour, linewidth=1, linestyle="--")
    right.plot([], [], color=INK, linewidth=1, linestyle="--", label="from differences, 16–84 %")
    for axes in (left, right):
        axes.legend(loc="upper right", frameon=False, labelcolor=INK, fontsize=8)
    return figure


def main() -> None:
    """Write the picture and print the tables."""
    matplotlib.rcParams.update({"svg.hashsalt": "hvd_lbt", "svg.fonttype": "path", "font.size": 10})
    draw().savefig(DOCS / "images" / "gradient_noise.svg", metadata={"Date": None})
    for table in (known_markdown(), bias_markdown(), frozen_markdown(), moving_markdown()):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
