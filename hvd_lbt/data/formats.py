"""Where the images lie in shards: tar (WebDataset), TFRecord, RecordIO. Framing only, no decoding.

Each `scan_*` reads one shard's headers, not its images, and tells for every sample where its
encoded bytes begin, how many they are, and its label as the shard has it; so that a sample is one
positional read. `shard_kind` tells the formats apart by content. Specifications:
WebDataset: POSIX tar; members of a sample follow each other and share the name up to the first dot.
TFRecord: tensorflow.org/tutorials/load_data/tfrecord (a record holds a tf.train.Example protobuf).
RecordIO: dmlc-core's recordio.h, MXNet's recordio.py (IRHeader).
"""

import os
import struct
import tarfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from hvd_lbt.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
RECORDIO_MAGIC = b"\x0a\x23\xd7\xce"
# ImageNet's own keys, then those of TensorFlow Datasets.
IMAGE_KEYS = (b"image/encoded", b"image")
LABEL_KEYS = (b"image/class/synset", b"image/class/label", b"label")  # a name rather than a number
WINDOW = 4096  # bytes of a shard read at once while scanning: headers, and no more of the image


@dataclass
class Extents:
    """Samples of one shard, in order.

    offsets, lengths: of the encoded bytes. A negative length: a RecordIO record in several parts,
    |length| bytes from its first header on. tokens: the labels, each an index into `names`.
    """

    offsets: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    tokens: array = field(default_factory=lambda: array("i"))
    names: dict[int | str, int] = field(default_factory=dict)

    def add(self, offset: int, length: int, label: int | str) -> None:
        """Note one sample."""
        self.offsets.append(offset)
        self.lengths.append(length)
        self.tokens.append(self.names.setdefault(label, len(self.names)))

    def __len__(self) -> int:
        return len(self.offsets)


def shard_kind(file: Path) -> str:
    """`webdataset`, `tfrecord` or `recordio` by the file's first bytes; "" if it is none of them.

    Raises UserError for a compressed shard: its samples cannot be read by position.
    """
    with file.open("rb") as stream:
        head = stream.read(512)
    if head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd":
        raise UserError(f"{file} is compressed; samples are read by position: unpack it first.")
    if head[:4] == RECORDIO_MAGIC:
        return "recordio"
    if len(head) >= 12 and masked_crc(head[:8]) == int.from_bytes(head[8:12], "little"):
        return "tfrecord"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # compares the header's checksum
    except tarfile.HeaderError:
        return ""
    return "webdataset"


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan_webdataset(file: Path, extents: Extents) -> None:
    """Samples of a tar file; the label is in NAME.cls, or is the folder that the image lies in."""
    key: str | None = None
    image: tuple[int, int] | None = None
    label: int | str | None = None

    def finish() -> None:
        if image is None:
            return
        found = label if label is not None else os.path.basename(os.path.dirname(key or ""))
        if found == "":
            raise UserError(
                f"{file} has the image {key!r} without a label: WebDataset has it in {key}.cls; "
                "or the image lies in a folder with its class's name."
            )
        extents.add(*image, found)

    try:
        with file.open("rb") as stream:
            for path, offset, size in _members(stream, file):
                folder, _, name = path.rpartition("/")
                stem, _, suffix = name.partition(".")
                if f"{folder}/{stem}" != key:
                    finish()
                    key, image, label = f"{folder}/{stem}", None, None
                if os.path.splitext(name)[1].lower() in SUFFIXES:
                    if image is not None:
                        finish()
                    image = (offset, size)
                elif suffix == "cls":
                    text = os.pread(stream.fileno(), size, offset).decode()
                    label = _int_or_name(text.strip())
            finish()
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no whole tar file: {error}.") from error


