"""Draw one or more runs: a self-contained HTML page and its pictures, from RUN/metrics.jsonl.

Runs that differ only by their seed are one group: one colour, the mean as a line and the range from
the lowest to the highest run as a band.
"""

import argparse
import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from hvd_lbt.errors import UserError
from hvd_lbt.stage_table import stage_cells

Floats = NDArray[np.float64]

# What a line of each event must have to be drawn.
KEYS = {
    "run": ("name", "recipe", "plan", "world_size", "versions"),
    "update": (
        *("update", "epoch", "samples_seen", "stage", "global_batch", "lr", "momentum"),
        *("noise_scale", "loss", "images_per_second", "data_wait"),
    ),
    "eval": ("update", "epoch", "samples", "loss", "top1", "top5"),
    "end": ("reason", "update", "seconds", "peak_memory_bytes"),
}
BINS = 120  # points of a measured curve: narrower than this a batch of 16 is mostly noise
# Okabe and Ito's colours, told apart by all common forms of colour blindness; yellow is too faint
# for a line on white. From the eighth group on they come again with another dash.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
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


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run's metrics.jsonl says, a resumed run's parts put together.

    updates: a float64 array a key, one element an update, in order; evals: the event lines, in
    order; reason: of the end, empty if the last part has none; seconds: of all parts together.
    """

    folder: Path
    about: dict[str, Any]
    updates: dict[str, Floats]
    evals: list[dict[str, Any]]
    reason: str
    seconds: float
    peak_memory_bytes: int
    workers: list[int]
    notes: list[str]

    @property
    def seed(self) -> int:
        return int(self.about["recipe"]["run"]["seed"])

    @property
    def data_wait(self) -> float | None:
        """The share of all updates' time that rank 0 waited for images."""
        seconds = self.updates["global_batch"] / self.updates["images_per_second"]
        total = float(seconds.sum())
        return float(seconds @ self.updates["data_wait"]) / total if total else None

    @property
    def policy(self) -> str:
        return str(self.about["recipe"]["schedule"]["policy"])

    @property
    def planned(self) -> int:
        """Updates of the plan."""
        return int(self.about["plan"]["updates"])

    @property
    def done(self) -> int:
        """Updates done: the last line's, counted from 1."""
        return int(self.updates["update"][-1]) + 1 if len(self.updates["update"]) else 0

    @property
    def final(self) -> float | None:
        """Test accuracy after the last planned update, 0..1; None before that."""
        whole = self.evals and self.evals[-1]["update"] == self.planned
        return float(self.evals[-1]["top1"]) if whole else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one recipe, data set and world size, which differ by the seed only."""

    label: str
    runs: list[Run]
    style: dict[str, Any] = field(default_factory=dict)

    def finals(self) -> list[float]:
        """Final test accuracies, 0..1, of the runs that reached the end of the plan."""
        return [run.final for run in self.runs if run.final is not None]


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve over a group's runs; all arrays have the shape (points,)."""

    epochs: Floats
    updates: Floats
    mean: Floats
    low: Floats
    high: Floats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write [report]")


def main(args: argparse.Namespace) -> int:
    """Write OUT/report.html and OUT/*.png, and print the accuracies."""
    path, groups = write_report(args.runs, args.out)
    for group in groups:
        print(f"{group.label}: test accuracy {_spread(group)}, {_updates(group.runs)} updates")
    for run in (run for group in groups for run in group.runs):
        for note in run.notes:
            print(f"{run.folder}: {note}")
    print(f"Wrote {path}")
    return 0


