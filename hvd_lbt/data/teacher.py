"""`--data teacher`: images of random pixels with the labels that a fixed random network gives them.

As many as wanted, ImageNet's number by default, and no two alike; the labels can be learnt. Nothing
is stored: pixels come from Philox 4×64 by the sample's index. The network's weights are integers,
so that its labels are the same on every machine: float64 holds all its sums exactly.
"""

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvd_lbt.data.pixels import Encoded
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe

TEACHER = Path("teacher")
TRAIN_SAMPLES, TEST_SAMPLES, CLASSES = 1_281_167, 50_000, 10
MAX_SIDE = 32  # pixels
HIDDEN = 16  # units of the teacher
CALIBRATION = 8192  # images that balance its classes
AT_ONCE = 65_536
SPLITS = {"calibration": 0, "train": 1, "test": 2}
KEY = 0x7465616368657201  # another is another data set


class TeacherStore:
    """The samples of one split: `samples` images of `side` × `side` pixels in `classes` classes.

    labels: int64 (n,).
    """

    def __init__(self, split: str, samples: int, side: int, classes: int):
        self._split, self._samples, self.side = split, samples, side
        self.classes = tuple(str(label) for label in range(classes))
        network = _Network(side, classes)
        self.labels = np.concatenate([network(pixels) for pixels in self.pixels()])

    @property
    def what(self) -> str:
        """What tells it from another data set of this kind."""
        return f"teacher {KEY:x}, {HIDDEN} units, {self._split}, {self.side}×{self.side} pixels"

    def __len__(self) -> int:
        return self._samples

    def name(self, index: int) -> str:
        """What errors call sample `index`."""
        return f"teacher:{self._split}/{index}"

    def image(self, index: int) -> Encoded:
        """The image of sample `index`, as PNG."""
        file = io.BytesIO()
        Image.fromarray(_pixels(self._split, index, 1, self.side)[0]).save(file, "PNG")
        return Encoded(np.frombuffer(file.getvalue(), dtype=np.uint8), self.side, self.side)

    def pixels(self) -> Iterator[NDArray[np.uint8]]:
        """All images in order, some at once: uint8 (k, side, side, 3)."""
        for first in range(0, self._samples, AT_ONCE):
            yield _pixels(self._split, first, min(AT_ONCE, self._samples - first), self.side)


def teacher_splits(recipe: Recipe) -> tuple[TeacherStore, TeacherStore]:
    """data.train_samples [1,281,167] training images and 50,000 test images of data.image_size.

    They have model.num_classes [10] classes.
    """
    data = recipe.data
    samples = data.train_samples or TRAIN_SAMPLES
    return _split("train", samples, recipe), _split("test", TEST_SAMPLES, recipe)


def teacher_test_split(classes: tuple[str, ...], recipe: Recipe) -> TeacherStore:
    """The test images for a network with these classes."""
    store = _split("test", TEST_SAMPLES, recipe)
    if store.classes != classes:
        raise UserError(
            f"--data teacher has the classes 0 … {len(store.classes) - 1}, and the network was "
            "trained on others."
        )
    return store


def _split(split: str, samples: int, recipe: Recipe) -> TeacherStore:
    side, classes = recipe.data.image_size, recipe.model.num_classes or CLASSES
    if side > MAX_SIDE:
        raise UserError(
            f"--data teacher: data.image_size is {side}; it must be at most {MAX_SIDE}, since the "
            "images are of random pixels."
        )
    return _made(split, samples, side, classes)


@lru_cache(maxsize=2)  # a study trains on the same ones again and again
def _made(split: str, samples: int, side: int, classes: int) -> TeacherStore:
    return TeacherStore(split, samples, side, classes)


class _Network:
    """One hidden layer of integer weights; each output has the median 0, which balances classes."""

    def __init__(self, side: int, classes: int):
        inputs = 3 * side * side
        words = np.random.Philox(key=np.array([KEY, len(SPLITS)], np.uint64))
        raw = words.random_raw((inputs + classes) * HIDDEN)
        weights = (raw >> np.uint64(56)).astype(
            np.float64
        ) - 127.5  # uniform, halves of odd numbers
        self._hidden = 2 * weights[: inputs * HIDDEN].reshape(inputs, HIDDEN)
        self._outputs = 2 * weights[inputs * HIDDEN :].reshape(HIDDEN, classes)
        self._centre = np.zeros(classes)
        sample = self._logits(_pixels("calibration", 0, CALIBRATION, side))
        self._centre = np.floor(np.median(sample, axis=0))

    def _logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Integers below 2^53, (n, classes): the same whatever the order of the sums."""
        values = pixels.reshape(len(pixels), -1).astype(np.float64) * 2 - 255
        return np.maximum(values @ self._hidden, 0) @ self._outputs - self._centre

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        return np.argmax(self._logits(pixels), axis=1)


def _pixels(split: str, first: int, count: int, side: int) -> NDArray[np.uint8]:
    """Images [first, first + count): uint8 (count, side, side, 3), uniform, little-endian words."""
    size = 3 * side * side
    blocks = -(-size // 32)  # of Philox's counter: 4 words of 8 bytes each
    key = np.array([KEY, SPLITS[split]], np.uint64)
    words = np.random.Philox(key=key, counter=first * blocks).random_raw(count * blocks * 4)
    rows = words.astype("<u8", copy=False).view(np.uint8).reshape(count, blocks * 32)
    return rows[:, :size].reshape(count, side, side, 3)
