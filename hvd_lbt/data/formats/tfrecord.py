"""TFRecord with a tf.train.Example in each record.

Specifications: tensorflow.org/tutorials/load_data/tfrecord, tensorflow/core/example/*.proto,
protobuf.dev/programming-guides/encoding.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import google_crc32c

from hvd_lbt.data.formats.extents import (
    LONGEST_NAME,
    Extents,
    LabelError,
    Window,
    class_name,
    class_number,
)
from hvd_lbt.data.formats.side_files import compare_with_idx

# ImageNet's own keys, then those of TensorFlow Datasets.
IMAGE_KEYS = (b"image/encoded", b"image")
LABEL_KEYS = (b"image/class/synset", b"image/class/label", b"label")  # a name rather than a number
LONGEST_KEY = 64  # bytes of a feature's name that are compared with these
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3  # fields of tf.train.Feature


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan_tfrecord(file: Path, extents: Extents) -> None:
    """Samples of a TFRecord file of tf.train.Example with ImageNet's keys, or `image` and
    `label`.
    """
    starts = []
    with file.open("rb") as stream:
        source = Window(stream.fileno(), file)
        for start, size in _records(source):
            offset, length, labels = _example(source, start, size)
            label, *others = (label for label in labels if label is not None)
            extents.add(offset, length, label)
            if extents.aliases.setdefault(label, labels) != labels:
                raise source.error(
                    f"has the labels {others} at byte {start:,} for an image of {label!r}, and "
                    f"{[x for x in extents.aliases[label] if x is not None][1:]} before"
                )
            starts.append(start - 12)
    extents.labels_from = "numbers" if isinstance(next(iter(extents.names), 0), int) else "names"
    compare_with_idx(file, starts, extents.findings)


@lru_cache(maxsize=16)
def tfrecord_places(file: Path) -> list[tuple[int, int]]:
    """(offset, length) of the data of each record, in order."""
    with file.open("rb") as stream:
        return list(_records(Window(stream.fileno(), file)))


def _records(source: Window) -> Iterator[tuple[int, int]]:
    """(offset, length) of each record's data: 12 bytes come before it, and its checksum after
    it.
    """
    at = 0
    while at < source.size:
        head = source.read(at, 12)
        if masked_crc(head[:8]) != int.from_bytes(head[8:], "little"):
            raise source.error(f"is no whole TFRecord file: no record at byte {at:,}")
        size = int.from_bytes(head[:8], "little")
        if at + 16 + size > source.size:
            raise source.error(f"is cut off: the record at byte {at:,} is not whole")
        yield at + 12, size
        at += 16 + size


def _example(
    source: Window, start: int, size: int
) -> tuple[int, int, tuple[int | str | None, ...]]:
    """(offset, length) of the image in an Example at `start`, and a label for each LABEL_KEYS."""
    features = _only(source, start, start + size, "tf.train.Example")
    found: dict[bytes, tuple[int, int]] = {}
    for number, _, begin, end in _fields(source, *features):
        if number != 1:
            raise source.error(f"has no tf.train.Example at byte {start:,}")
        entry = dict.fromkeys((1, 2), (0, 0))  # of the map: key and value
        for part, kind, *place in _fields(source, begin, end):
            if kind != BYTES or part not in entry:
                raise source.error(f"has a damaged feature at byte {begin:,}")
            entry[part] = (place[0], place[1])
        key_at, key_end = entry[1]
        if key_end - key_at <= LONGEST_KEY:
            key = source.read(key_at, key_end - key_at)
            if key in found:
                raise source.error(f"has the feature {key!r} twice in the record at {start:,}")
            found[key] = entry[2]
    images = [key for key in IMAGE_KEYS if key in found]
    if not images or not any(key in found for key in LABEL_KEYS):
        raise source.error(
            f"has the features {sorted(key.decode(errors='replace') for key in found)} "
            f"at byte {start:,}; an image needs {' or '.join(key.decode() for key in IMAGE_KEYS)}, "
            f"and {' or '.join(key.decode() for key in LABEL_KEYS)}"
        )
    if len(images) > 1:
        raise source.error(f"has two images in the record at byte {start:,}: {images}")
    kind, values = _feature(source, *found[images[0]], images[0])
    if kind != BYTES_LIST or len(values) != 1:
        raise source.error(f"has {len(values)} values, not 1, as image at byte {start:,}")
    ((begin, end),) = values
    labels = tuple(_label(source, key, found[key]) if key in found else None for key in LABEL_KEYS)
    return begin, end - begin, labels


def _label(source: Window, key: bytes, place: tuple[int, int]) -> int | str:
    kind, values = _feature(source, *place, key)
    where = f"({key.decode()}, byte {place[0]:,})"
    if kind == FLOAT_LIST or not kind:
        raise source.error(f"has a label that is neither a number nor a name {where}")
    if len(values) != 1:
        raise source.error(f"has {len(values)} labels for an image {where}, not 1")
    begin, end = values[0]
    try:
        if kind == BYTES_LIST:
            return class_name(source.read(begin, min(end - begin, LONGEST_NAME + 1)))
        value = begin - (1 << 64) if begin >> 63 else begin
        return class_number(value)
    except LabelError as error:
        raise source.error(
            f"has the label {error.what} at byte {place[0]:,} ({key.decode()}): {error}"
        ) from None


def _feature(source: Window, start: int, end: int, key: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Which list a tf.train.Feature is, and its values: (begin, end) of bytes, (number, 0) of
    int64.
    """
    lists = list(_fields(source, start, end))
    if len(lists) > 1 or any(kind != BYTES for _, kind, _, _ in lists):
        raise source.error(f"has a damaged feature {key!r} at byte {start:,}")
    if not lists:
        return 0, []
    ((number, _, begin, stop),) = lists
    values = []
    if number == FLOAT_LIST:
        return number, []
    for field, kind, *place in _fields(source, begin, stop):
        if field != 1 or number not in (BYTES_LIST, INT64_LIST):
            raise source.error(f"has a damaged feature {key!r} at byte {start:,}")
        if number == BYTES_LIST and kind == BYTES:
            values.append((place[0], place[1]))
        elif number == INT64_LIST and kind == VARINT:
            values.append((place[0], 0))
        elif number == INT64_LIST and kind == BYTES:  # packed
            at = place[0]
            while at < place[1]:
                value, at = _varint(source, at, place[1])
                values.append((value, 0))
        else:
            raise source.error(f"has a damaged feature {key!r} at byte {start:,}")
    return number, values


