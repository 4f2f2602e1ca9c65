"""MNIST, and what has its format and names (Fashion-MNIST, KMNIST): idx files, packed or not.

Format: http://yann.lecun.com/exdb/mnist. Big-endian: 0, 0, 8 (bytes), the number of dimensions,
each dimension as 32 bits, the values. Class names are the labels: the files have no others.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.downloads.arrays import array_store
from hvd_lbt.data.downloads.common import Download, note_classes, note_count, what_is
from hvd_lbt.data.formats import Findings
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.reading import read_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

PUBLISHED = {"train": 60_000, "test": 10_000}
BEGINS = {"train": "train", "test": "t10k"}
LARGEST = 1 << 30  # bytes of one file, unpacked: MNIST's largest has 47 MB


def _file(folder: Path, start: str, what: str, dimensions: int) -> Path | None:
    """START-WHAT-idxN-ubyte, with a dot for the dash before idx as some mirrors have it, or .gz."""
    there = [
        folder / f"{start}-{what}{mark}idx{dimensions}-ubyte{end}"
        for mark in "-."
        for end in ("", ".gz")
        if (folder / f"{start}-{what}{mark}idx{dimensions}-ubyte{end}").is_file()
    ]
    return there[0] if there else None


def find_mnist(source: Path) -> Path | None:
    """The folder with the four files: SOURCE, SOURCE/raw, or SOURCE/MNIST/raw (torchvision's)."""
    for place in (source, source / "raw", source / "MNIST" / "raw"):
        if place.is_dir() and any(
            _file(place, start, "images", 3) or _file(place, start, "labels", 1)
            for start in BEGINS.values()
        ):
            return place
    return None


def open_mnist(place: Path) -> Download:
    """Read all images into memory: 47 MB for the training images."""
    read, watched = {}, []
    for split, start in BEGINS.items():
        values = []
        for what, dimensions in (("images", 3), ("labels", 1)):
            file = _file(place, start, what, dimensions)
            if file is None:
                raise UserError(
                    f"{printable(place)} has no {start}-{what}-idx{dimensions}-ubyte (or .gz): "
                    "MNIST has four files, images and labels of train and of t10k."
                )
            watched.append(file)
            values.append(_read_idx(file, dimensions))
        images, labels = values
        if len(images) != len(labels) or not len(labels):
            raise UserError(
                f"{printable(place)} has {len(images):,} images and {len(labels):,} labels of "
                f"{start}: files of two data sets are mixed, or one is cut off."
            )
        read[split] = images, labels
    sizes = {images.shape[1:] for images, _ in read.values()}
    if len(sizes) > 1:
        raise UserError(f"{printable(place)} has images of two sizes in train and t10k: {sizes}.")
    classes = tuple(map(str, range(max(10, int(read["train"][1].max()) + 1))))
    if (largest := int(read["test"][1].max())) >= len(classes):
        raise UserError(
            f"{printable(place)} has the label {largest} in t10k and none above "
            f"{len(classes) - 1} in train: they are of two data sets."
        )
    stores: dict[str, Store] = {}
    for split, (images, labels) in read.items():
        findings = Findings()
        note_classes(findings, labels.tolist(), classes)
        note_count(findings, len(labels), PUBLISHED[split], split)
        stores[split] = array_store(
            "mnist", place, watched, classes, labels.astype(np.int32), images, findings
        )
    return Download(
        what="MNIST", train=stores["train"], test=stores["test"], watched=tuple(watched)
    )


def _read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an idx file. Raises UserError for another format and for a wrong length."""
    raw = _unpacked(file)
    head = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < head:
        what = "empty" if not raw else f"begins with {raw[:4].hex(' ')}"
        raise UserError(
            f"{printable(file)} is no idx file of {dimensions} dimensions of bytes "
            f"(00 00 08 {dimensions:02}; it {'is ' if not raw else ''}{what}): {what_is(file)}."
        )
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, head, 4))
    count = 1
    for side in shape:
        count *= side
    if count != len(raw) - head or 0 in shape[1:]:
        raise UserError(
            f"{printable(file)} has {len(raw) - head:,} bytes after its header, which says "
            f"{' × '.join(map(str, shape))}: it is cut off or damaged. Download it again."
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _unpacked(file: Path) -> bytes:
    try:
        if not file.name.endswith(".gz"):
            return read_regular(file, LARGEST)
        read_regular(file, LARGEST)  # raises for what is no regular file, before gzip opens it
        with gzip.open(file) as stream:
            raw = stream.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{printable(file)} cannot be read ({error}): {what_is(file)}.") from error
    if len(raw) > LARGEST:
        raise UserError(
            f"{printable(file)} unpacks to more than {LARGEST >> 20:,} MB: it is not MNIST's."
        )
    return raw
