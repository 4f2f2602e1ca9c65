"""Where the images lie: folders, tar (WebDataset), TFRecord, RecordIO. Framing only, no decoding.

Each `scan_*` reads one shard's headers, not its images, and tells for every sample where its
encoded bytes begin, how many they are, and its label as the shard has it; so that a sample is one
positional read. What is no sample is counted and named in `Extents.findings`; what is damaged, or
whose label is not certain, is a UserError with the file and the byte.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path

from hvd_lbt.data.formats.extents import Extents
from hvd_lbt.data.formats.findings import SUFFIXES, Findings, SplitError
from hvd_lbt.data.formats.folder import first_bytes
from hvd_lbt.data.formats.recordio import (
    RECORDIO_MAGIC,
    hides_record,
    join_recordio,
    recordio,
    scan_recordio,
)
from hvd_lbt.data.formats.side_files import SUMS_FILE
from hvd_lbt.data.formats.tfrecord import masked_crc, scan_tfrecord, tfrecord, tfrecord_places
from hvd_lbt.data.formats.webdataset import scan_webdataset
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

__all__ = [
    "RECORDIO_MAGIC",
    "SCANS",
    "SUFFIXES",
    "SUMS_FILE",
    "Extents",
    "Findings",
    "SplitError",
    "hides_record",
    "join_recordio",
    "masked_crc",
    "other_format",
    "recordio",
    "shard_kind",
    "tfrecord",
    "tfrecord_places",
]

SCANS: dict[str, Callable[[Path, Extents], None]] = {
    "webdataset": scan_webdataset,
    "tfrecord": scan_tfrecord,
    "recordio": scan_recordio,
}
COMPRESSED = (
    b"\x1f\x8b",  # gzip
    b"\x28\xb5\x2f\xfd",  # zstd
    b"\xfd7zXZ",
    b"BZh",
    b"\x04\x22\x4d\x18",  # lz4
    b"PK\x03\x04",
    b"7z\xbc\xaf",
    b"Rar!",
)
# Data sets in forms that are not read, by how a file of theirs begins.
UNPACK = "unpack its images into train/CLASS/FILE and test/CLASS/FILE"
OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file: fetch it with `git lfs pull`"),
    (b"PAR1", f"Parquet: {UNPACK}"),
    (b"ARROW1", f"Arrow: {UNPACK}"),
    (b"\x89HDF", f"HDF5: {UNPACK}"),
    (b"\x93NUMPY", f"a NumPy array: {UNPACK}"),
    (b"\0\0\x08\x01", f"MNIST's idx format: {UNPACK}"),
    (b"\0\0\x08\x03", f"MNIST's idx format: {UNPACK}"),
    (b"\x80\x02}", f"a Python pickle, as CIFAR has: {UNPACK}"),
    (b"<!DOCTYPE", "a web page, not the file: download it again"),
    (b"<html", "a web page, not the file: download it again"),
)


def shard_kind(file: Path) -> str:
    """`webdataset`, `tfrecord` or `recordio` by the file's first bytes; "" if it is none of them.

    Raises UserError for a compressed shard: its samples cannot be read by position.
    """
    head = first_bytes(file, 512) or b""
    if head.startswith(COMPRESSED):
        raise UserError(
            f"{printable(file)} is compressed; samples are read by position: unpack it first."
        )
    if head[:4] == RECORDIO_MAGIC:
        return "recordio"
    if len(head) >= 12 and masked_crc(head[:8]) == int.from_bytes(head[8:12], "little"):
        return "tfrecord"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # compares the header's checksum
    except (tarfile.HeaderError, ValueError):
        return ""
    return "webdataset"


def other_format(file: Path) -> str:
    """What a file is that no scan reads, and what to do with it; "" if that is not known."""
    head = first_bytes(file, 32)
    if head is None:
        return "a file that must not be read"
    if not head:
        return "empty"
    return next((what for magic, what in OTHER_FORMATS if head.startswith(magic)), "")
