"""ImageNet (ILSVRC2012) as it is downloaded: its archives, Kaggle's tree, or a flat `val`.

Training images: the archive (a tar of 1,000 tars) or train/WNID/FILE. Validation images: the
archive, or a folder without classes. Their labels: `imagenet_labels`. All give the same samples
with the same labels in the same order.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from hvd_lbt import terminal
from hvd_lbt.data.downloads.common import (
    LABEL_ALONE,
    NO_LABELS,
    OTHER_COUNT,
    Download,
    Samples,
    note_classes,
    note_count,
    some,
)
from hvd_lbt.data.downloads.imagenet_labels import NEEDED, VALIDATION, Labels, find_labels
from hvd_lbt.data.downloads.tars import WNID, classes_of_tars, scan_flat, scan_tars
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.folder import ClassFiles, scan_class
from hvd_lbt.data.index import open_index
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.source import SPLITS
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

TRAIN_TAR, VAL_TAR, TEST_TARS = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", (
    "ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar")  # fmt: skip
TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # of Kaggle, below its folder
PUBLISHED = {"train": 1_281_167, "test": 50_000}
TIMEOUT = 300.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where the images of each split are; a folder or an archive, None if there is none.

    tree: the folder above train/. flat, val_tar: without classes. sorted_val: whether the tree's
    validation images lie in class folders. unused: what is there and not used.
    """

    source: Path
    tree: Path | None = None
    train_tar: Path | None = None
    flat: Path | None = None
    val_tar: Path | None = None
    sorted_val: bool = False
    unused: tuple[tuple[found.Reason, str], ...] = ()


def find_imagenet(source: Path) -> Parts | None:
    """What SOURCE has of ImageNet as it is downloaded; None if it is another data set.

    Class folders for both splits are no download: None.
    """
    nested = next((source / tree for tree in TREES if (source / tree).is_dir()), None)
    place = nested or source
    tree = place if _has_classes(place / "train") else None
    flat, sorted_val = None, False
    for word in SPLITS["test"]:
        if _is_flat(place / word):
            flat = flat or place / word
        elif _has_classes(place / word):
            sorted_val = True
    train_tar, val_tar = (_archive(source, name) for name in (TRAIN_TAR, VAL_TAR))
    unused = []
    if tree is not None and train_tar is not None:
        unused.append((found.NOT_USED, f"{train_tar.name}: train/ is used"))
        train_tar = None
    if (flat is not None or sorted_val) and val_tar is not None:
        unused.append((found.NOT_USED, f"{val_tar.name}: the folder is used"))
        val_tar = None
    if sorted_val:
        flat = None
    if not (train_tar or val_tar or flat or (nested and (tree or sorted_val))):
        return None
    unused += [(NO_LABELS, name) for name in TEST_TARS if _archive(source, name)]
    if flat is not None and flat.name != "test" and (place / "test").is_dir():
        unused.append((NO_LABELS, "test/"))
    return Parts(
        source=source,
        tree=tree,
        train_tar=train_tar,
        flat=flat,
        val_tar=val_tar,
        sorted_val=sorted_val,
        unused=tuple(unused),
    )


def open_imagenet(parts: Parts) -> Download:
    """Read headers, names and labels; no image. Raises UserError for what is not certain."""
    source = parts.source
    if parts.train_tar is None and parts.tree is None:
        raise UserError(
            f"{printable(source)} has no training images of ImageNet: {TRAIN_TAR}, or "
            "train/WNID/FILE, belongs there."
        )
    needs_labels = parts.flat is not None or parts.val_tar is not None
    labels = find_labels(_label_folders(parts))
    if needs_labels and labels is None:
        raise UserError(
            f"{printable(parts.flat or parts.val_tar)} has ImageNet's validation images without "
            f"their labels. Needed in {printable(source)} is {NEEDED}."
        )
    listed = labels.wnids if labels is not None else None
    if parts.train_tar is not None:
        train = _train_of_tars(parts, parts.train_tar, listed)
    else:
        assert parts.tree is not None
        index = open_index(parts.tree, "train", TIMEOUT)
        _check_classes(index.token_names, listed, index.root)
        train = Store(index, listed or tuple(sorted(map(str, index.token_names))))
    _compare_train(train, labels)
    test = None
    if needs_labels:
        assert labels is not None
        test = _validation(parts, labels, train.classes)
    elif parts.sorted_val:
        assert parts.tree is not None or parts.train_tar is not None
        test = Store(open_index(_above(parts), "test", TIMEOUT), train.classes)
    noted = (test or train).index.findings
    for reason, name in parts.unused:
        noted.add(reason, name)
    watched = [path for path in (parts.train_tar, parts.val_tar, parts.flat) if path is not None]
    if parts.train_tar is None:
        watched += [train.index.root, *(train.index.root / name for name in train.classes)]
    if labels is not None:
        watched += labels.files
    return Download(what="ImageNet", train=train, test=test, watched=tuple(watched))


