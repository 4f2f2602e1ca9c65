"""A launcher that is killed with SIGKILL: its ranks save and end, and no process is left."""

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from hvd_lbt import checkpoint

LONG = ("model.width=4", "schedule.epochs=900", "schedule.milestones=[]", "run.eval_every=99")


@pytest.mark.parametrize(
    ("launcher", "whom"),
    [
        ("launch/local", "supervisor"),
        ("launch/local", "guard"),
        ("launch/local", "both"),
        ("launch/mpi", "mpirun"),
        (None, "mpirun"),
        ("horovodrun --gloo -np", "horovodrun"),
    ],
)
def test_the_ranks_save_and_no_process_is_left(start, tmp_path, launcher, whom):
    words = ["train", "digits", "--out", str(tmp_path / "run")]
    words += [word for setting in LONG for word in ("--set", setting)]
    if (
        launcher is None
    ):  # Open MPI aborts ranks without mpirun after a second, unless it is delayed
        words = [Path(__file__).with_name("slow_saving.py"), *words]
    if whom == "horovodrun":
        words = [sys.executable, "-m", "hvd_lbt", *words]
    launch = start(2, *words, launcher=launcher)
    launch.until_logged(tmp_path / "run", '"event": "update"')
    first = psutil.Process(launch.process.pid)
    tree = [first, *first.children(recursive=True)]
    if whom == "mpirun":
        killed = [one for one in tree if one.name() == "mpirun"]
    elif whom == "guard":
        killed = first.children()
    else:
        killed = [first, *(first.children() if whom == "both" else ())]
    assert len(killed) == 1 + (whom == "both")
    for process in killed:
        process.kill()
    ended = launch.wait()
    assert ended.code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    _, left = psutil.wait_procs(tree, timeout=60)
    assert not left
    events = list(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    assert events[-1].get("reason") == "stopped", ended.output[-4000:]
    assert checkpoint.load_newest(tmp_path / "run/checkpoints")["update"] == events[-1]["update"]
