"""Blocks that are read together: each sample once an epoch, from its window's blocks only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.data.block_order import Windows
from hvd_lbt.data.order import SampleStream, block_order
from hvd_lbt.data.store import open_data
from hvd_lbt.data.synthetic import SYNTHETIC
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe

sizes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6)).map(
    lambda its: (its[0], its[1], its[0] * its[1] + 1 + its[2] % 500)
)


@given(sizes, st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_each_sample_comes_once_and_a_window_is_its_blocks(its, seed, epoch):
    block, window, n = its
    windows = Windows(n=n, block=block, window=window)
    order = block_order(seed, epoch, windows)
    indices = order.at(np.arange(n))
    assert np.array_equal(np.sort(indices), np.arange(n))
    at, used = 0, []
    while at < n:
        number, blocks = order.window_of(at)
        end = order.window_end(number)
        assert number == len(used)
        assert sorted(indices[at:end].tolist()) == [i for its in blocks for i in its]
        assert all(order.window_of(place)[0] == number for place in (at, end - 1))
        starts = [its.start // block for its in blocks]
        used.append(starts)
        assert len(blocks) == window or end == n
        at = end
    assert sorted(start for starts in used for start in starts) == list(range(windows.blocks))


def test_a_part_of_the_positions_is_as_in_the_whole():
    order = block_order(1, 2, Windows(n=1003, block=7, window=4))
    whole = order.at(np.arange(1003))
    for first in range(0, 1003, 50):
        assert np.array_equal(order.at(np.arange(first, min(first + 50, 1003))), whole[first:][:50])
    assert order.at(np.arange(12).reshape(3, 4)).tolist() == whole[:12].reshape(3, 4).tolist()


def test_golden_values():
    order = block_order(0, 0, Windows(n=23, block=4, window=2))
    assert order.at(np.arange(23)).tolist() == [
        2,
        8,
        11,
        10,
        9,
        0,
        1,
        3,
        15,
        14,
        21,
        13,
        20,
        22,
        12,
        7,
        16,
        18,
        19,
        17,
        4,
        5,
        6,
    ]
    order = block_order(5, 1, Windows(n=10**12 + 7, block=1000, window=16))
    assert order.at(np.array([0, 1, 10**11, 10**12 + 6])).tolist() == [
        355489666072,
        744832030906,
        897009619224,
        464812407871,
    ]


def test_windows_are_shuffled_differently_and_all_places_alike():
    """Chi-square of (place in the window, place in the index's blocks), over windows and epochs."""
    block, window, n = 5, 4, 20 * 300
    places, ranks = [], []
    for epoch in range(60):
        indices = block_order(0, epoch, Windows(n=n, block=block, window=window)).at(np.arange(n))
        its = indices.reshape(-1, block * window)
        ranks.append(np.argsort(np.argsort(its, axis=1), axis=1).ravel())
        places.append(np.tile(np.arange(block * window), len(its)))
    rank, place = np.concatenate(ranks), np.concatenate(places)
    cells = np.bincount(rank * 20 + place, minlength=400)
    chi_square = ((cells - cells.mean()) ** 2 / cells.mean()).sum()
    assert abs(chi_square - 361) < 4.5 * np.sqrt(2 * 361)
    neighbours = np.bincount(rank[:-1][place[:-1] < 19] * 20 + rank[1:][place[:-1] < 19])
    off = neighbours[np.arange(len(neighbours)) % 21 != 0]
    assert abs(((off - off.mean()) ** 2 / off.mean()).sum() - 379) < 4.5 * np.sqrt(2 * 379)


def test_the_stream_goes_on_from_epoch_to_epoch_in_blocks():
    stream = SampleStream(103, 4, shuffle_block=10, shuffle_window=2)
    found = stream.indices(0, 309).reshape(3, 103)
    assert all(sorted(epoch) == list(range(103)) for epoch in found.tolist())
    assert len({tuple(epoch) for epoch in found.tolist()}) == 3
    assert np.array_equal(
        np.concatenate([stream.indices(at, 7) for at in range(0, 308, 7)]), found.ravel()[:308]
    )
    windows = stream.windows(90, 30)
    assert {epoch for epoch, _ in windows} == {0, 1}
    read = {sample for blocks in windows.values() for block in blocks for sample in block}
    assert set(stream.indices(90, 30).tolist()) <= read
    assert SampleStream(103, 4).windows(90, 30) == {}


@pytest.mark.parametrize(("block", "window"), [(50, 2), (101, 1), (7, 16)])
def test_blocks_that_are_the_whole_shuffle_are_refused(block, window):
    with pytest.raises(UserError, match=r"data\.shuffle_block: .* the training set has 100"):
        SampleStream(100, 0, block, window)
    SampleStream(101 * 16, 0, block, window)


def test_settings_that_have_no_effect_are_refused():
    with pytest.raises(UserError, match=r"data\.shuffle_window: 4 has no effect without"):
        load_recipe("digits", ["data.shuffle_window=4"])
    with pytest.raises(UserError, match=r"shuffle_block.*at least 2|greater than or equal to 2"):
        load_recipe("digits", ["data.shuffle_block=1"])
    recipe = load_recipe("digits", ["data.shuffle_block=4", "data.train_samples=100"])
    assert recipe.data.blocks_in_window == 16
    with pytest.raises(UserError, match="no effect with --data synthetic"):
        open_data(SYNTHETIC, recipe)
    large = load_recipe("digits", ["data.shuffle_block=100"])
    with pytest.raises(UserError, match="the training set has 1,437: that is the whole shuffle"):
        open_data(None, large)
    assert len(open_data(None, load_recipe("digits", ["data.shuffle_block=4"]))[0]) == 1437
