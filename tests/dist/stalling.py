"""`python stalling.py WHERE`: rank 1 of 2 freezes there, and the others have to notice.

WHERE: start (before it joins the world) · a function of comm · last barrier · shutdown.
"""

import os
import signal
import sys
import time

import torch

import hvd_lbt.data.check as command  # any command: the errors are those of the command line
from hvd_lbt import comm
from hvd_lbt.cli import main

where = sys.argv.pop(1)
comm.WATCHDOG_MARGIN = 1.0


def freeze(at: str) -> None:
    if at == where and "1" in (os.environ.get(name) for name in comm.RANK_VARIABLES):
        time.sleep(0.2)  # the others wait by now
        os.kill(os.getpid(), signal.SIGSTOP)


def work(args) -> int:
    freeze("start")
    comm.init()
    freeze("allreduce_")
    comm.allreduce_(torch.ones(3), "ones")
    freeze("broadcast_")
    comm.broadcast_({"ones": torch.ones(3)})
    freeze("broadcast_object")
    comm.broadcast_object({"update": 3})
    freeze("allgather_object")
    comm.allgather_object("a value")
    freeze("barrier")
    comm.barrier()
    leave = comm.hvd.shutdown
    comm.hvd.shutdown = lambda: (freeze("shutdown"), leave())
    freeze("last barrier")
    comm.shutdown()
    print("nobody froze", flush=True)
    return 0


command.main = work
sys.exit(main(["data", "check", "anything"]))
