"""Which part of an image is used: functions of its size and of random numbers (pure)."""

import math

import numpy as np
from numpy.typing import NDArray

# The uniforms of one sample, by place: for each attempt at a crop these four, then the flip. Unused
# ones are drawn all the same.
AREA, RATIO, LEFT, TOP = 0, 1, 2, 3
ATTEMPTS = 10
FLIP = 4 * ATTEMPTS
DRAWS = FLIP + 4

Floats = NDArray[np.float64]


def random_resized_crops(sizes: NDArray[np.int64], uniforms: Floats) -> tuple[Floats, Floats]:
    """Inception's crops: 8 % to 100 % of the area, aspect ratio 3/4 to 4/3, uniform in its
    logarithm.

    sizes: (n, 2), height and width; uniforms: (n, DRAWS). Returns (left, top) and (width, height),
    (n, 2) each, whole numbers. As torchvision's RandomResizedCrop: the first of ten attempts that
    fits; if none does, the centre, as much of it as the aspect ratio allows.
    """
    width, height = sizes[:, 1:].astype(np.float64), sizes[:, :1].astype(np.float64)
    tries = uniforms[:, :FLIP].reshape(-1, ATTEMPTS, 4)
    area = width * height * (0.08 + 0.92 * tries[..., AREA])
    ratio = np.exp((2 * tries[..., RATIO] - 1) * math.log(4 / 3))
    wide, high = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
    first = fits.argmax(axis=1)[:, None]
    sides = np.concatenate([np.take_along_axis(a, first, 1) for a in (wide, high)], axis=1)
    none = ~fits.any(axis=1)
    if none.any():
        w, h = width[none], height[none]
        whole = [np.clip(w, 1, np.round(h * 4 / 3)), np.clip(h, 1, np.round(w * 4 / 3))]
        sides[none] = np.concatenate(whole, axis=1)
    room = np.concatenate([width, height], axis=1) - sides
    places = np.take_along_axis(tries[..., [LEFT, TOP]], first[..., None], 1)[:, 0]
    corners = np.floor(places * (room + 1))
    corners[none] = np.floor(room[none] / 2)
    return corners, sides


def center_crops(sizes: NDArray[np.int64], resize: int, size: int) -> tuple[Floats, Floats]:
    """The centre of size² pixels of each image whose shorter side is resized to `resize`.

    sizes: (n, 2), height and width. Returns where it begins and ends in the image's own pixels,
    (top, left) and (bottom, right), (n, 2) each. Rounded as torchvision's Resize and CenterCrop
    are.
    """
    resized = np.floor(resize * sizes / sizes.min(axis=1, keepdims=True))
    start = np.round((resized - size) / 2)  # halves to even, as Python's round
    return start * sizes / resized, (start + size) * sizes / resized


def pad_crops(uniforms: Floats, pad: int) -> Floats:
    """(left, top) of each crop from an image padded on all sides, from −pad to pad: (n, 2)."""
    return np.floor(uniforms[:, [LEFT, TOP]] * (2 * pad + 1)) - pad
