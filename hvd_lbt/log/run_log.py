"""What a run says while it trains: JSON lines, TensorBoard, and a live line. Rank 0 speaks."""

import json
import math
import resource
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_lbt.append_file import AppendFile
from hvd_lbt.data.order import ORDER_VERSION
from hvd_lbt.errors import OutOfMemoryError, SampleError
from hvd_lbt.growing import FILE as DECISIONS
from hvd_lbt.growing import Growing
from hvd_lbt.log.loggers import RunInfo, make_outputs, scalars
from hvd_lbt.log.progress import ProgressLine
from hvd_lbt.log.provenance import revision, slurm_job, versions
from hvd_lbt.measure.gradient_noise import simple_noise_scale
from hvd_lbt.measure.rank_times import PARTS
from hvd_lbt.measure.run_times import RanksLine, RunTimes, summary_text
from hvd_lbt.measure.slow_ranks import SlowRank
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.growth import Costs
from hvd_lbt.schedule.plan import Plan, Update
from hvd_lbt.schedule.time_left import TimeLeft
from hvd_lbt.stage_table import render_plan
from hvd_lbt.terminal import printable
from hvd_lbt.world import World

# Device scalars are read this often, not every update: reading one waits for the GPU.
FLUSH_SECONDS = 1.0
COSTS_AFTER = 6  # updates, until what micro-batches of other sizes cost is tried
COSTS_WORTH = 50  # updates to come, for which that is worth it
# What loggers are given of an update, beside what a test split gives.
TRAIN = (
    *("loss", "accuracy", "images_per_second", "data_wait", "wire_scale", "underflow"),
    "seconds_left",
)
PLAN = ("gradient_noise", "global_batch", "lr", "momentum", "noise_scale")


