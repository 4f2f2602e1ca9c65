"""What a run says while it trains: JSON lines, TensorBoard, and a live line. Rank 0 speaks."""

import io
import json
import math
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import scalar

from hvd_lbt import terminal
from hvd_lbt.append_file import AppendFile
from hvd_lbt.errors import SampleError
from hvd_lbt.measure.gradient_noise import simple_noise_scale
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.plan import Plan, Update
from hvd_lbt.stage_table import render_plan
from hvd_lbt.world import World

# Device scalars are read this often, not every update: reading one waits for the GPU.
FLUSH_SECONDS = 1.0
# A line this often where no live line can be: without a terminal, and under a launcher, which puts
# the rank before every piece of output.
LINE_SECONDS = 5.0
NOTABLE_UNDERFLOW = 0.01  # share of gradients below fp16's smallest normal number
SCALARS = ("loss", "accuracy", "images_per_second", "data_wait", "wire_scale", "underflow")
LAUNCHERS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def versions() -> dict[str, str]:
    """The versions a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("hvd_lbt", "horovod", "mpi4py", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The git revision of this program, with + if files differ from it; empty outside a
    checkout.
    """
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def slurm_job() -> dict[str, str] | None:
    """The Slurm job this is a part of, and how often Slurm has started it again."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"id": job, "restarts": os.environ.get("SLURM_RESTART_COUNT", "0")} if job else None


class EventFile:
    """TensorBoard's scalars, as SummaryWriter writes them, in a file that outlasts a full disk.

    SummaryWriter's own thread ends with a traceback when the disk is full, and then the training.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        self._file = AppendFile(folder / name, say)
        self._add(Event(file_version="brain.Event:2"))
        # what an earlier part of the run wrote for these steps is hidden
        self._add(Event(step=purge_step, file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._file.flush()
        self.flush, self.close = self._file.flush, self._file.close

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Note a value; `flush` writes it."""
        self._add(Event(step=step, summary=scalar(tag, value)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.append(framed.getvalue())


class RunLog:
    """Writes RUN/metrics.jsonl and RUN/tensorboard on rank 0 and shows progress there."""

    def __init__(self, folder: Path, world: World, plan: Plan, first_update: int):
        self.speaks = world.rank == 0
        self.plan = plan
        self._world = world
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._began = self._flushed = self._line = self._last = time.perf_counter()
        self._accuracy = ""
        self._waited = self._trained = 0.0
        self._folder, self._named, self._skipped_samples = folder, set[str](), 0
        self._says = True  # until the standard output fails
        self._first_sample = (
            plan.at(first_update).samples_seen if first_update < plan.updates else plan.samples
        )
        if not self.speaks:
            return
        live = sys.stdout.isatty() and not any(name in os.environ for name in LAUNCHERS)
        self.console = terminal.console(live=live)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not live,
        )
        self._task = self._progress.add_task("", total=plan.samples, completed=self._first_sample)
        self._lines = AppendFile(folder / "metrics.jsonl", self.say)
        if not self._lines.ends_with(b"\n"):  # half a line of a run that was killed
            self._lines.append(b"\n")
        self._board = EventFile(folder / "tensorboard", first_update, self.say)
        self._progress.start()

    def say(self, text: Any) -> None:
        """Print once, on rank 0, above the live line."""
        if self.speaks:
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

    def begin(self, recipe: Recipe, test_samples: int, first_update: int) -> None:
        """Show the plan, and note what the run is made of."""
        job = slurm_job()
        self.say(render_plan(recipe, self.plan, self._world.size))
        self.say(
            f"{self._world.size} workers · {self.plan.train_samples:,} training images, "
            f"{test_samples:,} test images"
            + (f" · Slurm job {job['id']}, restart {job['restarts']}" if job else "")
            + (f" · going on after {first_update:,} updates" if first_update else "")
        )
        self.event(
            "run",
            name=recipe.name,
            recipe=recipe.to_dict(),
            plan={
                "train_samples": self.plan.train_samples,
                "updates": self.plan.updates,
                "stages": [asdict(stage) for stage in self.plan.stages],
            },
            world_size=self._world.size,
            versions=versions(),
            revision=revision(),
            resumed_at_update=first_update,
            slurm_job=job,
        )

    def event(self, event: str, **values: Any) -> None:
        """Write one line to metrics.jsonl."""
        if not self.speaks:
            return
        line = json.dumps({"event": event, **values, "time": time.time()}) + "\n"
        self._lines.append(line.encode())
        self._lines.flush()

    def update(
        self,
        update: Update,
        sums: Tensor,
        *,
        data_wait: float,
        reducer: dict[str, Any],
        noise: Tensor,
    ) -> None:
        """Note one finished update. sums: (3,) its losses, right answers, samples not skipped.

        data_wait: seconds that this rank waited for images. noise: (2,) averages of tr(Σ) and |G|².
        The tensors are read later.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._waited, self._trained = self._waited + data_wait, self._trained + seconds
        if not self.speaks:
            return
        seen = update.samples_seen + update.global_batch
        record = {
            "update": update.index,
            "epoch": seen / self.plan.train_samples,
            "samples_seen": seen,
            "stage": update.stage,
            "global_batch": update.global_batch,
            "lr": update.lr,
            "momentum": update.momentum,
            "noise_scale": update.noise_scale,
            "images_per_second": update.global_batch / seconds,
            "data_wait": min(1.0, data_wait / seconds),
            **{key: reducer[key] for key in ("wire_scale", "underflow", "overflows", "skipped")},
        }
        self._pending.append((record, torch.cat([sums, noise])))
        if now - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Read the noted device scalars and write them out."""
        self._flushed = time.perf_counter()
        if not self._pending:
            return
        values = torch.stack([values for _, values in self._pending]).tolist()
        for (record, _), (loss, right, used, *noise) in zip(self._pending, values, strict=True):
            # JSON has no NaN: a skipped update has no loss
            record["loss"] = loss / used if used and math.isfinite(loss) else None
            record["accuracy"] = right / max(used, 1)
            record["skipped_samples"] = record["global_batch"] - round(used)
            self._skipped_samples += record["skipped_samples"]
            record["gradient_noise"] = simple_noise_scale(*noise)
            for key, value in zip(("gradient_variance", "gradient_squared"), noise, strict=True):
                record[key] = value if math.isfinite(value) else None
            self.event("update", **record)
            if record["gradient_noise"] is not None:
                self._board.add_scalar(
                    "plan/gradient_noise", record["gradient_noise"], record["update"]
                )
            for key in SCALARS:
                if record[key] is not None:
                    self._board.add_scalar(f"train/{key}", record[key], record["update"])
            for key in ("global_batch", "lr", "momentum", "noise_scale"):
                self._board.add_scalar(f"plan/{key}", record[key], record["update"])
        self._pending.clear()
        self._board.flush()
        self._show(record)

    def evaluation(self, update: Update, values: dict[str, Any]) -> None:
        """Note an evaluation after this update."""
        if not self.speaks:
            return
        self.flush()
        done = update.index + 1
        seen = update.samples_seen + update.global_batch
        epoch = seen / self.plan.train_samples
        self.event("eval", update=done, epoch=epoch, samples_seen=seen, **values)
        for key in ("loss", "top1", "top5"):
            self._board.add_scalar(f"test/{key}", values[key], done)
        self._board.flush()
        self._accuracy = f" · test {values['top1']:.2%}"
        self.say(
            f"epoch {epoch:6.2f} · update {done:>6} · test loss {values['loss']:.4f} · "
            f"top-1 {values['top1']:.2%} · top-5 {values['top5']:.2%} of {values['samples']:,}"
        )
        self._last = time.perf_counter()  # an evaluation is no part of the next update

    def skipped_sample(self, error: SampleError) -> None:
        """List a sample that was skipped, once, in this rank's RUN/skipped_samples.RANK.txt."""
        line = f"{error}\n"
        if line in self._named:
            return
        file = self._folder / f"skipped_samples.{self._world.rank}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._named and file.exists():  # from before a resume
                with file.open(encoding="utf-8", errors="surrogateescape") as before:
                    self._named |= set(before)
            if line not in self._named:
                with file.open("a", encoding="utf-8", errors="surrogateescape") as lines:
                    lines.write(line)
        except OSError as refused:
            shown = terminal.printable(str(error))
            print(f"{file} cannot be written ({refused.strerror}): {shown}", flush=True)
        self._named.add(line)

    def _share(self) -> float:
        """Of the training time so far, the share that this rank waited for data."""
        return self._waited / max(self._trained, 1e-9)

    def end(self, reason: str, update: int) -> None:
        """Note the end and close the files; reason: finished, or stopped by a signal."""
        if not self.speaks:
            return
        self.flush()
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = time.perf_counter() - self._began
        totals = {
            "seconds": seconds,
            "data_wait": self._share(),
            "skipped_samples": self._skipped_samples,
        }
        self.event("end", reason=reason, update=update, peak_memory_bytes=peak, **totals)
        self.say(
            f"{update:,} updates done · {self._share():.1%} of the training time was spent waiting "
            "for data"
            + (
                f" · {self._skipped_samples:,} samples skipped: "
                f"{self._folder}/skipped_samples.*.txt"
                if self._skipped_samples
                else ""
            )
        )
        self.close()

    def close(self) -> None:
        """Take the live line down and close the files."""
        if self.speaks:
            with suppress(OSError):
                self._progress.stop()
            self._lines.close()
            self._board.close()
            with suppress(OSError):
                sys.stdout.flush()

    def _show(self, record: dict[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.3f}"
        measured = record["gradient_noise"]
        noise = "" if measured is None else f"tr Σ/|G|² {measured:,.3g} · "
        text = (
            f"stage {record['stage'] + 1}/{len(self.plan.stages)} · update "
            f"{record['update'] + 1:,}/{self.plan.updates:,} · global batch "
            f"{record['global_batch']:,} · lr {record['lr']:.4g} · m {record['momentum']:.4g} · "
            f"g {record['noise_scale']:.4g} · {noise}{record['images_per_second']:,.0f} images/s "
            f"(waits {record['data_wait']:.0%} for data, {self._share():.0%} in all) · loss "
            f"{loss}{self._accuracy}"
            + (f" · {self._skipped_samples:,} samples skipped" if self._skipped_samples else "")
            + (
                f" · {record['underflow']:.0%} of the gradients are below fp16's normal numbers"
                if record["underflow"] >= NOTABLE_UNDERFLOW
                else ""
            )
        )
        seen = record["samples_seen"]
        self._progress.update(self._task, completed=seen, description=text)
        now = time.perf_counter()
        if self._progress.disable and now - self._line > LINE_SECONDS:
            self._line = now
            speed = (seen - self._first_sample) / (now - self._began)
            left = (self.plan.samples - seen) / speed
            self.say(f"{text} · {left:,.0f} s left")
