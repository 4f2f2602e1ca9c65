"""What started this rank: when it is gone, the rank saves and ends instead of training on alone.

A rank's launcher is its nearest ancestor of LAUNCHERS; on other nodes than the first that is
mpirun's orted, which ends with mpirun. The scripts in launch/ put launch/supervise.py above it, two
processes of which one is enough: the one that is left ends the others. Without a launcher nothing
is watched, since a rank that was started by hand may outlive its shell; elastic workers ask their
driver themselves.
"""

import ctypes
import errno
import io
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import psutil  # type: ignore[import-untyped]

LAUNCHERS = {"mpirun", "mpiexec", "orterun", "prterun", "orted", "prted"}
LAUNCHERS |= {"horovodrun", "slurmstepd"}
SUPERVISOR = "launch/supervise.py"
# From the launcher's end to the rank's: an update and a checkpoint must fit.
SECONDS_TO_SAVE = 15.0
SECONDS_BETWEEN_LOOKS = 0.5
_gone = threading.Event()


def _hold_back_abort() -> None:
    """Let Open MPI wait for the end of SECONDS_TO_SAVE before it aborts.

    A process that loses mpirun calls MPI_Abort's code by itself, about a second later, in the
    middle of what it saves. The variable is that of the MCA parameter opal_abort_delay, which any
    other abort would wait for too: so it is set when the launcher is gone, and not before.
    """
    with suppress(OSError):
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            loaded = {line.split()[-1] for line in maps if "libopen-pal" in line}
        for library in loaded:
            with suppress(OSError, ValueError):  # of an MPI that has no such variable
                delay = ctypes.c_int.in_dll(ctypes.CDLL(library), "opal_abort_delay")
                delay.value = int(SECONDS_TO_SAVE) + 5


def is_gone() -> bool:
    """Whether the launcher was found gone: then nothing that needs it, as MPI_Finalize, ends."""
    return _gone.is_set()


def watch() -> None:
    """Begin to watch what started this process, if that is a launcher; see the module's docstring.

    When it is gone this process gets SIGUSR1, which stops a training after the update under way,
    and is ended SECONDS_TO_SAVE later.
    """
    if "HVD_LBT_ELASTIC" in os.environ:
        return
    ancestors = psutil.Process().parents()
    index = next((i for i, one in enumerate(ancestors) if _name(one) in LAUNCHERS), None)
    if index is not None:
        _survive_the_reader("stdout")
        _survive_the_reader("stderr")
        supervisors = [one for one in ancestors[index + 1 :] if _is_supervisor(one)]
        threading.Thread(
            target=_watch, args=(ancestors[: index + 1], supervisors), daemon=True, name="launcher"
        ).start()


def _watch(launcher: list[psutil.Process], supervisors: list[psutil.Process]) -> None:
    while all(map(_runs, launcher)) and (not supervisors or any(map(_runs, supervisors))):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    _gone.set()
    _hold_back_abort()
    with suppress(OSError):
        who = f"process {os.getpid()} on {os.uname().nodename}"
        message = f"hvd_lbt: the launcher was killed: {who} stops after this update and saves.\n"
        os.write(2, message.encode())
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGKILL)


class _Output(io.FileIO):
    """stdout or stderr: what is written after the launcher that reads it has gone is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
                raise
            return len(data)


def _survive_the_reader(name: str) -> None:
    """Let `print` to sys.NAME not raise when the launcher is gone: the training is to be saved."""
    old = getattr(sys, name)
    if isinstance(old, io.TextIOWrapper) and old.fileno() in (1, 2):
        old.flush()
        buffer = io.BufferedWriter(_Output(old.fileno(), "wb", closefd=False))
        new = io.TextIOWrapper(
            buffer, old.encoding, old.errors, None, old.line_buffering, old.write_through
        )
        setattr(sys, name, new)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def _is_supervisor(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(word.endswith(SUPERVISOR) for word in process.cmdline()[1:3])
    return False