class RunLog:
    """Writes RUN/metrics.jsonl on rank 0, sends scalars to `run.loggers`, and shows progress there.

    recipe: of the run, with its loggers; None: TensorBoard alone.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        plan: Plan,
        first_update: int,
        recipe: Recipe | None = None,
    ):
        self.speaks = world.rank == 0
        self._first_update = first_update
        self.plan = plan
        self._world = world
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._left: TimeLeft | None = None
        self._times: RunTimes | None = None
        self._timed: list[tuple[Update, float]] = []  # pending updates and their seconds
        self._began = self._flushed = self._last = time.perf_counter()
        self._accuracy = ""
        self._waited = self._trained = 0.0
        self._folder, self._named, self._skipped_samples = folder, set[str](), 0
        self._name = recipe.name if recipe else folder.name
        self._decisions_fail = False
        if not self.speaks:
            return
        first_sample = (
            plan.at(first_update).samples_seen if first_update < plan.updates else plan.samples
        )
        self.progress = ProgressLine(folder, plan, first_sample)
        self._lines = AppendFile(folder / "metrics.jsonl", self.say)
        if not self._lines.ends_with(b"\n"):  # half a line of a run that was killed
            self._lines.append(b"\n")
        about = RunInfo(
            name=self._name,
            folder=folder,
            recipe=recipe.to_dict() if recipe else {},
            run_id=None,
            first_update=first_update,
        )
        names = recipe.run.loggers if recipe else ("tensorboard",)
        self._outputs = make_outputs(names, about, self.say)
        self.progress.start()

    def say(self, text: Any) -> None:
        """Print once, on rank 0, above the live line."""
        if self.speaks:
            self.progress.say(text)

    def begin(
        self,
        recipe: Recipe,
        test_samples: int,
        micro_batch: Mapping[str, Any],
        lines: Iterable[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        """Show the plan, and note what the run is made of.

        micro_batch: `MicroBatchSizes.to_dict()` and what was tried; lines: about it. hosts: the
        name of each rank's.
        """
        first_update = self._first_update
        job = slurm_job()
        hosts = list(hosts) or [socket.gethostname()] * self._world.size
        ghost_batch = recipe.layout.ghost_batch
        self._left = TimeLeft(
            self.plan,
            workers=self._world.size,
            micro_batches=micro_batch["stages"],
            ghost_batch=ghost_batch,
            eval_every=recipe.run.eval_every,
            test_samples=test_samples,
            image_size=recipe.data.image_size,
        )
        self._times = RunTimes(
            hosts, planned=self.plan.updates, ghost_batch=ghost_batch, left=self._left
        )
        if self.speaks:
            self.say(render_plan(recipe, self.plan, self._world.size, micro_batch["stages"]))
        self.say(
            f"{self._world.size} workers · {self.plan.train_samples:,} training images, "
            f"{test_samples:,} test images"
            + (f" · Slurm job {job['id']}, restart {job['restarts']}" if job else "")
            + (f" · going on after {first_update:,} updates" if first_update else "")
        )
        for line in lines:
            self.say(line)
        self.event(
            "run",
            name=recipe.name,
            recipe=recipe.to_dict(),
            plan=_plan_values(self.plan),
            world_size=self._world.size,
            hosts=hosts,
            versions=versions(),
            revision=revision(),
            order_version=ORDER_VERSION,
            resumed_at_update=first_update,
            slurm_job=job,
            micro_batch=micro_batch,
        )

    def event(self, event: str, **values: Any) -> None:
        """Write one line to metrics.jsonl."""
        if not self.speaks:
            return
        line = json.dumps({"event": event, **values, "time": time.time()}) + "\n"
        self._lines.append(line.encode())
        self._lines.flush()

    def _log(self, update: int, values: dict[str, float | None]) -> None:
        record = scalars(update, values)
        for output in self._outputs:
            output.add(record)

    def update(
        self,
        update: Update,
        sums: Tensor,
        *,
        data_wait: float,
        reducer: dict[str, Any],
        noise: Tensor,
        noise_from: str = "parts",
        times: Tensor,
    ) -> None:
        """Note one finished update. sums: (3,) its losses, right answers, samples not skipped.

        data_wait: seconds that this rank waited for images. noise: (2,) averages of tr(Σ) and |G|²;
        noise_from: `GradientNoise.source`. times: (ranks, 4) seconds of each rank's parts of the
        update before. The tensors are read later.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._waited, self._trained = self._waited + data_wait, self._trained + seconds
        if not self.speaks:
            return
        if self._left:
            self._left.updated(update, seconds)
        left = self._left.after(update) if self._left else None
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
            "seconds": now - self._began,
            "seconds_left": left.seconds if left else None,
            "seconds_left_basis": left.basis if left else None,
            "gradient_noise_from": noise_from,
            **{key: reducer[key] for key in ("wire_scale", "underflow", "overflows", "skipped")},
        }
        self._pending.append((record, torch.cat([sums, noise, times.flatten()])))
        self._timed.append((update, seconds))
        if now - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Read the noted device scalars and write them out."""
        self._flushed = time.perf_counter()
        if not self._pending:
            return
        read = torch.stack([values for _, values in self._pending]).cpu().double()
        values = read[:, :5].tolist()
        for (record, _), (loss, right, used, *noise) in zip(self._pending, values, strict=True):
            # JSON has no NaN: a skipped update has no loss
            record["loss"] = loss / used if used and math.isfinite(loss) else None
            record["accuracy"] = right / max(used, 1)
            record["skipped_samples"] = record["global_batch"] - round(used)
            self._skipped_samples += record["skipped_samples"]
            record["gradient_noise"] = simple_noise_scale(*noise)
            for key, value in zip(("gradient_variance", "gradient_squared"), noise, strict=True):
                record[key] = value if math.isfinite(value) else None
            if record["gradient_variance"] is None:
                record["gradient_noise_from"] = None  # nothing measured yet
            self.event("update", **record)
            shown = {f"train/{key}": record[key] for key in TRAIN}
            shown |= {f"plan/{key}": record[key] for key in PLAN}
            if record["gradient_noise_from"] == "differences":  # a curve of its own
                shown["plan/gradient_noise_differences"] = shown.pop("plan/gradient_noise")
            self._log(record["update"], shown)
        if self._times:
            rows = read[:, 5:].reshape(len(read), -1, len(PARTS)).numpy()
            self._note_times(self._times.add(self._timed, rows))
        self._pending.clear()
        self._timed.clear()
        for output in self._outputs:
            output.flush()
        self.progress.show(
            record,
            waited=self._share(),
            skipped_samples=self._skipped_samples,
            accuracy=self._accuracy + self._slowest(),
        )

    def decision(self, decision: Mapping[str, Any], growing: Growing) -> None:
        """Note what was decided about the batch, in RUN/decisions.jsonl too."""
        if not self.speaks:
            return
        self.write_decisions(growing)
        self.event("decision", **decision)
        before, after = decision["global_batch_before"], decision["global_batch"]
        if after != before:
            self.say(
                f"update {decision['update']:>6,} · global batch {before:,} → {after:,} · "
                f"{_why(decision)}"
            )

    def replan(self, plan: Plan, micro_batches: Sequence[int]) -> None:
        """Go on with another plan, which differs from the next update on."""
        self.plan = plan
        if self._left:
            self._left.replan(plan, micro_batches)
        if self.speaks:
            self.progress.plan = plan
            self.event("plan", plan=_plan_values(plan))

    def write_decisions(self, growing: Growing, end: str | None = None) -> None:
        """Write RUN/decisions.jsonl anew; where that fails it is said once."""
        if not self.speaks or growing.schedule.policy != "measured":
            return
        try:
            growing.write(self._folder, self._name, end)
        except OSError as error:
            if not self._decisions_fail:
                self.say(
                    f"{self._folder}/{DECISIONS} cannot be written ({error.strerror}). Training "
                    "continues; the checkpoints have the decisions too."
                )
            self._decisions_fail = True

    def costs(self, update: Update) -> Costs | None:
        """Of updates like this one, by this run's times; None before they are known."""
        if not self._left:
            return None
        self.flush()
        return self._left.costs(self.plan.stages[update.stage])

    def out_of_memory(
        self, updates_done: int, error: OutOfMemoryError, before: int, after: int
    ) -> None:
        """Note that memory ran out on some ranks, and the micro-batch from here on.

        Each of these ranks prints the error that it met.
        """
        self.print_own(error)
        self.event(
            "out_of_memory",
            update=updates_done,
            ranks={str(rank): place for rank, place in error.ranks.items()},
            micro_batch_before=before,
            micro_batch=after,
        )
        self.say(
            f"{error.who}, after {updates_done:,} updates. All ranks do it "
            f"again with a micro-batch of {after:,} instead of {before:,}, which computes the same."
        )

    def print_own(self, error: OutOfMemoryError) -> None:
        """Print the error that this rank met, if it is one of those that ran out of memory."""
        if error.own:
            print(f"hvd_lbt: rank {self._world.rank}: {error.own}", file=sys.stderr, flush=True)

    def _note_times(self, found: Iterable[SlowRank | RanksLine]) -> None:
        """Write down what the ranks' times say, and name a rank that is slow, or no longer."""
        for line in found:
            if isinstance(line, RanksLine):
                self.event("ranks", **line.values())
            else:
                self.event("slow_rank", **asdict(line))
                self.say(f"update {line.update:>6,} · {line.text(self._world.size)}")

    def evaluation(self, update: Update, values: dict[str, Any]) -> None:
        """Note an evaluation after this update."""
        if not self.speaks:
            return
        self.flush()
        done = update.index + 1
        seen = update.samples_seen + update.global_batch
        epoch = seen / self.plan.train_samples
        self.event("eval", update=done, epoch=epoch, samples_seen=seen, **values)
        self._log(done, {f"test/{key}": values[key] for key in sorted(values.keys() - {"samples"})})
        for output in self._outputs:
            output.flush()
        self._accuracy = f" · test {values['top1']:.2%}"
        self.say(
            f"epoch {epoch:6.2f} · update {done:>6} · test loss {values['loss']:.4f} · "
            f"top-1 {values['top1']:.2%} · top-5 {values['top5']:.2%} of {values['samples']:,}"
            + (
                f" · averaged weights: top-1 {values['ema_top1']:.2%}"
                if "ema_top1" in values
                else ""
            )
        )
        now = time.perf_counter()
        if self._left:
            self._left.evaluated(now - self._last)
        self._last = now  # an evaluation is no part of the next update

    def saved(self, updates_done: int) -> None:
        """Note that a checkpoint has been written, or is being written beside the training."""
        now = time.perf_counter()
        if self._left:
            ends = {stage.first_update + stage.updates for stage in self.plan.stages}
            self._left.saved(now - self._last, at_end_of_stage=updates_done in ends)
        self._last = now  # nor is a checkpoint

    def unknown_costs(self, update: Update) -> list[int]:
        """Sizes of micro-batches that are to be timed after this update; the same on all ranks.

        Some updates after the beginning, where a plan has several and enough updates to come.
        """
        done = update.index + 1
        if not self._left or done != self._first_update + COSTS_AFTER:
            return []
        sizes = self._left.micro_batches_ahead(update.index)
        few = self.plan.updates - done < COSTS_WORTH
        return [] if few or len(sizes) == 1 else sizes

    def use_micro_batches(self, by_stage: Sequence[int]) -> None:
        """From now on micro-batches are of so many samples."""
        if self._left:
            self._left.use(by_stage)

    def learn_costs(self, by_rank: Sequence[dict[int, float]]) -> None:
        """Take what micro-batches cost on each rank, of which the slowest counts."""
        known = [costs for costs in by_rank if costs]
        if self._left and known:
            self._left.learn_costs({size: max(c[size] for c in known) for size in known[0]})
        self._last = time.perf_counter()

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
            shown = printable(str(error))
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
        if self._times:
            self._note_times(self._times.last_line())
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
        summary = self._times.summary(seconds) if self._times else {}
        totals |= summary
        self.event("end", reason=reason, update=update, peak_memory_bytes=peak, **totals)
        for line in summary_text(summary, seconds).splitlines() if summary else ():
            self.say(line)
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
        self.close(reason)

    def close(self, reason: str = "interrupted") -> None:
        """Take the live line down, close the files and end the loggers."""
        if self.speaks:
            self.progress.stop()
            self._lines.close()
            for output in self._outputs:
                output.close(reason)

    def _slowest(self) -> str:
        """The slowest rank of those that are slow, for the live line."""
        named = self._times.slow.named.values() if self._times else ()
        if not named:
            return ""
        slowest = max(named, key=lambda rank: rank.ratio)
        others = f" and {len(named) - 1} more" if len(named) > 1 else ""
        return f" · {slowest.text(self._world.size)}{others}"


def _plan_values(plan: Plan) -> dict[str, Any]:
    return {
        "train_samples": plan.train_samples,
        "updates": plan.updates,
        "stages": [asdict(stage) for stage in plan.stages],
    }


def _why(decision: Mapping[str, Any]) -> str:
    """What a decision rests on, in one line."""

    def number(value: float | None) -> str:
        return "too large to tell" if value is None else f"{value:,.4g}"

    return (
        f"tr Σ/|G|² {number(decision['noise'])}, overhead of an update "
        f"{number(decision['overhead'])} samples, fastest batch {number(decision['fastest'])} "
        f"(bound: {decision['bound']})"
    )
