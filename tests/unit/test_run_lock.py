"""One run, one owner: refused while it may live, taken over only with proof or on the user's
word.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hvd_lbt import run_lock
from hvd_lbt.errors import UserError
from hvd_lbt.run_lock import RECORD, RunLock, evidence, file_system_of, read_owner, this_process
from hvd_lbt.world import World

HOLD = """
import sys, time
from pathlib import Path
from hvd_lbt.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), role="training")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.01)


@pytest.fixture
def holder(tmp_path):
    """Another process that owns tmp_path, in a Slurm job."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "one"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | job,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def without_flock(monkeypatch, number: int = errno.EOPNOTSUPP) -> None:
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def leave(out: Path, age: float = 0.0, **changes) -> None:
    """The record of an owner on another host that has not removed it."""
    there = {"host": "node9", "boot": "another", "machine": "another", "flock": False}
    owner = replace(this_process("training", flock=True, linger=0.0), **(there | changes))
    (out / RECORD).write_text(json.dumps(asdict(owner)))
    then = time.time() - age
    os.utime(out / RECORD, (then, then))


def squeue(folder: Path, monkeypatch, script: str, cluster: str = "one") -> None:
    """A squeue that is this shell script, on a host of that cluster."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (commands / "scontrol").write_text(f"#!/bin/sh\necho 'ClusterName             = {cluster}'\n")
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("take_over", [False, True])
def test_a_second_owner_is_refused_and_told_who_owns_the_run(tmp_path, holder, frozen, take_over):
    if frozen:
        holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError) as refused:
        RunLock(tmp_path, take_over=take_over)
    message = str(refused.value)
    assert f"pid {holder.pid} on {os.uname().nodename}, user " in message
    assert "Slurm job 4711, restart 2, since 20" in message
    assert "scancel 4711" in message
    assert "--take-over" not in message
    assert read_owner(tmp_path / RECORD).pid == holder.pid


def test_a_killed_owner_is_followed_and_an_orderly_end_leaves_nothing(tmp_path, holder, capsys):
    holder.kill()
    holder.wait()
    with RunLock(tmp_path) as lock:
        assert read_owner(tmp_path / RECORD) == lock.owner
        said = capsys.readouterr().out
        assert f"taken over from training, pid {holder.pid} on " in said
        assert said.endswith("its lock is free.\n")
    assert {file.name for file in tmp_path.iterdir()} == {"owner.lock"}
    RunLock(tmp_path).release()
    assert capsys.readouterr().out == ""


def test_a_process_that_inherited_the_lock_keeps_it_and_is_named(tmp_path):
    lock = RunLock(tmp_path, role="elastic driver")
    worker = subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
    lock.release()  # as if the driver had been killed
    with pytest.raises(UserError, match=rf"Processes here that hold owner.lock: {worker.pid}\."):
        RunLock(tmp_path)
    worker.kill()
    worker.wait()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("number", sorted(run_lock.UNSUPPORTED))
def test_without_kernel_locks_the_process_table_decides(tmp_path, holder, monkeypatch, number):
    without_flock(monkeypatch, number)
    with pytest.raises(UserError, match=f"pid {holder.pid} on .*it runs on this host"):
        RunLock(tmp_path, take_over=True)
    holder.kill()
    holder.wait()
    with RunLock(tmp_path), pytest.raises(UserError, match=f"pid {os.getpid()} .*it runs on this"):
        RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_a_process_number_that_was_given_again_is_no_owner(tmp_path, monkeypatch, capsys):
    without_flock(monkeypatch)
    mine = this_process("training", flock=False, linger=0.0)
    leave(tmp_path, host=mine.host, boot=mine.boot, machine=mine.machine, started=mine.started - 1)
    RunLock(tmp_path).release()
    assert "there is no such process any more" in capsys.readouterr().out


def test_a_zombie_is_no_owner():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert run_lock.start_of(child.pid) is None
    child.wait()


def test_a_restarted_host_has_no_owner_but_a_container_proves_nothing(monkeypatch):
    monkeypatch.setattr(run_lock, "_pid_namespace", lambda: run_lock.INITIAL_PID_NAMESPACE)
    mine = this_process("training", flock=False, linger=0.0)
    monkeypatch.setattr(run_lock, "_text", lambda file: "machine" if "id" in file.name else "")
    before = replace(mine, boot="before", machine="machine")
    assert evidence(before, certain=False)[0] == "this host was started anew since"
    assert not evidence(replace(before, pid_namespace="pid:[4026532000]"), certain=False)[0]
    assert not evidence(replace(before, host="node9"), certain=False)[0]
    assert not evidence(replace(before, machine="cloned"), certain=False)[0]


