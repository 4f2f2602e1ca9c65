"""Workers that are killed, added and taken away: the same training, no sample lost or used twice.

The kills are at random moments. HVD_LBT_TEST_KILLS=20 makes a campaign of them; the seed is
printed.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from elastic_runs import Elastic, check_whole, kept
from launching import run_ranks
from trainings import EXACT, ROUNDING, difference, events, last_state, train

from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan

KILLS = int(os.environ.get("HVD_LBT_TEST_KILLS", "3"))


@pytest.fixture
def elastic(tmp_path):
    begun: list[Elastic] = []

    def start(*settings: str, **options) -> Elastic:
        folder = tmp_path / f"elastic{len(begun)}"
        folder.mkdir()
        begun.append(Elastic(folder, *settings, **options))
        return begun[-1]

    yield start
    for one in begun:
        one.kill_all()
        one.output.close()


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Path:
    """The run on one worker, from which nobody goes."""
    out = tmp_path_factory.mktemp("fixed")
    run_ranks(1, *train(*EXACT, out=out, smooth=True))
    return out


def test_workers_killed_and_added_at_random_moments(elastic, fixed):
    seed = int(os.environ.get("HVD_LBT_TEST_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    chance = random.Random(seed)
    # 80 updates last until all kills are done: a new worker is loaded within some seconds
    run = elastic(*EXACT, slots=2, maximum=3, pause=str(0.15 * KILLS))
    run.until(lambda: run.committed() >= 2, "training")
    killed = []
    for number in range(KILLS):
        if number % 4 != 3:  # else also the only worker may be killed
            run.until(lambda: run.size() >= 2, "two workers")
        time.sleep(chance.uniform(0.5, 3.0))
        rank, pid = chance.choice(sorted(run.members().items()))
        os.kill(pid, signal.SIGKILL)
        killed.append(rank)
        before = run.committed()
        run.until(lambda before=before: run.committed() > before + 1, f"going on after {killed}")
        run.offer(chance.choice([2, 3]))
    run.offer(1)
    assert run.end(600) == 0, run.said()

    check_whole(run, EXACT)
    assert [line["update"] for line in kept(run.out)] == list(range(80))
    assert difference(fixed, run.out) < ROUNDING
    happened = [json.loads(line) for line in (run.out / "elastic.jsonl").read_text().splitlines()]
    # Whoever is killed while it is being released is not lost, but has left.
    assert sum("lost" in event or "left" in event for event in happened) >= KILLS
    seconds = sorted(event["again"] for event in happened if "again" in event)
    print(f"killed ranks {killed}; seconds from loss to the next committed update: {seconds}")


def test_losses_in_an_evaluation_and_in_a_checkpoint_then_of_the_driver(elastic, fixed, ranks):
    run = elastic(*EXACT, slots=3, maximum=3, pause="0.15", die="evaluation checkpoint")
    run.until(lambda: run.committed() >= 50, "past the first evaluation and its checkpoint")
    assert {file.name for file in run.notes.iterdir()} > {"evaluation", "checkpoint"}
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 60
    while run.workers():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.05)
    (end,) = events(run.out, "end")
    assert end["reason"] == "stopped"
    assert end["update"] == last_state(run.out)["update"] < 80
    assert end["update"] > run.committed()  # nothing that was committed is lost
    ranks(1, *train(*EXACT, out=run.out, resume=True, smooth=True))
    assert [line["update"] for line in kept(run.out)] == list(range(80))
    assert difference(fixed, run.out) < ROUNDING


def test_losses_while_the_ranks_connect_cost_no_update(elastic, fixed):
    """One dies before it connects and one while it does; rank 0 alone has the state of training."""
    run = elastic(*EXACT, slots=1, maximum=2, pause="0.3", die="joining connecting")
    run.until(lambda: run.committed() >= 2, "training")
    run.offer(2)
    run.until(lambda: run.size() == 2, "two workers")
    assert {file.name for file in run.notes.iterdir()} > {"joining", "connecting"}
    assert run.end(600) == 0, run.said()
    assert [line["update"] for line in events(run.out, "update")] == list(range(80))  # none twice
    happened = [json.loads(line) for line in (run.out / "elastic.jsonl").read_text().splitlines()]
    assert [event["restarts"] for event in happened if "restarts" in event] == ["localhost:0"] * 2
    check_whole(run, EXACT)
    assert difference(fixed, run.out) < ROUNDING


def test_workers_grow_and_shrink_with_the_batch(elastic, ranks, tmp_path):
    stages = (
        "model.width=8",
        "wire.form=fp32",
        "schedule.epochs=2",
        "schedule.lr=0.02",
        "schedule.milestones=[{epoch: 0.5, factor: 2}, {epoch: 1, factor: 1.5}]",
        "elastic.local_batch=32",
    )
    ranks(1, *train(*stages, out=tmp_path / "fixed", smooth=True), timeout=300)
    run = elastic(*stages, slots=3, maximum=3, pause="target")
    assert run.end(600) == 0, run.said()
    check_whole(run, stages)
    assert difference(tmp_path / "fixed", run.out) < ROUNDING
    plan = make_plan(load_recipe("digits", stages).schedule, 1437)
    sizes: dict[int, int] = {}
    for line in sorted(run.lines(), key=lambda line: (line["update"], line["generation"])):
        if "samples" in line:
            sizes[plan.at(line["update"]).stage] = line["size"]
    assert sizes == {0: 1, 1: 2, 2: 3}  # at the end of each stage
    # nothing was lost, so no update was done twice
    starts = [event["resumed_at_update"] for event in events(run.out, "run")]
    assert [line["update"] for line in events(run.out, "update")] == list(range(plan.updates))
    assert starts == sorted(starts)
