"""Open the data set that `--data` names: the stores of its training and test images."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_lbt import terminal
from hvd_lbt.data.class_names import CLASSES_FILE, read_classes
from hvd_lbt.data.digits import write_digits
from hvd_lbt.data.downloads import Download, open_small
from hvd_lbt.data.formats import SplitError
from hvd_lbt.data.index import open_index
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.order import SampleStream
from hvd_lbt.data.own_data import OwnData, own_splits, own_test_split
from hvd_lbt.data.raw_layouts import raw_layout
from hvd_lbt.data.reading import bounded
from hvd_lbt.data.synthetic import SYNTHETIC, SyntheticStore, synthetic_splits
from hvd_lbt.data.teacher import (
    TEACHER,
    TRAIN_SAMPLES,
    TeacherStore,
    teacher_splits,
    teacher_test_split,
)
from hvd_lbt.errors import ReadError, UserError
from hvd_lbt.own import is_object_name
from hvd_lbt.recipe import Recipe
from hvd_lbt.world import RANK_VARIABLES

TIMEOUT = 300.0


Splits = (
    tuple[Store, Store]
    | tuple[OwnData, OwnData]
    | tuple[SyntheticStore, SyntheticStore]
    | tuple[TeacherStore, TeacherStore]
)


def open_data(data: Path | None, recipe: Recipe) -> Splits:
    """The splits that `--data` names.

    None: the built-in digits; `synthetic`: images in memory; `teacher`: random images that a fixed
    network labels; `package.module:function`: a Python data set, unless there is a folder of this
    name. Raises UserError too where data.shuffle_block cannot be, before anything is trained.
    """
    splits = _open(data, recipe)
    block = recipe.data.shuffle_block
    if block is not None and data == SYNTHETIC:
        raise UserError(
            f"data.shuffle_block: {block} has no effect with --data synthetic, which reads "
            "nothing: leave it out."
        )
    SampleStream(len(splits[0]), 0, block, recipe.data.blocks_in_window)
    return splits


def _open(data: Path | None, recipe: Recipe) -> Splits:
    if is_made(data, SYNTHETIC):
        return synthetic_splits(recipe)
    if is_made(data, TEACHER):
        return teacher_splits(recipe)
    if is_own(data):
        return own_splits(str(data), recipe.model.num_classes, recipe.data.classes)
    return open_splits(data or write_digits(), recipe.data.classes, recipe.data.timeout)


def open_test_data(
    data: Path | None, classes: tuple[str, ...], recipe: Recipe
) -> Store | OwnData | TeacherStore:
    """The test split that `--data` names, for a network with these classes."""
    if is_made(data, TEACHER):
        return teacher_test_split(classes, recipe)
    if is_own(data):
        return own_test_split(str(data), classes)
    file, timeout = recipe.data.classes, recipe.data.timeout
    return open_test_split(data or write_digits(), classes, file, timeout)


def count_train_samples(data: Path, recipe: Recipe) -> int:
    """How many training samples `--data` has."""
    if is_made(data, TEACHER):
        return recipe.data.train_samples or TRAIN_SAMPLES
    if is_own(data):
        return len(own_splits(str(data), recipe.model.num_classes, recipe.data.classes)[0])
    return len(open_train_split(data))


def is_made(data: Path | None, name: Path) -> bool:
    """Whether `--data` names the made data set of this name: no file or folder is called so."""
    return data == name and not name.exists()


def is_own(data: Path | None) -> bool:
    """Whether `--data` names a Python data set: no folder is called so."""
    return data is not None and is_object_name(str(data)) and not data.exists()


def open_splits(
    data: Path, classes_file: str | Path | None = None, timeout: float = TIMEOUT
) -> tuple[Store, Store]:
    """The training and test splits of `data`, whatever their format.

    classes_file: one class name a line; the n-th line's has label n, from 0. None:
    DATA/classes.txt, if there is one.
    """
    train = open_train_split(data, classes_file, timeout)
    return train, open_test_split(data, train.classes, classes_file, timeout)


def open_train_split(
    data: Path, classes_file: str | Path | None = None, timeout: float = TIMEOUT
) -> Store:
    """The training split; its classes are the data set's."""
    with _raw_layout_named(data):
        try:
            index = open_index(data, "train", timeout)
        except ReadError:
            raise
        except UserError:
            if (found := _small(data, classes_file)) is None:
                raise
            return _told(found.train, "train")
        return Store(index, named=_named(data, classes_file, timeout, index.token_names))


def open_test_split(
    data: Path,
    classes: tuple[str, ...],
    classes_file: str | Path | None = None,
    timeout: float = TIMEOUT,
) -> Store:
    """The test split (DATA/test, or DATA/val where there is none) with the training's classes."""
    with _raw_layout_named(data):
        try:
            index = open_index(data, "test", timeout)
        except ReadError:
            raise
        except UserError:
            if (found := _small(data, classes_file)) is None or found.test is None:
                raise
            if found.train.classes != classes:
                raise UserError(
                    f"{data} has other classes than the training images' {len(classes):,}."
                ) from None
            return _told(found.test, "test")
        named = _named(data, classes_file, timeout, index.token_names, classes)
        return Store(index, classes, named)


def _small(data: Path, classes_file: str | Path | None) -> Download | None:
    """CIFAR's or MNIST's own files, in memory; None if DATA has none of them."""
    try:
        found = open_small(data)
    except OSError as error:
        raise UserError(f"--data {data} cannot be read ({error}).") from error
    if found is not None and classes_file is not None:
        raise UserError(
            f"data.classes {classes_file} has no effect: {found.what} has classes of its own."
        )
    return found


def _told(store: Store, split: str) -> Store:
    """The store; what was found in it is printed by the first rank."""
    if all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES):
        console = terminal.console(stderr=True)
        for line in store.index.findings.lines():
            terminal.say(console, f"{split}: {line}")
    return store


@contextmanager
def _raw_layout_named(data: Path) -> Iterator[None]:
    """Add what DATA is to the error of a data set that cannot be opened as it was downloaded."""
    try:
        yield
    except ReadError:  # the storage failed
        raise
    except UserError as error:
        if what := raw_layout(data):
            if isinstance(error, SplitError):
                error.findings.errors.append(what)
            error.args = (f"{error} {what}",)
        raise


def _named(
    data: Path, file: str | Path | None, timeout: float, *known: tuple[int | str, ...]
) -> tuple[str, ...] | None:
    """As read_classes; a ReadError when the storage gives nothing for `timeout` seconds."""

    def look(asked: list[Path]) -> tuple[str, ...] | None:
        asked.append(Path(file or data / CLASSES_FILE))
        return read_classes(data, file, known)

    return bounded(look, timeout)