def write_report(folders: Sequence[Path], out: Path) -> tuple[Path, list[Group]]:
    """Read the runs, draw them, write the page; the page's path and the groups in it.

    Raises UserError for a run that can't be read and for an `out` that can't be written.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (twin := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise UserError(f"{folder} is the same run as {twin}: give each run once.")
    groups = group_runs([read_run(folder) for folder in folders])
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = {name: draw(groups, out / name) for name, (draw, _) in PICTURES.items()}
        page = out / "report.html"
        page.write_text(render(groups, pictures), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out {out}: the report can't be written there ({error.strerror}). Give a folder "
            "that can be made or written to."
        ) from error
    return page, groups


# ---------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> Run:
    """Read RUN/metrics.jsonl.

    A resume takes back what came after the update it starts at. A line that is damaged, as the
    last one of a run that was killed, is left out and noted. Raises UserError if there is nothing
    to read.
    """
    file = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that `hvd_lbt train` wrote.")
    if not file.is_file():
        raise UserError(f"{folder} holds no run: there is no metrics.jsonl in it.")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    updates: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    parts: list[dict[str, Any]] = []  # one for each run line: that line, its end line, last time
    notes: list[str] = []
    for number, line in enumerate(lines, start=1):
        if (record := _record(line)) is None:
            last = "the last line, " if number == len(lines) else ""
            notes.append(f"{last}line {number} of {file.name} is damaged or unfinished: left out.")
            continue
        match record["event"]:
            case "run":
                start = record.get("resumed_at_update", 0)
                updates = {key: value for key, value in updates.items() if key < start}
                evals = {key: value for key, value in evals.items() if key <= start}
                parts.append({"run": record, "end": None, "time": record.get("time", 0.0)})
            case "update":
                updates[record["update"]] = record
            case "eval":
                evals[record["update"]] = record
            case "end" if parts:
                parts[-1]["end"] = record
        if parts:
            parts[-1]["time"] = record.get("time", parts[-1]["time"])
    if not parts:
        what = "is empty" if not lines else "has no readable line of the event `run`"
        raise UserError(f"{file} {what}: the run ended before it began, or this is another file.")

    ordered = [updates[key] for key in sorted(updates)]
    ends = [part["end"] for part in parts]
    columns = {key: np.array([r[key] for r in ordered], np.float64) for key in KEYS["update"]}
    noise = [record.get("gradient_noise") for record in ordered]  # not in the lines of old runs
    columns["gradient_noise"] = np.array(noise, np.float64)
    run = Run(
        folder=folder,
        about=parts[-1]["run"],
        updates=columns,
        evals=[evals[key] for key in sorted(evals)],
        reason=ends[-1]["reason"] if ends[-1] else "",
        seconds=sum(
            part["end"]["seconds"] if part["end"] else part["time"] - part["run"].get("time", 0.0)
            for part in parts
        ),
        peak_memory_bytes=max((end["peak_memory_bytes"] for end in ends if end), default=0),
        workers=list(dict.fromkeys(part["run"]["world_size"] for part in parts)),
        notes=notes,
    )
    if run.done < run.planned:
        why = {"": "it has no end line", "stopped": "it was stopped by a signal"}
        notes.append(
            f"unfinished: {run.done:,} of {run.planned:,} updates are done "
            f"({why.get(run.reason, run.reason)})."
        )
    elif run.final is None:
        notes.append("there is no evaluation after the last update.")
    if left_out := sum(record.get("left_out", 0) for record in ordered):
        notes.append(f"{left_out:,} samples were left out; they are listed in left_out.*.txt.")
    if missing := run.done - len(ordered):
        notes.append(f"{missing:,} updates have no line.")
    if bad := int(np.sum(~np.isfinite(columns["loss"]))):
        notes.append(f"{bad:,} updates have a loss that is not finite; the curves leave them out.")
    if any(part["run"]["versions"] != run.about["versions"] for part in parts):
        notes.append("versions changed at a resume; the table shows the last.")
    return run


def _record(line: str) -> dict[str, Any] | None:
    """The event of a line, or None if it is damaged.

    A run that went on after it was killed in the middle of a line wrote behind that half line.
    """
    try:
        record = json.loads(line[max(0, line.rfind('{"event"')) :])
        event = record["event"]
        whole = all(key in record for key in KEYS.get(event, ()))
        if event == "run":
            _ = (record["recipe"]["run"]["seed"], record["recipe"]["schedule"]["policy"])
            whole = whole and {"updates", "train_samples", "stages"} <= set(record["plan"])
        return record if whole else None
    except (ValueError, KeyError, TypeError):
        return None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ only by run.seed, in the order given, each group labelled."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    return [
        Group(
            label=label,
            runs=members,
            style={
                "color": COLOURS[place % len(COLOURS)],
                "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
                # Curves that lie on each other are all seen if the later ones are thinner.
                "linewidth": max(1.4, 3.0 - 0.7 * place),
                "zorder": 3 + place,
            },
        )
        for place, (label, members) in enumerate(zip(labels, groups.values(), strict=True))
    ]


def _settings(run: Run) -> dict[str, Any]:
    """All that makes a run but its seed, as a flat dictionary of dotted keys."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", run.about["recipe"])
    flat.pop("run.seed")
    plan = run.about["plan"]
    return flat | {"training images": plan["train_samples"], "workers": run.workers[-1]}


