"""RecordIO: MXNet's `.rec`. Specifications: dmlc-core's recordio.h, MXNet's recordio.py
(IRHeader).
"""

import math
import struct
from pathlib import Path

from hvd_lbt.data.formats.extents import Extents, LabelError, Window, class_number
from hvd_lbt.data.formats.side_files import compare_with_idx

RECORDIO_MAGIC = b"\x0a\x23\xd7\xce"
HEADER = 24  # flag, label, and two numbers of the image
LARGEST_EXACT = 1 << 24  # of a 32-bit float: labels above are not all distinct
WHOLE, FIRST, MIDDLE, LAST = range(4)


def scan_recordio(file: Path, extents: Extents) -> None:
    """Samples of a .rec file; the label is the one number of MXNet's IRHeader."""
    starts = []
    with file.open("rb") as stream:
        source, at = Window(stream.fileno(), file), 0
        while at < source.size:
            start, parts = at, _parts(source, at)
            at = _end(source, *parts[-1])
            size = sum(length for _, length in parts) + 4 * (len(parts) - 1)
            if len(parts) == 1:
                head = source.read(parts[0][0], min(size, HEADER + 4))
            else:
                head = _joined(source.read(start, at - start))[: HEADER + 4]
            label, skip = _header(source, start, head, size)
            if len(parts) == 1:
                extents.add(parts[0][0] + skip, size - skip, label)
            else:
                extents.add(start, start - at, label)
            starts.append(start)
    extents.labels_from = "numbers"
    compare_with_idx(file, starts, extents.findings)


def _parts(source: Window, at: int) -> list[tuple[int, int]]:
    """(offset, length) of each part of the record at `at`, which is one if all goes well."""
    parts: list[tuple[int, int]] = []
    start, kind = at, FIRST
    while kind in (FIRST, MIDDLE):
        magic, size = struct.unpack("<4sI", source.read(at, 8))
        kind, size = size >> 29, size & (1 << 29) - 1
        if magic != RECORDIO_MAGIC or kind not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
            raise source.error(f"is no whole RecordIO file: no record at byte {at:,}")
        parts.append((at + 8, size))
        end = _end(source, at + 8, size)
        if end > source.size:
            raise source.error(f"is cut off: the record at byte {start:,} is not whole")
        if end > at + 8 + size and any(source.read(at + 8 + size, end - at - 8 - size)):
            raise source.error(f"is damaged: the record at byte {at:,} is longer than it says")
        at = end
    return parts


def _end(source: Window, offset: int, size: int) -> int:
    return offset + size + -size % 4


def _header(source: Window, start: int, head: bytes, size: int) -> tuple[int, int]:
    """The label, and how many bytes come before the image."""
    if len(head) < HEADER:
        raise source.error(f"has a record of {size} bytes at byte {start:,}: no image's header")
    flag, label = struct.unpack("<If", head[:8])
    if flag > 1:
        raise source.error(f"has {flag} labels for the image at byte {start:,}, not 1")
    if flag == 1:  # an array of one
        if len(head) < HEADER + 4:
            raise source.error(f"has a record without its label at byte {start:,}")
        (label,) = struct.unpack("<f", head[HEADER:])
    try:
        if LARGEST_EXACT <= label < math.inf:
            raise LabelError(
                f"{label}", f"no class's number: a float is exact to {LARGEST_EXACT:,}"
            )
        return class_number(label), HEADER + 4 * flag
    except LabelError as error:
        raise source.error(f"has the label {error.what} at byte {start:,}: {error}") from None


def join_recordio(raw: bytes) -> bytes:
    """The image in a record of several parts, from its first header on.

    A payload that holds the magic number is cut there; the number comes back between the parts.
    """
    whole = _joined(raw)
    return whole[HEADER + 4 * int.from_bytes(whole[:4], "little") :]


def _joined(raw: bytes) -> bytes:
    parts, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little") & (1 << 29) - 1
        parts.append(raw[at + 8 : at + 8 + size])
        at += 8 + size + -size % 4
    return RECORDIO_MAGIC.join(parts)


def hides_record(image: bytes) -> bool:
    """Whether the image of a record in one part holds what begins a record.

    Writers cut a record there, so its length is damaged and it has swallowed the next.
    """
    place = image.find(RECORDIO_MAGIC)
    while place >= 0 and place % 4:  # the image begins at a multiple of four, as all records do
        place = image.find(RECORDIO_MAGIC, place + 1)
    return place >= 0


def recordio(image: bytes, label: int, number: int) -> bytes:
    """One RecordIO record with MXNet's IRHeader, cut in parts where it holds the magic number."""
    parts, payload, start = [], struct.pack("<IfQQ", 0, float(label), number, 0) + image, 0
    place = payload.find(RECORDIO_MAGIC)
    while place >= 0:
        if place % 4 == 0:  # readers look for it at multiples of four only
            parts.append(payload[start:place])
            start = place + 4
        place = payload.find(RECORDIO_MAGIC, max(start, place + 1))
    parts.append(payload[start:])
    kinds = [WHOLE] if len(parts) == 1 else [FIRST, *[MIDDLE] * (len(parts) - 2), LAST]
    return b"".join(
        RECORDIO_MAGIC
        + (kind << 29 | len(part)).to_bytes(4, "little")
        + part
        + bytes(-len(part) % 4)
        for kind, part in zip(kinds, parts, strict=True)
    )
