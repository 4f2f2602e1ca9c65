"""A Python data set of your own, `--data package.module:function`: index → image and label.

The function returns (train, test), each with `__len__` and `__getitem__`; item i is
(image, label), the same whenever it is read. An image is the bytes of an image file, a uint8 array
(H, W, 3), (H, W, 1) or (H, W), or a PIL image; a label is a whole number from 0. `classes`, a list
of names, is optional on `train`. The data set stays in the rank's own process: it is not pickled.
"""

import hashlib
import operator
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hvd_lbt.data.pixels import Encoded, encoded, of_image, of_pixels
from hvd_lbt.errors import ReadError, SampleError, UserError, one_line, shortened
from hvd_lbt.own import load_object
from hvd_lbt.terminal import printable

LOOKED_AT = 16  # items that are read twice at the start, evenly spread
UNREAD = -1  # the label of an item that was not read yet
ITEM = "(image, label), the image as bytes of an image file, uint8 array (H, W, 3) or PIL image"


class OwnData:
    """One split of a Python data set; for the pipelines the same as a Store.

    what: of errors, such as `--data pets.data:load, train`. classes: None takes the data set's
    `classes`, or else `outputs` numbers. labels: int64 (n,), each known once its item was read.
    `__getitem__` is called by one thread at a time, unless the data set has `thread_safe = True`.
    Raises UserError for what is no such data set.
    """

    kind = "python"

    def __init__(
        self,
        data: Any,
        what: str,
        classes: tuple[str, ...] | None = None,
        outputs: int | None = None,
    ):
        self._data, self._what = data, what
        for name in ("__len__", "__getitem__"):
            if not hasattr(type(data), name):
                raise UserError(
                    f"{what}: a {type(data).__name__} has no {name}; a map-style data set is "
                    f"needed: len(data) items, data[0] to data[n-1], each {ITEM}."
                )
        self._count = self._length()
        if self._count < 1:
            raise UserError(f"{what}: the data set is empty; at least one item is needed.")
        self.classes = classes or _classes(data, what, outputs)
        self.labels = np.full(self._count, UNREAD, dtype=np.int64)
        self._lock = threading.Lock()
        self._parallel = getattr(data, "thread_safe", False) is True
        self.digest = self._look()

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """What errors call item `index`."""
        return f"{self._what}[{index}]"

    def image(self, index: int) -> Encoded:
        """The image of item `index`; its label is known from then on.

        Raises ReadError for a fault of the data set (an exception, another type, a label that is
        none), SampleError for bytes that are no whole image, which `data.on_bad_sample` may skip.
        """
        if self._parallel:
            image = self._image(index)
        else:
            with self._lock:
                image = self._image(index)
        try:
            return image if isinstance(image, Encoded) else encoded(image)
        except ValueError as fault:
            raise SampleError(f"{self.name(index)} is no whole image: {fault}.") from fault

    def read(self, index: int) -> bytes:
        """The encoded bytes of item `index`: of a file as they are, of pixels as PPM."""
        return self.image(index).data.tobytes()

    def _image(self, index: int) -> Encoded | bytes:
        """The image of an item, its label noted; bytes of a file are still to be looked at."""
        item = self._ask(index)
        if not isinstance(item, tuple | list) or len(item) != 2:
            its = f" of {len(item)} parts" if isinstance(item, tuple | list | dict) else ""
            raise ReadError(f"{self.name(index)} is a {_kind(item)}{its}; it must be {ITEM}.")
        image, label = item
        self._note_label(index, label)
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image)
        if isinstance(image, Image.Image):
            try:
                return of_image(image)
            except ValueError as fault:
                raise SampleError(f"{self.name(index)} is no whole image: {fault}.") from fault
        if isinstance(image, np.ndarray):
            try:
                return of_pixels(image)
            except ValueError as fault:
                raise ReadError(f"{self.name(index)}: {fault}.") from fault
        raise ReadError(
            f"{self.name(index)}: the image is a {_kind(image)}; it must be the bytes of an image "
            "file, a uint8 array (H, W, 3) or a PIL image, before any transform: data.augment and "
            "data.image_size of the recipe make what the network sees."
        )

    def _ask(self, index: int) -> Any:
        if (now := self._length()) != self._count:
            raise ReadError(
                f"{self._what}: it had {self._count:,} items at the start and has {now:,} now. A "
                "data set must not change while it is trained on."
            )
        try:
            return self._data[index]
        except Exception as error:
            raise ReadError(
                f"{self.name(index)}: {_told(error)}. Correct the data set's __getitem__, or leave "
                "this item out of it."
            ) from error

    def _length(self) -> int:
        try:
            return len(self._data)
        except Exception as error:
            raise ReadError(f"{self._what}: len() failed: {_told(error)}.") from error

    def _note_label(self, index: int, label: Any) -> None:
        try:
            if isinstance(label, bool | np.bool_):
                raise TypeError
            number = operator.index(label)
        except TypeError:
            raise ReadError(
                f"{self.name(index)}: the label is {_shown(label)}; it must be a whole number, "
                f"0 to {len(self.classes) - 1}."
            ) from None
        if not 0 <= number < len(self.classes):
            raise ReadError(
                f"{self.name(index)}: the label is {number}; there are {len(self.classes)} "
                f"classes, so it must be 0 to {len(self.classes) - 1}. Give the training data set "
                "`classes`, a list with a name for each label, or set model.num_classes."
            )
        if self.labels[index] not in (UNREAD, number):
            raise ReadError(
                f"{self.name(index)}: the label was {self.labels[index]} and is {number} now. "
                "Item i must be the same whenever it is read."
            )
        self.labels[index] = number

    def _look(self) -> str:
        """SHA-256 (hex) of some items, each read twice. Raises ReadError if the two differ.

        What differs from one read to the next, as a random transform makes it, would differ
        between ranks and after a resume too.
        """
        places = np.unique(np.linspace(0, self._count - 1, LOOKED_AT).round().astype(int))
        digest = hashlib.sha256()
        for index in map(int, places):
            try:
                first, second = self.read(index), self.read(index)
            except ReadError:
                raise
            except SampleError as error:  # no image: training decides what to do with it
                digest.update(str(error).encode("utf-8", "replace"))
                continue
            if first != second:
                raise ReadError(
                    f"{self.name(index)} is another image each time it is read. Random transforms "
                    "belong into the recipe (data.augment, data.flip), where they follow from "
                    "run.seed; take them out of the data set."
                )
            digest.update(b"%d %d %d\n" % (index, self.labels[index], len(first)) + first)
        return digest.hexdigest()


