"""Small data sets whose images are arrays of pixels in memory: CIFAR's and MNIST's."""

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvd_lbt.data.formats import Findings
from hvd_lbt.data.index import Index, Names
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.pixels import Encoded


class ArrayStore(Store):
    """Images as one array: uint8 (n, H, W, 3), or (n, H, W) if they are grey.

    `image` gives the pixels as they are; `read` gives a PNG of them, for `data convert`.
    """

    def __init__(self, index: Index, classes: tuple[str, ...], pixels: NDArray[np.uint8]):
        super().__init__(index, classes)
        self._pixels = pixels
        self.contents = hashlib.sha256(pixels.tobytes()).hexdigest()

    def member(self, index: int) -> str:
        """CLASS/NUMBER.png."""
        return f"{self.classes[self.labels[index]]}/{index:06}.png"

    def name(self, index: int) -> str:
        """The files that the data set was read from, and the number of the image."""
        files = ", ".join(self.index.files[at] for at in range(len(self.index.files)))
        return f"{self.index.root} ({files}), image {index:,}"

    def read(self, index: int) -> bytes:
        """Sample `index` as a PNG file, without loss."""
        file = io.BytesIO()
        Image.fromarray(self._pixels[index]).save(file, "PNG")
        return file.getvalue()

    def image(self, index: int) -> Encoded:
        """Sample `index` as a PPM file: a header and the pixels."""
        pixels = self._pixels[index]
        if pixels.ndim == 2:
            pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
        height, width = pixels.shape[:2]
        head = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
        return Encoded(np.concatenate([head, pixels.reshape(-1)]), height, width)


def array_store(
    kind: str,
    root: Path,
    files: list[Path],
    classes: tuple[str, ...],
    labels: NDArray[np.int32],
    pixels: NDArray[np.uint8],
    findings: Findings,
) -> ArrayStore:
    """A store of these pixels. labels: of each, an index into `classes`; files: they came from."""
    count = len(labels)
    size = int(np.prod(pixels.shape[1:]))
    extents = np.stack(
        [np.zeros(count, np.int64), np.arange(count) * size, np.full(count, size)], axis=1
    )
    names = [bytes(file.relative_to(root)) for file in files]
    index = Index(
        kind=kind,
        root=root,
        files=Names.of(names),
        tokens=labels,
        token_names=classes,
        extents=extents,
        findings=findings,
    )
    return ArrayStore(index, classes, pixels)
