"""What all downloaded data sets share: samples under names, small text files, error texts."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hvd_lbt.data.formats import Findings, other_format
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.findings import Reason
from hvd_lbt.data.index import Index, Names
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.reading import read_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

LARGEST_TEXT = 64 << 20  # bytes of a table of labels: LOC_val_solution.csv has 2.5 MB
SHOWN = 5  # names of a long list that an error shows

NO_LABELS = Reason(
    "part without labels, which is not used", "parts without labels, which are not used"
)
LABEL_ALONE = Reason(
    "label whose image is not there", "labels whose images are not there", "warning"
)
NO_IMAGES = Reason(
    "class without images, which keeps its label",
    "classes without images, which keep their labels",
    "warning",
)
OTHER_COUNT = Reason(
    "count of images that is not the published one",
    "counts of images that are not the published ones",
    "warning",
)
SAME_MEMBER = Reason(
    "image that is in the archive twice with the same bytes, and used once",
    "images that are in the archive twice with the same bytes, and used once",
    "warning",
)
ODD_NAME = Reason(
    "image whose name begins with another class's id",
    "images whose names begin with other classes' ids",
    "warning",
)
SAME_ROW = Reason(
    "row that says the same as an earlier one", "rows that say the same as earlier ones", "warning"
)


@dataclass(frozen=True, kw_only=True)
class Download:
    """A downloaded data set, opened.

    what: for messages. watched: the files and folders that it was made of. Findings are those of
    the stores' indexes.
    """

    what: str
    train: Store
    test: Store | None
    watched: tuple[Path, ...]

    def stores(self) -> dict[str, Store]:
        """The splits that there are."""
        return {"train": self.train} | ({"test": self.test} if self.test is not None else {})

    def fingerprint(self) -> str:
        """SHA-256 (hex) of size and times of all that is watched."""
        stamps = []
        for path in self.watched:
            try:
                about = os.stat(path)
                stamps.append((about.st_size, about.st_mtime_ns, about.st_ctime_ns))
            except OSError:
                stamps.append((-1, -1, -1))
        return hashlib.sha256(repr(stamps).encode()).hexdigest()


class NamedStore(Store):
    """Samples under names of their own, CLASS/FILE, wherever their bytes lie."""

    def __init__(self, index: Index, classes: tuple[str, ...], names: Names):
        super().__init__(index, classes)
        self._names = names

    def member(self, index: int) -> str:
        """CLASS/FILE of sample `index`, as the data set has it as class folders."""
        return self._names[index]

    def name(self, index: int) -> str:
        """The file, and where it is an archive, the image in it."""
        if self.index.extents is None:
            return super().name(index)
        archive = self.index.files[int(self.index.extents[index, 0])]
        return f"{self.index.root / archive}:{self.member(index)}"


@dataclass
class Samples:
    """Samples as they are found: label, FILE, and where the bytes lie."""

    labels: array = field(default_factory=lambda: array("i"))
    names: list[bytes] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    findings: Findings = field(default_factory=Findings)

    def add(self, label: int, name: bytes, offset: int = 0, length: int = 0) -> None:
        """Note one."""
        self.labels.append(label)
        self.names.append(name)
        self.offsets.append(offset)
        self.lengths.append(length)

    def __len__(self) -> int:
        return len(self.names)

    def store(self, kind: str, root: Path, archive: Path | None, classes: tuple[str, ...]) -> Store:
        """The store: sorted by class, then FILE as bytes, as class folders are.

        archive: what the bytes lie in, None for files ROOT/FILE.
        """
        order = sorted(range(len(self)), key=lambda at: (self.labels[at], self.names[at]))
        labels = np.frombuffer(self.labels, np.int32)[order] if order else np.zeros(0, np.int32)
        folders = [os.fsencode(name) for name in classes]
        files = [self.names[at] for at in order]
        members = Names.of([folders[label] + b"/" + os.path.basename(name) for label, name in zip(
            labels, files, strict=True)])  # fmt: skip
        extents = None
        if archive is not None:
            places = (np.frombuffer(its, np.int64)[order] for its in (self.offsets, self.lengths))
            extents = np.stack([np.zeros(len(order), np.int64), *places], axis=1)
            files = [os.fsencode(archive.relative_to(root))]
        index = Index(
            kind=kind,
            root=root,
            files=Names.of(files),
            tokens=labels,
            token_names=classes,
            extents=extents,
            findings=self.findings,
        )
        return NamedStore(index, classes, members)


def some(names: Iterable[object]) -> str:
    """The first few of many names, for an error."""
    listed = list(map(printable, names))
    more = f", … ({len(listed):,} in all)" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def raise_all(errors: Sequence[str]) -> None:
    """Raise a UserError with the first of the errors and how many more there are."""
    if errors:
        more = f" ({len(errors) - 1:,} more like it)" if len(errors) > 1 else ""
        raise UserError(errors[0] + more)


def what_is(file: Path) -> str:
    """What a file is instead of what its name says, as the end of a sentence."""
    what = other_format(file)
    return f"it is {what}" if what else "it is damaged, or something else: download it again"


def text_lines(file: Path, raw: bytes | None = None) -> list[str]:
    """The lines of a small text file in UTF-8, without empty lines at the end.

    raw: its bytes, where they are known. Raises UserError for what is no text: a web page, zero
    bytes, another encoding, or more than LARGEST_TEXT bytes.
    """
    if raw is None:
        try:
            raw = read_regular(file, LARGEST_TEXT)
        except OSError as error:
            raise UserError(f"{printable(file)} cannot be read ({error.strerror}).") from error
    if raw.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{printable(file)} is a web page, not the file: download it again.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{printable(file)} is no text in UTF-8: byte {raw[error.start]:#04x} at byte "
            f"{error.start:,}. Download it again."
        ) from error
    if "\0" in text:
        raise UserError(f"{printable(file)} has zero bytes: it is damaged. Download it again.")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{printable(file)} is empty: download it again.")
    return lines


def note_classes(findings: Findings, labels: Iterable[int], classes: tuple[str, ...]) -> None:
    """Count the classes without images, which keep their labels."""
    there = set(labels)
    for label, name in enumerate(classes):
        if label not in there:
            findings.add(NO_IMAGES, name)
    if len(there) == 1:
        findings.add(found.ONE_CLASS, classes[there.pop()])


def note_count(findings: Findings, count: int, published: int, split: str) -> None:
    """Count a number of images that is not the published one. split: train or test."""
    what = "training" if split == "train" else "validation or test"
    if count != published:
        findings.add(OTHER_COUNT, f"{count:,} here, {published:,} published for {what}")
