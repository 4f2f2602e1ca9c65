"""The curves of a report: what was measured, evaluated and scheduled, over the runs of a group."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.report.runs import Group

Floats = NDArray[np.float64]
BINS = 120  # points of a measured curve: narrower than this a batch of 16 is mostly noise


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve over a group's runs; all arrays have the shape (points,)."""

    epochs: Floats
    updates: Floats
    mean: Floats
    low: Floats
    high: Floats


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
