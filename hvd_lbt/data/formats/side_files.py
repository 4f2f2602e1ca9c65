"""Files that tools write beside shards: checksums, and `.idx` with the places of their records."""

import json
import os
from pathlib import Path

from hvd_lbt.data.formats.findings import NOT_LISTED, Findings
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

SUMS_FILE = "sha256sums.txt"  # of `hvd_lbt data convert`, as sha256sum -c reads it
ABOUT_FILE = "convert.json"  # of `hvd_lbt data convert`: how many samples there are
SHRINK_KEY = "shrink"  # in it: what made the images smaller, if anything did
TFDS_FILE = "dataset_info.json"  # of TensorFlow Datasets: the same for each shard
LARGEST = 1 << 30  # bytes of an .idx file that are read


def compare_with_idx(file: Path, starts: list[int], findings: Findings) -> None:
    """Compare where records begin with FILE.idx or STEM.idx, where there is one.

    im2rec writes `NUMBER<tab>OFFSET` a line, DALI's tfrecord2idx `OFFSET LENGTH`. Raises UserError
    for an offset at which no record begins: the shard is cut off, or the .idx is another shard's.
    """
    for idx in (file.with_name(f"{file.name}.idx"), file.with_suffix(".idx")):
        if idx == file or not idx.is_file() or os.path.getsize(idx) > LARGEST:
            continue
        column = 1 if b"\t" in (data := idx.read_bytes()) else 0
        try:
            listed = {int(line.split()[column]) for line in data.splitlines() if line.strip()}
        except (ValueError, IndexError):
            return  # another tool's
        wrong = sorted(listed - set(starts))
        if wrong:
            raise UserError(
                f"{printable(file)} has no record at byte {wrong[0]:,}, where {idx.name} has "
                f"one ({len(wrong):,} such): the shard is cut off or damaged, or the .idx is "
                "another shard's and is to be removed."
            )
        if len(listed) < len(starts):
            findings.add(
                NOT_LISTED, f"{file.name}: {len(starts):,} records, {len(listed):,} listed"
            )
        return


def compare_with_counts(root: Path, split: str, count: int, findings: Findings) -> None:
    """Compare a split's samples with what convert.json or dataset_info.json says, if one is there.

    A shard that is cut off between two records shows nowhere else.
    """
    for folder in (root, root.parent):
        for name, count_in in ((ABOUT_FILE, _converted), (TFDS_FILE, _of_tfds)):
            file = folder / name
            if not file.is_file() or file.stat().st_size > LARGEST:
                continue
            try:
                expected = count_in(json.loads(file.read_bytes()), split)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # another tool's file of this name
            if expected not in (None, count):
                findings.errors.append(
                    f"{printable(root)} has {count:,} samples, and {printable(file)} says "
                    f"{expected:,}: shards are missing or damaged. If that is meant, remove {name}."
                )


def pixels_of(root: Path) -> str:
    """What made the images of a converted split smaller, as JSON; "" if nothing did."""
    file = root.parent / ABOUT_FILE
    try:
        if file.stat().st_size > LARGEST:
            return ""
        about = json.loads(file.read_bytes())
        return json.dumps(about[SHRINK_KEY], sort_keys=True) if SHRINK_KEY in about else ""
    except (OSError, ValueError, TypeError, RecursionError):
        return ""


def _converted(about: dict, split: str) -> int | None:
    count = about["samples"].get(split)
    return None if count is None else int(count)


def _of_tfds(about: dict, split: str) -> int | None:
    lengths = [its["shardLengths"] for its in about["splits"] if its["name"] == split]
    return sum(map(int, lengths[0])) if lengths else None
