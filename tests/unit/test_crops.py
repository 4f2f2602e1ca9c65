"""Crops of images: those of torchvision, from uniform numbers."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.data.crops import ATTEMPTS, DRAWS, center_crops, pad_crops, random_resized_crops


def torchvision_crop(height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params, line by line, with its random numbers given: left, top, w,
    h.
    """
    for attempt in range(ATTEMPTS):
        area_draw, ratio_draw, left_draw, top_draw = draws[4 * attempt : 4 * attempt + 4]
        area = height * width * (0.08 + (1.0 - 0.08) * area_draw)
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1)), w, h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.lists(st.integers(0, 2**20 - 1), min_size=DRAWS, max_size=DRAWS),
)
def test_a_random_cut_is_torchvisions(height, width, words):
    draws = [word / 2**20 for word in words]
    corners, sides = random_resized_crops(np.array([[height, width]]), np.array([draws]))
    (left, top), (w, h) = corners[0].tolist(), sides[0].tolist()
    assert (left, top, w, h) == torchvision_crop(height, width, draws)
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height


def test_cuts_of_a_batch_are_those_of_its_samples():
    rng = np.random.default_rng(0)
    sizes, uniforms = rng.integers(1, 900, (200, 2)), rng.random((200, DRAWS))
    whole = random_resized_crops(sizes, uniforms)
    assert {(s[0] > 3 * s[1], s[1] > 3 * s[0]) for s in sizes} == {(0, 0), (0, 1), (1, 0)}
    for index in range(200):
        one = random_resized_crops(sizes[index : index + 1], uniforms[index : index + 1])
        assert all((mine[0] == all_[index]).all() for mine, all_ in zip(one, whole, strict=True))


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_the_centre_is_torchvisions(height, width):
    if width <= height:
        wide, high = 256, int(256 * height / width)
    else:
        wide, high = int(256 * width / height), 256
    top, left = round((high - 224) / 2.0), round((wide - 224) / 2.0)
    starts, ends = center_crops(np.array([[height, width]]), 256, 224)
    scale = np.array([height / high, width / wide])
    assert np.allclose(starts[0], np.array([top, left]) * scale, rtol=1e-12)
    assert np.allclose(ends[0], np.array([top + 224, left + 224]) * scale, rtol=1e-12)


def test_padded_cuts_reach_from_edge_to_edge():
    uniforms = np.zeros((3, DRAWS))
    uniforms[1], uniforms[2] = 0.5, 1 - 2**-53
    assert pad_crops(uniforms, 4).tolist() == [[-4, -4], [0, 0], [4, 4]]
