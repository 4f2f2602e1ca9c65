"""With which micro-batches a run begins: the recipe's number, what `auto` finds, or what it had."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvd_lbt.errors import UserError
from hvd_lbt.growing import bounds_of
from hvd_lbt.memory import Memory, memory_of
from hvd_lbt.micro_batch import MicroBatchSizes
from hvd_lbt.probe import Demand, Found, Probe, Trial, agreed, from_plain, plain, words
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.layout import largest_share
from hvd_lbt.schedule.plan import Plan, Stage
from hvd_lbt.training import Training
from hvd_lbt.world import World


def ghost_batches(recipe: Recipe, plan: Plan) -> list[int]:
    """The ghost batch of each stage."""
    return [stage.ghost_batch or recipe.layout.ghost_batch for stage in plan.stages]


@dataclass(frozen=True, kw_only=True)
class Start:
    """sizes: to begin with; lines: to print about them; trials: what was tried on rank 0."""

    sizes: MicroBatchSizes
    lines: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the log."""
        return {**self.sizes.to_dict(), "trials": [asdict(trial) for trial in self.trials]}


def starting_sizes(
    recipe: Recipe,
    plan: Plan,
    training: Training,
    world: World,
    classes: int,
    kept: Mapping[str, Any] | None,
    same_job: bool,
    gather: Callable[[Any], list[Any]],
) -> Start:
    """The micro-batches to begin with, the same on all ranks, which all call it.

    kept: `MicroBatchSizes.to_dict()` of the run so far. It is taken over if the recipe asks for the
    same and the hardware is the same; on other hardware a number is that of the recipe, and `auto`
    tries anew. same_job: of an elastic job, which keeps what it has.
    Raises UserError if not even one ghost batch fits.
    """
    asked, ghosts = recipe.layout.micro_batch, ghost_batches(recipe, plan)
    # before the gathering: no rank takes memory for a trial until all have read what is free
    memory = memory_of(training.device, world.local_size)
    hardware = tuple(sorted(set(gather(memory.hardware))))
    lines = []
    if kept and kept.get("asked") == asked and len(kept["stages"]) == len(plan.stages):
        sizes = MicroBatchSizes.of(kept)
        lowered = asked == "auto" or {*sizes.stages, sizes.evaluation} != {asked}
        if same_job or sizes.hardware == hardware:
            as_before = f"micro-batch: {_shown(sizes)}, as before."
            return Start(sizes=sizes, lines=(as_before,) if lowered else ())
        if lowered:
            what = "auto tries again" if asked == "auto" else f"it begins with {asked:,} again"
            lines.append(
                f"micro-batch: it was {_shown(sizes)} on {' and '.join(sizes.hardware)}; this is "
                f"{' and '.join(hardware)}, and {what}."
            )
    if asked != "auto":
        stages = (asked,) * len(plan.stages)
        sizes = MicroBatchSizes(stages=stages, evaluation=asked, asked=asked, hardware=hardware)
        return Start(sizes=sizes, lines=tuple(lines))
    demands = [
        Demand(
            image_size=stage.image_size or recipe.data.image_size,
            ghost_batch=ghost_batch,
            most=largest_share(_largest_batch(recipe, plan, stage), ghost_batch, world.size),
        )
        for stage, ghost_batch in zip(plan.stages, ghosts, strict=True)
    ]
    found = find(recipe, demands, training, memory, classes=classes, gather=gather)
    sizes = MicroBatchSizes(
        stages=found.sizes, evaluation=found.evaluation, asked=asked, hardware=hardware
    )
    lines.append(f"micro-batch: auto is {_shown(sizes)}, {words(found)}: {' and '.join(hardware)}.")
    return Start(sizes=sizes, lines=tuple(lines), trials=found.trials)


def _largest_batch(recipe: Recipe, plan: Plan, stage: Stage) -> int:
    """The largest update of a stage: with policy measured what the bounds let it grow to."""
    schedule = recipe.schedule
    if schedule.policy != "measured":
        return stage.global_batch
    lr = min(stage.lr, stage.last_lr)
    bounds = bounds_of(schedule, plan.train_samples, stage.global_batch, lr)
    return max(stage.global_batch, int(min(bounds.data, bounds.max_lr, bounds.max_global_batch)))


def find(
    recipe: Recipe,
    demands: Sequence[Demand],
    training: Training,
    memory: Memory,
    *,
    classes: int,
    gather: Callable[[Any], list[Any]],
) -> Found:
    """What fits all ranks, which all call it: one sum, then each tries alone, then one gathering.

    memory: made before a gathering, so that all ranks have read what is free.
    """
    training.reducer.first_sum()
    probe = Probe(
        training,
        memory,
        classes=classes,
        # decoded, and made ready: as many as DALI makes ahead, and the one in use
        input_copies=0 if recipe.data.cache_on_device else 2 * (recipe.data.prefetch + 1),
        compiles=recipe.run.compile,
    )
    sizes = [recipe.data.for_evaluation(demand.image_size).image_size for demand in demands]
    own = probe.find(demands, max(sizes))
    return agreed([from_plain(its) for its in gather(plain(own))], demands)


def fixed(recipe: Recipe, size: int) -> Recipe:
    """The recipe with this number for `auto`."""
    layout = recipe.layout.model_copy(update={"micro_batch": size})
    return recipe.model_copy(update={"layout": layout})


def number_of(recipe: Recipe, instead: str) -> int:
    """layout.micro_batch where nothing can be tried. Raises UserError for `auto`.

    instead: what to give, for the message.
    """
    size = recipe.layout.micro_batch
    if size == "auto":
        raise UserError(
            f"layout.micro_batch: auto is tried when a training starts, not here; {instead}."
        )
    return size


def _shown(sizes: MicroBatchSizes) -> str:
    different = list(dict.fromkeys(sizes.stages))
    if len(different) == 1:
        return f"{different[0]:,}"
    return ", ".join(
        f"{size:,} in stage {number}" for number, size in enumerate(sizes.stages, start=1)
    )
