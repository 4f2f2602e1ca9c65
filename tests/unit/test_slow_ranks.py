"""Which rank is slow, and why, on simulated updates: named in time, and nobody without reason."""

import numpy as np
import pytest

from hvd_lbt.measure.run_times import RanksLine, RunTimes, summary_text
from hvd_lbt.measure.slow_ranks import SlowRanks, reference
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Schedule


def simulated(compute, data=0.0, between=0.0, no_core=0.0, *, updates, ranks, noise=0.05, seed=0):
    """(U, ranks, 4) rows of ranks that leave each sum together, with log-normal noise.

    compute, data, between, no_core: seconds, each a number or one for each rank; what had no core
    is a part of compute.
    """
    random = np.random.default_rng(seed)
    shape = (updates, ranks)
    compute = np.broadcast_to(compute, shape) * np.exp(noise * random.standard_normal(shape))
    compute = compute + np.broadcast_to(no_core, shape)
    data, between = np.broadcast_to(data, shape), np.broadcast_to(between, shape)
    arrival = between + data + compute
    sums = arrival.max(1, keepdims=True) - arrival + 0.004
    return np.stack([compute, data, sums, np.broadcast_to(no_core, shape)], axis=2)


def found(rows, samples=None, seconds=0.1, step=7):
    """What SlowRanks says of these rows, given a few at a time."""
    ranks = rows.shape[1]
    slow = SlowRanks([f"node{rank // 2}" for rank in range(ranks)])
    samples = np.broadcast_to(np.full(ranks, 64.0) if samples is None else samples, rows.shape[:2])
    said = []
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        indices = range(at, min(at + step, len(rows)))
        said += slow.add(indices, rows[part], samples[part], np.full(len(indices), seconds))
    return said


@pytest.mark.parametrize("ranks", [2, 3, 4, 64])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_nobody_is_named_where_nobody_is_slow(ranks, noise):
    rows = simulated(0.1, 0.01, updates=700, ranks=ranks, noise=noise, seed=ranks)
    assert found(rows) == []


@pytest.mark.parametrize("ranks", [2, 3, 4, 64])
def test_a_rank_slower_by_30_percent_is_named_within_20_updates(ranks):
    compute = np.full((200, ranks), 0.1)
    compute[100:, 1] *= 1.3
    (one,) = found(simulated(compute, updates=200, ranks=ranks))
    assert (one.rank, one.cause, one.host) == (1, "compute", "node0")
    assert 105 <= one.update <= 119
    assert one.ratio == pytest.approx(1.3, abs=0.05)
    assert one.excess == pytest.approx(0.03, abs=0.008)
    peers = "the other rank" if ranks == 2 else "the median"
    assert one.text(ranks) == f"slowest rank 1 on node0: 1.3 × {peers}, in forward and backward"


@pytest.mark.parametrize("cause", ["compute", "data", "between"])
def test_the_cause_is_where_the_time_goes(cause):
    extra = {"compute": 0.1, "data": 0.01, "between": 0.002}
    slow = np.broadcast_to(extra[cause], (60, 4)).copy()
    slow[20:, 3] += 0.04
    (one,) = found(simulated(**(extra | {cause: slow}), updates=60, ranks=4))
    assert (one.rank, one.cause) == (3, cause)
    assert one.update <= 39


def test_two_slow_ranks_are_both_named_each_with_its_cause():
    compute, data = np.full((60, 3), 0.1), np.full((60, 3), 0.005)
    compute[20:, 0] *= 1.3
    data[20:, 2] += 0.06
    said = found(simulated(compute, data, updates=60, ranks=3))
    assert {(one.rank, one.cause) for one in said} == {(0, "compute"), (2, "data")}
    assert max(one.update for one in said) <= 39


def test_a_rank_is_cleared_when_it_is_fast_again_and_named_once_in_between():
    compute = np.full((300, 4), 0.1)
    compute[50:150, 2] *= 1.4
    named, cleared = found(simulated(compute, updates=300, ranks=4))
    assert (named.rank, named.ended, cleared.rank, cleared.ended) == (2, False, 2, True)
    assert 150 < cleared.update <= 170
    assert "fast as the others again" in cleared.text(4)


