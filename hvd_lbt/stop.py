"""Stopping together: a signal to any rank ends all ranks after the same update."""

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm and srun may each hand on the one signal that was meant: later than this it is a second one.
SECONDS_OF_ONE_SIGNAL = 2.0
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, start again with --resume


class StopRequest:
    """Remembers a signal; a second one ends the process at once.

    votes() and agreed() bracket an update: with it the flags of all ranks are summed
    (`Training.update`), and whether any rank wants a checkpoint now, as only one clock can tell.
    """

    def __init__(self) -> None:
        self._asked_at = float("inf")
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

    def votes(self, save: bool = False) -> tuple[float, float]:
        """The flags as they are now: stop, and save."""
        return float(self.requested()), float(save)

    @staticmethod
    def agreed(sums: Sequence[float]) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and any wanted to save: the same on all ranks.

        sums: over the ranks, of their `votes`.
        """
        stop, save = sums
        return stop > 0, save > 0


def ignore_signals() -> None:
    """From the end of a run on: a launcher ends all ranks when the first leaves with 75."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
