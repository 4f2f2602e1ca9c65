"""Ranks of the tests that start in a tenth of the time: forked off a process that has torch loaded.

    mpirun → rank (this file as a program: passes words, environment and output on, and waits)
    loader, one for each rank's number → fork → the program, in `__main__` as python would run it

To start a rank takes about four seconds of CPU, of which `import torch` is the most, and a test's
few updates some tenths. What belongs to this project, Horovod and mpi4py included, is imported by
the rank itself, in its own order; each rank's number has a loader of its own, so that ranks differ
in the seed of `hash`. A rank that is gone, or whose launcher is, takes its fork with it. Tests of
launchers, signals and failures start real processes (`begin`).
"""

import ctypes
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NUMBER = struct.Struct("!q")
FOLDER = "HVD_LBT_TEST_LOADERS"  # where the loaders listen, for the ranks
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """A program for a fork: its words, and what it gets of the rank that asks for it."""

    words: list[str]
    folder: str
    environment: dict[str, str]
    files: list[int]  # stdin, stdout, stderr


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Loaders:
    """The loaders of this test session, begun when a rank of that number is first wanted."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self._folder, self._environment = folder, environment
        self._processes: list[subprocess.Popen] = []

    def need(self, ranks: int) -> None:
        """Have so many loaders; returns when they can be asked."""
        begun = range(len(self._processes), ranks)
        for number in begun:
            words = [sys.executable, __file__, "--load", self._folder / str(number)]
            self._processes.append(
                # pytest runs tests in its main thread: it is the parent until the end
                subprocess.Popen(words, env=self._environment, preexec_fn=die_with_parent)
            )
        for number in begun:
            while not (self._folder / str(number)).exists():
                assert self._processes[number].poll() is None, f"loader {number} has ended"
                time.sleep(0.02)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def load(place: Path) -> Request:
    """Import, listen and fork; returns in the forks only, with what each is to run."""
    preload()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{place}.part")
    listening.listen(64)
    Path(f"{place}.part").rename(place)
    forks: dict[int, tuple[socket.socket, int]] = {}  # by pidfd: its rank's connection, its pid
    while True:
        askers = {rank.fileno(): pid for rank, pid in forks.values()}
        ready, _, _ = select.select([listening.fileno(), *askers, *forks], [], [])
        for file in ready:
            if file == listening.fileno():
                rank, _ = listening.accept()
                request = received(rank)
                pid = os.fork()
                if pid == 0:
                    die_with_parent()
                    for open_file in (listening.fileno(), rank.fileno(), *askers, *forks):
                        os.close(open_file)
                    return request
                for output in request.files:
                    os.close(output)
                forks[os.pidfd_open(pid)] = rank, pid
                break  # the lists above are no longer whole
            if file in askers:  # the rank is gone
                os.kill(askers[file], signal.SIGKILL)
            else:
                rank, pid = forks.pop(file)
                _, status = os.waitpid(pid, 0)
                os.close(file)
                with rank, suppress(OSError):  # of a rank that was killed meanwhile
                    rank.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
                break


def preload() -> None:
    """What the ranks import of others; whatever looks at its environment when imported is left."""
    import nvidia.dali  # noqa: F401
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch.export
    import torch.profiler
    import torch.utils.data  # noqa: F401


def received(rank: socket.socket) -> Request:
    start, files, _, _ = socket.recv_fds(rank, NUMBER.size, 3)
    (length,) = NUMBER.unpack(start)
    text = b""
    while len(text) < length:
        text += rank.recv(length - len(text))
    return Request(files=files, **json.loads(text))


def become(request: Request) -> None:
    """Run the program in this fork, as `python WORDS` would."""
    import numpy

    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    numpy.random.seed(None)  # Python's own generator is seeded by the fork
    words = request.words
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.path[0] = request.folder
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path[0] = str(Path(words[0]).absolute().parent)
        runpy.run_path(words[0], run_name="__main__")


def ask() -> int:
    """Let the loader of this rank's number run the program; gives its exit code."""
    number = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    words = {"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    text = json.dumps(words).encode()
    with socket.socket(socket.AF_UNIX) as loader:
        loader.connect(f"{os.environ[FOLDER]}/{number}")
        socket.send_fds(loader, [NUMBER.pack(len(text))], [0, 1, 2])
        loader.sendall(text)
        ended = loader.recv(NUMBER.size)
    (code,) = NUMBER.unpack(ended) if ended else (70,)  # 70: the loader is gone
    if code < 0:
        os.kill(os.getpid(), -code)  # by what has ended the fork
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        become(load(Path(sys.argv[2])))
    else:
        sys.exit(ask())