def _only(source: Window, start: int, end: int, what: str) -> tuple[int, int]:
    """Where field 1 lies, the only field there may be."""
    fields = list(_fields(source, start, end))
    if [(number, kind) for number, kind, _, _ in fields] != [(1, BYTES)]:
        also = " (it may be a tf.train.SequenceExample)" if len(fields) > 1 else ""
        raise source.error(f"has a record at byte {start:,} that is no {what}{also}")
    return fields[0][2], fields[0][3]


def _fields(source: Window, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, begin, end) of each field of a protobuf message; of a varint its
    value.
    """
    at = start
    while at < end:
        tag, at = _varint(source, at, end)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(source, at, end)
            yield tag >> 3, kind, value, 0
            continue
        if kind == BYTES:
            size, at = _varint(source, at, end)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise source.error(f"has no tf.train.Example at byte {start:,}")
        if at + size > end:
            raise source.error(f"has a damaged tf.train.Example at byte {start:,}")
        yield tag >> 3, kind, at, at + size
        at += size


def _varint(source: Window, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends) of the number at `at`, which must end before `end`."""
    start, value, shift = at, 0, 0
    while at < end and shift < 70:
        byte = source.read(at, 1)[0]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80 and value >> 64 == 0:
            return value, at
    raise source.error(f"has a damaged tf.train.Example: no number at byte {start:,}")


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


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | BYTES]) + _encoded(len(data)) + data


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
