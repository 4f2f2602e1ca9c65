"""Order and random numbers of samples: functions of (seed, epoch, position) alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.data.order import SampleStream, epoch_order, order_at, sample_uniforms, stream_ranges
from hvd_lbt.schedule.layout import make_layout

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10**6)


@given(seeds, epochs, st.integers(1, 3000))
def test_an_order_is_a_permutation_and_the_same_again(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, epoch_order(seed, epoch, n))


def test_orders_of_seeds_and_epochs_differ():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(seeds, epochs, st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 11), st.data())
def test_a_part_of_a_range_has_the_numbers_of_the_whole(seed, epoch, first, count, draws, data):
    whole = sample_uniforms(seed, epoch, first, count, draws)
    assert whole.shape == (count, draws)
    assert ((whole >= 0) & (whole < 1)).all()
    start = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(start, count))
    part = sample_uniforms(seed, epoch, first + start, end - start, draws)
    assert np.array_equal(part, whole[start:end])


def test_numbers_are_uniform_and_all_different():
    numbers = np.concatenate(
        [sample_uniforms(seed, epoch, 0, 5000, 8) for seed in (0, 1) for epoch in (0, 1)]
    )
    assert np.unique(numbers).size == numbers.size
    # the mean of n uniforms has standard deviation 1/sqrt(12 n); seed and count are fixed
    assert abs(numbers.mean() - 0.5) < 4 / np.sqrt(12 * numbers.size)
    assert abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 4 / np.sqrt(len(numbers))


def test_numbers_are_no_function_of_the_order():
    # the words that make epoch 0's order are not the words of its uniforms
    order = epoch_order(0, 0, 4000)
    assert not np.array_equal(np.argsort(sample_uniforms(0, 0, 0, 1000, 4).ravel()), order)


def test_golden_values_hold_on_every_machine_and_numpy():
    assert epoch_order(0, 0, 10).tolist() == [2, 6, 1, 4, 5, 9, 8, 0, 7, 3]
    positions = np.array([0, 1, 10**6, 2**61])
    assert order_at(3, 5, positions[:3], 1_281_167).tolist() == [553887, 96467, 549065]
    assert order_at(3, 5, positions, 2**62 - 57).tolist() == [
        479567249678195680,
        1467141842026324030,
        2534841963877084086,
        1247531473131369695,
    ]
    assert np.array_equal(
        sample_uniforms(7, 3, 5, 1, 3)[0],
        [0.5184643650152858, 0.037191216496851864, 0.3178598873762948],
    )


@given(st.integers(0, 10**5), st.integers(0, 3000), st.integers(1, 700))
def test_ranges_of_the_stream_are_its_samples_in_order(first, count, n):
    samples = [
        epoch * n + position
        for epoch, start, length in stream_ranges(first, count, n)
        for position in range(start, start + length)
    ]
    assert samples == list(range(first, first + count))
    assert all(0 <= p < p + length <= n for _, p, length in stream_ranges(first, count, n))


def test_ranges_as_a_table():
    assert stream_ranges(3, 0, 5) == []
    assert stream_ranges(3, 12, 5) == [(0, 3, 2), (1, 0, 5), (2, 0, 5)]


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2000), st.integers(1, 90))
def test_an_update_has_the_same_samples_on_any_number_of_workers(size, batch, seen, n):
    found = []
    for rank in range(size):
        layout = make_layout(batch, rank=rank, size=size, micro_batch=16, ghost_batch=8)
        for part in layout.micro_batches:
            for epoch, first, count in stream_ranges(seen + part.start, len(part), n):
                found += order_at(0, epoch, np.arange(first, first + count), n).tolist()
    alone = [
        sample
        for epoch, first, count in stream_ranges(seen, batch, n)
        for sample in order_at(0, epoch, np.arange(first, first + count), n).tolist()
    ]
    assert found == alone


@given(seeds, st.integers(1, 400), st.integers(0, 3000), st.integers(1, 300))
def test_the_stream_is_the_epochs_orders_one_after_the_other(seed, n, first, count):
    found = SampleStream(n, seed).indices(first, count).tolist()
    assert found == [
        sample
        for epoch, start, length in stream_ranges(first, count, n)
        for sample in epoch_order(seed, epoch, n)[start : start + length].tolist()
    ]


def test_a_stream_of_ten_billion_samples_has_no_array_of_them():
    stream = SampleStream(10**10, 1)
    indices = stream.indices(10**10 - 500, 1000)  # the end of epoch 0, the begin of epoch 1
    assert indices.min() >= 0
    assert indices.max() < 10**10
    assert np.unique(indices[:500]).size == np.unique(indices[500:]).size == 500
    assert indices[500:].tolist() == order_at(1, 1, np.arange(500), 10**10).tolist()
