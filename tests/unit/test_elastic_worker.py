"""An elastic worker's own part: stops that are not lost, and a state that no disk takes."""

import os
import signal
import threading
import time

import pytest
import torch

from hvd_lbt import checkpoint, stop
from hvd_lbt.elastic import worker
from hvd_lbt.elastic.discovery import OLD_TARGET, TARGET
from hvd_lbt.errors import CheckpointError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def member(tmp_path) -> worker.Membership:
    """A worker of a world, without a driver."""
    one = object.__new__(worker.Membership)
    one._recipe = load_recipe("digits", ("elastic.local_batch=32",))
    one._out, one._rank, one._target = tmp_path, 0, 0
    one._stop, one._stop_asked = None, False
    one._at_end, one._flags = worker._nothing, torch.zeros(2)
    one._leaving, one._in_world, one._news = threading.Lock(), True, threading.Event()
    one._wanted = {"regroup": False, "stop": False, "lost": False}
    one._committed = {"update": 5, "best_top1": 0.5, "model": {"w": torch.arange(3.0)}}
    return one


def stop_request() -> stop.StopRequest:
    return stop.StopRequest()


def test_a_drivers_stop_long_after_a_signal_is_no_second_signal(member, monkeypatch):
    """SIGTERM reached this worker in a long update; the driver's word comes seconds later."""
    monkeypatch.setattr(worker.comm, "allreduce_", lambda tensor, name: tensor)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with {code}"))
    request = stop_request()
    stage = make_plan(member._recipe.schedule, 1437).stages[0]
    member.begin(stage, worker._nothing, request)
    signal.raise_signal(signal.SIGTERM)
    request._asked_at -= 10
    member._wanted["stop"] = True
    for update in (6, 7):
        member.commit({**member._committed, "update": update}, stage)
    assert request.requested()


def test_a_signal_between_two_worlds_reaches_the_next_training(member, monkeypatch):
    monkeypatch.setattr(worker.comm, "leave", worker._nothing)
    stage = make_plan(member._recipe.schedule, 1437).stages[0]
    first = stop_request()
    member.begin(stage, worker._nothing, first)
    member.leave()  # a worker was lost
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR1)
    second = stop_request()
    assert not second.requested()
    member.begin(stage, worker._nothing, second)
    assert second.requested()
    member.leave()  # and if that world is lost too
    third = stop_request()
    member.begin(stage, worker._nothing, third)
    assert third.requested()


def test_a_state_is_kept_until_the_disk_takes_it(member, monkeypatch, capsys):
    monkeypatch.setattr(worker, "SAVE_AGAIN_SECONDS", 1)
    folder = member._out / "checkpoints"
    folder.write_text("in the way")

    def make_room() -> None:
        while "kept in memory" not in "".join(said):
            said.append(capsys.readouterr().out)
            time.sleep(0.01)
        folder.unlink()

    said: list[str] = []
    helper = threading.Thread(target=make_room)
    helper.start()
    error = CheckpointError("update-00000006.pt could not be written")
    assert member._save_until(time.monotonic() + 1000, error) == ""
    helper.join()
    state = checkpoint.load_newest(folder)
    assert state["update"] == 5
    assert state["best_top1"] == 0.5
    assert torch.equal(state["model"]["w"], torch.arange(3.0))


def test_a_signal_or_the_time_ends_the_waiting_with_the_reason(member):
    (member._out / "checkpoints").write_text("in the way")
    error = CheckpointError("first")
    assert "could not be written" in member._save_until(time.monotonic() - 1, error)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()
    assert "could not be written" in member._save_until(time.monotonic() + 1000, error)
    member._committed = {}
    assert member._save_until(time.monotonic() + 1000, error) == "first"


def test_the_target_is_written_under_both_names_and_a_failure_is_no_end(member, capsys):
    plan = make_plan(member._recipe.schedule, 1437)
    member._publish_target(plan.stages[0])
    first = (member._out / TARGET).read_text()
    assert (member._out / OLD_TARGET).read_text() == first
    member._out = member._out / "no such folder"
    member._target = 0
    member._publish_target(plan.stages[0])
    assert "cannot be written" in capsys.readouterr().out
