"""Draw the README's picture from docs/studies/fewer_updates.json.

`python docs/front_picture.py`

Writes docs/images/accuracy_over_updates_{light,dark}.svg: test accuracy against updates for the
four schedules of the study, mean and range over its seeds. The same JSON gives the same bytes.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hvd_lbt.report.colours import PALETTE, assign

DOCS = Path(__file__).parent
STUDY = DOCS / "studies" / "fewer_updates.json"
THEMES = {
    "light": {"ink": "#1f2328", "grid": "#d8dee4"},
    "dark": {"ink": "#e6edf3", "grid": "#30363d"},
}


def draw(arms: list[dict[str, Any]], name: str) -> Figure:
    """One line per schedule, labelled at its end with its updates and final accuracy."""
    theme, form = THEMES[name], ("light", "dark").index(name)
    ink = theme["ink"]
    # as the report colours them: one for each policy, others for more of the same policy
    lines = [PALETTE[place][form] for place, _ in assign([arm["name"] for arm in arms])]
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    for arm, colour in zip(arms, lines, strict=True):
        curve, final = arm["accuracy"], statistics.mean(arm["finals"])
        label = f"{arm['label']}: {arm['updates']:,} updates, {final:.2f} %"
        axes.plot(curve["updates"], curve["mean"], color=colour, linewidth=2.2, label=label)
        axes.plot(curve["updates"][-1:], curve["mean"][-1:], "o", color=colour, markersize=7)
        axes.fill_between(
            curve["updates"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0
        )
    axes.set_xlim(left=0)
    axes.set_ylim(80, 99)
    axes.set_xlabel("updates (optimizer steps)", color=ink)
    axes.set_ylabel("test accuracy, %", color=ink)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(colors=ink)
    axes.grid(color=theme["grid"], linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(theme["grid"])
    axes.legend(loc="lower right", frameon=False, labelcolor=ink)
    return figure


def main() -> None:
    """Write one SVG per theme."""
    arms = json.loads(STUDY.read_text("utf-8"))["arms"]
    settings = {"font.size": 12, "svg.hashsalt": "hvd_lbt", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        for name in THEMES:
            file = DOCS / "images" / f"accuracy_over_updates_{name}.svg"
            draw(arms, name).savefig(file, metadata={"Date": None})
            print(file)


if __name__ == "__main__":
    main()
