"""OUT/probe.json: the branches of a checkpoint that are done, so that a probe can be continued."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import Any

from hvd_lbt.bench.harness import machine
from hvd_lbt.branch_training import Branch, Branched
from hvd_lbt.errors import UserError, one_line
from hvd_lbt.log.provenance import revision, versions
from hvd_lbt.plain_yaml import read_text
from hvd_lbt.schedule.branches import Kept
from hvd_lbt.schedule.plan import Update
from hvd_lbt.whole_file import write_whole

NAME = "probe.json"
VERSION = 1
MAX_BYTES = 64 * 2**20
# What a probe that is continued must have in common with the one before, and how it is asked for.
SAME = {
    "version": "the hvd_lbt that wrote it",
    "checkpoint_sha256": "the same checkpoint",
    "data": "the same --data",
    "first_sample": "the same checkpoint",
    "samples": "the same --epochs and --largest",
    "buffer": "the same --buffer",
}


def new_record(head: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a probe of which nothing is done; head: what it is of, with the keys of
    SAME.
    """
    record = {
        "version": VERSION,
        **head,
        "versions": versions(),
        "revision": revision(),
        "machine": machine(),
        "time": time.time(),
        "start": None,
        "gradient_noise": None,
        "branches": [],
    }
    return dict(json.loads(json.dumps(record)))  # as it will be read: plain values only


def open_record(out: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The record in this folder, or a new one. Raises UserError if it is of another probe."""
    file, new = out / NAME, new_record(head)
    try:
        text = read_text(file, str(file), MAX_BYTES)
    except FileNotFoundError:
        return new
    try:
        record = json.loads(text)
        there = {key: record[key] for key in SAME}
        for branch in record["branches"]:
            key_of(branch)
            if not isinstance(branch["diverged"], bool):
                raise TypeError("diverged must be true or false")
            if not branch["diverged"]:
                branch["loss"] + 0.0
        if record["start"] is not None:
            record["start"]["loss"], record["gradient_noise"]["from"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is not the record of a probe ({type(error).__name__}: {one_line(error, 80)}). "
            "Move it away, or choose another --out."
        ) from error
    differing = [key for key in SAME if there[key] != new[key]]
    if differing:
        raise UserError(
            f"--out {out} holds the probe of something else: {', '.join(differing)} differ. Give "
            f"{', '.join(dict.fromkeys(SAME[key] for key in differing))} to continue it, or choose "
            "another --out."
        )
    return dict(record)


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Write OUT/probe.json, whole. Raises UserError."""
    write_result(out / NAME, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_result(file: Path, content: str | bytes) -> None:
    """Write a file of the results, whole. Raises UserError."""
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}). Free space or correct the folder; the "
            "same command continues."
        ) from error


def entry_of(
    branch: Branch, branched: Branched, updates: Sequence[Update], *, run_seed: int, ranks: int
) -> dict[str, Any]:
    """A branch that is done; run_seed: of its order. What is not finite is None."""
    own = asdict(branched)
    del own["evaluation"]
    return {
        **asdict(branch),
        "run_seed": run_seed,
        "lr": updates[0].lr,
        "last_lr": updates[-1].lr,
        "momentum": updates[0].momentum,
        "noise_scale": updates[0].noise_scale,
        **own,
        **finite(branched.evaluation.to_dict()),
        "ranks": ranks,
        "revision": revision(),
    }


def key_of(branch: Mapping[str, Any]) -> tuple[str, int, int]:
    """By which a branch of the record is found."""
    return str(branch["kept"]), int(branch["batch"]), int(branch["seed"])


def branches_of(
    record: Mapping[str, Any], kept: Kept, batches: Sequence[int], seeds: int
) -> dict[int, list[dict[str, Any]]]:
    """The branches of each batch, by seed. B comes first; nothing was changed in it, so it is the
    same whatever is kept.
    """
    by_key = {key_of(one): one for one in record["branches"]}
    return {
        batch: [
            by_key["noise" if batch == batches[0] else kept, batch, seed] for seed in range(seeds)
        ]
        for batch in batches
    }


def losses_of(branches: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[int, list[float]]:
    """The test losses of each batch, by seed; infinite where a branch diverged."""
    return {
        batch: [inf if one["diverged"] else one["loss"] for one in its]
        for batch, its in branches.items()
    }


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, None for those that JSON has no number for."""
    return {
        key: None if isinstance(value, float) and not isfinite(value) else value
        for key, value in values.items()
    }
