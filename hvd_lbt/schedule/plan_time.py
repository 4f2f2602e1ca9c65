"""The predicted time of a plan's stages on so many workers (pure)."""

from dataclasses import dataclass, replace

from hvd_lbt.errors import UserError
from hvd_lbt.schedule.layout import count_ghost_batches, make_layout, typical_workers
from hvd_lbt.schedule.plan import Plan, Stage, make_plan, target_workers
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.schedule.speed import SpeedProfile, UpdateTime, Work, update_time

POLICIES = ("decay_lr", "hybrid", "grow_batch")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """On what a plan is to run: workers, and how an update is cut (micro and ghost batch).

    local_batch: samples a worker of which a stage asks for fewer workers (elastic.local_batch);
    image_size: of stages without one of their own.
    """

    workers: int
    micro_batch: int
    ghost_batch: int
    image_size: int
    local_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Predicted for one stage; None is not predictable with the profile.

    seconds: of all its updates; images_per_second: of all workers; efficiency: the share of the
    workers' time that is forward and backward of samples, B·b/(W·t); needed_images_per_second: what
    the input of all nodes must give for the stage to wait for it never; idle: workers without
    samples.
    """

    stage: Stage
    workers: int
    image_size: int
    update: UpdateTime
    seconds: float | None
    images_per_second: float | None
    efficiency: float | None
    needed_images_per_second: float | None
    idle: int

    @property
    def worker_seconds(self) -> float | None:
        """What the stage costs."""
        return None if self.seconds is None else self.seconds * self.workers


def stage_times(plan: Plan, profile: SpeedProfile, cluster: Cluster) -> tuple[StageTime, ...]:
    """Each stage's predicted time, without evaluations, checkpoints and the start."""
    return tuple(_stage_time(plan, stage, profile, cluster) for stage in plan.stages)


def total_seconds(times: tuple[StageTime, ...]) -> float | None:
    """Of the run; None if a stage cannot be predicted."""
    seconds = [time.seconds for time in times]
    return None if None in seconds else sum(value for value in seconds if value is not None)


def policy_plans(schedule: Schedule, train_samples: int) -> dict[str, Plan | str]:
    """The plan of the schedule with each policy that needs no measurement, or why it cannot have
    it.
    """
    plans: dict[str, Plan | str] = {}
    for policy in POLICIES:
        try:
            plans[policy] = make_plan(with_policy(schedule, policy), train_samples)
        except UserError as error:
            plans[policy] = str(error)
    return plans


def work_of(samples: int, cluster: Cluster, *, ghost_batch: int, image_size: int) -> Work:
    """What an update of so many samples asks of the busiest worker."""
    layouts = [
        make_layout(
            samples,
            rank=rank,
            size=cluster.workers,
            micro_batch=cluster.micro_batch,
            ghost_batch=ghost_batch,
        )
        for rank in typical_workers(count_ghost_batches(samples, ghost_batch), cluster.workers)
    ]
    busiest = max(layouts, key=lambda layout: layout.local_batch)
    return Work(
        workers=cluster.workers,
        samples=busiest.local_batch,
        micro_batches=len(busiest.micro_batches),
        last_micro_batch=len(busiest.micro_batches[-1]),
        image_size=image_size,
    )


def _stage_time(plan: Plan, stage: Stage, profile: SpeedProfile, cluster: Cluster) -> StageTime:
    target = target_workers(stage, cluster.local_batch)
    if target is not None:
        cluster = replace(cluster, workers=min(cluster.workers, target))
    size = stage.image_size or cluster.image_size
    ghost_batch = stage.ghost_batch or cluster.ghost_batch

    def update_of(samples: int) -> UpdateTime:
        work = work_of(samples, cluster, ghost_batch=ghost_batch, image_size=size)
        return update_time(profile, work)

    update = update_of(stage.global_batch)
    seconds = images = efficiency = needed = None
    if update.total is not None:
        assert update.exposed_sum is not None
        seconds = stage.updates * update.total
        last = plan.at(stage.first_update + stage.updates - 1).global_batch
        if last != stage.global_batch and (smaller := update_of(last).total) is not None:
            seconds += smaller - update.total
        images = stage.global_batch / update.total
        needed = stage.global_batch / (update.compute + update.exposed_sum)
        useful = stage.global_batch * profile.seconds_a_sample(size)
        efficiency = useful / (cluster.workers * update.total)
    return StageTime(
        stage=stage,
        workers=cluster.workers,
        image_size=size,
        update=update,
        seconds=seconds,
        images_per_second=images,
        efficiency=efficiency,
        needed_images_per_second=needed,
        idle=max(0, cluster.workers - count_ghost_batches(stage.global_batch, ghost_batch)),
    )


def with_policy(schedule: Schedule, policy: str) -> Schedule:
    """The schedule with another policy, and without the settings that only its own has."""
    if policy == schedule.policy:
        return schedule
    curves = {"cosine": schedule.cosine, "polynomial": schedule.polynomial}
    if policy != "grow_batch":
        curves = {
            name: replace(one, batch_factor=None) if one else None for name, one in curves.items()
        }
    return replace(
        schedule,
        policy=policy,  # type: ignore[arg-type]
        batch_milestones=None,
        max_lr=None,
        overhead=None,
        **curves,  # type: ignore[arg-type]
    )
