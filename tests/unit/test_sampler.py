"""PlanSampler: on any number of ranks the samples of an update are the plan's."""

from itertools import islice

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from hvd_lbt import MicroBatches, Milestone, PlanSampler, Schedule, UserError, World, make_plan
from hvd_lbt.data.order import SampleStream

N = 103
DATA = TensorDataset(torch.arange(N))
PLAN = make_plan(
    Schedule(
        policy="grow_batch",
        epochs=3,
        lr=0.1,
        momentum=0.9,
        global_batch=5,
        milestones=(Milestone(epoch=1, factor=4), Milestone(epoch=2, factor=10, ghost_batch=8)),
    ),
    N,
)


def sampler(rank=0, size=1, **changes) -> PlanSampler:
    settings = {"micro_batch": 16, "ghost_batch": 4, "world": World(rank=rank, size=size)}
    return PlanSampler(DATA, PLAN, **settings | changes)


def by_update(one: PlanSampler) -> list[tuple[int, list[list[int]]]]:
    return [(update.index, list(batches)) for update, batches in one.updates(one)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_union_of_the_ranks_is_the_update(size):
    ranks = [by_update(sampler(rank, size)) for rank in range(size)]
    stream = SampleStream(N, 0)
    for index in range(PLAN.updates):
        update = PLAN.at(index)
        found = [i for rank in ranks for micro_batch in rank[index][1] for i in micro_batch]
        assert found == stream.indices(update.samples_seen, update.global_batch).tolist()
    assert all([index for index, _ in rank] == list(range(PLAN.updates)) for rank in ranks)


@pytest.mark.parametrize("size", [1, 3])
def test_each_epoch_has_every_sample_once(size):
    everything = [
        i
        for index in range(PLAN.updates)
        for rank in range(size)
        for micro_batch in by_update(sampler(rank, size))[index][1]
        for i in micro_batch
    ]
    for epoch in range(3):
        assert sorted(everything[epoch * N : (epoch + 1) * N]) == list(range(N))


def test_a_rank_without_samples_has_no_micro_batches_and_still_meets_the_update():
    # 5 samples are one ghost batch of 4 with the rest of one
    first = by_update(sampler(0, 5))[0], by_update(sampler(4, 5))[0]
    assert [(index, [len(part) for part in parts]) for index, parts in first] == [(0, []), (0, [5])]


@pytest.mark.parametrize("start", [0, 7, PLAN.updates - 1, PLAN.updates])
def test_resumed_anywhere_it_is_the_rest(start):
    assert by_update(sampler(1, 2, start_update=start)) == by_update(sampler(1, 2))[start:]
    assert len(sampler(1, 2, start_update=start)) == len(list(sampler(1, 2, start_update=start)))


def test_it_is_a_batch_sampler_and_workers_change_nothing():
    one = sampler()
    assert isinstance(one, BatchSampler)
    loader = DataLoader(DATA, batch_sampler=one, num_workers=2)
    assert len(loader) == len(one)
    found = [batch[0].tolist() for _, batches in one.updates(loader) for batch in batches]
    assert found == list(one) == list(one)  # it can be iterated again


def test_another_seed_is_another_order():
    assert list(sampler(seed=1)) != list(sampler(seed=2))
    assert list(sampler(seed=1)) == list(sampler(seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0; it must be at least 1"),
        ({"ghost_batch": 0}, "ghost_batch is 0; it must be at least 1"),
        ({"ghost_batch": 5}, "micro_batch 16 is no multiple of a ghost batch of 5"),
        ({"micro_batch": 4}, "micro_batch 4 is no multiple of a ghost batch of 8"),
        ({"seed": -1}, "seed is -1; it must be 0 to 2"),
        ({"start_update": PLAN.updates + 1}, f"it must be 0 to {PLAN.updates}"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        sampler(**changes)


def test_other_data_than_the_plans_is_refused():
    with pytest.raises(UserError, match="the data has 102 samples, the plan was made for 103"):
        PlanSampler(range(102), PLAN, micro_batch=8, world=World())


def test_micro_batches_that_are_left_are_an_error():
    one = sampler()
    with pytest.raises(UserError, match=r"update 0: 1 of 1 micro-batches were not used"):
        for _ in one.updates(one):
            pass


def test_a_loader_that_ends_early_is_an_error():
    one = sampler()
    with pytest.raises(UserError, match="the batches ended after 0 of 1 micro-batches"):
        [list(batches) for _, batches in one.updates(islice(one, 3))]


def test_micro_batches_of_nothing_are_false():
    assert not MicroBatches([], [])
    assert len(MicroBatches([3, 2], [])) == 2


@pytest.mark.parametrize("size", [1, 3])
def test_in_blocks_each_epoch_has_every_sample_once_and_updates_are_the_same(size):
    blocks = {"shuffle_block": 5, "shuffle_window": 3}
    ranks = [by_update(sampler(rank, size, **blocks)) for rank in range(size)]
    found = [
        i
        for index in range(PLAN.updates)
        for rank in ranks
        for micro_batch in rank[index][1]
        for i in micro_batch
    ]
    assert found == SampleStream(N, 0, 5, 3).indices(0, 3 * N).tolist()
    for settings in ({"shuffle_block": 1}, {"shuffle_block": 5, "shuffle_window": 0}):
        with pytest.raises(UserError, match="must be"):
            sampler(**settings)
    with pytest.raises(UserError, match="the whole shuffle"):
        sampler(shuffle_block=50)