def test_a_larger_share_of_the_samples_makes_no_slow_rank():
    for fixed in (0.0, 0.05, 0.1):  # of 0.1 s for 64 samples
        samples = np.array([32.0, 64.0, 64.0, 0.0])
        compute = fixed + (0.1 - fixed) * samples / 64
        compute[3] = 0.0
        assert found(simulated(compute, updates=400, ranks=4, noise=0.1), samples) == []
    slow = np.array([0.09, 0.1, 0.16, 0.0])
    assert {one.rank for one in found(simulated(slow, updates=60, ranks=4), samples)} == {2}


def test_another_process_on_its_cores_counts_only_if_it_stays():
    """A burst of two seconds names nobody; after five seconds the cause is that process."""
    taken = np.zeros((200, 2))
    taken[50:70, 0] = 0.08
    assert found(simulated(0.1, no_core=taken, updates=200, ranks=2)) == []
    taken[100:, 1] = 0.08
    (one,) = found(simulated(0.1, no_core=taken, updates=200, ranks=2))
    assert (one.rank, one.cause) == (1, "no_core")
    assert 145 <= one.update <= 175  # 0.1 s an update


def test_single_hiccups_name_nobody():
    compute = np.full((400, 4), 0.1)
    compute[::3, 1] += 0.5  # every third update: a checkpoint, a page of Python's memory
    assert found(simulated(compute, updates=400, ranks=4)) == []


def test_the_reference_is_the_low_median_of_the_others():
    values, same = np.array([[1.0, 2.0, 3.0, 10.0]]), np.ones(4)
    assert reference(values, same).tolist() == [[3.0, 3.0, 2.0, 2.0]]
    assert reference(values[:, :3], same[:3]).tolist() == [[2.0, 1.0, 1.0]]
    assert reference(values[:, :2], same[:2]).tolist() == [[2.0, 1.0]]
    assert reference(values[:, :1], same[:1]).tolist() == [[0.0]]
    # twice the samples of the others may take twice as long
    double = np.array([2.0, 1.0, 1.0])
    assert reference(np.array([[2.0, 1.0, 1.0]]), double).tolist() == [[2.0, 1.0, 1.0]]
    # a rank without samples is none to compare with
    assert reference(np.array([[2.0, 1.0, 0.0]]), np.array([1.0, 1.0, 0.0])).tolist() == [
        [1.0, 2.0, 0.0]
    ]


def test_the_times_of_a_run_are_added_up_by_stage_with_the_row_of_the_update_before():
    schedule = Schedule(epochs=2, lr=0.1, momentum=0.9, global_batch=10, policy="grow_batch")
    plan = make_plan(schedule, 100)
    updates = [(plan.at(index), 0.5) for index in range(plan.updates)]
    rows = np.zeros((len(updates), 2, 4))
    rows[1:] = [[0.3, 0.05, 0.1, 0.0], [0.2, 0.05, 0.2, 0.0]]
    run = RunTimes(["a", "b"], planned=plan.updates, ghost_batch=5)
    lines = [*run.add(updates[:9], rows[:9]), *run.add(updates[9:], rows[9:]), *run.last_line()]
    stage = run.stages[0]
    assert (stage.updates, stage.samples, stage.seconds) == (20, 200, 10.0)
    assert stage.images_per_second == 20
    assert stage.timed == 9.5  # the row of the last update never comes
    assert stage.shares == pytest.approx({"compute": 0.5, "data": 0.1, "sums": 0.2, "waiting": 0.1})
    slow = lines.pop([isinstance(line, RanksLine) for line in lines].index(False))
    assert (slow.rank, slow.host, slow.cause) == (0, "a", "compute")
    assert slow.ratio == pytest.approx(1.4)
    assert sum(line.updates for line in lines) == 19
    summary = run.summary(18.0)
    assert summary["worker_hours"] == pytest.approx(0.01)
    assert [stage["images_per_second"] for stage in summary["stages"]] == [20]
    assert summary_text(summary, 18.0).splitlines() == [
        "<0:01 h (18.0 s), 0.01 worker-hours",
        (
            "stage 1: 20 updates, 20 images/s · forward and backward 50.0%, waiting for data "
            "10.0%, sums 20.0%, waiting for slower ranks 10.0%"
        ),
    ]
    assert lines[0].values() == {
        "first_update": 0,
        "updates": 1,
        "compute": [0.3, 0.2],
        "data": [0.05, 0.05],
        "sums": [0.1, 0.2],
        "delayed": [0.0, 0.0],
    }
