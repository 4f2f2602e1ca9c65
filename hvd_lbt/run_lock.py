"""One run folder, one owner: a second training in the same folder is refused before any work.

The owner (rank 0 of a training, the driver of an elastic one) holds a kernel lock (flock) on
RUN/owner.lock and describes itself in RUN/owner.json, whose modification time it renews. The kernel
drops the lock when the owner and every process that inherited the lock's descriptor have ended. An
orderly end removes owner.json.

Whoever finds an owner.json takes the run over only if that owner is proven gone: by the kernel lock
where it reaches all hosts, by the process table of the same host, or by Slurm. Nothing else is
proof; then the user decides, with --take-over. flock is called directly: locking libraries add
nothing to that one call, and do not hand out the descriptor that an elastic driver's workers
inherit.
"""

import errno
import fcntl
import getpass
import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hvd_lbt.errors import UserError
from hvd_lbt.world import World

LOCK, RECORD = "owner.lock", "owner.json"
HEARTBEAT_SECONDS = 15.0
# Without a sign of life for so long, the user may say that the owner is gone.
SILENCE_SECONDS = 120.0
# Where no lock orders two who claim a run, each looks again after so long whether it is the owner.
SETTLE_SECONDS = 1.0
SLURM_SECONDS = 30.0  # for an answer of squeue
INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of Linux: not in a container
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
# File systems of one kernel: their locks are seen by all who can write to them.
LOCAL = {"bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "msdos", "ntfs3"}
LOCAL |= {"overlay", "ramfs", "reiserfs", "tmpfs", "vfat", "xfs", "zfs"}
# States of a job in which none of its processes is left (squeue's long names).
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
ENDED |= {"OUT_OF_MEMORY", "PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"}
ENDED |= {"REVOKED", "SPECIAL_EXIT", "TIMEOUT"}


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What owner.json says: who owns a run, and what is needed to prove that it is gone.

    started: of the process, in clock ticks since boot. job: Slurm's, with the task of an array.
    flock: whether it holds the kernel lock. linger: seconds for which its processes on other hosts
    may still write after it has ended.
    """

    token: str
    role: str
    user: str
    host: str
    machine: str
    boot: str
    pid_namespace: str
    pid: int
    started: int
    job: str
    step: str
    restarts: int
    cluster: str
    since: float
    flock: bool
    linger: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.since))
        job = f"Slurm job {self.job}, restart {self.restarts}, " if self.job else "no Slurm job, "
        return f"{self.role}, pid {self.pid} on {self.host}, user {self.user}, {job}since {since}"


class RunLock:
    """Ownership of the run in `out` until `release`, or until this process ends.

    role: what it is called in messages. take_over: the user says that an owner that cannot be
    proven gone is gone. linger: as in Owner. Raises UserError, which names the owner, if the run
    has one, and UserError if the folder cannot be written.
    """

    def __init__(
        self, out: Path, *, role: str = "training", take_over: bool = False, linger: float = 0.0
    ):
        self.out, self._record, self._take_over = out, out / RECORD, take_over
        self._descriptor = -1
        self._released = threading.Event()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            flock = self._lock()
            self.owner = this_process(role, flock=flock, linger=linger)
            self._claim(certain=flock and reaches_all_hosts(out))
        except OSError as error:
            self._close()
            raise UserError(
                f"--out {out}: {error.filename or out} cannot be written ({error.strerror}). Free "
                "space, or correct the folder and its permissions, or choose another --out."
            ) from error
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._renew, daemon=True, name="run lock").start()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def fileno(self) -> int:
        """The locked descriptor: a process that inherits it (pass_fds) holds the lock as well."""
        return self._descriptor

    def check(self) -> None:
        """Raise UserError if another has taken the run over (--take-over): write no more then."""
        found = read_owner(self._record)
        if found is not None and found.token != self.owner.token:
            raise UserError(
                f"{self.out} was taken over by another: {found}. This {self.owner.role} ends and "
                "writes nothing more."
            )

    def release(self) -> None:
        """Give the run up: owner.json is removed, the lock dropped."""
        if self._descriptor < 0:
            return
        self._released.set()
        found = read_owner(self._record)
        if found is not None and found.token == self.owner.token:
            with suppress(OSError):
                self._record.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self) -> bool:
        """Take the kernel lock; False where the file system has none."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(
                    f"{self.out}: no kernel locks on this file system ({error.strerror}); "
                    f"{RECORD} alone says who owns the run.",
                    flush=True,
                )
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise self._refused(read_owner(self._record), "its lock is held") from error
        return True

    def _claim(self, certain: bool) -> None:
        """Put our record where none is, or in the place of an owner that is proven gone.

        certain: whoever held the kernel lock, on whatever host, has ended.
        """
        for _ in range(5):
            try:
                with open(self._record, "x", encoding="utf-8") as file:
                    json.dump(asdict(self.owner), file, indent=1)
                    file.write("\n")
            except FileExistsError:
                self._put_aside(certain)
                continue
            except OSError:
                with suppress(OSError):
                    self._record.unlink()
                raise
            if not certain:
                time.sleep(SETTLE_SECONDS)
                found = read_owner(self._record)
                if found is None or found.token != self.owner.token:
                    raise self._refused(found, "it began at the same moment")
            return
        raise self._refused(read_owner(self._record), "several trainings begin at the same moment")

    def _put_aside(self, certain: bool) -> None:
        """Remove the record of an owner that is proven gone; UserError if it is not."""
        former, age = read_owner(self._record), self._silent_for()
        if age is None:
            return  # it was removed just now
        if not self._record.is_file():
            raise UserError(f"--out {self.out}: {self._record} is not a file. Remove it.")
        if former is None:
            reason = (
                "the kernel lock is free"
                if certain
                else self._as_the_user_says(None, f"{self._record} cannot be read", age)
            )
        else:
            proof, doubt = evidence(former, certain=certain)
            if not proof and doubt.startswith("it runs"):
                raise self._refused(former, doubt)
            reason = proof or self._as_the_user_says(former, doubt, age)
            while former.linger and age is not None and age < former.linger:
                print(
                    f"{self.out}: waiting {former.linger - age:.0f} s for what the {former} has "
                    "left behind on other hosts.",
                    flush=True,
                )
                time.sleep(former.linger - age)
                age = self._silent_for()
        aside = self.out / f"{RECORD}.{self.owner.token}.part"
        try:
            os.rename(self._record, aside)
        except FileNotFoundError:
            return  # another was quicker; the next turn meets its record
        moved = read_owner(aside)
        if moved != former:  # another took the run over in between, and this is its record
            os.rename(aside, self._record)
            raise self._refused(moved, "it took the run over at the same moment")
        aside.unlink()
        print(f"{self.out}: taken over from {former or 'an unknown owner'}: {reason}.", flush=True)

    def _silent_for(self) -> float | None:
        """Seconds since the owner's last sign of life, by the clock of the storage; None if no
        owner.
        """
        probe = self.out / f"{RECORD}.{secrets.token_hex(8)}.part"
        try:
            probe.touch()
            return max(0.0, probe.stat().st_mtime - self._record.stat().st_mtime)
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _as_the_user_says(self, former: Owner | None, doubt: str, age: float) -> str:
        """A reason to take over without proof, or UserError."""
        seen = f"its last sign of life is {age:.0f} s old"
        if age < SILENCE_SECONDS:
            raise self._refused(former, f"{seen}, {doubt}")
        if not self._take_over:
            raise self._refused(
                former,
                f"it may be gone, which cannot be proven here: {doubt}; {seen}",
                "If you know that it does not run any more, add --take-over.",
            )
        return f"--take-over was given; {seen}"

    def _refused(self, owner: Owner | None, why: str, advice: str = "") -> UserError:
        holders = holders_of(self._descriptor)
        if owner is not None and owner.pid in holders and owner.host == os.uname().nodename:
            holders.remove(owner.pid)
        also = (
            f" Processes here that hold {LOCK}: {', '.join(map(str, holders))}." if holders else ""
        )
        if not advice:
            stop = (
                f"scancel {owner.job}"
                if owner and owner.job
                else f"kill {owner.pid} on {owner.host}"
                if owner
                else "kill that process"
            )
            advice = f"Wait for its end, or stop it ({stop}), or choose another --out."
        return UserError(
            f"--out {self.out}: the run is owned by {owner or 'another process'} ({why}).{also} "
            f"{advice}"
        )

    def _renew(self) -> None:
        """Give signs of life, as a new modification time of the record."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # storage that fails for a while; then the record looks old
                os.utime(self._record)


def own_run(
    out: Path, world: World, *, take_over: bool = False
) -> AbstractContextManager[RunLock | None]:
    """Ownership of a run, for all ranks of a training: rank 0 takes it, the others have None."""
    return RunLock(out, take_over=take_over) if world.rank == 0 else nullcontext()


def this_process(role: str, *, flock: bool, linger: float) -> Owner:
    """The record of this process."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if job and "SLURM_ARRAY_TASK_ID" in os.environ:
        # SLURM_JOB_ID of an array's last task is the whole array's
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return Owner(
        token=secrets.token_hex(16),
        role=role,
        user=user,
        host=os.uname().nodename,
        machine=_text(Path("/etc/machine-id")),
        boot=_text(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        started=start_of(os.getpid()) or 0,
        job=job,
        step=os.environ.get("SLURM_STEP_ID", "") if job else "",
        restarts=int(restarts) if job and restarts.isdecimal() else 0,
        cluster=os.environ.get("SLURM_CLUSTER_NAME", "") if job else "",
        since=time.time(),
        flock=flock,
        linger=linger,
    )


def read_owner(file: Path) -> Owner | None:
    """The owner that a record names; None if there is no record, or none that can be used."""
    try:
        if not file.is_file():  # such as a FIFO, which would block
            return None
        with file.open("rb") as stream:
            values = json.loads(stream.read(1 << 16).decode())
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {field.name: field.type for field in fields(Owner)}
    if not isinstance(values, dict) or not kinds.keys() <= values.keys():
        return None
    for name, kind in kinds.items():
        value = values[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            return None
        if not (value.isprintable() if isinstance(value, str) else 0 <= value < 2**37):
            return None
    return Owner(**{name: values[name] for name in kinds}) if values["pid"] else None


def evidence(former: Owner, *, certain: bool) -> tuple[str, str]:
    """(proof that this owner is gone, or ""; what stands against it or is not known).

    certain: no process on any host holds the kernel lock. The second begins with "it runs" if the
    owner is seen to run.
    """
    if certain and former.flock:
        return "its lock is free", ""
    here = _text(Path("/proc/sys/kernel/random/boot_id"))
    if former.boot == here and former.pid_namespace == _pid_namespace():
        started = start_of(former.pid)
        if started == former.started or started == 0:
            return "", "it runs on this host"
        return "there is no such process any more", ""
    rebooted = (
        former.boot != here
        and (former.host, former.machine) == (os.uname().nodename, _text(Path("/etc/machine-id")))
        and former.pid_namespace == _pid_namespace() == INITIAL_PID_NAMESPACE
    )
    if rebooted and former.machine:
        return "this host was started anew since", ""
    where = (
        f"it ran on {former.host}, and the locks of this file system are not known to reach "
        "other hosts"
    )
    if not former.job:
        return "", where
    proof, doubt = slurm_evidence(former)
    return proof, f"{where}; {doubt}"


def slurm_evidence(former: Owner) -> tuple[str, str]:
    """As `evidence`, by what Slurm says of the owner's job."""
    mine = this_process("", flock=False, linger=0.0)
    if not former.cluster or _cluster() != former.cluster or not shutil.which("squeue"):
        cluster = former.cluster or "an unknown cluster"
        return "", f"the Slurm of its job {former.job} on {cluster} cannot be asked here"
    if mine.job == former.job and mine.restarts > former.restarts:
        return f"Slurm has requeued its job {former.job} (restart {mine.restarts})", ""
    answer = _squeue("--jobs", former.job, "--format=%T")
    if isinstance(answer, str):
        return "", answer
    left = sorted(set(answer) - ENDED)
    if not left:
        state = ", ".join(sorted(set(answer))) or "unknown to Slurm by now"
        return f"its Slurm job {former.job} does not run ({state})", ""
    if mine.job == former.job and former.step and mine.restarts == former.restarts:
        step = f"{former.job}.{former.step}"
        answer = _squeue("--steps", step, "--format=%i")
        if isinstance(answer, list) and not answer:
            return f"step {step} of this Slurm job has ended", ""
    return "", f"Slurm says that its job {former.job} is {', '.join(left)}"


def _cluster() -> str:
    """The name of the Slurm cluster that commands on this host talk to; empty without one."""
    name = os.environ.get("SLURM_CLUSTER_NAME", "")
    if not name and shutil.which("scontrol"):
        with suppress(OSError, subprocess.TimeoutExpired):
            config = _run("scontrol", "show", "config").stdout
            found = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.MULTILINE)
            name = found[1] if found else ""
    return name


def _squeue(*words: str) -> list[str] | str:
    """The lines that squeue prints, none for a job it does not know; why it cannot say, as a
    str.
    """
    try:
        answer = _run("squeue", "--noheader", *words)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"squeue cannot be asked ({error})"
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return f"squeue: {answer.stderr.strip()[:200] or f'exit code {answer.returncode}'}"
    return answer.stdout.split()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SLURM_SECONDS
    )


