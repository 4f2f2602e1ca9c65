"""`data convert --shorter-side`: an image decoded, made smaller once, and stored as JPEG.

Training decodes the stored image every epoch: a photograph of ImageNet has 500×375 pixels or more,
and the network sees 224×224 of them. The pixels are those that training would get (`pixels`: PIL's
RGB, EXIF's orientation ignored). They are resized as torchvision's `Resize` does (bilinear, with
antialiasing), so an evaluation that begins with the same resize differs by the JPEG alone.
"""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from hvd_lbt.data.pixels import encoded

QUALITY = 90  # of JPEG, 1 to 100
# Half the colour resolution, as nearly all photographs have: 4:4:4 takes 24 % more bytes and more
# time to decode, and brings an evaluation pixel from 2.8 to 2.3 of 255 to the original's.
SUBSAMPLING = "4:2:0"


class Shrunk(NamedTuple):
    """What is stored. changed: False for an image that was small enough, whose bytes are kept.

    difference: mean absolute difference of the stored pixels to those before JPEG, of 255; None
    where it was not measured.
    """

    data: bytes
    changed: bool
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Make images smaller until their shorter side has `shorter_side` pixels; never larger."""

    shorter_side: int
    quality: int = QUALITY

    def about(self) -> dict[str, Any]:
        """For convert.json: all that the stored bytes depend on."""
        return {
            "shorter_side": self.shorter_side,
            "quality": self.quality,
            "subsampling": SUBSAMPLING,
            "pillow": PIL.__version__,
        }

    def __call__(self, data: bytes, *, measure: bool = False) -> Shrunk:
        """The image of a file as it is to be stored. Raises ValueError for what is no whole image.

        measure: decode what is stored, and compare.
        """
        its = encoded(data)
        if min(its.height, its.width) <= self.shorter_side:
            return Shrunk(data, False)
        with Image.open(io.BytesIO(its.data.tobytes())) as image:
            # grey stays grey: one channel of the same pixels
            pixels = image.convert("L" if image.mode == "L" else "RGB")
        pixels = pixels.resize(self._size(its.width, its.height), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=self.quality, subsampling=SUBSAMPLING)
        stored, difference = file.getvalue(), None
        if measure:
            with Image.open(io.BytesIO(stored)) as image:
                changed = np.asarray(image, np.int16) - np.asarray(pixels, np.int16)
            difference = float(np.abs(changed).mean())
        return Shrunk(stored, True, difference)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) with the shorter side, as torchvision's Resize rounds the longer one."""
        side = self.shorter_side
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side
