"""What rank 0 shows of a run: a live line on a terminal, else a plain line every few seconds."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from hvd_lbt import terminal
from hvd_lbt.schedule.plan import Plan
from hvd_lbt.schedule.time_left import UPPER_BOUND, hours_and_minutes

# A line this often where no live line can be: without a terminal, and under a launcher, which puts
# the rank before every piece of output.
LINE_SECONDS = 5.0
NOTABLE_UNDERFLOW = 0.01  # share of gradients below fp16's smallest normal number
LAUNCHERS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def time_left(seconds: float | None, basis: str | None) -> str:
    """An estimate for people; basis: of `schedule.time_left`."""
    if seconds is None:
        return "time left: not known yet"
    if basis == UPPER_BOUND:
        return f"at most {hours_and_minutes(seconds)} left (predicted, larger batches not timed)"
    return f"{hours_and_minutes(seconds)} left (predicted)"


class ProgressLine:
    """The standard output of a run. folder: of the run; first_sample: what was seen before."""

    def __init__(self, folder: Path, plan: Plan, first_sample: int):
        self._folder, self.plan = folder, plan
        self._says = True  # until the standard output fails
        self._line = time.perf_counter()
        live = sys.stdout.isatty() and not any(name in os.environ for name in LAUNCHERS)
        self.console = terminal.console(live=live)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not live,
        )
        self._task = self._progress.add_task(
            "", total=plan.samples, completed=first_sample, left=""
        )

    def start(self) -> None:
        """Put the live line up, where there is one."""
        self._progress.start()

    def say(self, text: Any) -> None:
        """Print above the live line."""
        shown = terminal.printable(text) if isinstance(text, str) else text
        try:
            self.console.print(shown, soft_wrap=True, highlight=False)
        except OSError as error:  # a full disk, or a pipe that nobody reads
            if self._says:
                with suppress(OSError):
                    print(
                        f"The standard output cannot be written ({error.strerror}); "
                        f"{self._folder / 'metrics.jsonl'} has all numbers.",
                        file=sys.stderr,
                        flush=True,
                    )
            self._says = False

    def show(
        self, record: dict[str, Any], *, waited: float, skipped_samples: int, accuracy: str
    ) -> None:
        """Show the newest update's record. waited: share of the training time so far."""
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.3f}"
        measured = record["gradient_noise"]
        marked = " (differences)" if record["gradient_noise_from"] == "differences" else ""
        noise = "" if measured is None else f"tr Σ/|G|² {measured:,.3g}{marked} · "
        plan = self.plan
        text = (
            f"stage {record['stage'] + 1}/{len(plan.stages)} · update "
            f"{record['update'] + 1:,}/{plan.updates:,} · global batch "
            f"{record['global_batch']:,} · lr {record['lr']:.4g} · m {record['momentum']:.4g} · "
            f"g {record['noise_scale']:.4g} · {noise}{record['images_per_second']:,.0f} images/s "
            f"(waits {record['data_wait']:.0%} for data, {waited:.0%} in all) · loss "
            f"{loss}{accuracy}"
            + (f" · {skipped_samples:,} samples skipped" if skipped_samples else "")
            + (
                f" · {record['underflow']:.0%} of the gradients are below fp16's normal numbers"
                if record["underflow"] >= NOTABLE_UNDERFLOW
                else ""
            )
        )
        seen = record["samples_seen"]
        left = time_left(record["seconds_left"], record["seconds_left_basis"])
        self._progress.update(self._task, completed=seen, description=text, left=left)
        now = time.perf_counter()
        if self._progress.disable and now - self._line > LINE_SECONDS:
            self._line = now
            self.say(f"{text} · {left}")

    def stop(self) -> None:
        """Take the live line down."""
        with suppress(OSError):
            self._progress.stop()
        with suppress(OSError):
            sys.stdout.flush()
