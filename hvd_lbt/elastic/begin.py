"""Start a worker on this host as standard input says: JSON of directory, environment and program.

A program of its own, on the standard library alone: the remote shell starts it, so that neither the
environment nor the worker's key stands on a command line. Its output goes through a process that
outlives the remote shell: a worker that saves while its job is taken down is not ended by it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

KEPT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2)


def main() -> None:
    """Become the program."""
    given = json.load(sys.stdin.buffer)
    try:
        os.chdir(given["directory"])
    except OSError as error:
        sys.exit(f"hvd_lbt: {os.uname().nodename}: {error}. All hosts need this folder.")
    # the remote shell may have been started with signals blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, KEPT)
    output = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("output.py")), ""],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    assert output.stdin is not None
    os.dup2(output.stdin.fileno(), 1)
    os.dup2(output.stdin.fileno(), 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.execve(given["program"][0], given["program"], os.environ | given["environment"])


if __name__ == "__main__":
    main()
