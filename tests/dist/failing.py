"""`python failing.py HOW train …` is `hvd_lbt train …` that fails in rank 1's (or the only one's)
third backward.

HOW: raise · hang (Python waits, Horovod's thread lives) · freeze (the whole process) · die · crash.
"""

import os
import signal
import sys
import time

from hvd_lbt import comm
from hvd_lbt.cli import main
from hvd_lbt.reducer import GradientReducer

how = sys.argv.pop(1)
if how == "freeze":
    comm.WATCHDOG_MARGIN = 2.0
backward, calls = GradientReducer.backward, 0


def failing(self, loss, *, last):
    global calls
    calls += 1
    if self.world.rank == min(1, self.world.size - 1) and calls == 3:
        print("failing", flush=True)
        if how == "raise":
            raise RuntimeError("the memory of this GPU is full")
        if how == "hang":
            time.sleep(600)
        number = {"freeze": signal.SIGSTOP, "die": signal.SIGKILL, "crash": signal.SIGSEGV}[how]
        os.kill(os.getpid(), number)
    backward(self, loss, last=last)


GradientReducer.backward = failing
sys.exit(main())