SLURM = {  # what squeue does; what proves that job 12 of cluster "one" is gone, or what is said
    "echo RUNNING": "Slurm says that its job 12 is RUNNING",
    "echo COMPLETING": "Slurm says that its job 12 is COMPLETING",
    "echo SUSPENDED": "Slurm says that its job 12 is SUSPENDED",
    "printf 'PENDING\\nRUNNING\\n'": "Slurm says that its job 12 is RUNNING",
    "echo NEW_STATE": "Slurm says that its job 12 is NEW_STATE",
    "exec sleep 600": "squeue cannot be asked",
    "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1": "Unable to",
    "exit 1": "squeue: exit code 1",
    "exit 0": "",
    "echo PENDING": "",
    "echo CANCELLED": "",
    "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1": "",
}


@pytest.mark.parametrize("script", SLURM)
def test_slurm_proves_that_an_owner_on_another_host_is_gone(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(run_lock, "reaches_all_hosts", lambda folder: False)
    monkeypatch.setattr(run_lock, "SLURM_SECONDS", 1.0)
    squeue(tmp_path, monkeypatch, script)
    leave(tmp_path, age=1e5, job="12", cluster="one")
    if doubt := SLURM[script]:
        with pytest.raises(UserError, match=f"which cannot be proven here.*{doubt}.*--take-over"):
            RunLock(tmp_path)
        leave(tmp_path, age=3.0, job="12", cluster="one")
        with pytest.raises(UserError, match=r"its last sign of life is [34] s old.*scancel 12"):
            RunLock(tmp_path, take_over=True)
    else:
        RunLock(tmp_path).release()
        assert "its Slurm job 12 does not run" in capsys.readouterr().out


def test_another_cluster_proves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "reaches_all_hosts", lambda folder: False)
    squeue(tmp_path, monkeypatch, "exit 0", cluster="two")
    for cluster in ("one", ""):
        leave(tmp_path, age=1e5, job="12", cluster=cluster)
        with pytest.raises(UserError, match=r"Slurm of its job 12 .* cannot be asked here"):
            RunLock(tmp_path)


def test_a_requeued_job_follows_itself_and_an_array_is_asked_by_its_task(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "reaches_all_hosts", lambda folder: False)
    # as of the last task of an array, whose SLURM_JOB_ID is the whole array's
    squeue(tmp_path, monkeypatch, '[ "$3" = 12_7 ] && exit 0; echo RUNNING')
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, job="12", cluster="one", restarts=0)
    RunLock(tmp_path).release()
    leave(tmp_path, job="12", cluster="one", restarts=1)  # two trainings of one allocation
    with pytest.raises(UserError, match="last sign of life"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert this_process("", flock=False, linger=0.0).job == "12_7"
    leave(tmp_path, job="12_7", cluster="one", restarts=1)
    RunLock(tmp_path).release()


def test_an_ended_step_of_the_same_job_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "reaches_all_hosts", lambda folder: False)
    steps = 'case "$*" in *--steps*12.0*) exit 0;; *--steps*) echo 12.1;; *) echo RUNNING;; esac'
    squeue(tmp_path, monkeypatch, steps)
    for name, value in {"JOB_ID": "12", "CLUSTER_NAME": "one", "STEP_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    leave(tmp_path, step="1", job="12", cluster="one")
    with pytest.raises(UserError, match="job 12 is RUNNING"):
        RunLock(tmp_path)
    leave(tmp_path, step="0", job="12", cluster="one")
    RunLock(tmp_path).release()


def test_without_proof_only_the_user_can_say_that_an_owner_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "reaches_all_hosts", lambda folder: False)
    leave(tmp_path, age=30.0)
    with pytest.raises(UserError, match=r"sign of life is 3. s old, it ran on node9"):
        RunLock(tmp_path, take_over=True)
    leave(tmp_path, age=500.0)
    with pytest.raises(UserError, match=r"cannot be proven here: it ran on node9.*add --take-over"):
        RunLock(tmp_path)
    RunLock(tmp_path, take_over=True).release()
    assert "--take-over was given" in capsys.readouterr().out


def test_an_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / RECORD, (0, 0))
        while (tmp_path / RECORD).stat().st_mtime == 0:
            time.sleep(0.01)