def _labels(runs: Sequence[Run]) -> list[str]:
    """A short name of each run: recipe and policy where they tell runs apart, else what does."""
    names = [run.about["name"] for run in runs]
    if len(set(names)) == len(runs):
        return [f"{run.about['name']} ({run.policy})" for run in runs]
    labels = [
        run.policy if len(set(names)) == 1 else f"{run.about['name']} {run.policy}" for run in runs
    ]
    settings = [_settings(run) for run in runs]
    for label in {label for label in labels if labels.count(label) > 1}:
        places = [place for place, other in enumerate(labels) if other == label]
        keys = dict.fromkeys(key for place in places for key in settings[place])
        differ = [
            key
            for key in keys
            if len({json.dumps(settings[place].get(key)) for place in places}) > 1
        ]
        for place in places:
            values = (f"{key.split('.')[-1]} {settings[place].get(key)}" for key in differ[:3])
            labels[place] = f"{label}, {', '.join(values)}"
    return [
        f"{label} [{place + 1}]" if labels.count(label) > 1 else label
        for place, label in enumerate(labels)
    ]


# --------------------------------------------------------------------------------------- numbers


def measured(group: Group, key: str) -> Band:
    """A measured quantity, averaged over 1/BINS of the run's samples, over the group's runs.

    loss: mean over samples; images_per_second, data_wait: mean over time (so that images/s is
    images ÷ seconds). A bin without a finite value has no point.
    """
    values, epochs, updates = (np.full((len(group.runs), BINS), np.nan) for _ in range(3))
    for row, run in enumerate(group.runs):
        last = run.about["plan"]["stages"][-1]
        total = last["first_sample"] + last["samples"]
        seen, batch, value = (run.updates[k] for k in ("samples_seen", "global_batch", key))
        if not len(seen):
            continue
        bins = np.minimum((seen - 1) * BINS // total, BINS - 1).astype(np.int64)
        weight = batch if key == "loss" else batch / run.updates["images_per_second"]
        good = np.isfinite(value)
        weights = np.bincount(bins, np.where(good, weight, 0.0), BINS)
        sums = np.bincount(bins, np.where(good, weight * value, 0.0), BINS)
        here = weights > 0
        values[row, here] = sums[here] / weights[here]
        ends = np.searchsorted(bins, np.arange(BINS), side="right")[here] - 1
        epochs[row, here] = run.updates["epoch"][ends]
        updates[row, here] = run.updates["update"][ends] + 1
    return _band(epochs, updates, values)


def evaluated(group: Group) -> Band:
    """Test accuracy in percent at each evaluation, over the group's runs."""
    counts = sorted({line["update"] for run in group.runs for line in run.evals})
    places = {count: place for place, count in enumerate(counts)}
    values, epochs, updates = (np.full((len(group.runs), len(counts)), np.nan) for _ in range(3))
    for row, run in enumerate(group.runs):
        for line in run.evals:
            place = places[line["update"]]
            values[row, place] = 100 * line["top1"]
            epochs[row, place], updates[row, place] = line["epoch"], line["update"]
    return _band(epochs, updates, values)


def _band(epochs: Floats, updates: Floats, values: Floats) -> Band:
    here = np.isfinite(values).any(axis=0)
    epochs, updates, values = epochs[:, here], updates[:, here], values[:, here]
    if not here.any():
        empty = np.empty(0)
        return Band(epochs=empty, updates=empty, mean=empty, low=empty, high=empty)
    return Band(
        epochs=np.nanmax(epochs, axis=0),
        updates=np.nanmax(updates, axis=0),
        mean=np.nanmean(values, axis=0),
        low=np.nanmin(values, axis=0),
        high=np.nanmax(values, axis=0),
    )


def scheduled(group: Group, key: str) -> Band:
    """A scheduled quantity at the borders of its constant spans, of the group's longest run.

    The plan's last update is left out if it is smaller than the one before: it takes the samples
    that were left, and is not a change of the schedule.
    """
    run = max(group.runs, key=lambda run: run.done)
    columns = {k: run.updates[k] for k in ("epoch", "update", "samples_seen", "global_batch", key)}
    batch = columns["global_batch"]
    if len(batch) > 1 and run.done == run.planned and batch[-1] < batch[-2]:
        columns = {k: column[:-1] for k, column in columns.items()}
    value = columns[key]
    if not len(value):
        return _band(*(np.empty((1, 0)) for _ in range(3)))
    # Each span is drawn from before its first update to after its last one.
    first = np.flatnonzero(np.r_[True, value[1:] != value[:-1]])
    last = np.r_[first[1:] - 1, len(value) - 1]
    seen = columns["samples_seen"]
    share = 1 - columns["global_batch"] / seen  # samples before the update ÷ after it
    ends = {
        "epochs": (columns["epoch"] * share, columns["epoch"]),
        "updates": (columns["update"], columns["update"] + 1),
    }
    x = {k: np.c_[before[first], after[last]].ravel() for k, (before, after) in ends.items()}
    level = np.repeat(value[first], 2)
    return Band(**x, mean=level, low=level, high=level)


# -------------------------------------------------------------------------------------- pictures


def draw_loss(groups: Sequence[Group], path: Path) -> Path:
    """Train loss against epochs and against updates."""
    bands = [measured(group, "loss") for group in groups]
    return _picture(groups, [("train loss", bands, _log_if_decades)], path)


def draw_accuracy(groups: Sequence[Group], path: Path) -> Path:
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
    return _picture(groups, rows, path)


def draw_schedule(groups: Sequence[Group], path: Path) -> Path:
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
        rows.append(("measured tr(Σ)/|G|²,\nsamples", noises, _log_if_decades))
    return _picture(groups, rows, path, height=2.6)


def draw_speed(groups: Sequence[Group], path: Path) -> Path:
    """Images per second, and the share of the time that rank 0 waited for images."""

    def from_zero(axes: Axes, values: Floats) -> None:
        axes.set_ylim(bottom=0)

    def per_second(axes: Axes, values: Floats) -> None:
        _log_if_decades(axes, values)
        if axes.get_yscale() == "linear":
            from_zero(axes, values)

    waits = [measured(group, "data_wait") for group in groups]
    percent = [
        Band(
            epochs=band.epochs,
            updates=band.updates,
            mean=100 * band.mean,
            low=100 * band.low,
            high=100 * band.high,
        )
        for band in waits
    ]
    rows: list[Row] = [
        ("images/s", [measured(group, "images_per_second") for group in groups], per_second),
        ("waiting for data,\n% of the time", percent, from_zero),
    ]
    return _picture(groups, rows, path, height=3.0)


Scale = Callable[[Axes, Floats], None]
Row = tuple[str, list[Band], Scale]


def _picture(
    groups: Sequence[Group], rows: Sequence[Row], path: Path, *, height: float = 3.9
) -> Path:
    """Draw rows of quantities, each against epochs (left) and updates (right), legend on top."""
    with matplotlib.rc_context(FONTS):
        labels = [_legend_label(group) for group in groups]
        columns = max(1, min(3, 110 // max(len(label) + 8 for label in labels)))
        legend_rows = -(-len(groups) // columns)
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
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        figure.align_ylabels(panels[:, 0])
        lines = panels[0, 0].get_lines()[::2]  # each line has its end's dot behind it
        figure.legend(lines, labels, loc="outside upper center", ncols=columns, frameon=False)
        figure.savefig(path, dpi=130)
    return path


def _draw(axes: Axes, x: Floats, band: Band, group: Group) -> None:
    """The line of one group, a dot at its end, and the band of its runs."""
    axes.plot(x, band.mean, **group.style)
    marker = {"color": group.style["color"], "zorder": group.style["zorder"], "markersize": 6}
    axes.plot(x[-1:], band.mean[-1:], "o", **marker, clip_on=False)
    if np.any(band.high > band.low):
        axes.fill_between(x, band.low, band.high, color=marker["color"], alpha=0.2, linewidth=0)


def _legend_label(group: Group) -> str:
    count = len(group.runs)
    return group.label if count == 1 else f"{group.label}, mean and range of {count} runs"


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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


Drawing = Callable[[Sequence[Group], Path], Path]
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
}

# ------------------------------------------------------------------------------------------ page

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
figure { margin: 1.5em 0; } img { width: 100%; height: auto; } figcaption { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; color: #555; padding-bottom: .3em; }
.key { display: inline-block; width: 1em; height: .7em; margin-right: .5em; }
"""


Cell = str | tuple[str, str]  # text, or text and the colour of its group
Rows = list[list[Cell]]


def render(groups: Sequence[Group], pictures: dict[str, Path]) -> str:
    """The page: accuracies first, then the pictures, then what made the numbers."""
    runs = [(group, run) for group in groups for run in group.runs]
    names = list(dict.fromkeys(run.about["name"] for _, run in runs))
    notes = [f"<li>{escape(f'{run.folder}: {note}')}</li>" for _, run in runs for note in run.notes]
    figures = [
        f'<figure><img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" '
        f'alt="{escape(PICTURES[name][1])}"><figcaption>{escape(PICTURES[name][1])} '
        f"({escape(name)})</figcaption></figure>"
        for name, path in pictures.items()
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(', '.join(names))}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(', '.join(names))}</h1>",
            "<h2>Test accuracy</h2>",
            _table("groups", _group_rows(groups), "± standard deviation over the runs (n − 1)"),
            _table("runs", _run_rows(runs)),
            *(["<h2>To be noted</h2>", f'<ul id="notes">{"".join(notes)}</ul>'] if notes else []),
            "<h2>Curves</h2>",
            *figures,
            "<h2>Stages</h2>",
            *(
                _table(f"stages-{place + 1}", _stage_rows(group), group.label)
                for place, group in enumerate(groups)
            ),
            "<h2>What made these numbers</h2>",
            _table("versions", _version_rows(run for _, run in runs)),
            "</body></html>\n",
        ]
    )


def _table(name: str, rows: Rows, caption: str = "") -> str:
    """Rows of cells, the first of them headings."""

    def cell(tag: str, value: Cell) -> str:
        text, colour = value if isinstance(value, tuple) else (value, "")
        key = f'<span class="key" style="background:{colour}"></span>' if colour else ""
        return f"<{tag}>{key}{escape(text)}</{tag}>"

    head, *body = rows
    lines = ["".join(cell("td", text) for text in row) for row in body]
    return (
        f'<div class="wide"><table id="{name}">'
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + f"<thead><tr>{''.join(cell('th', text) for text in head)}</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def _key(group: Group, text: str) -> Cell:
    return text, group.style["color"]


def _spread(group: Group) -> str:
    """Mean ± standard deviation (n − 1) of the final test accuracies."""
    finals = 100 * np.array(group.finals())
    if not len(finals):
        return "– (no run is finished)"
    if len(finals) == 1:
        return f"{finals[0]:.2f} %"
    return f"{finals.mean():.2f} ± {finals.std(ddof=1):.2f} %"


def _updates(runs: Sequence[Run]) -> str:
    """Updates done / planned; a list where the runs differ."""
    done = list(dict.fromkeys(run.done for run in runs))
    return f"{', '.join(f'{count:,}' for count in done)} of {runs[0].planned:,}"


def _group_rows(groups: Sequence[Group]) -> Rows:
    rows: Rows = [["group", "final test accuracy", "finished runs", "seeds", "updates done"]]
    for group in groups:
        seeds = ", ".join(str(run.seed) for run in group.runs)
        finished = f"{len(group.finals())} of {len(group.runs)}"
        rows.append(
            [_key(group, group.label), _spread(group), finished, seeds, _updates(group.runs)]
        )
    return rows


def _run_rows(runs: Sequence[tuple[Group, Run]]) -> Rows:
    rows: Rows = [
        [
            *("run", "group", "seed", "workers", "updates done", "planned", "epochs"),
            *("final test accuracy", "best", "end", "seconds", "waited for data"),
            "peak memory of rank 0",
        ]
    ]
    for group, run in runs:
        best = max((line["top1"] for line in run.evals), default=None)
        rows.append(
            [
                _key(group, str(run.folder)),
                group.label,
                str(run.seed),
                " → ".join(str(count) for count in run.workers),
                f"{run.done:,}",
                f"{run.planned:,}",
                f"{run.updates['epoch'][-1]:.4g}" if run.done else "0",
                _percent(run.final),
                _percent(best),
                run.reason or "–",
                f"{run.seconds:,.1f}",
                _percent(run.data_wait),
                f"{run.peak_memory_bytes / 2**20:,.0f} MiB" if run.peak_memory_bytes else "–",
            ]
        )
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _stage_rows(group: Group) -> Rows:
    plan = group.runs[0].about["plan"]
    rows = []
    for stage in plan["stages"]:
        done = dict.fromkeys(
            int(np.sum(run.updates["stage"] == stage["index"])) for run in group.runs
        )
        cells = stage_cells(stage, plan["train_samples"])
        rows.append(cells | {"updates done": ", ".join(f"{count:,}" for count in done)})
    table: Rows = [list(rows[0])]
    table.extend(list(cells.values()) for cells in rows)
    return table


def _version_rows(runs: Iterable[Run]) -> Rows:
    """One row for each set of versions, naming its runs."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        made = {**run.about["versions"], "revision": run.about.get("revision", "")}
        sets.setdefault(json.dumps(made), []).append(run)
    names = list(dict.fromkeys(name for made in sets for name in json.loads(made)))
    return [
        ["runs", *names],
        *(
            [
                ", ".join(str(run.folder) for run in members),
                *(str(json.loads(made).get(name) or "–") for name in names),
            ]
            for made, members in sets.items()
        ),
    ]
