"""The time that is left, on simulated runs of a plan that grows."""

import math
import random

import pytest

from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Milestone, Schedule
from hvd_lbt.schedule.time_left import (
    FITTED,
    MEASURED,
    UPPER_BOUND,
    TimeLeft,
    hours_and_minutes,
    robust_mean,
)

PLAN = make_plan(
    Schedule(
        epochs=20,
        lr=0.1,
        momentum=0.9,
        global_batch=32,
        policy="grow_batch",
        milestones=(
            Milestone(epoch=8, factor=2),
            Milestone(epoch=11, factor=4),
            Milestone(epoch=14, factor=2),
        ),
    ),
    1437,
)
EVALUATION, SAVE = 0.3, 0.1


class Run:
    """A run whose micro-batches of n samples cost c0 + c1·n seconds, and an update a more."""

    def __init__(self, *, workers=2, micro_batch=64, a=0.004, c0=0.003, c1=0.0002, noise=0.0):
        self.workers, self.micro_batch, self.a, self.noise = workers, micro_batch, a, noise
        self.cost = lambda samples: c0 + c1 * samples
        self.random = random.Random(1)

    def left_at(self, share, *, probes=True, plan=PLAN, first=0, parts=True):
        """(estimate after that share of the run's time, true rest, naive estimate)."""
        left = TimeLeft(
            plan,
            workers=self.workers,
            micro_batches=[self.micro_batch] * len(plan.stages),
            ghost_batch=16,
            eval_every=1,
            test_samples=360,
        )
        clock, estimates, before, evaluations = 0.0, [], None, 0
        for index in range(first, plan.updates):
            update = plan.at(index)
            sizes = left._size(left._key(update.stage, update.global_batch)).micro_batches
            compute = sum(map(self.cost, sizes)) * math.exp(self.noise * self.random.gauss(0, 1))
            seconds = self.a + compute + (2.0 if index % 97 == 50 else 0.0) * self.noise
            clock += seconds
            left.updated(update, seconds)
            if parts and before:
                left.parts(*before)
            before = (update, compute, 0.0)
            if probes and index - first == 5:
                left.learn_costs({n: self.cost(n) for n in left.micro_batches_ahead(index)})
            seen = update.samples_seen + update.global_batch
            if seen // 1437 > update.samples_seen // 1437 or index + 1 == plan.updates:
                clock += EVALUATION
                left.evaluated(EVALUATION)
                evaluations += 1
                if evaluations in (1, 2, 3, 5):  # the best so far
                    clock += SAVE
                    left.saved(SAVE, at_end_of_stage=False)
            if index + 1 == plan.updates or plan.at(index + 1).stage != update.stage:
                clock += SAVE
                left.saved(SAVE, at_end_of_stage=True)
            estimates.append((clock, left.after(update), seen))
        place = next(n for n, (at, _, _) in enumerate(estimates) if at >= share * clock)
        at, estimate, seen = estimates[place]
        started = plan.at(first).samples_seen
        naive = at / (seen - started) * (plan.samples - seen)
        return estimate, clock - at, naive


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_growth_ahead_is_in_the_estimate_of_the_first_stage(noise):
    estimate, rest, naive = Run(noise=noise).left_at(0.2)
    assert estimate.basis == FITTED
    assert estimate.seconds == pytest.approx(rest, rel=0.08)
    assert naive > 1.3 * rest  # what the average since the start says


def test_two_sizes_suffice_without_a_probe():
    estimate, rest, _ = Run().left_at(0.75, probes=False)  # the second stage
    assert estimate.basis == FITTED
    assert estimate.seconds == pytest.approx(rest, rel=0.25)
    large = Run(micro_batch=16)  # micro-batches of one size: their number grows
    estimate, rest, _ = large.left_at(0.2, probes=False)
    assert estimate.basis == FITTED
    assert estimate.seconds == pytest.approx(rest, rel=0.08)


def test_one_size_alone_gives_an_upper_bound_that_says_so():
    estimate, rest, naive = Run().left_at(0.2, probes=False)
    assert estimate.basis == UPPER_BOUND
    assert rest < estimate.seconds < naive * 1.05


def test_in_the_last_stage_everything_has_been_measured():
    estimate, rest, _ = Run(noise=0.05).left_at(0.95)
    assert estimate.basis == MEASURED
    assert estimate.seconds == pytest.approx(rest, rel=0.25)


def test_the_same_holds_for_a_resumed_part_with_other_workers():
    run = Run(workers=4, noise=0.05)
    estimate, rest, _ = run.left_at(0.2, first=100)
    assert estimate.seconds == pytest.approx(rest, rel=0.08)


def test_what_a_stage_was_predicted_to_do_is_kept_for_the_summary():
    run = Run()
    left = TimeLeft(
        PLAN, workers=2, micro_batches=[64] * 4, ghost_batch=16, eval_every=1, test_samples=360
    )
    for update in map(PLAN.at, range(PLAN.updates)):
        sizes = left._size(left._key(update.stage, update.global_batch)).micro_batches
        compute = sum(map(run.cost, sizes))
        left.updated(update, compute + run.a)
        left.parts(update, compute, 0.0)
        if update.index == 5:
            left.learn_costs({n: run.cost(n) for n in left.micro_batches_ahead(5)})
        left.after(update)
    assert left.at_first[0] is None  # nothing was known when it began
    for stage in PLAN.stages[1:]:
        sizes = left._size(left._key(stage.index)).micro_batches
        true = stage.global_batch / (sum(map(run.cost, sizes)) + run.a)
        assert left.at_first[stage.index] == pytest.approx(true, rel=0.02)


def test_nothing_is_said_before_there_is_something_to_go_by():
    left = TimeLeft(
        PLAN, workers=1, micro_batches=[64] * 4, ghost_batch=16, eval_every=1, test_samples=360
    )
    for index in range(4):
        left.updated(PLAN.at(index), 0.1 if index > 2 else 9.0)
        assert left.after(PLAN.at(index)) is None
    left.updated(PLAN.at(4), 0.1)
    assert left.after(PLAN.at(4)).seconds < 0.1 * PLAN.updates * 16  # no first update in it


def test_after_the_last_update_nothing_is_left_but_its_save():
    estimate, rest, _ = Run().left_at(1.0)
    assert rest == 0
    assert 0 <= estimate.seconds <= SAVE


def test_updates_that_wait_for_the_input_grow_with_their_samples():
    left = TimeLeft(
        PLAN, workers=1, micro_batches=[64] * 4, ghost_batch=16, eval_every=1, test_samples=1
    )
    for index in range(40):
        left.updated(PLAN.at(index), 0.1)
        left.parts(PLAN.at(index), 0.02, 0.07)
    left.learn_costs({32: 0.02, 64: 0.03})
    assert left.images_per_second(PLAN.stages[2]) == pytest.approx(320)  # no more than now


def test_single_hiccups_count_as_four_medians():
    assert robust_mean([1.0] * 9 + [101.0]) == pytest.approx((9 + 4) / 10)
    assert robust_mean([2.0]) == 2.0


def test_hours_and_minutes():
    assert [hours_and_minutes(s) for s in (5, 59.9, 60, 3600, 7530, 360000)] == [
        *("<0:01 h", "<0:01 h", "0:01 h", "1:00 h", "2:06 h", "100:00 h")
    ]
