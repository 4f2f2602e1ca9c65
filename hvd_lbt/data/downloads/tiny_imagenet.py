"""tiny-ImageNet as it is downloaded: train/WNID/images/FILE, and val/images with one table."""

import os
from pathlib import Path

from hvd_lbt.data.downloads.common import (
    LABEL_ALONE,
    NO_LABELS,
    SAME_ROW,
    Download,
    Samples,
    note_classes,
    note_count,
    some,
    text_lines,
)
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.findings import is_litter
from hvd_lbt.data.formats.folder import ClassFiles, scan_class
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

ANNOTATIONS, WNIDS = "val_annotations.txt", "wnids.txt"
PUBLISHED = {"train": 100_000, "test": 10_000}


def find_tiny(source: Path) -> Path | None:
    """The folder with tiny-ImageNet's tree: SOURCE, or the only one below it."""
    for place in (source, source / "tiny-imagenet-200"):
        if (place / "val" / ANNOTATIONS).is_file() or (
            (place / WNIDS).is_file() and (place / "val" / "images").is_dir()
        ):
            return place
    return None


def open_tiny(place: Path) -> Download:
    """Open the tree. Raises UserError for an image without a label and a label of no class."""
    root = place / "train"
    if not root.is_dir():
        raise UserError(f"{printable(place)} has no training images: train/WNID/images is missing.")
    train = Samples()
    folders = []
    for entry in sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name)):
        if entry.is_dir() and not is_litter(entry.name):
            folders.append(entry.name)
        else:
            reason = found.HIDDEN if is_litter(entry.name) else found.NO_IMAGE
            train.findings.add(reason, entry.name)
    classes = tuple(folders)
    if (place / WNIDS).is_file():
        lines = [line.strip() for line in text_lines(place / WNIDS)]
        classes = tuple(sorted(set(lines)))
        if len(classes) < len(lines) or not all(classes):
            raise UserError(f"{printable(place / WNIDS)} has a class twice, or an empty line.")
        if unknown := sorted(set(folders) - set(classes)):
            raise UserError(
                f"{printable(root)} has folders that {WNIDS} does not list: {some(unknown)}."
            )
    if not folders:
        raise UserError(f"{printable(root)} has no class folders: train/WNID/images is missing.")
    for label, name in enumerate(classes):
        if name in folders:
            _class_images(root / name, label, name, train)
    if not len(train):
        raise UserError(f"{printable(root)} has no images in train/WNID/images.")
    note_classes(train.findings, train.labels, classes)
    note_count(train.findings, len(train), PUBLISHED["train"], "train")
    test = _validation(place, classes)
    if (place / "test").is_dir():
        test.findings.add(NO_LABELS, "test/")
    watched = [root, place / "val" / "images", place / "val" / ANNOTATIONS]
    watched += [root / name / "images" for name in folders]
    return Download(
        what="tiny-ImageNet",
        train=train.store("folder", root, None, classes),
        test=test.store("folder", place / "val" / "images", None, classes),
        watched=tuple(watched),
    )


def _class_images(folder: Path, label: int, name: str, into: Samples) -> None:
    """The images of one class: FOLDER/images/FILE, and nothing beside it but text."""
    files, beside = ClassFiles(), ClassFiles()
    inner = folder / "images"
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == "images":
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir() or ending in found.SUFFIXES:
                raise UserError(
                    f"{printable(entry.path)} lies beside images/: tiny-ImageNet has a class's "
                    "images in train/WNID/images, and whether this is one is not certain."
                )
            if not entry.name.endswith("_boxes.txt"):
                beside.findings.add(found.NO_IMAGE, f"{name}/{entry.name}")
    if inner.is_dir():
        scan_class(inner, files)
    into.findings.merge(files.findings, f"{name}/")
    into.findings.merge(beside.findings)
    for file in files.names:
        into.add(label, os.fsencode(name) + b"/images/" + file)


def _validation(place: Path, classes: tuple[str, ...]) -> Samples:
    """The validation images with the labels of val_annotations.txt: FILE, WNID and a box."""
    table, folder = place / "val" / ANNOTATIONS, place / "val" / "images"
    for path in (table, folder):
        if not path.exists():
            raise UserError(
                f"{printable(path)} is missing: the validation images have no labels without it."
            )
    into, files = Samples(), ClassFiles()
    scan_class(folder, files)
    into.findings.merge(files.findings)
    label_of = {name: label for label, name in enumerate(classes)}
    wanted: dict[str, str] = {}
    for number, line in enumerate(text_lines(table), 1):
        cells = line.split("\t") if "\t" in line else line.split()
        where = f"{printable(table)} has in line {number:,} "
        if len(cells) not in (2, 6) or not cells[0]:
            raise UserError(f"{where}{line[:60]!r}, where FILE, WNID and a box belong.")
        if cells[1] not in label_of:
            raise UserError(f"{where}the class {cells[1][:40]!r}, which is none of {len(classes)}.")
        if wanted.setdefault(cells[0], cells[1]) != cells[1]:
            raise UserError(f"{where}a second class for {cells[0]!r}: an image has one label.")
        if len(wanted) < number - into.findings.counts.get(SAME_ROW, 0):
            into.findings.add(SAME_ROW, f"{ANNOTATIONS}, line {number:,}")
    there = {os.fsdecode(name) for name in files.names}
    if without := sorted(there - wanted.keys()):
        raise UserError(
            f"{printable(table)} has no label for {len(without):,} of {len(there):,} images in "
            f"{printable(folder)} ({some(without)})."
        )
    for name, wnid in wanted.items():
        if name in there:
            into.add(label_of[wnid], os.fsencode(name))
        else:
            into.findings.add(LABEL_ALONE, name)
    if not len(into):
        raise UserError(f"{printable(folder)} has no images.")
    note_count(into.findings, len(into), PUBLISHED["test"], "test")
    return into
