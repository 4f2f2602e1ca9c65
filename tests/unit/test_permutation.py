"""Permutations without an array: each index once, pairs uniform, another for each key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.data.order import epoch_order, epoch_permutation
from hvd_lbt.data.permutation import LARGEST, Permutation, rounds_of

words = st.integers(0, 2**64 - 1)


def permutation(n: int, seed: int = 0) -> Permutation:
    key = np.random.default_rng(seed).integers(0, 2**64, rounds_of(n), dtype=np.uint64)
    return Permutation(n=n, key=key)


SIZES = [*range(1, 300), *(2**k + d for k in range(9, 17) for d in (-1, 0, 1)), 100_003]


def test_each_index_has_one_position():
    for n in SIZES:
        one = permutation(n, seed=n)
        indices = one.at(np.arange(n))
        assert indices.dtype == np.int64
        assert np.array_equal(np.sort(indices), np.arange(n)), n
        assert np.array_equal(one.positions_of(indices), np.arange(n)), n


@given(st.integers(1, LARGEST), words, st.data())
def test_of_any_size_the_inverse_leads_back(n, seed, data):
    some = st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)
    positions = np.array(data.draw(some))
    one = permutation(n, seed)
    indices = one.at(positions)
    assert ((indices >= 0) & (indices < n)).all()
    assert np.unique(indices).size == positions.size
    assert np.array_equal(one.positions_of(indices), positions)


@given(st.integers(1, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_one_position_alone_is_as_among_others(n, numbers):
    positions = np.array(numbers) % n
    one = permutation(n)
    assert one.at(positions).tolist() == [int(one.at(np.array([at]))[0]) for at in positions]
    shaped = one.at(np.tile(positions, (3, 1)))
    assert shaped.shape == (3, len(numbers))
    assert (shaped == one.at(positions)).all()


def test_positions_are_not_changed_and_large_arrays_are_as_their_parts():
    n, positions = 50_000, np.arange(50_000)
    whole = permutation(n).at(positions)
    assert np.array_equal(positions, np.arange(n))
    parts = [permutation(n).at(positions[at : at + 777]) for at in range(0, n, 777)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 16, 30])
def test_pairs_of_positions_reach_all_pairs_of_indices_equally(n):
    """Chi-square over ordered pairs, for neighbours, both ends and two in one row; fixed keys."""
    count = 60_000
    keys = np.random.default_rng(n).integers(0, 2**64, count, dtype=np.uint64)
    one = permutation(n)
    pairs = {(0, 1), (0, n - 1), (n // 2, (n // 2 + 1) % n), (0, min(n - 1, int(n**0.5) + 1))}
    for pair in pairs:
        first, second = (one.at(np.full(count, at), tweak=keys) for at in pair)
        found = np.bincount(first * n + second, minlength=n * n).reshape(n, n)
        assert not np.diag(found).any()
        cells = found[~np.eye(n, dtype=bool)]
        chi_square = ((cells - count / cells.size) ** 2).sum() / (count / cells.size)
        freedom = cells.size - 1
        # mean and standard deviation of chi-square; 4.5 of them (a bias of 5 % is 18 and more)
        assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("n", [257, 1437, 200_000])
def test_large_orders_have_no_pattern(n):
    """What a shuffle's neighbours, differences and parts look like; seeds are fixed."""
    order = epoch_order(0, 0, n)
    size = 16
    for lag in (1, 2, int(n**0.5) + 1):
        one, other = order[:-lag] * size // n, order[lag:] * size // n
        cells = np.bincount(one * size + other, minlength=size**2)
        expected = len(one) / size**2
        chi_square = ((cells - expected) ** 2).sum() / expected
        assert abs(chi_square - (size**2 - 1)) < 4.5 * np.sqrt(2 * size**2)
    steps = np.diff(order) % n  # an affine order, say, has few of them
    assert np.unique(steps).size > 0.6 * (n - 1)  # 1 − 1/e of random ones are different
    rises = (np.diff(order) > 0).mean()
    assert abs(rises - 0.5) < 4.5 / np.sqrt(12 * n)


def test_orders_of_near_seeds_and_epochs_are_unrelated():
    n = 20_000
    orders = {(s, e): epoch_order(s, e, n) for s in (0, 1, 2, 2**63) for e in (0, 1, 2, 2**40)}
    same = [
        int((one == other).sum())
        for key, one in orders.items()
        for others, other in orders.items()
        if key < others
    ]
    assert max(same) <= 8  # of each pair one place agrees on average (Poisson)
    # a copy that is shifted, or one key's order applied to another, would show as one difference
    for key in orders:
        if key != (0, 0):
            differences = np.bincount((orders[key] - orders[0, 0]) % n, minlength=n)
            assert differences.max() <= 12


def test_what_is_no_permutation_is_refused():
    for n in (0, -1, LARGEST + 1):
        with pytest.raises(ValueError, match="possible are"):
            Permutation(n=n, key=np.zeros(8, np.uint64))
    with pytest.raises(ValueError, match="key of 8 words"):
        Permutation(n=5, key=np.zeros(8, np.uint64))
    assert epoch_permutation(0, 0, 1).at(np.zeros(3, np.int64)).tolist() == [0, 0, 0]
