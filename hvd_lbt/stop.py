"""Stopping together: a signal to any rank ends all ranks after the same update."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the elastic driver needs the constants, and no torch
    from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm and srun may each hand on the one signal that was meant: later than this it is a second one.
SECONDS_OF_ONE_SIGNAL = 2.0
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, start again with --resume


class StopRequest:
    """Remembers a signal; a second one ends the process at once.

    ask() and agreed() bracket an update: the flags of all ranks are summed while it runs, and with
    them whether any rank wants a checkpoint now, as only one clock can tell when that is.
    """

    def __init__(
        self,
        allreduce_async: "Callable[[Tensor, str], int]",
        synchronize: "Callable[[int], Tensor]",
    ):
        import torch

        self._allreduce_async, self._synchronize = allreduce_async, synchronize
        self._asked_at = float("inf")
        self._asked = torch.zeros(2)  # stop · save
        self._sum = torch.zeros(2)
        self._handle = -1
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._asked_at > SECONDS_OF_ONE_SIGNAL:
            os._exit(128 + number)
        self._asked_at = min(self._asked_at, now)

    def request(self) -> None:
        """Stop after this update, as after a signal, and never at once: asking twice is
        harmless.
        """
        self._asked_at = min(self._asked_at, time.monotonic())

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked_at < float("inf")

    def ask(self, save: bool = False) -> None:
        """Begin to sum the flags as they are now."""
        self._asked[0] = float(self.requested())
        self._asked[1] = float(save)
        self._sum.copy_(self._asked)
        self._handle = self._allreduce_async(self._sum, "stop")

    def agreed(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and any wanted to save: the same on all ranks."""
        stop, save = self._synchronize(self._handle).tolist()
        return stop > 0, save > 0


def ignore_signals() -> None:
    """From the end of a run on: a launcher ends all ranks when the first leaves with 75."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
