"""`hand_on.py LAUNCHER …` runs mpirun or horovodrun, and hands signals on to the ranks as SIGUSR1, at once.

mpirun itself takes SIGTERM and SIGINT for the end: the ranks get SIGTERM only after
odls_base_sigkill_timeout seconds, and their exit code is lost. horovodrun is a shell by then, and
hands on nothing. Before there is an mpirun a signal ends what has begun. SIGQUIT (Ctrl-\\ in a
terminal) kills all that still runs.
"""

import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil

MPIRUN = {"mpirun", "mpiexec", "orterun", "prterun"}  # prterun: Open MPI 5
launcher: subprocess.Popen | None = None
early: list[int] = []  # signals from before there was a launcher


def named(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def hand_on(number: int, frame: FrameType | None) -> None:
    if launcher is None:
        early.append(number)
        return
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(launcher.pid)
        begun = [started, *started.children(recursive=True)]
        mpiruns = [process for process in begun if named(process) in MPIRUN]
        for process in begun:
            with suppress(psutil.NoSuchProcess):
                if number == signal.SIGQUIT:
                    process.kill()
                elif process in mpiruns:
                    process.send_signal(signal.SIGUSR1)
                elif not mpiruns:
                    process.terminate()


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
    signal.signal(number, hand_on)
# In a session of its own: the terminal's Ctrl-C must not reach mpirun.
launcher = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
for number in early:
    hand_on(number, None)
code = launcher.wait()
sys.exit(code if code >= 0 else 128 - code)
