"""Arrays in one file that processes of a node share: mapped into memory, not read by each.

The file is a first line, the arrays one after the other at multiples of ALIGNED bytes, a JSON text
that says what they are, its CRC-32 and length (little-endian uint32 and uint64), and the first line
again. Whoever opens it compares the CRC-32 of every array, by ordinary reads through a small
buffer: damage is found before a value is used, and the pages are not mapped by that.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MARK = b"hvd_lbt arrays 1\n"
ALIGNED = 64  # bytes: a cache line
AT_ONCE = 1 << 22  # bytes that are read or written at a time
END = struct.Struct("<IQ")  # CRC-32 and length of the text


class DamageError(ValueError):
    """Why a file is not what was written."""


def write_arrays(
    stream: BinaryIO, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]
) -> None:
    """Write the arrays and what there is to say about them (plain values) to an empty file."""
    table = {}
    stream.write(MARK)
    at = len(MARK)
    for name, array in arrays.items():
        stream.write(bytes(-at % ALIGNED))
        at += -at % ALIGNED
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        crc = 0
        for first in range(0, len(flat), AT_ONCE):
            part = flat[first : first + AT_ONCE].data
            crc = zlib.crc32(part, crc)
            stream.write(part)
        kind = np.dtype(array.dtype).newbyteorder("<").str
        table[name] = {"dtype": kind, "shape": list(array.shape), "at": at, "crc": crc}
        at += len(flat)
    text = json.dumps({"about": about, "arrays": table}).encode("utf-8", "surrogateescape")
    stream.write(text + END.pack(zlib.crc32(text), len(text)) + MARK)


def map_arrays(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What was said, and the arrays by name: read-only, in memory that all processes share.

    Where the file system cannot map files, they are read. Raises DamageError, OSError.
    """
    about, table = _table(stream)
    for name, its in table.items():
        size = its["bytes"]
        if _crc(stream, its["at"], size) != its["crc"]:
            raise DamageError(f"the CRC-32 of its {name} is another")
    shared = _shared(stream)
    return about, {
        name: np.frombuffer(
            shared, its["dtype"], int(np.prod(its["shape"], dtype=np.int64)), its["at"]
        ).reshape(its["shape"])
        for name, its in table.items()
    }


def _table(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON text at the end: what was said, and each array's dtype, shape, place, bytes, CRC."""
    whole = os.fstat(stream.fileno()).st_size
    end = END.size + len(MARK)
    stream.seek(0)
    if stream.read(len(MARK)) != MARK or whole < len(MARK) + end:
        raise DamageError("it is no file of this format")
    stream.seek(whole - end)
    tail = stream.read(end)
    crc, length = END.unpack_from(tail)
    if tail[END.size :] != MARK or length > whole - end:
        raise DamageError("its end is missing")
    stream.seek(whole - end - length)
    text = stream.read(length)
    if zlib.crc32(text) != crc:
        raise DamageError("the CRC-32 of its table is another")
    its = json.loads(text.decode("utf-8", "surrogateescape"))
    for array in its["arrays"].values():
        count = int(np.prod(array["shape"], dtype=np.int64))
        array["bytes"] = count * np.dtype(array["dtype"]).itemsize
    return its["about"], its["arrays"]


def _crc(stream: BinaryIO, at: int, size: int) -> int:
    stream.seek(at)
    crc, left, buffer = 0, size, bytearray(min(AT_ONCE, max(size, 1)))
    view = memoryview(buffer)
    while left:
        got = stream.readinto(view[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not got:
            raise DamageError("it is shorter than it was")
        crc = zlib.crc32(view[:got], crc)
        left -= got
    return crc


def _shared(stream: BinaryIO) -> Any:
    """The whole file as a buffer: mapped, or read where it cannot be."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        stream.seek(0)
        return stream.read()
