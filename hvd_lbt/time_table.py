"""The predicted hours of a plan: by stage and number of workers, and with each policy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import lcm

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hvd_lbt.growing import widest_plan
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.phases import phases
from hvd_lbt.schedule.plan import Plan
from hvd_lbt.schedule.plan_time import (
    Cluster,
    StageTime,
    policy_plans,
    stage_times,
    total_seconds,
)
from hvd_lbt.schedule.speed import LARGEST, SpeedProfile

UNKNOWN = "?"
CHECKED_NODES = 16  # of the largest published rows that the model was compared with


def render_times(
    recipe: Recipe,
    plan: Plan,
    profile: SpeedProfile,
    workers: Sequence[int],
    price: float | None = None,
) -> RenderableType:
    """Hours and what they are made of, for each number of workers; price: of a worker-hour."""
    if recipe.data.cache_on_device:  # no input to wait for
        profile = replace(profile, input_images_per_second=LARGEST)
    if recipe.run.compile:  # all gradients arrive at the end of a compiled backward
        profile = replace(profile, overlap=0.0)
    clusters = [_cluster(recipe, count) for count in dict.fromkeys(workers)]
    by_workers = [stage_times(plan, profile, cluster) for cluster in clusters]
    policies = policy_plans(recipe.schedule, plan.train_samples)
    if recipe.schedule.policy == "measured":
        widest = widest_plan(
            recipe.schedule, plan.train_samples, recipe.layout.ghost_batch, recipe.run.noise_every
        )
        policies |= {"measured, never growing": plan, "measured, to its bounds": widest}
    return Group(
        Text(""),
        _stage_table(recipe, profile, clusters, by_workers, price),
        _policy_table(recipe, policies, profile, clusters, price),
        *(Text(note) for note in _notes(recipe, profile, by_workers)),
        *(
            Text(f"No plan with policy {policy}: {reason}")
            for policy, reason in policies.items()
            if isinstance(reason, str)
        ),
    )


def _cluster(recipe: Recipe, workers: int) -> Cluster:
    return Cluster(
        workers=workers,
        micro_batch=_micro_batch(recipe),
        ghost_batch=recipe.layout.ghost_batch,
        image_size=recipe.data.image_size,
        local_batch=recipe.elastic.local_batch,
    )


def _micro_batch(recipe: Recipe) -> int:
    """That of the recipe; for auto one that holds the largest update, in whole ghost batches."""
    if recipe.layout.micro_batch != "auto":
        return recipe.layout.micro_batch
    milestones = recipe.schedule.milestones
    whole = lcm(recipe.layout.ghost_batch, *(m.ghost_batch or 1 for m in milestones))
    largest = max(phase.global_batch for phase in phases(recipe.schedule))
    return -(-largest // whole) * whole


def _stage_table(
    recipe: Recipe,
    profile: SpeedProfile,
    clusters: Sequence[Cluster],
    by_workers: Sequence[tuple[StageTime, ...]],
    price: float | None,
) -> Table:
    table = Table(title=f"{recipe.name}: predicted with the speed profile {profile.name}")
    headings = ["workers", "stage", "global batch", "px", "ms an update", "images/s", "sums"]
    headings += ["efficiency", "bottleneck", "input must give", "hours"]
    for heading in headings + (["cost"] if price else []):
        table.add_column(heading, justify="right")
    for cluster, times in zip(clusters, by_workers, strict=True):
        for time in times:
            cells = _stage_cells(time)
            table.add_row(*cells, *_cost([time], price), end_section=False)
        total = total_seconds(times)
        images = sum(time.stage.samples for time in times) / total if total else None
        cells = [f"{cluster.workers:,}", "all", "", "", "", _number(images), _sums(times)]
        cells += ["", "", "", _hours(total)]
        table.add_row(*cells, *_cost(times, price), end_section=True, style="bold")
    return table


def _stage_cells(time: StageTime) -> list[str]:
    update = time.update
    known = update.total is not None
    return [
        f"{time.workers:,}",
        str(time.stage.index + 1),
        f"{time.stage.global_batch:,}",
        str(time.image_size),
        _number(1e3 * update.total if update.total is not None else None),
        _number(time.images_per_second),
        _sums([time]),
        UNKNOWN if time.efficiency is None else f"{time.efficiency:.0%}",
        update.bottleneck if known else UNKNOWN,
        _number(time.needed_images_per_second, "/s"),
        _hours(time.seconds),
    ]


def _policy_table(
    recipe: Recipe,
    plans: Mapping[str, Plan | str],
    profile: SpeedProfile,
    clusters: Sequence[Cluster],
    price: float | None,
) -> Table:
    table = Table(title=f"{recipe.name} with each policy: what growing the batch saves, predicted")
    headings = ["workers", "policy", "largest batch", "updates", "hours", "saved"]
    for heading in headings + (["cost"] if price else []):
        table.add_column(heading, justify="right")
    for cluster in clusters:
        base: float | None = None
        for policy, made in plans.items():
            if isinstance(made, str):
                table.add_row(
                    f"{cluster.workers:,}", policy, "–", "–", "–", "–", *["–"] * bool(price)
                )
                continue
            times = stage_times(made, profile, cluster)
            total = total_seconds(times)
            base = total if policy == "decay_lr" else base
            saved = f"{1 - total / base:.0%}" if total and base and policy != "decay_lr" else ""
            name = f"{policy} (this recipe)" if policy == recipe.schedule.policy else policy
            table.add_row(
                f"{cluster.workers:,}",
                name,
                f"{max(stage.global_batch for stage in made.stages):,}",
                f"{made.updates:,}",
                _hours(total),
                saved,
                *_cost(times, price),
                end_section=policy == [*plans][-1],
            )
    return table


def _notes(
    recipe: Recipe,
    profile: SpeedProfile,
    by_workers: Sequence[tuple[StageTime, ...]],
) -> list[str]:
    notes = ["Predicted, not measured; without evaluations, checkpoints and start (docs/time.md)."]
    if recipe.layout.micro_batch == "auto":
        notes.append(
            "layout.micro_batch: auto is chosen when the run starts; predicted is one micro-batch "
            "an update and worker."
        )
    if profile.source:
        notes.append(f"Source of {profile.name}: {profile.source}")
    unknown = dict.fromkeys(
        text for times in by_workers for time in times for text in time.update.unknown
    )
    notes.extend(f"Not predicted: {text}." for text in unknown)
    if profile.model is not None and profile.model != recipe.model.name:
        notes.append(
            f"Warning: the profile was measured with {profile.model}, and the recipe trains "
            f"{recipe.model.name}: neither its compute nor its gradients are those of the profile."
        )
    sizes = dict.fromkeys(time.image_size for times in by_workers for time in times)
    for size in sizes:
        if (nearest := profile.unmeasured_size(size)) is not None:
            notes.append(
                f"Warning: the profile has no time for images of {size} px; that of {nearest} px "
                "is scaled by the pixels, which is too little for much smaller images."
            )
    for times in by_workers[1:]:  # the plan's own table says it of the first
        notes.extend(_idle(times))
    most = max(time.workers for times in by_workers for time in times)
    nodes = -(-most // profile.workers_per_node)
    if nodes > CHECKED_NODES:
        notes.append(
            f"{most:,} workers are {nodes:,} nodes: the model was compared with published speeds "
            f"of up to {CHECKED_NODES} nodes."
        )
    if recipe.elastic.local_batch is not None:
        notes.append(
            f"A stage runs on ceil(global batch / {recipe.elastic.local_batch}) workers "
            "(elastic.local_batch), at most on as many as --workers says."
        )
    return notes


def _idle(times: Sequence[StageTime]) -> list[str]:
    """One line for all stages in which workers have no samples."""
    idle = [time for time in times if time.idle]
    if not idle:
        return []
    listed = "; ".join(
        f"{time.idle:,} of {time.workers:,} in stage {time.stage.index + 1}" for time in idle[:8]
    )
    more = f", and in {len(idle) - 8} more stages" if len(idle) > 8 else ""
    return [f"Warning: workers without samples: {listed}{more}. They are in the cost."]


def _sums(times: Iterable[StageTime]) -> str:
    """The exposed sums' share of the time."""
    exposed = total = 0.0
    for time in times:
        if time.update.total is None or time.update.exposed_sum is None:
            return UNKNOWN
        exposed += time.stage.updates * time.update.exposed_sum
        total += time.stage.updates * time.update.total
    return f"{exposed / total:.0%}"


def _cost(times: Iterable[StageTime], price: float | None) -> list[str]:
    if price is None:
        return []
    seconds = [time.worker_seconds for time in times]
    if None in seconds:
        return [UNKNOWN]
    return [f"${sum(value for value in seconds if value is not None) / 3600 * price:,.2f}"]


def _hours(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds / 3600)


def _number(value: float | None, unit: str = "") -> str:
    """Three digits, and never an exponent where there are more before the point."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"
