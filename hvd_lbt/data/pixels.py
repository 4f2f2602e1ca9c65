"""From the bytes of an image file to what every decoder here reads alike: one decision for all.

A sample's pixels are those of PIL's `Image.open(file).convert("RGB")`, or the sample is refused
with the reason. Plain JPEG files, which libjpeg-turbo decodes to the same pixels everywhere, stay
as they are. Everything else is decoded by PIL once, here, and handed on as PPM: a header and the
pixels.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP")  # by content, as PIL names them
MAX_PIXELS = 89_478_485  # of one image: PIL's own limit, 0.27 GB decoded
# PIL's convert clips these to 0 … 255: an image of 16 bits becomes white.
CLIPPED = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2  # with Huffman coding
START_OF_SCAN, APP0, APP14 = 0xDA, 0xE0, 0xEE


class Encoded(NamedTuple):
    """The bytes of a plain JPEG or a PPM file, uint8, and the size of the image in pixels."""

    data: np.ndarray
    height: int
    width: int


def encoded(data: bytes) -> Encoded:
    """The image in the bytes of a file. Raises ValueError with the reason if it is refused.

    DALI's decoder must not get what is no image: one such sample fails its whole batch, and after
    that DALI 2.4 may end the process with signal 11, or hang at its end. Orientation is as in PIL:
    EXIF's is ignored, TIFF's is applied. Of several pictures in a file the first counts.
    """
    if not data:
        raise ValueError("the file is empty")
    size = plain_jpeg(data)
    if size is not None:
        _check_size(*size)
        return Encoded(np.frombuffer(data, dtype=np.uint8), *size)
    return _decoded(data)


def _decoded(data: bytes) -> Encoded:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in FORMATS:
                raise ValueError(f"it is {image.format}, allowed are {', '.join(FORMATS)}")
            _check_size(image.height, image.width)
            if image.format in ("JPEG", "MPO") and _cut_off(data):
                raise ValueError("the JPEG is cut off")
            pixels = _rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("it cannot be identified as an image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"it has more than MAX_PIXELS = {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise ValueError("it does not fit into memory") from error
    # What PIL's parsers raise for damaged headers, beside its own OSError and SyntaxError.
    except (OSError, SyntaxError, LookupError, TypeError, struct.error, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return _ppm(pixels.tobytes(), pixels.height, pixels.width)


def of_image(image: Image.Image) -> Encoded:
    """A PIL image, as the file that it came from is read. Raises ValueError with the reason."""
    _check_size(image.height, image.width)
    try:
        pixels = _rgb(image.copy() if image.mode == "P" else image)
    # AttributeError: its file was closed before it was read
    except (OSError, SyntaxError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return _ppm(pixels.tobytes(), pixels.height, pixels.width)


def of_pixels(pixels: np.ndarray) -> Encoded:
    """An image of uint8 (H, W, 3), or grey (H, W) or (H, W, 1). Raises ValueError with the
    reason.
    """
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"the array is of {pixels.dtype}; it must be of uint8, 0 to 255, before any transform"
        )
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1)
    if not grey and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ValueError(
            f"the array has the shape {pixels.shape}; it must be (height, width, 3), or grey "
            "(height, width)"
        )
    height, width = pixels.shape[:2]
    if not height or not width:
        raise ValueError(f"the array has the shape {pixels.shape}, which is no pixel")
    _check_size(height, width)
    if grey:
        pixels = np.broadcast_to(pixels.reshape(height, width, 1), (height, width, 3))
    return _ppm(np.ascontiguousarray(pixels).tobytes(), height, width)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in CLIPPED:
        raise ValueError(
            f"it has more than 8 bits a pixel in one channel ({image.format}, mode "
            f"{image.mode}), which PIL would clip to white: convert it to 8 bits"
        )
    if image.mode == "P":  # else PIL warns of a transparency that RGB has no use for
        image.load()
        image.info.pop("transparency", None)
    return image.convert("RGB")


def _ppm(pixels: bytes, height: int, width: int) -> Encoded:
    head = b"P6\n%d %d\n255\n" % (width, height)
    return Encoded(np.frombuffer(head + pixels, dtype=np.uint8), height, width)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"its header says {width:,}×{height:,} pixels, and MAX_PIXELS = {MAX_PIXELS:,} are "
            "allowed: make it smaller"
        )


def _cut_off(data: bytes) -> bool:
    """Within a scan these two bytes cannot occur: a scan without an end was cut off."""
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width if this is a whole JPEG that all decoders read alike, else None.

    That is: 8 bits, Huffman coding, grey or YCbCr (ITU-T T.81 B.2 and T.872 6.5; the choice of the
    colour space is libjpeg's), segments up to a scan, and an end. 8 µs for a JPEG of ImageNet.
    """
    if data[:3] != b"\xff\xd8\xff" or (data[-2:] != b"\xff\xd9" and _cut_off(data)):
        return None
    at, end, size = 2, len(data), None
    components, jfif, adobe = b"", False, -1
    while at + 9 < end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == START_OF_SCAN:
            grey = len(components) == 1
            colours = jfif or adobe == 1 or components == b"\x01\x02\x03"
            ycbcr = len(components) == 3 and colours and adobe in (-1, 1)
            return size if grey or ycbcr else None
        if marker in (BASELINE, EXTENDED, PROGRESSIVE):
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            count = data[at + 9]
            whole = length == 8 + 3 * count and at + 2 + length < end
            if size or data[at + 4] != 8 or not height or not width or not whole:
                return None
            size, components = (height, width), data[at + 10 : at + 10 + 3 * count : 3]
        elif marker == APP0 and data[at + 4 : at + 9] == b"JFIF\0":
            jfif = True
        elif marker == APP14 and length >= 14 and data[at + 4 : at + 9] == b"Adobe":
            adobe = data[at + 15] if at + 15 < end else -2
        elif (marker <= 0xCF and marker != 0xC4) or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return None  # another coding, a marker without a length, or padding
        if length < 2:
            return None
        at += 2 + length
    return None
