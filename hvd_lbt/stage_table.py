"""The table of a plan's stages: one set of columns for the terminal and for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hvd_lbt.growing import widest_plan
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.growth import PART_OF_DATA
from hvd_lbt.schedule.layout import (
    count_ghost_batches,
    largest_share,
    make_layout,
    typical_workers,
)
from hvd_lbt.schedule.phases import phases
from hvd_lbt.schedule.plan import Plan, Stage, target_workers
from hvd_lbt.schedule.plan_warnings import plan_warnings, sampling_note


def stage_cells(stage: Mapping[str, Any], train_samples: int) -> dict[str, str]:
    """The text of each column by its heading; stage: the fields of a `Stage`.

    Runs of older versions have no last_lr, last_momentum and last_noise_scale: there all are
    constant.
    """
    ends = (stage["first_sample"], stage["first_sample"] + stage["samples"])
    return {
        "stage": str(stage["index"] + 1),
        "epochs": "–".join(f"{round(end / train_samples, 2):g}" for end in ends),
        "global batch": f"{stage['global_batch']:,}",
        "lr": _from_to(stage, "lr"),
        "momentum": _from_to(stage, "momentum"),
        "g ≈ εN/B(1−m)": _from_to(stage, "noise_scale"),
        "g exact": f"{stage['exact_noise_scale']:,.4g}",
        "samples": f"{stage['samples']:,}",
        "updates": f"{stage['updates']:,}",
    }


def render_plan(
    recipe: Recipe, plan: Plan, workers: int, micro_batches: Sequence[int] = ()
) -> RenderableType:
    """The stages as a table for the terminal, with what `workers` workers do in one update.

    A recipe that says what a worker is for (elastic.local_batch) counts its own workers.
    micro_batches: of each stage, where a run has chosen them; else those of the recipe.
    """
    rows = []
    for stage in plan.stages:
        target = target_workers(stage, recipe.elastic.local_batch)
        cells = stage_cells(asdict(stage), plan.train_samples)
        if any(one.image_size for one in plan.stages):
            cells["image size"] = str(stage.image_size or recipe.data.image_size)
        cells["micro-batches a worker"] = _shares(
            recipe, stage, target or workers, micro_batches
        ).text
        rows.append(cells | ({"workers": f"{target:,}"} if target else {}))
    policy: str = recipe.schedule.policy
    if policy == "measured":
        policy += ", as far as it is decided" if plan.growth else ", if the batch never grows"
    table = Table(
        title=f"{recipe.name}: {plan.updates:,} updates on {plan.train_samples:,} samples, {policy}"
    )
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for cells in rows:
        table.add_row(*cells.values())
    return Group(table, *(Text(note) for note in _notes(recipe, plan, workers, micro_batches)))


def _notes(recipe: Recipe, plan: Plan, workers: int, micro_batches: Sequence[int]) -> list[str]:
    """What the table does not show: doubts, idle workers, a smaller last update and the like."""
    stages = [asdict(stage) for stage in plan.stages]
    notes = plan_warnings(stages, plan.train_samples)
    if note := sampling_note(stages, plan.train_samples, nesterov=recipe.optimizer.nesterov):
        notes.append(note)
    compared = []  # stages where an update is one micro-batch
    for stage in plan.stages:
        wanted = target_workers(stage, recipe.elastic.local_batch) or workers
        shares = _shares(recipe, stage, wanted, micro_batches)
        if shares.micro_batches == 1 and recipe.run.noise_every:
            compared.append(str(stage.index + 1))
        if shares.idle:
            notes.append(
                f"Warning: in stage {stage.index + 1} {shares.idle} of {wanted} workers have no "
                f"samples: {stage.global_batch:,} samples are only {wanted - shares.idle} ghost "
                f"batches of {stage.ghost_batch or recipe.layout.ghost_batch}."
            )
    if compared:
        notes.append(
            f"The gradient's noise is measured from differences of consecutive updates in stage "
            f"{', '.join(compared)}: there an update is one micro-batch. It comes out too large "
            "(docs/gradient_noise.md); a smaller layout.micro_batch, if an update has two ghost "
            "batches, does not have that fault."
        )
    last = plan.at(plan.updates - 1).global_batch
    if last < plan.stages[-1].global_batch:
        notes.append(
            f"The last update takes the {last:,} samples that are left, with an lr smaller in "
            "proportion."
        )
    elif last > plan.stages[-1].global_batch:
        notes.append(
            f"The last update takes {last:,} samples, one more than the others: a single sample "
            "was left, and batch norm needs two."
        )
    if recipe.layout.micro_batch == "auto" and not micro_batches:
        notes.append(
            "layout.micro_batch: auto is chosen when the run starts, between one ghost batch and "
            "all samples that a worker has of an update: the fastest that leaves 8 % of memory."
        )
    if ramp := [stage for stage in plan.stages if stage.in_ramp]:
        notes.append(_ramp_note(plan, ramp))
    ghosts = [stage.ghost_batch or recipe.layout.ghost_batch for stage in plan.stages]
    if len(set(ghosts)) > 1:
        notes.append(f"The ghost batches are of {', '.join(map(str, ghosts))} samples, by stage.")
    if recipe.schedule.policy == "measured":
        notes.append(_widest_note(recipe, plan.train_samples))
    missing = len(phases(recipe.schedule)) - len(plan.stages)
    if missing > 0:
        notes.append(f"Warning: {missing} stages are shorter than one update and left out.")
    return notes


def _ramp_note(plan: Plan, ramp: Sequence[Stage]) -> str:
    """Where the momentum is on its way, and how full its buffer is there."""
    ends = {
        end for stage in ramp for end in (stage.first_update, stage.first_update + stage.updates)
    }
    least = min(plan.at(min(end, plan.updates - 1)).settled for end in ends - {0})
    numbers = ", ".join(str(stage.index + 1) for stage in ramp)
    return (
        f"In stage {numbers} the momentum is on its way (schedule.momentum_ramp), with the noise "
        "scale of the schedule. After the run's first updates none there is shorter than "
        f"{least:.2f} times what lr/(1−m) says, as far as the momentum buffer goes."
    )


def _widest_note(recipe: Recipe, train_samples: int) -> str:
    schedule = recipe.schedule
    widest = widest_plan(schedule, train_samples, recipe.layout.ghost_batch, recipe.run.noise_every)
    largest = max(stage.global_batch for stage in widest.stages)
    if largest == schedule.first_global_batch:
        return (
            f"Warning: the batch cannot grow: its bounds (N/{PART_OF_DATA} = "
            f"{train_samples // PART_OF_DATA:,}, an lr of {schedule.largest_lr:g}, "
            f"{schedule.max_global_batch:,}) leave no room for the next step, in whole ghost "
            f"batches of {recipe.layout.ghost_batch}."
        )
    return (
        "The batch grows by the measured gradient noise and the overhead of an update; its bounds "
        f"(N/{PART_OF_DATA} = {train_samples // PART_OF_DATA:,}, an lr of "
        f"{schedule.largest_lr:g}, {schedule.max_global_batch:,}) allow up to {largest:,} and as "
        f"few as {widest.updates:,} updates."
    )


@dataclass(frozen=True, kw_only=True)
class _Shares:
    """Of one update: micro-batches of each worker, such as `2 × 64`, of all (None: not chosen
    yet), and idle workers.
    """

    text: str
    micro_batches: int | None
    idle: int


def _shares(
    recipe: Recipe, stage: Stage, workers: int, micro_batches: Sequence[int] = ()
) -> _Shares:
    """What `workers` workers do, from `typical_workers`."""
    ghost_batch = stage.ghost_batch or recipe.layout.ghost_batch
    chosen = micro_batches[stage.index] if micro_batches else recipe.layout.micro_batch
    most = largest_share(stage.global_batch, ghost_batch, workers)
    ghost_batches = count_ghost_batches(stage.global_batch, ghost_batch)
    fewest, more = divmod(ghost_batches, workers)
    of_one = {
        rank: make_layout(
            stage.global_batch,
            rank=rank,
            size=workers,
            micro_batch=most if chosen == "auto" else chosen,
            ghost_batch=ghost_batch,
        ).micro_batches
        for rank in typical_workers(ghost_batches, workers)
    }
    few, many = len(of_one[0]), len(of_one[workers - 1])
    sizes = {len(part) for parts in of_one.values() for part in parts}
    idle = 0 if fewest else workers - more
    if chosen == "auto":
        ends = sorted({ghost_batch, max(sizes)})
        text = f"auto, {'–'.join(map(str, ends))} each"
        return _Shares(text=text, micro_batches=None, idle=idle)
    number = "–".join(f"{count:,}" for count in sorted({few, many}))
    size = "–".join(str(size) for size in sorted({min(sizes), max(sizes)}))
    return _Shares(
        text=f"{number} × {size}",
        micro_batches=few * (workers - more) + many * more,
        idle=idle,
    )


def _from_to(stage: Mapping[str, Any], key: str) -> str:
    """A stage's first and last value, such as `0.1–3.2`; one number if they read the same."""
    ends = (stage[key], stage.get(f"last_{key}", stage[key]))
    return "–".join(dict.fromkeys(f"{value:,.4g}" for value in ends))
