"""An update sums its gradients, and all else that the ranks must know in one small message."""

from collections import Counter

import pytest
import torch
from test_regularised_training import SCHEDULE, B, N, network, stream
from thread_ranks import Ranks, reducer_of
from torch import nn

from hvd_lbt.errors import UserError
from hvd_lbt.measure.rank_times import ROWS, RankTimes
from hvd_lbt.models import make_forward
from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.training import Training
from hvd_lbt.world import World


def test_an_update_has_one_sum_beside_its_gradients():
    sums = Counter()
    model = network()
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    reducer = reducer_of(model, optimizer, allreduce=lambda tensor, name: sums.update([name]))
    training = Training(model, optimizer, SCHEDULE, forward=make_forward(model), reducer=reducer)
    plan = make_plan(SCHEDULE, N)
    _, _, updates = stream(plan, 8)
    sums.clear()
    for (update, batches), votes in zip(updates, [(1.0, 0.0), (0.0, 3.0)], strict=False):
        tally = training.update(update, batches, votes)
        assert tally.votes.tolist() == list(votes)
        assert tally.sums[2] == update.global_batch == B
    buckets = [name for name in sums if name.startswith("gradient.") and "flags" not in name]
    others = sums.keys() - set(buckets)
    assert len(others) == 1, others
    assert set(sums.values()) == {2}


def one_update(rank, make):
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    reducer = make(model, torch.optim.SGD(model.parameters(), lr=0.1))
    results = []
    for update in range(2):
        room = reducer.room(2)
        room[0], room[1] = rank + 1.0, 10.0 * update
        reducer.backward(model(torch.ones(1, 2)).sum() * (rank + 1))
        reducer._optimizer.step()
        results.append(room)
    reducer.backward(model(torch.ones(1, 2)).sum())  # without room: the next one is not summed in
    with pytest.raises(UserError, match="before"):
        reducer.room(1)
    reducer._optimizer.step()
    return [room.tolist() for room in results]


def test_what_rides_along_is_summed_over_the_ranks_and_stays_its_callers():
    assert Ranks(3).run(one_update) == [[[6.0, 0.0], [6.0, 30.0]]] * 3


def test_the_small_sum_does_not_grow_with_the_ranks_without_end():
    def numbers(ranks):
        times = RankTimes(torch.device("cpu"), World(rank=0, size=ranks))
        return sum(times.numbers(update) for update in range(64)) / 64

    assert numbers(8) == 4 * 8
    assert numbers(ROWS) == 4 * ROWS
    assert numbers(4096) == 4 * ROWS

    def flags(size):
        sent = []

        def allreduce(tensor, name):
            sent.append(len(tensor))
            if name == "gradient.model":  # as if all ranks had the same
                tensor += tensor.sum(0) - tensor

        model = nn.Linear(2, 1)
        optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        reducer: GradientReducer = reducer_of(model, optimizer, allreduce=allreduce, size=size)
        reducer._compared = True
        reducer.backward(model(torch.ones(1, 2)).sum())
        return sent[-1]

    assert flags(4096) == flags(2)
