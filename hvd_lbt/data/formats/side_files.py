"""Files that tools write beside shards: checksums, and `.idx` with the places of their records."""

import os
from pathlib import Path

from hvd_lbt.data.formats.findings import NOT_LISTED, Findings
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

SUMS_FILE = "sha256sums.txt"  # of `hvd_lbt data convert`, as sha256sum -c reads it
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
