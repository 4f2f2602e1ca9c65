"""Where encoded images and their labels come from: sample index → bytes, label."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hvd_lbt.errors import SampleError, UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
FORMATS = {"BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}  # by content, as PIL names them


class ImageFolder:
    """A folder in ImageNet's layout, CLASS/FILE; samples ordered by class name, then file name.

    root: the folder of one split. classes: the names that give labels 0, 1, …; None takes the
    sorted class folders found here (the training split); the test split is given the training's.
    Raises UserError for a missing folder, one without images, or a class that is not in `classes`.
    """

    def __init__(self, root: Path, classes: tuple[str, ...] | None = None):
        if not root.is_dir():
            raise UserError(f"{root} is no folder. Images are expected as {root}/CLASS/FILE.")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.root = root
        self.classes = tuple(found) if classes is None else classes
        unknown = [name for name in found if name not in set(self.classes)]
        if unknown:
            raise UserError(
                f"{root} has the class folder {unknown[0]!r}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
                + f", which the training folder does not have; its {len(self.classes)} classes are "
                f"{', '.join(self.classes[:5])}{', …' if len(self.classes) > 5 else ''}. "
                "Both splits must use the same class names."
            )
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.files: list[str] = []
        labels: list[int] = []
        for name in found:
            files = sorted(
                entry.name
                for entry in os.scandir(root / name)
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()
            )
            self.files += [f"{name}/{file}" for file in files]
            labels += [label_of[name]] * len(files)
        if not self.files:
            raise UserError(
                f"{root} has no images: {len(found)} class folders and no file that ends in "
                f"{', '.join(sorted(SUFFIXES))}. The layout is {root}/CLASS/FILE."
            )
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """The file of sample `index`."""
        return self.root / self.files[index]

    def read(self, index: int) -> np.ndarray:
        """The encoded bytes of sample `index`, uint8. Raises SampleError if it cannot be read."""
        try:
            encoded = np.fromfile(self.path(index), dtype=np.uint8)
        except OSError as error:
            raise SampleError(f"{self.path(index)} cannot be read: {error.strerror}.") from error
        fault = find_fault(encoded)
        if fault:
            raise SampleError(
                f"{self.path(index)} is no whole image: {fault}. Replace or remove it."
            )
        return encoded


def find_fault(encoded: np.ndarray) -> str:
    """What is wrong with these bytes of an image file, "" if nothing shows without decoding.

    DALI 2.4 often ends with signal 11 instead of an error when one image of a batch fails to decode,
    so that text, cut-off files and foreign formats must be found before it gets them. 0.15 ms for a
    JPEG of ImageNet, some 3 % of its decoding.
    """
    data = encoded.tobytes()
    if not data:
        return "the file is empty"
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format
            if kind == "PNG":
                image.verify()  # the checksums of its chunks
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return (
            "it cannot be identified" if isinstance(error, UnidentifiedImageError) else str(error)
        )
    if kind not in FORMATS:
        return f"it is {kind}, allowed are {', '.join(sorted(FORMATS))}"
    # Within a scan these two bytes cannot occur: a scan without an end was cut off.
    if kind == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        return "the JPEG is cut off"
    return ""


def open_splits(data: Path) -> tuple[ImageFolder, ImageFolder]:
    """The training and test splits of `data`: DATA/train and DATA/test (or DATA/val)."""
    if not data.is_dir():
        raise UserError(
            f"--data {data}: there is no such folder. It must hold train/CLASS/FILE and "
            "test/CLASS/FILE (or val/…); without --data the built-in digits are used."
        )
    train = ImageFolder(data / "train")
    return train, open_test_split(data, train.classes)


def open_test_split(data: Path, classes: tuple[str, ...]) -> ImageFolder:
    """DATA/test, or DATA/val where there is none, with the training split's classes."""
    return ImageFolder(data / ("test" if (data / "test").is_dir() else "val"), classes)