def reaches_all_hosts(folder: Path) -> bool:
    """Whether a kernel lock in this folder is seen by every host that can write to it."""
    kind, options = file_system_of(folder.resolve(), _text(Path("/proc/self/mountinfo")))
    if kind in ("nfs", "nfs4"):
        return not options & {"nolock", "local_lock=flock", "local_lock=all"}
    if kind == "lustre":
        return "flock" in options and "localflock" not in options
    return kind in LOCAL or kind == "ceph"


def file_system_of(folder: Path, mounts: str) -> tuple[str, set[str]]:
    """Kind and options of the file system that holds an absolute path; mounts: Linux's
    mountinfo.
    """
    best, kind, options = -1, "", set[str]()
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        words, about = before.split(" "), after.split(" ")
        if not dash or len(words) < 6 or len(about) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])
        parts = Path(point).parts
        if folder.parts[: len(parts)] == parts and len(parts) >= best:  # the last mount lies on top
            best, kind, options = len(parts), about[0], {*words[5].split(","), *about[2].split(",")}
    return kind, options


def start_of(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None if there is none, 0 if hidden."""
    try:
        state, *numbers = (
            Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        )
        return None if state in "ZX" else int(numbers[18])
    except (OSError, ValueError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return None
        except OSError:
            pass
        return 0


def holders_of(descriptor: int) -> list[int]:
    """The processes of this host, other than this one, that have the file open; as far as
    visible.
    """
    wanted, found = os.fstat(descriptor), []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.path.samestat(link.stat(), wanted):
                        found.append(int(process.name))
                        break
    return sorted(found)


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "surrogateescape").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