def own_splits(
    name: str, outputs: int | None, classes_file: str | None = None
) -> tuple[OwnData, OwnData]:
    """The (train, test) that `--data package.module:function` gives.

    outputs: model.num_classes, for a data set without `classes`. Raises UserError.
    """
    return _splits(name, None, outputs, classes_file)


def own_test_split(name: str, classes: tuple[str, ...]) -> OwnData:
    """The test split alone, for the evaluation of a checkpoint that has these classes."""
    return OwnData(_made(name)[1], f"--data {name}, test", classes)


def _splits(
    name: str, classes: tuple[str, ...] | None, outputs: int | None, classes_file: str | None
) -> tuple[OwnData, OwnData]:
    if classes_file is not None:
        raise UserError(
            f"data.classes: {classes_file} has no effect with --data {name}, whose `classes` name "
            "the labels: leave it out."
        )
    made = _made(name)
    train = OwnData(made[0], f"--data {name}, train", classes, outputs)
    test = OwnData(made[1], f"--data {name}, test", train.classes)
    theirs = getattr(made[1], "classes", None)
    if theirs is not None and tuple(map(str, theirs)) != train.classes:
        raise UserError(
            f"--data {name}: the test data set has other classes than the training data set; both "
            "must have the same, in the same order."
        )
    return train, test


def _made(name: str) -> tuple[Any, Any]:
    """What the function of that name returns."""
    function = load_object(name, "--data")
    if not callable(function):
        raise UserError(
            f"--data {name}: it is a {_kind(function)}; it must be a function that returns "
            "(train, test)."
        )
    try:
        made = function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--data {name}: the function failed: {_told(error)}.") from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise UserError(
            f"--data {name}: the function returned a {_kind(made)}; it must return two data sets, "
            "(train, test)."
        )
    return made[0], made[1]


def _classes(data: Any, what: str, outputs: int | None) -> tuple[str, ...]:
    """The names of the labels 0, 1, …: the data set's own, or numbers."""
    names = getattr(data, "classes", None)
    if names is None:
        if outputs is None:
            raise UserError(
                f"{what}: how many classes there are is not known. Give the data set `classes`, a "
                "list with a name for each label, or set model.num_classes."
            )
        return tuple(str(number) for number in range(outputs))
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray) or not len(names):
        raise UserError(
            f"{what}: `classes` is {_shown(names)}; it must be a list with a name for each label."
        )
    classes = tuple(map(str, names))
    if len(set(classes)) < len(classes):
        twice = next(one for one in classes if classes.count(one) > 1)
        raise UserError(f"{what}: `classes` has {twice!r} twice; each label needs its own name.")
    return classes


def _kind(value: Any) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else (f"{kind.__module__}.{kind.__qualname__}")
    )


def _shown(value: Any) -> str:
    return f"{shortened(' '.join(repr(value).split()))} ({_kind(value)})"


def _told(error: Exception) -> str:
    """Type, message and line of an exception in somebody's code."""
    place, line = error.__traceback__, ""
    while place is not None:
        file = place.tb_frame.f_code.co_filename
        if file != __file__:
            line = f", {file}:{place.tb_lineno}"
        place = place.tb_next
    message = one_line(error) or "no message"
    return printable(f"{type(error).__name__}: {message}{line}")
