"""The plan: a literal table of stages, made from a schedule and a data set's size (pure).

The one place where epochs become samples and samples become updates.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hvd_lbt.errors import UserError
from hvd_lbt.layout import Layout, make_layout
from hvd_lbt.noise import exact_noise_scale, noise_scale
from hvd_lbt.recipe import Recipe, ScheduleRecipe
from hvd_lbt.schedule import Phase, phases
from hvd_lbt.world import World


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A span with one global batch, lr and momentum.

    first_sample: samples seen before it; samples: seen in it. Updates are of `global_batch`
    samples, except the last of the run, which takes what is left.
    """

    index: int
    first_update: int
    updates: int
    first_sample: int
    samples: int
    global_batch: int
    lr: float
    momentum: float
    noise_scale: float
    exact_noise_scale: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step, counted from 0.

    epoch, samples_seen: before this update; global_batch: the samples of this very update.
    """

    index: int
    stage: int
    epoch: float
    samples_seen: int
    global_batch: int
    lr: float
    momentum: float
    noise_scale: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All updates of a run, as stages in order."""

    train_samples: int
    stages: tuple[Stage, ...]

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.stages[-1].first_update + self.stages[-1].updates

    @property
    def samples(self) -> int:
        """Samples of the whole run: epochs·N, rounded once."""
        return self.stages[-1].first_sample + self.stages[-1].samples

    def at(self, update: int) -> Update:
        """The update of this index. Raises IndexError outside of 0 … updates − 1."""
        if not 0 <= update < self.updates:
            raise IndexError(f"update {update} of a plan of {self.updates} updates")
        place = bisect_right(self.stages, update, key=lambda stage: stage.first_update)
        stage = self.stages[place - 1]
        before = (update - stage.first_update) * stage.global_batch
        seen = stage.first_sample + before
        global_batch = min(stage.global_batch, stage.samples - before)
        return Update(
            index=update,
            stage=stage.index,
            epoch=seen / self.train_samples,
            samples_seen=seen,
            global_batch=global_batch,
            lr=stage.lr,
            momentum=stage.momentum,
            noise_scale=noise_scale(stage.lr, stage.momentum, self.train_samples, global_batch),
        )


def make_plan(schedule: ScheduleRecipe, train_samples: int) -> Plan:
    """The plan of a schedule for N = `train_samples`.

    A stage runs as many full updates as end at or before its milestone, in samples seen from the
    start of the run. The samples left over, fewer than its batch, go to the next stage; so no
    update straddles two learning rates and no sample is dropped. The last stage uses up the rest:
    the last update of the run may be smaller. A stage too short for one update is left out.

    Raises UserError if there are no samples.
    """
    total = round(schedule.epochs * train_samples)
    if total < 1:
        raise UserError(
            f"schedule.epochs: {schedule.epochs:g} epochs of {train_samples} training samples are "
            "no sample at all; at least one is needed."
        )
    spans = phases(schedule)
    ends = [round(span.epoch * train_samples) for span in spans[1:]] + [total]
    stages: list[Stage] = []
    seen = done = 0
    for span, end in zip(spans, ends, strict=True):
        updates, left = divmod(end - seen, span.global_batch)
        samples = end - seen - left
        if end == total and left:
            updates, samples = updates + 1, end - seen
        if updates > 0:
            stages.append(_stage(len(stages), span, train_samples, (done, updates, seen, samples)))
            seen, done = seen + samples, done + updates
    plan = Plan(train_samples=train_samples, stages=tuple(stages))
    assert plan.samples == total, (plan, total)
    return plan


def _stage(index: int, span: Phase, train_samples: int, extent: tuple[int, int, int, int]) -> Stage:
    first_update, updates, first_sample, samples = extent
    quantities = (span.lr, span.momentum, train_samples, span.global_batch)
    return Stage(
        index=index,
        first_update=first_update,
        updates=updates,
        first_sample=first_sample,
        samples=samples,
        global_batch=span.global_batch,
        lr=span.lr,
        momentum=span.momentum,
        noise_scale=noise_scale(*quantities),
        exact_noise_scale=exact_noise_scale(*quantities),
    )


def layout_of(update: Update, recipe: Recipe, world: World) -> Layout:
    """This rank's micro-batches of `update`."""
    return make_layout(
        update.global_batch,
        rank=world.rank,
        size=world.size,
        micro_batch=recipe.layout.micro_batch,
        ghost_batch=recipe.layout.ghost_batch,
    )


def micro_batch_ranges(
    updates: list[Update], recipe: Recipe, world: World
) -> Iterator[tuple[int, int]]:
    """(first sample of the stream, count) of each micro-batch of this rank, update by update."""
    for update in updates:
        for micro_batch in layout_of(update, recipe, world).micro_batches:
            yield update.samples_seen + micro_batch.start, len(micro_batch)


def render_plan(recipe: Recipe, plan: Plan, workers: int) -> RenderableType:
    """The stages as a table for the terminal, with what `workers` workers do in one update."""
    table = Table(
        title=f"{recipe.name}: {plan.updates:,} updates on {plan.train_samples:,} samples, "
        f"{recipe.schedule.policy}"
    )
    for heading in (
        "stage",
        "epochs",
        "global batch",
        "micro-batches a worker",
        "lr",
        "momentum",
        "g ≈ εN/B(1−m)",
        "g exact",
        "updates",
    ):
        table.add_column(heading, justify="right")
    notes = []
    for stage in plan.stages:
        shares, idle = _shares(recipe, stage.global_batch, workers)
        ends = (stage.first_sample, stage.first_sample + stage.samples)
        table.add_row(
            str(stage.index + 1),
            "–".join(f"{round(end / plan.train_samples, 2):g}" for end in ends),
            f"{stage.global_batch:,}",
            shares,
            f"{stage.lr:.4g}",
            f"{stage.momentum:g}",
            f"{stage.noise_scale:,.4g}",
            f"{stage.exact_noise_scale:,.4g}",
            f"{stage.updates:,}",
        )
        if idle:
            notes.append(
                f"Warning: in stage {stage.index + 1} {idle} of {workers} workers have no samples: "
                f"{stage.global_batch:,} samples are only {workers - idle} ghost batches of "
                f"{recipe.layout.ghost_batch}."
            )
    last = plan.at(plan.updates - 1).global_batch
    if last < plan.stages[-1].global_batch:
        notes.append(f"The last update takes the {last:,} samples that are left.")
    missing = len(recipe.schedule.milestones) + 1 - len(plan.stages)
    if missing:
        notes.append(f"Warning: {missing} stages are shorter than one update and left out.")
    return Group(table, *(Text(note) for note in notes))


def _shares(recipe: Recipe, global_batch: int, workers: int) -> tuple[str, int]:
    """Micro-batches of one update on each worker, such as `2 × 64`, and how many have none."""
    layouts = [
        make_layout(global_batch, rank=rank, size=workers, **recipe.layout.model_dump())
        for rank in range(workers)
    ]
    counts = sorted({len(layout.micro_batches) for layout in layouts})
    largest = max(len(part) for layout in layouts for part in layout.micro_batches)
    smallest = min(len(part) for layout in layouts for part in layout.micro_batches)
    number = "–".join(f"{count:,}" for count in sorted({counts[0], counts[-1]}))
    sizes = "–".join(str(size) for size in sorted({smallest, largest}))
    return f"{number} × {sizes}", sum(not layout.micro_batches for layout in layouts)
