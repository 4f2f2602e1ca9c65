"""A Slurm of its own: munged, slurmctld and slurmd of this machine, in a folder and on ports of its own.

The daemons and all jobs live in a process namespace whose first process dies with this one, so
nothing is left behind, not even when the tests are killed.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
WHERE = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# cred_expire is also the time a requeued job waits (default 120 s; a launch must not take longer); config_overrides: more CPUs
# than the machine has, so that two jobs and two ranks fit where the tests run. FirstJobId: Open MPI
# names its shared memory by the job's number, and two Slurms on one machine would share it.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
TmpFS={folder}/tmp
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10
"""
DAEMONS = """\
set -e
cd "$1"
munged --foreground --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munge.pid" \
  --log-file="$1/munge.log" --seed-file="$1/munge.seed" &
while [[ ! -S munge.socket ]]; do sleep 0.1; done
slurmctld -D &
slurmd -D &
wait
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster of one node; `environment` makes its commands reach it."""

    environment: dict[str, str]

    def run(self, *words: str | Path, timeout: float = 600, **variables: str) -> str:
        """Run a command of Slurm, or a script; it must end with 0. Gives what it wrote."""
        ended = subprocess.run(
            [str(word) for word in words],
            env=self.environment | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert ended.returncode == 0, ended.stdout[-4000:]
        return ended.stdout

    def script(self, name: str) -> Path:
        """A shipped script, as one takes it to a cluster without GPUs."""
        lines = (ROOT / "launch/slurm" / name).read_text().splitlines(keepends=True)
        copy = Path(self.environment["SLURM_CONF"]).with_name(name)
        copy.write_text("".join(line for line in lines if "#SBATCH --gpus" not in line))
        return copy

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode …"""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, timeout: float = 600) -> dict[str, str]:
        """The job's last word, when it has come to its end."""
        return until(
            lambda: job if (job := self.job(number))["JobState"] in ENDS else None, timeout
        )


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def until(found: Callable, timeout: float = 600):
    """The first true value of `found()`."""
    deadline = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < deadline, f"it did not happen in {timeout} s"
        time.sleep(0.2)
    return value


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=WHERE) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (apt-get install slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started by root only, as in a container")
    # a socket's path must be short, and munge wants a folder that only root can write
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in (
        "state",
        "spool",
        "tmp",
    ):  # tmp: the plug-in's folders are named by job numbers only
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    config = folder / "slurm.conf"
    (folder / "gres.conf").write_text(
        "Name=gpu Count=8\n"
    )  # only counted: the scripts ask for some
    host = socket.gethostname().split(".")[0]
    config.write_text(
        CONFIG.format(host=host, folder=folder, ports=free_ports(2), first_job=os.getpid() * 100)
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "OMPI_", "PMIX_", "HOROVOD_"))
    }
    environment = kept | {"SLURM_CONF": str(config), "PATH": WHERE}
    log = folder / "daemons.log"
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with log.open("w") as output:
        daemons = subprocess.Popen(
            [*unshare, "bash", "-c", DAEMONS, "bash", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        cluster = Slurm(environment)
        words = ["sinfo", "--noheader", "--partition=low", "--format=%T"]

        def idle() -> bool:
            if daemons.poll() is not None:
                pytest.fail(f"Slurm's daemons ended:\n{log.read_text()[-3000:]}")
            state = subprocess.run(words, env=environment, capture_output=True, text=True)
            return state.stdout.strip() == "idle"

        until(idle, timeout=60)
        yield cluster
    finally:
        daemons.kill()
        daemons.wait()
        shutil.rmtree(folder, ignore_errors=True)
