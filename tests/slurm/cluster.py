"""A Slurm of its own: munged, slurmctld and two slurmd on this machine, in a folder and on ports of
its own.

The daemons and all jobs live in a process namespace whose first process dies with this one, so
nothing is left behind, not even when the tests are killed.
"""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
WHERE = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# cred_expire is also the time a requeued job waits (default 120 s; a launch must not take longer);
# config_overrides: more CPUs than the machine has, so that two jobs and two ranks fit where the
# tests run. FirstJobId: Open MPI names its shared memory by the job's number, and two Slurms on one
# machine would share it.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 CoresPerSocket=4 RealMemory=1000
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 CoresPerSocket=4 RealMemory=1000
PartitionName=low Nodes={host} Default=YES PriorityTier=1
PartitionName=high Nodes={host} PriorityTier=10
PartitionName=both Nodes=ALL
"""  # noqa: E501 -- a node is one line
DAEMONS = """\
set -e
cd "$1"
munged --foreground --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munge.pid" \
  --log-file="$1/munge.log" --seed-file="$1/munge.seed" &
while [[ ! -S munge.socket ]]; do sleep 0.1; done
slurmctld -D &
slurmd -D -N "$2" &
slurmd -D -N second &
wait
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster; `environment` makes its commands reach it."""

    environment: dict[str, str]

    def run(
        self, *words: str | Path, timeout: float = 600, cwd: Path = ROOT, **variables: str
    ) -> str:
        """Run a command of Slurm, or a script; it must end with 0. Gives what it wrote."""
        ended = subprocess.run(
            [str(word) for word in words],
            env=self.environment | variables,
            cwd=cwd,
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
