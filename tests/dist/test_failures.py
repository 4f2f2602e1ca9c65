"""A rank that fails ends the others soon, and the first failure is told first; signals end runs as
told.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hvd_lbt import checkpoint, stop

FAILING = Path(__file__).with_name("failing.py")
TINY = ("model.width=4", "schedule.epochs=0.5", "schedule.milestones=[]", "run.eval_every=9")


def train(how: str, out: Path) -> list[str]:
    words = [str(FAILING), how, "train", "digits", "--out", str(out)]
    return words + [word for setting in TINY for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "3")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "6")


def test_the_first_failure_is_told_first(start, tmp_path):
    ended = start(3, *train("raise", tmp_path)).wait()
    assert ended.code == 1
    told = [line for line in ended.output.splitlines() if line.startswith("hvd_lbt: rank")]
    assert told[0].startswith("hvd_lbt: rank 1 on ")
    assert told[0].endswith(" failed:")
    assert "RuntimeError: the memory of this GPU is full" in ended.output
    assert ended.output.count("Traceback") == 1


def train_long(out: Path, *settings: str) -> list[str]:
    """Until something happens to it."""
    settings = ("model.width=4", "schedule.epochs=900", "schedule.milestones=[]", *settings)
    words = ["train", "digits", "--out", str(out)]
    return words + [word for setting in settings for word in ("--set", setting)]


def newest(out: Path) -> int:
    return checkpoint.load_newest(out / "checkpoints")["update"]


@pytest.mark.parametrize(
    ("launcher", "number"), [("launch/mpi", signal.SIGTERM), ("launch/local", signal.SIGINT)]
)
def test_a_launcher_that_is_told_to_end_lets_the_ranks_save(start, tmp_path, launcher, number):
    launch = start(2, *train_long(tmp_path), launcher=launcher)
    launch.until_logged(tmp_path, '"event": "update"')
    if number == signal.SIGINT:
        os.killpg(launch.process.pid, number)  # as Ctrl-C in a terminal
    else:
        launch.process.send_signal(number)
    ended = launch.wait()
    assert ended.code == 75, ended.output[-4000:]
    stopped = re.search(r"Stopped after (\d+) of \d+ updates and saved", ended.output)
    assert newest(tmp_path) == int(stopped[1])


def test_a_launcher_that_is_told_to_end_before_it_has_begun_ends(start, tmp_path):
    launch = start(2, *train_long(tmp_path), launcher="launch/local")
    command = Path(f"/proc/{launch.process.pid}/cmdline")
    while b"supervise.py" not in command.read_bytes():
        assert launch.process.poll() is None
    time.sleep(0.2)  # horovodrun takes longer to start mpirun, and the ranks much longer
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait().code in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_second_signal_ends_at_once(start, tmp_path):
    launch = start(1, *train("hang", tmp_path))
    assert any(line == "failing\n" for line in launch.process.stdout)
    launch.process.send_signal(signal.SIGTERM)
    time.sleep(stop.SECONDS_OF_ONE_SIGNAL + 0.1)
    assert launch.process.poll() is None  # the first waits for the end of the update
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait().code == 128 + signal.SIGTERM
    assert not list((tmp_path / "checkpoints").iterdir())  # the folder is made at the start


def test_a_disk_that_fills_up_ends_all_ranks_and_the_checkpoint_before_is_good(start, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", out]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {mounted.stderr.strip()}")
    try:
        settings = ("run.checkpoint_minutes=0.00001", "run.keep_checkpoints=999")
        ended = start(2, "-m", "hvd_lbt", *train_long(out, *settings)).wait()
        assert ended.code == 2, ended.output[-4000:]
        told = [line for line in ended.output.splitlines() if line.startswith("hvd_lbt: ")]
        assert len(told) == 1, ended.output
        assert "could not be written (No space left on device)" in told[0]
        assert "Traceback" not in ended.output
        before = newest(out)
        subprocess.run(["mount", "-o", "remount,size=16m", out], check=True)
        launch = start(2, "-m", "hvd_lbt", *train_long(out, *settings), "--resume")
        launch.until(lambda: newest(out) != before)
        launch.kill()
        assert f"going on after {before} updates" in launch.wait().output
    finally:
        subprocess.run(["umount", "--lazy", out], check=True)


def test_a_sum_that_a_rank_does_not_join_is_named_and_ended(start, tmp_path):
    ended = start(2, *train("hang", tmp_path)).wait()
    assert ended.code != 0
    assert "Missing ranks:" in ended.output
    assert "gradient." in ended.output
    assert "hvd_lbt: rank 0 on " in ended.output
    assert "ends because another rank failed or is gone" in ended.output


def test_a_frozen_rank_is_noticed(start, tmp_path):
    ended = start(2, *train("freeze", tmp_path)).wait()
    assert ended.code == 74
    assert "hvd_lbt: rank 0 on " in ended.output
    assert "s for the ranks' sum of 'gradient." in ended.output
    assert "(HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=6)" in ended.output


@pytest.mark.parametrize(("how", "signal"), [("die", 9), ("crash", 11)])
def test_a_rank_that_dies_ends_the_others(start, tmp_path, how, signal):
    ended = start(3, *train(how, tmp_path)).wait()
    assert ended.code == 128 + signal
    assert "rank 1 with PID" in ended.output
    assert f"exited on signal {signal}" in ended.output
