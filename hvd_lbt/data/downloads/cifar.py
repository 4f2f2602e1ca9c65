"""CIFAR-10 and CIFAR-100 as they are published: the python and the binary version, packed or not.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html. Labels are the published numbers; class names
are those of batches.meta, or of meta (CIFAR-100: the 100 fine classes).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.downloads.arrays import array_store
from hvd_lbt.data.downloads.common import Download, note_classes, note_count, text_lines
from hvd_lbt.data.downloads.packed import read_packed
from hvd_lbt.data.downloads.plain_pickle import read_pickle
from hvd_lbt.data.formats import Findings
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.reading import read_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

SIZE, PIXELS = 32, 3 * 32 * 32
PUBLISHED = {"train": 50_000, "test": 10_000}
LARGEST_FILE = 512 << 20  # bytes of one file: CIFAR-100's train has 155 MB
LARGEST_ARCHIVE = 1 << 30  # bytes of an archive, unpacked


@dataclass(frozen=True, kw_only=True)
class Version:
    """One of the four published forms. names: the file of class names; pixels_at: of a record."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    binary: bool
    fine: bool

    def files(self) -> tuple[str, ...]:
        """All files that are needed."""
        return (*self.train, *self.test, self.names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
VERSIONS = (
    Version(
        folder="cifar-10-batches-py", archive="cifar-10-python.tar.gz", train=_BATCHES,
        test=("test_batch",), names="batches.meta", binary=False, fine=False,
    ),
    Version(
        folder="cifar-10-batches-bin", archive="cifar-10-binary.tar.gz",
        train=tuple(f"{name}.bin" for name in _BATCHES), test=("test_batch.bin",),
        names="batches.meta.txt", binary=True, fine=False,
    ),
    Version(
        folder="cifar-100-python", archive="cifar-100-python.tar.gz", train=("train",),
        test=("test",), names="meta", binary=False, fine=True,
    ),
    Version(
        folder="cifar-100-binary", archive="cifar-100-binary.tar.gz", train=("train.bin",),
        test=("test.bin",), names="fine_label_names.txt", binary=True, fine=True,
    ),
)  # fmt: skip


def find_cifar(source: Path) -> tuple[Version, Path] | None:
    """Which version SOURCE is, and its archive or folder. Raises UserError for several."""
    there = []
    for version in VERSIONS:
        if source.is_file():
            if source.name in (version.archive, version.archive.removesuffix(".gz")):
                return version, source
            continue
        for place in (source, source / version.folder):
            markers = (version.train[0], version.names)
            if place.is_dir() and all((place / name).is_file() for name in markers):
                there.append((version, place))
                break
        else:
            for name in (version.archive, version.archive.removesuffix(".gz")):
                if (source / name).is_file():
                    there.append((version, source / name))
                    break
    if len(there) > 1:
        names = ", ".join(printable(place.name) for _, place in there)
        raise UserError(
            f"{printable(source)} has several data sets ({names}): name one, as in "
            f"{printable(there[0][1])}."
        )
    return there[0] if there else None


def open_cifar(version: Version, place: Path) -> Download:
    """Read all images into memory: 150 MB for the training images."""
    if place.is_file():
        files = read_packed(place, version.files(), LARGEST_ARCHIVE, version.archive)
    else:
        files = _read(version, place)
    classes = _class_names(version, _named(place, version.names), files[version.names])
    root = place.parent if place.is_file() else place
    watched = [place] if place.is_file() else [place / name for name in version.files()]
    stores: dict[str, Store] = {}
    for split, names in (("train", version.train), ("test", version.test)):
        parts = [_images(version, _named(place, name), files.pop(name), classes) for name in names]
        labels = np.concatenate([its for its, _ in parts])
        findings = Findings()
        note_classes(findings, labels.tolist(), classes)
        note_count(findings, len(labels), PUBLISHED[split], split)
        stores[split] = array_store(
            "cifar", root, watched, classes, labels,
            np.concatenate([pixels for _, pixels in parts]), findings,
        )  # fmt: skip
    what = f"CIFAR-{100 if version.fine else 10}"
    return Download(what=what, train=stores["train"], test=stores["test"], watched=tuple(watched))


def _named(place: Path, name: str) -> Path:
    """What errors call a file: FOLDER/NAME or ARCHIVE:NAME."""
    return Path(f"{place}:{name}") if place.is_file() else place / name


def _read(version: Version, place: Path) -> dict[str, bytes]:
    """The files of an unpacked version."""
    files = {}
    for name in version.files():
        try:
            files[name] = read_regular(place / name, LARGEST_FILE)
        except OSError as error:
            raise UserError(
                f"{printable(place / name)} cannot be read ({error.strerror}): the data set has "
                f"{', '.join(version.files())}."
            ) from error
    return files


def _class_names(version: Version, file: Path, raw: bytes) -> tuple[str, ...]:
    if version.binary:
        names = [line.strip() for line in text_lines(file, raw)]
    else:
        key = "fine_label_names" if version.fine else "label_names"
        listed = read_pickle(file, raw).get(key)
        if not isinstance(listed, list) or not all(isinstance(n, bytes | str) for n in listed):
            raise UserError(f"{printable(file)} has no list {key} of class names.")
        names = [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in listed]
    expected = 100 if version.fine else 10
    if len(set(names)) != expected or not all(names):
        raise UserError(
            f"{printable(file)} has {len(names):,} class names, {len(set(names)):,} of them "
            f"different, and {expected} are published."
        )
    return tuple(names)


def _images(
    version: Version, file: Path, raw: bytes, classes: tuple[str, ...]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Labels and pixels, uint8 (n, 32, 32, 3), of one file: red, green and blue planes."""
    read = _binary if version.binary else _pickled
    labels, planes = read(file, raw, "fine_labels" if version.fine else "labels")
    if not len(labels):
        raise UserError(f"{printable(file)} has no images.")
    if labels.min() < 0 or labels.max() >= len(classes):
        at = int(np.flatnonzero((labels < 0) | (labels >= len(classes)))[0])
        raise UserError(
            f"{printable(file)} gives image {at:,} the label {labels[at]:,}, and the labels of "
            f"{len(classes)} classes are 0 to {len(classes) - 1}."
        )
    pixels = planes.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    return labels.astype(np.int32), np.ascontiguousarray(pixels)


def _binary(file: Path, raw: bytes, which: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    before = 2 if which == "fine_labels" else 1  # a coarse label lies before the fine one
    record = before + PIXELS
    if len(raw) % record:
        raise UserError(
            f"{printable(file)} has {len(raw):,} bytes, no multiple of a record's {record:,}: it "
            "is cut off or damaged. Download it again."
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return records[:, before - 1].astype(np.int64), records[:, before:]


def _pickled(file: Path, raw: bytes, which: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    values = read_pickle(file, raw)
    data, labels = values.get("data"), values.get(which)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS:
        shape = getattr(data, "shape", None)
        raise UserError(
            f"{printable(file)} has data of shape {shape}, and n × {PIXELS:,} bytes belong there."
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{printable(file)} has no list {which} of whole numbers.")
    if len(labels) != len(data):
        raise UserError(f"{printable(file)} has {len(data):,} images and {len(labels):,} {which}.")
    if any(abs(label) > 10**6 for label in labels):
        raise UserError(f"{printable(file)} has a label beyond all classes: {max(labels)}.")
    return np.array(labels, np.int64), data
