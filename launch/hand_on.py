"""`hand_on.py LAUNCHER …` runs mpirun or horovodrun, and hands signals on to the ranks as SIGUSR1, at once.

mpirun itself takes SIGTERM and SIGINT for the end: the ranks get SIGTERM only after
odls_base_sigkill_timeout seconds, and their exit code is lost. horovodrun is a shell by then, and
hands on nothing. SIGQUIT (Ctrl-\\ in a terminal) kills all that still runs.
"""

import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil


def hand_on(number: int, frame: FrameType | None) -> None:
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(launcher.pid)
        for process in (started, *started.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                if number == signal.SIGQUIT:
                    process.kill()
                elif process.name() == "mpirun":
                    process.send_signal(signal.SIGUSR1)


# In a session of its own: the terminal's Ctrl-C must not reach mpirun.
launcher = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
    signal.signal(number, hand_on)
code = launcher.wait()
sys.exit(code if code >= 0 else 128 - code)
