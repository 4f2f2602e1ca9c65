"""Ranks that are forks (preloaded.py) end as processes do, and with their launcher."""

import signal
import time

import psutil
from launching import RANK, begin, loaders

PROGRAM = """\
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
Path(sys.argv[1], str(rank)).write_text(f"{os.getpid()} {hash('seed')}")
while not Path(sys.argv[1], str(1 - rank)).exists():
    time.sleep(0.02)
if rank == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(600)
"""


def test_a_fork_that_dies_ends_the_others(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    loaders().need(2)
    ended = begin(2, tmp_path / "program.py", tmp_path, python=RANK, timeout=60).wait()
    assert ended.code == 128 + signal.SIGSEGV, ended.output
    (zero, seed), (one, other) = ((tmp_path / str(r)).read_text().split() for r in range(2))
    assert seed != other
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(zero)) or psutil.pid_exists(int(one)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
