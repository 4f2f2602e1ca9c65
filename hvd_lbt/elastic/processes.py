"""Starting workers here and, by a remote shell, on other hosts; and printing their output.

A worker's own environment (its key among it) never stands on a command line: here it is the
environment of the process, elsewhere it goes through the remote shell's standard input.
"""

import fcntl
import json
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hvd_lbt.elastic.decisions import Slot
from hvd_lbt.errors import UserError
from hvd_lbt.stop import SIGNALS

# The environment variables that a worker on another host gets.
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED")
EXPORTED_BEGINNINGS = ("HVD_LBT_", "HOROVOD_", "NCCL_", "OMP_", "CUDA_")
OUTPUT = Path(__file__).with_name("output.py")
BEGIN = Path(__file__).with_name("begin.py")
SIOCGIFADDR = 0x8915


class Started:
    """A worker's process group here, or the remote shell that runs it elsewhere."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        where: str,
        *,
        given: bytes = b"",
        keep_signals: bool = False,
        keep: Sequence[int] = (),
    ):
        """Start it.

        where: printed before each line of its output; given: its standard input; keep_signals: a
        signal to all processes is not for this one (a remote shell: the worker behind it saves);
        keep: file descriptors that it inherits.
        """
        self._output = start_output(where)
        assert self._output.stdin is not None
        try:
            with _standard_input(given) as stdin, _blocked(SIGNALS if keep_signals else ()):
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=stdin,
                    stdout=self._output.stdin,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=keep,
                )
        finally:
            self._output.stdin.close()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        code = self._process.poll()
        if code is not None:
            with suppress(subprocess.TimeoutExpired):  # a process of the worker's may hold it
                self._output.wait(1)
        return code

    def kill(self) -> None:
        """End the whole process group at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def start_output(where: str) -> "subprocess.Popen[bytes]":
    """Start a process that prints its standard input, `[where]` before each line.

    It outlives the driver, and no signal but SIGKILL ends it before its input has: a worker that
    saves while its job is taken down can still say so.
    """
    with _blocked((*SIGNALS, signal.SIGHUP, signal.SIGUSR2, signal.SIGQUIT)):
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(OUTPUT), f"[{where}] "],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())


def start_worker(
    program: Sequence[str],
    slot: Slot,
    own: Mapping[str, str],
    remote_shell: str,
    keep: Sequence[int] = (),
) -> Started:
    """Start `program` on a slot's host.

    own: what this worker's environment has beside the driver's. keep: file descriptors that a
    worker here inherits, and that a remote shell keeps open: the run has an owner while one of them
    lives.
    """
    host, number = slot
    where = f"{host}:{number}"
    environment = {**os.environ, **own}
    if is_here(host):
        return Started(program, environment, where, keep=keep)
    passed = {
        key: value
        for key, value in environment.items()
        if key in EXPORTED or key.startswith(EXPORTED_BEGINNINGS)
    }
    given = {"directory": os.getcwd(), "environment": passed, "program": list(program)}
    # the libraries that Python itself needs there, before it can read anything
    libraries = os.environ.get("LD_LIBRARY_PATH")
    prefix = ["env", f"LD_LIBRARY_PATH={libraries}"] if libraries else []
    there = "exec " + shlex.join([*prefix, sys.executable, "-I", "-S", str(BEGIN)])
    command = [*shlex.split(remote_shell), host, there]
    return Started(
        command,
        os.environ,
        where,
        given=json.dumps(given).encode(),
        keep_signals=True,
        keep=keep,
    )


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface. Raises UserError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            answer = fcntl.ioctl(one.fileno(), SIOCGIFADDR, request)
        except (OSError, ValueError) as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"--network-interface {interface}: no IPv4 address ({error}). There are: {known}."
            ) from error
    return socket.inet_ntoa(answer[20:24])


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Processes started inside never receive these signals; this one gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _standard_input(given: bytes) -> Iterator[int]:
    """A file of memory alone that holds these bytes; a full pipe would hold the driver up."""
    if not given:
        yield subprocess.DEVNULL
        return
    number = os.memfd_create("worker", os.MFD_CLOEXEC)
    try:
        os.write(number, given)
        os.lseek(number, 0, os.SEEK_SET)
        yield number
    finally:
        os.close(number)