def _above(parts: Parts) -> Path:
    """The folder whose val/ has class folders."""
    return next((one for tree in TREES if (one := parts.source / tree).is_dir()), parts.source)


def _label_folders(parts: Parts) -> list[Path]:
    """Where the labels may lie: in SOURCE, a folder below it, or above Kaggle's tree."""
    source = parts.source
    below = sorted(entry for entry in source.iterdir() if entry.is_dir())
    folders = [source, source / "ILSVRC", *below]
    resolved = source.resolve()  # it may be within Kaggle's folder
    above = {"ILSVRC": 1, "Data": 2, "CLS-LOC": 3}.get(resolved.name, 0)
    return folders + list(resolved.parents[:above])


def _archive(source: Path, name: str) -> Path | None:
    """An archive in SOURCE or in a folder below it. Raises UserError if it is there twice."""
    there = [file for file in (source / name, *sorted(source.glob(f"*/{name}"))) if file.is_file()]
    if len(there) > 1:
        raise UserError(
            f"{printable(source)} has {name} twice ({some(there)}): which one is meant? Remove one."
        )
    return there[0] if there else None


def _has_classes(folder: Path) -> bool:
    """Whether a folder has folders that are called as ImageNet's classes."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(WNID.fullmatch(entry.name) and entry.is_dir() for entry in entries)


def _is_flat(folder: Path) -> bool:
    """Whether validation images lie directly in a folder."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(VALIDATION.match(entry.name) and not entry.is_dir() for entry in entries)


def _check_classes(
    there: tuple[int | str, ...], listed: tuple[str, ...] | None, where: object
) -> None:
    unknown = sorted(set(map(str, there)) - set(listed)) if listed is not None else []
    if unknown:
        raise UserError(
            f"{printable(where)} has classes that the labels' {len(listed or ()):,} do not have: "
            f"{some(unknown)}. The labels are of another data set, or these folders are no classes."
        )


def _train_of_tars(parts: Parts, file: Path, listed: tuple[str, ...] | None) -> Store:
    """The training images of the tar of tars."""
    samples = Samples()
    tars = classes_of_tars(file, samples.findings)
    _check_classes(tuple(name for name, _, _ in tars), listed, file)
    classes = listed or tuple(name for name, _, _ in tars)
    label_of = {name: label for label, name in enumerate(classes)}
    console = terminal.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        what = terminal.description(f"reading the headers of {file.name}")
        task = bar.add_task(what, total=len(tars))
        scan_tars(file, tars, label_of, samples, lambda _: bar.update(task, advance=1))
    if not len(samples):
        raise UserError(f"{printable(file)} has no images: it is another archive.")
    note_classes(samples.findings, samples.labels, classes)
    return samples.store("imagenet tar", parts.source, file, classes)


def _compare_train(train: Store, labels: Labels | None) -> None:
    """Compare the counts of training images with the published ones, of all and of each class."""
    findings = train.index.findings
    note_count(findings, len(train), PUBLISHED["train"], "train")
    if labels is None or not labels.train_counts:
        return
    counts = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    for wnid, here in zip(train.classes, counts, strict=True):
        published = labels.train_counts.get(wnid)
        if here and published is not None and here != published:
            findings.add(OTHER_COUNT, f"{wnid}: {here:,} here, {published:,} published")


def _validation(parts: Parts, labels: Labels, classes: tuple[str, ...]) -> Store:
    """The validation images with their labels."""
    where = parts.flat or parts.val_tar
    assert where is not None
    if parts.flat is not None:
        files = ClassFiles()
        scan_class(parts.flat, files)
        images, into = [(os.fsdecode(name), 0, 0) for name in files.names], Samples()
        into.findings.merge(files.findings)
    else:
        assert parts.val_tar is not None
        images, into = scan_flat(parts.val_tar)
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(labels.of_image.values()) - label_of.keys())
    if unknown:
        raise UserError(
            f"{labels.source} has classes that the training images do not have: {some(unknown)}. "
            "The labels are of another data set, or training images are missing."
        )
    without = [name for name, _, _ in images if _stem(name) not in labels.of_image]
    if without:
        raise UserError(
            f"{labels.source} has no label for {len(without):,} of {len(images):,} images in "
            f"{printable(where)} ({some(without)}): it is not theirs, or it is cut off."
        )
    if not images:
        raise UserError(f"{printable(where)} has no images: download it again.")
    for name, offset, size in images:
        into.add(label_of[labels.of_image[_stem(name)]], os.fsencode(name), offset, size)
    there = {_stem(name) for name, _, _ in images}
    for name in labels.of_image:
        if name not in there:
            into.findings.add(LABEL_ALONE, name)
    into.findings.merge(labels.findings)
    note_count(into.findings, len(images), PUBLISHED["test"], "test")
    root = parts.flat or parts.source
    return into.store("folder" if parts.flat else "imagenet tar", root, parts.val_tar, classes)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
