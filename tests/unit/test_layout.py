"""The split of a global batch over workers and micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.schedule.layout import count_ghost_batches, make_layout


@given(
    global_batch=st.integers(1, 5000),
    size=st.integers(1, 40),
    ghost_batch=st.integers(1, 64),
    ghosts=st.integers(1, 8),
)
def test_every_sample_once_in_bounded_parts(global_batch, size, ghost_batch, ghosts):
    layouts = [
        make_layout(
            global_batch,
            rank=rank,
            size=size,
            micro_batch=ghosts * ghost_batch,
            ghost_batch=ghost_batch,
        )
        for rank in range(size)
    ]
    parts = [part for layout in layouts for part in layout.micro_batches]
    assert [offset for part in parts for offset in part] == list(range(global_batch))
    assert all(1 <= len(part) <= ghosts * ghost_batch for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= ghosts * ghost_batch + (global_batch % ghost_batch == 1)
    assert all(part.start % ghost_batch == 0 for part in parts)
    assert all(part.stop % ghost_batch == 0 for part in parts[:-1])
    counts = [
        count_ghost_batches(layout.local_batch, ghost_batch)
        for layout in layouts
        if layout.local_batch
    ]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == count_ghost_batches(global_batch, ghost_batch)
    if 1 not in (global_batch, ghost_batch):  # batch norm needs two values
        assert min(map(len, parts)) > 1
    assert sum(layout.local_batch for layout in layouts) == global_batch


def test_layouts_as_a_table():
    def ranges(batch, rank, size):
        layout = make_layout(batch, rank=rank, size=size, micro_batch=8, ghost_batch=4)
        return [(part.start, part.stop) for part in layout.micro_batches]

    assert ranges(25, 0, 1) == [(0, 8), (8, 16), (16, 25)]  # a rest of one joins the last
    assert [ranges(5, rank, 2) for rank in range(2)] == [[], [(0, 5)]]
    assert ranges(1, 0, 1) == [(0, 1)]
    assert ranges(26, 0, 1) == [(0, 8), (8, 16), (16, 24), (24, 26)]
    assert [ranges(26, rank, 2) for rank in range(2)] == [
        [(0, 8), (8, 12)],
        [(12, 20), (20, 26)],
    ]
    assert [ranges(6, rank, 3) for rank in range(3)] == [[], [(0, 4)], [(4, 6)]]


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 2}, {"rank": -1}, {"global_batch": 0}, {"ghost_batch": 0}, {"micro_batch": 6}],
)
def test_impossible_arguments_are_errors(wrong):
    right = {"global_batch": 8, "rank": 0, "size": 2, "micro_batch": 8, "ghost_batch": 4}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_layout(**(right | wrong))


def test_ghost_batches_as_a_table():
    sizes = (1, 2, 31, 32, 33, 34, 64, 65, 66)
    assert [count_ghost_batches(n, 32) for n in sizes] == [1, 1, 1, 1, 1, 2, 2, 2, 3]
    assert [count_ghost_batches(n, 1) for n in (1, 2, 3)] == [1, 2, 3]
    assert [count_ghost_batches(n, 2) for n in (1, 2, 3, 4, 5)] == [1, 1, 1, 2, 2]
