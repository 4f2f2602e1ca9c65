"""`run.profile`: where the time of some updates goes, in RUN/profile.

Torch's profile of one rank is a Chrome trace (open it in chrome://tracing or ui.perfetto.dev), and
so is Horovod's timeline of all ranks' messages. Both only look on: the weights stay the same bits.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hvd_lbt.errors import UserError, one_line
from hvd_lbt.schedule.plan import Plan
from hvd_lbt.world import World

TIMELINE = "HOROVOD_TIMELINE"  # read when Horovod starts; DYNAMIC: to be started later


def allow_timeline(profiled: tuple[int, int] | None) -> None:
    """Let Horovod's timeline be started later; called before Horovod starts."""
    if profiled is not None:
        os.environ.setdefault(TIMELINE, "DYNAMIC")


class Profile:
    """Profiles the updates from `profiled[0]` to `profiled[1]`, both included; None: none.

    rank: the one that torch's profile is of. start_timeline(file), stop_timeline(): Horovod's.
    say(text): prints a line on rank 0. Raises UserError for updates and a rank that there are not.
    """

    def __init__(
        self,
        folder: Path,
        profiled: tuple[int, int] | None,
        rank: int,
        *,
        world: World,
        plan: Plan,
        first_update: int,
        start_timeline: Callable[[str], None],
        stop_timeline: Callable[[], None],
        say: Callable[[str], None],
    ):
        self._folder, self._world, self._say = folder / "profile", world, say
        self._start_timeline, self._stop_timeline = start_timeline, stop_timeline
        self._mine = rank == world.rank
        self._timeline = os.environ.get(TIMELINE, "").upper() == "DYNAMIC"
        self._profiler: profile | None = None
        self._running = False
        self._first, self._last = profiled or (-1, -1)
        if profiled is None:
            return
        if self._last >= plan.updates:
            too_late = (
                f"run.profile: [{self._first}, {self._last}]: the plan has {plan.updates:,} "
                f"updates, counted from 0; the last must be at most {plan.updates - 1}."
            )
            if not plan.growth:
                raise UserError(too_late)
            say(f"{too_late} It had more before the batch grew; they are not profiled.")  # a resume
        if rank >= world.size:
            raise UserError(
                f"run.profile_rank: {rank}: there are {world.size} ranks, counted from 0; it must "
                f"be at most {world.size - 1}."
            )
        if self._last >= first_update:
            self._first = max(self._first, first_update)
        else:
            say(f"run.profile: the run resumes at update {first_update:,}, behind these updates.")

    def before(self, update: int) -> None:
        """Begin, if `update` is the first of the range."""
        if update != self._first:
            return
        self._running = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._failed(error)
            return
        if self._timeline:
            self._start_timeline(str(self._folder / f"horovod_{self._name}.json"))
        if self._mine:
            kinds = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=kinds)
            self._profiler.start()

    def after(self, update: int) -> None:
        """End, and write the trace, if `update` is the last of the range."""
        if self._running and update == self._last:
            self.close()

    def close(self, *, updates_done: int | None = None) -> None:
        """End a profile that is running, as far as it has come; updates_done: of a finished run."""
        if not self._running:
            if updates_done is not None and updates_done <= self._first:
                self._say(
                    f"run.profile: updates {self._first:,} to {self._last:,} were never reached, "
                    "since the batch grew; there is no profile."
                )
            return
        self._running = False
        if self._timeline:
            with suppress(ValueError):  # Horovod has ended, and its timeline too
                self._stop_timeline()
        if self._profiler is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            self._write(self._profiler)
            self._profiler = None

    @property
    def _name(self) -> str:
        return f"updates_{self._first}-{self._last}"

    def _write(self, profiler: profile) -> None:
        """The trace, whole or not at all."""
        file = self._folder / f"rank{self._world.rank}_{self._name}.json"
        scratch = file.with_name(f".{os.getpid()}.{file.name}")
        try:
            profiler.export_chrome_trace(str(scratch))
            scratch.replace(file)
        except (OSError, RuntimeError) as error:
            scratch.unlink(missing_ok=True)
            self._failed(error)
        else:
            self._say(f"Wrote the profile of updates {self._first:,} to {self._last:,} to {file}")

    def _failed(self, error: Exception) -> None:
        reason = one_line(error, 200)
        print(
            f"{self._folder}: no profile can be written ({reason}). Training continues.", flush=True
        )