def test_an_owner_whose_run_was_taken_over_writes_no_more(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.check()
        leave(tmp_path)
        with pytest.raises(UserError, match=r"was taken over by another: training, .* on node9"):
            lock.check()
    assert read_owner(tmp_path / RECORD).host == "node9"  # not ours to remove


HOSTILE = {
    "empty": b"",
    "not JSON": b"owner",
    "a list": b"[]",
    "an object": b"{}",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 60000,
    "long": b" " * (1 << 20) + b"{}",
    "digits": b'{"pid": ' + b"9" * 5000 + b"}",
}
FIELDS = {"pid": -1, "since": 1e300, "host": "\x1b[2J", "restarts": True, "started": None}


@pytest.mark.parametrize("certain", [True, False])
def test_a_record_that_cannot_be_used_is_taken_over_with_proof_alone(
    tmp_path, monkeypatch, certain
):
    monkeypatch.setattr(run_lock, "reaches_all_hosts", lambda folder: certain)
    good = asdict(this_process("training", flock=True, linger=0.0))
    records = [*HOSTILE.values()]
    records += [json.dumps(good | {name: value}).encode() for name, value in FIELDS.items()]
    for content in records:
        (tmp_path / RECORD).write_bytes(content)
        assert read_owner(tmp_path / RECORD) is None
        if not certain:
            with pytest.raises(UserError, match=r"last sign of life is 0 s old, .*cannot be read"):
                RunLock(tmp_path, take_over=True)
            os.utime(tmp_path / RECORD, (0, 0))
            with pytest.raises(UserError, match=r"owner.json cannot be read.*--take-over"):
                RunLock(tmp_path)
        RunLock(tmp_path, take_over=not certain).release()


def test_a_folder_that_cannot_be_owned_is_named(tmp_path):
    def refused(out: Path, text: str) -> None:
        with pytest.raises(UserError, match=text):
            RunLock(out)

    (tmp_path / "file").touch()
    refused(tmp_path / "file", r"--out .*file: .*file cannot be written \(File exists\)")
    refused(tmp_path / "file" / "run", r"Not a directory")
    for number, make in enumerate((Path.mkdir, os.mkfifo)):
        out = tmp_path / str(number)
        out.mkdir()
        make(out / RECORD)
        refused(out, "owner.json is not a file. Remove it")
    (tmp_path / "folder" / run_lock.LOCK).mkdir(parents=True)
    refused(tmp_path / "folder", r"owner.lock cannot be written \(Is a directory\)")


def test_of_many_who_follow_a_dead_owner_at_once_one_owns_the_run(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.2)
    mine = this_process("training", flock=False, linger=0.0)
    here = {"host": mine.host, "boot": mine.boot, "machine": mine.machine}

    def begin(number: int) -> RunLock | None:
        try:
            return RunLock(tmp_path)
        except UserError:
            return None

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            leave(tmp_path, **here, started=1)
            owners = [lock for lock in pool.map(begin, range(8)) if lock]
            assert len(owners) == 1
            assert read_owner(tmp_path / RECORD) == owners[0].owner
            owners[0].release()
    assert {file.name for file in tmp_path.iterdir()} == {"owner.lock"}


MOUNTS = """22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /scratch rw - lustre 10.0.0.1@tcp:/s rw,flock,lazystatfs
31 22 0:41 / /scratch2 rw - lustre 10.0.0.1@tcp:/s rw,localflock
32 22 0:42 / /home rw - nfs4 server:/home rw,vers=4.2,local_lock=none
33 22 0:43 / /old rw - nfs server:/old rw,vers=3,nolock,local_lock=all
34 22 0:44 / /with\\040space rw - fuse.sshfs server:/x rw
35 22 0:45 / /mnt rw - ext4 /dev/vdb rw
36 22 0:46 / /mnt rw - beegfs server rw
broken
"""


@pytest.mark.parametrize(
    ("folder", "kind", "reaches"),
    [
        ("/runs/a", "ext4", True),
        ("/scratch/runs", "lustre", True),
        ("/scratch2/runs", "lustre", False),
        ("/home/me/runs", "nfs4", True),
        ("/homes", "ext4", True),
        ("/old", "nfs", False),
        ("/with space/runs", "fuse.sshfs", False),
        ("/mnt/runs", "beegfs", False),
    ],
)
def test_which_file_systems_locks_reach_all_hosts(monkeypatch, folder, kind, reaches):
    assert file_system_of(Path(folder), MOUNTS)[0] == kind
    monkeypatch.setattr(run_lock, "_text", lambda file: MOUNTS)
    assert run_lock.reaches_all_hosts(Path(folder)) == reaches


def test_rank_0_owns_the_run_for_all(tmp_path):
    with run_lock.own_run(tmp_path, World(rank=0, size=2)) as lock:
        assert lock.owner.role == "training"
        with run_lock.own_run(tmp_path, World(rank=1, size=2)) as other:
            assert other is None
