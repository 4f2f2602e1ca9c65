"""Draw docs/images/measured_growth.svg and print the tables of docs/measured_growth.md.

`python docs/growth_picture.py`

The rule of schedule/growth.py replayed on the noise that AdaptDL measured, from the CSV files in
tests/golden. The same rows give the same bytes.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests" / "golden"))

import growth_replay as replayed  # noqa: E402

INK, GRID = "#1f2328", "#d8dee4"
COLOURS = ("#6e7781", "#0969da", "#bc4c00")
OVERHEADS = (50, 100, 400, 1_389, 12_932)  # a/b; the last two are those of 8 and 64 GPUs
HOURS = ("rule", "from 200", "bounded", "B ≤ 4φ", "sooner", "both")


def agreement_markdown() -> list[str]:
    """Updates of each training: its log's, and those that follow from φ."""
    lines = [
        "| batch | updates | from φ | epochs | φ of spans 1, 2, 30, 60, 90 |",
        "| -: | -: | -: | -: | -- |",
    ]
    for own in replayed.series():
        counted = replayed.constant(own, own.batch).updates
        error = round(counted / own.updates[-1] - 1, 4) + 0.0  # no −0
        epochs = own.batch * own.updates[-1] / replayed.TRAIN_SAMPLES
        noise = ", ".join(f"{_three(own.noise[row - 1])}" for row in (1, 2, 30, 60, 90))
        lines.append(
            f"| {own.batch:,} | {own.updates[-1]:,} | {error:+.2%} | {epochs:.0f} | {noise} |"
        )
    return lines


def saved_markdown() -> list[str]:
    """Updates saved at equal samples, by the rule and (in brackets) by the best schedule."""
    heads = [f"a/b {overhead:,}" for overhead in OVERHEADS]
    lines = [
        "| φ | " + " | ".join(heads) + " | own batch |",
        "| -: |" + " -: |" * (len(OVERHEADS) + 1),
    ]
    for name, noise in replayed.noises().items():
        cells = [_saved(replayed.saved(noise, overhead)) for overhead in OVERHEADS]
        own = ""
        if isinstance(noise, replayed.Series) and noise.batch > replayed.UNIT:
            own = _saved(replayed.saved_against(noise))
        lines.append(f"| {name} | {' | '.join(cells)} | {own} |")
    return lines


def hours_markdown() -> list[str]:
    """Hours on each cluster against the best constant batch."""
    constant = ("half, twice", "12,800")
    heads = ("GPUs", "φ", "batch", "hours", *constant, *HOURS)
    lines = [
        f"| {' | '.join(heads)} |",
        "| -: |" + " -: |" * (len(heads) - 1),
    ]
    for cluster in replayed.clusters():
        for name, noise in replayed.noises().items():
            found = replayed.hours(noise, cluster)
            shares = (
                found.trained,
                found.rule,
                found.from_200,
                found.within_noise,
                found.wider,
                found.sooner,
                found.both,
            )
            lines.append(
                f"| {cluster.name} | {name} | {found.best_batch:,} | {found.best_hours:.2f} | "
                f"{100 * found.half:+.1f}, {100 * found.twice:+.1f} | "
                + " | ".join(f"{100 * share:+.1f}" for share in shares)
                + " |"
            )
    return lines


def modelled_markdown() -> list[str]:
    """The same where the model predicts each batch: the least and the most over all φ."""
    lines = ["| GPUs | rule | comparing | B ≤ 4φ | both |", "| -: | -: | -: | -: | -: |"]
    for gpus in (8, 64, 256):
        found = replayed.hours_modelled(gpus)
        cells = [f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in found.values()]
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    return lines


def tables() -> tuple[list[str], ...]:
    return agreement_markdown(), saved_markdown(), hours_markdown(), modelled_markdown()


def _saved(saved: replayed.Saved) -> str:
    return f"{round(100 * saved.rule)} ({round(100 * saved.best)})"


def _three(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


def _steps(axes: Axes, run: replayed.Run, end: float, **style: object) -> None:
    """The batch over progress."""
    begins = [begin for begin, _, _ in run.parts]
    axes.step(
        [90 * begin / end for begin in (*begins, end)],
        [batch for _, batch, _ in run.parts] + [run.parts[-1][1]],
        where="post",
        **style,
    )


def _over_progress(axes: Axes) -> None:
    for own in replayed.series():
        last = own.batch == 12_800
        axes.plot(
            [90 * end / own.ends[-1] for end in own.ends],
            own.noise,
            color=COLOURS[0],
            linewidth=1.0,
            alpha=0.35 + 0.65 * last,
            label="φ, trained at 200 to 12,800" if last else None,
        )
    noise = replayed.noises()["12,800"]
    cluster = replayed.clusters()[1]
    run = replayed.replay(noise, cluster.overhead, first=cluster.first)
    _steps(axes, run, noise.ends[-1], color=COLOURS[1], linewidth=1.6, label="rule, 64 GPUs")
    best, _ = replayed.best_constant(noise, cluster)
    axes.axhline(
        best, color=COLOURS[2], linewidth=1.2, linestyle="--", label="best constant, 64 GPUs"
    )
    axes.set(yscale="log", xlabel="progress, epochs with a batch of 200", ylabel="samples")
    axes.set_title("Noise and batch (rule on φ of 12,800)", color=INK, fontsize=10)


def _updates_saved(axes: Axes) -> None:
    overheads = [25 * 2 ** (step / 2) for step in range(19)]
    pick: tuple[tuple[str, Callable[[replayed.Saved], float], str], ...] = (
        ("rule", lambda saved: saved.rule, "-"),
        ("best schedule", lambda saved: saved.best, ":"),
    )
    for colour, name in zip(COLOURS, ("200", "12,800", "all"), strict=True):
        for what, value, style in pick:
            found = [replayed.saved(replayed.noises()[name], overhead) for overhead in overheads]
            axes.plot(
                overheads,
                [100 * value(saved) for saved in found],
                style,
                color=colour,
                linewidth=1.6,
                label=f"{what}, φ of {name}",
            )
    axes.axhline(30, color=GRID, linewidth=1)
    axes.axhline(0, color=GRID, linewidth=1)
    axes.set(xscale="log", xlabel="a/b, samples", ylabel="% of updates saved", ylim=(-15, 40))
    axes.set_title("Updates at equal samples", color=INK, fontsize=10)


def draw() -> Figure:
    """Left φ and the batches over progress, right what is saved at equal samples."""
    figure = Figure(figsize=(9, 4.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    _over_progress(left)
    _updates_saved(right)
    for axes in (left, right):
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for side in axes.spines.values():
            side.set_color(GRID)
        axes.legend(frameon=False, labelcolor=INK, fontsize=7)
    return figure


def main() -> None:
    """Write the picture and print the tables."""
    matplotlib.rcParams.update({"svg.hashsalt": "hvd_lbt", "svg.fonttype": "path", "font.size": 10})
    draw().savefig(DOCS / "images" / "measured_growth.svg", metadata={"Date": None})
    for table in tables():
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
