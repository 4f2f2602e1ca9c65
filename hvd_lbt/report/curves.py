"""The curves of a report: what was measured, evaluated and scheduled, over the runs of a group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.report.runs import Group, Run

Floats = NDArray[np.float64]
BINS = 120  # points of a measured curve: narrower than this a batch of 16 is mostly noise
AXES = ("epochs", "updates", "samples", "hours")


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve over a group's runs; all arrays have the shape (points,).

    hours: of the updates alone, without evaluations and what was done again after a resume.
    """

    epochs: Floats
    updates: Floats
    samples: Floats
    hours: Floats
    mean: Floats
    low: Floats
    high: Floats


def measured(group: Group, key: str) -> Band:
    """A measured quantity, averaged over 1/BINS of the run's samples, over the group's runs.

    loss: mean over samples; images_per_second, data_wait: mean over time (so that images/s is
    images ÷ seconds). A bin without a finite value has no point.
    """
    values = np.full((len(group.runs), BINS), np.nan)
    x = {axis: np.full_like(values, np.nan) for axis in AXES}
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
        for axis, column in _clocks(run).items():
            x[axis][row, here] = column[ends]
    return _band(x, values)


def share_from_differences(groups: Sequence[Group]) -> float:
    """Of the updates with a measured noise scale, the share where it is from differences."""
    updates = [run.updates for group in groups for run in group.runs]
    known = [np.isfinite(columns["gradient_noise"]) for columns in updates]
    marked = [columns["from_differences"] > 0 for columns in updates]
    count = sum(int(here.sum()) for here in known)
    both = sum(int((m & here).sum()) for m, here in zip(marked, known, strict=True))
    return both / count if count else 0.0


def _clocks(run: Run) -> dict[str, Floats]:
    """Where each update ends on each axis."""
    columns = run.updates
    seen = columns["samples_seen"]
    clocks = {"epochs": columns["epoch"], "updates": columns["update"] + 1, "samples": seen}
    return clocks | {"hours": run.hours}


def decided_at(run: Run) -> dict[str, list[float]]:
    """Where each decision about the batch was made, on each axis."""
    clocks = _clocks(run)
    places = [
        int(np.searchsorted(clocks["updates"], one["update"], side="right")) - 1
        for one in run.decisions
    ]
    return {
        axis: [float(column[place]) if place >= 0 else 0.0 for place in places]
        for axis, column in clocks.items()
    }


def evaluated(group: Group) -> Band:
    """Test accuracy in percent at each evaluation, over the group's runs."""
    counts = sorted({line["update"] for run in group.runs for line in run.evals})
    places = {count: place for place, count in enumerate(counts)}
    values = np.full((len(group.runs), len(counts)), np.nan)
    x = {axis: np.full_like(values, np.nan) for axis in AXES}
    for row, run in enumerate(group.runs):
        clocks = _clocks(run)
        for line in run.evals:
            place = places[line["update"]]
            values[row, place] = 100 * line["top1"]
            # of the last update before the evaluation that has a line
            last = int(np.searchsorted(clocks["updates"], line["update"], side="right")) - 1
            for axis, column in clocks.items():
                x[axis][row, place] = column[last] if last >= 0 else 0.0
            x["epochs"][row, place], x["updates"][row, place] = line["epoch"], line["update"]
    return _band(x, values)


def _band(x: dict[str, Floats], values: Floats) -> Band:
    here = np.isfinite(values).any(axis=0)
    values = values[:, here]
    if not here.any():
        empty = np.empty(0)
        return Band(**dict.fromkeys(AXES, empty), mean=empty, low=empty, high=empty)
    return Band(
        **{axis: np.nanmax(column[:, here], axis=0) for axis, column in x.items()}
        | {"hours": np.nanmean(x["hours"][:, here], axis=0)},
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
    values, batch = run.updates[key], run.updates["global_batch"]
    after = _clocks(run)
    if len(batch) > 1 and run.done == run.planned and batch[-1] < batch[-2]:
        values, batch = values[:-1], batch[:-1]
        after = {axis: column[:-1] for axis, column in after.items()}
    if not len(values):
        return _band({axis: np.empty((1, 0)) for axis in AXES}, np.empty((1, 0)))
    # Each span is drawn from before its first update to after its last one.
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    last = np.r_[first[1:] - 1, len(values) - 1]
    share = 1 - batch / after["samples"]  # samples before the update ÷ after it
    before = {
        "epochs": after["epochs"] * share,
        "updates": after["updates"] - 1,
        "samples": after["samples"] - batch,
        "hours": np.r_[0.0, after["hours"][:-1]],
    }
    x = {axis: np.c_[before[axis][first], after[axis][last]].ravel() for axis in AXES}
    level = np.repeat(values[first], 2)
    return Band(**x, mean=level, low=level, high=level)


def in_percent(band: Band) -> Band:
    """A band of shares as percent."""
    return replace(band, mean=100 * band.mean, low=100 * band.low, high=100 * band.high)