def _members(stream: BinaryIO, file: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file in a tar. Plain headers are read here, 5 times as fast as
    tarfile does; from the first that is not plain (long names, links, sparse files) on, tarfile does.
    """
    source, at = Window(stream.fileno(), file), 0
    while at + 512 <= source.size:
        head = source.read(at, 512)
        if head[156:157] != b"0" or head[257:262] != b"ustar" or not head[124:135].isdigit():
            break
        if sum(head[:148]) + sum(head[156:]) + 256 != int(head[148:154], 8):
            break  # its checksum; tarfile says what is wrong
        name, prefix = (part.partition(b"\0")[0] for part in (head[:100], head[345:500]))
        if head[257:263] == b"ustar\0" and prefix:
            name = prefix + b"/" + name
        size = int(head[124:135], 8)
        if at + 512 + size > source.size:
            break
        yield os.fsdecode(name), at + 512, size
        at += 512 + size + -size % 512
    stream.seek(at)
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            vars(archive)["members"] = []  # else it keeps them all, a million of them
            if member.isreg():
                yield member.name, member.offset_data, member.size


def scan_recordio(file: Path, extents: Extents) -> None:
    """Samples of a .rec file; the label is the one number of MXNet's IRHeader."""
    with file.open("rb") as stream:
        source = Window(stream.fileno(), file)
        at = 0
        while at < source.size:
            start, parts = at, []
            while True:
                magic, size = struct.unpack("<4sI", source.read(at, 8))
                if magic != RECORDIO_MAGIC:
                    raise UserError(f"{file} is no whole RecordIO file: no record at byte {at:,}.")
                kind, size = size >> 29, size & (1 << 29) - 1
                parts.append((at + 8, size))
                at += 8 + size + -size % 4
                if kind in (0, 3):  # a whole record, or the last part of one
                    break
            if at > source.size:
                raise UserError(f"{file} is cut off: its last record ends at byte {at:,}.")
            flag, label = struct.unpack("<If", source.read(parts[0][0], 8))
            if flag > 1:
                raise UserError(f"{file} has {flag} labels for the image at byte {start:,}, not 1.")
            if flag == 1:  # an array of one
                (label,) = struct.unpack("<f", source.read(parts[0][0] + 24, 4))
            if label != int(label):
                raise UserError(
                    f"{file} has the label {label} at byte {start:,}: no class's number."
                )
            skip = 24 + 4 * flag
            if len(parts) == 1:
                extents.add(parts[0][0] + skip, parts[0][1] - skip, int(label))
            else:
                extents.add(start, start - at, int(label))


def join_recordio(raw: bytes) -> bytes:
    """The image in a record of several parts, from its first header on.

    A payload that holds the magic number is cut there; the number comes back between the parts.
    """
    parts, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little") & (1 << 29) - 1
        parts.append(raw[at + 8 : at + 8 + size])
        at += 8 + size + -size % 4
    whole = RECORDIO_MAGIC.join(parts)
    return whole[24 + 4 * int.from_bytes(whole[:4], "little") :]


def scan_tfrecord(file: Path, extents: Extents) -> None:
    """Samples of a TFRecord file of tf.train.Example with ImageNet's keys, or `image` and `label`."""
    with file.open("rb") as stream:
        source = Window(stream.fileno(), file)
        for start, size in _records(source):
            extents.add(*_example(source, start, size))


@lru_cache(maxsize=16)
def tfrecord_places(file: Path) -> list[tuple[int, int]]:
    """(offset, length) of the data of each record, in order."""
    with file.open("rb") as stream:
        return list(_records(Window(stream.fileno(), file)))


def _records(source: "Window") -> Iterator[tuple[int, int]]:
    """(offset, length) of each record's data: 12 bytes come before it, and its checksum after it."""
    at = 0
    while at < source.size:
        head = source.read(at, 12)
        if masked_crc(head[:8]) != int.from_bytes(head[8:], "little"):
            raise UserError(f"{source.file} is no whole TFRecord file: no record at byte {at:,}.")
        size = int.from_bytes(head[:8], "little")
        if at + 16 + size > source.size:
            raise UserError(f"{source.file} is cut off: the record at byte {at:,} is not whole.")
        yield at + 12, size
        at += 16 + size


def _example(source: "Window", start: int, size: int) -> tuple[int, int, int | str]:
    """(offset, length, label) of the image in an Example that begins at `start`."""
    features = _one(source, start, start + size, 1)
    found: dict[bytes, tuple[int, int]] = {}
    for number, begin, end in _fields(source, *features):
        if number == 1:  # an entry of the map: key 1, value 2
            key = _one(source, begin, end, 1)
            if key[1] - key[0] <= 64:
                found[source.read(key[0], key[1] - key[0])] = _one(source, begin, end, 2)
    image = next((found[key] for key in IMAGE_KEYS if key in found), None)
    label = next((found[key] for key in LABEL_KEYS if key in found), None)
    if image is None or label is None:
        raise UserError(
            f"{source.file} has the features {sorted(key.decode(errors='replace') for key in found)} "
            f"at byte {start:,}; an image needs {' or '.join(key.decode() for key in IMAGE_KEYS)}, "
            f"and {' or '.join(key.decode() for key in LABEL_KEYS)}."
        )
    begin, end = _one(source, *_one(source, *image, 1), 1)  # BytesList, its only value
    return begin, end - begin, _label(source, *label)


def _label(source: "Window", start: int, end: int) -> int | str:
    for number, begin, stop in _fields(source, start, end):
        if number == 1:  # BytesList: a class's name
            text = _one(source, begin, stop, 1)
            return source.read(text[0], text[1] - text[0]).decode()
        if number == 3:  # Int64List: packed, or one by one
            at = begin
            tag, at = _varint(source, at)
            if tag & 7 == 2:
                _, at = _varint(source, at)
            return _varint(source, at)[0]
    raise UserError(f"{source.file} has a label that is neither a number nor a name.")


def _one(source: "Window", start: int, end: int, wanted: int) -> tuple[int, int]:
    """Where the first field of this number lies."""
    for number, begin, stop in _fields(source, start, end):
        if number == wanted:
            return begin, stop
    raise UserError(f"{source.file} has a record at byte {start:,} that is no tf.train.Example.")


def _fields(source: "Window", start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of each length-delimited field of a protobuf message."""
    at = start
    while at < end:
        tag, at = _varint(source, at)
        if tag & 7 != 2:
            raise UserError(f"{source.file} has no tf.train.Example at byte {start:,}.")
        size, at = _varint(source, at)
        if at + size > end:
            raise UserError(f"{source.file} has a damaged tf.train.Example at byte {start:,}.")
        yield tag >> 3, at, at + size
        at += size


def _varint(source: "Window", at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = source.read(at, 1)[0]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


class Window:
    """Small positional reads of a file, WINDOW bytes at a time. Raises UserError past its end."""

    def __init__(self, descriptor: int, file: Path):
        self.file, self._descriptor = file, descriptor
        self.size = os.fstat(descriptor).st_size
        self._start, self._bytes = 0, b""

    def read(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on."""
        place = at - self._start
        if not 0 <= place <= len(self._bytes) - count:
            self._start, place = at, 0
            self._bytes = os.pread(self._descriptor, max(WINDOW, count), at)
            if len(self._bytes) < count:
                raise UserError(f"{self.file} is cut off at byte {self.size:,}.")
        return self._bytes[place : place + count]


def tfrecord(image: bytes, name: str, label: int, class_name: str) -> bytes:
    """One TFRecord with ImageNet's keys; `label` counts from 0."""
    features = b"".join(
        _field(1, _field(1, key) + _field(2, value))
        for key, value in (
            (b"image/class/label", _field(3, _field(1, _encoded(label)))),
            (b"image/class/synset", _field(1, _field(1, class_name.encode()))),
            (b"image/filename", _field(1, _field(1, os.fsencode(name)))),
            (b"image/encoded", _field(1, _field(1, image))),
        )
    )
    data = _field(1, features)
    length = len(data).to_bytes(8, "little")
    crcs = [masked_crc(part).to_bytes(4, "little") for part in (length, data)]
    return b"".join((length, crcs[0], data, crcs[1]))


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
    kinds = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        RECORDIO_MAGIC
        + (kind << 29 | len(part)).to_bytes(4, "little")
        + part
        + bytes(-len(part) % 4)
        for kind, part in zip(kinds, parts, strict=True)
    )


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _encoded(len(data)) + data


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


SCANS: dict[str, Callable[[Path, Extents], None]] = {
    "webdataset": scan_webdataset,
    "tfrecord": scan_tfrecord,
    "recordio": scan_recordio,
}
