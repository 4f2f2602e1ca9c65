"""Who pays when the noise scale falls: the learning rate or the batch (pure)."""

from dataclasses import dataclass
from math import prod

from hvd_lbt.recipe import ScheduleRecipe


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the optimizer is given from `epoch` on, until the next phase."""

    epoch: float
    global_batch: int
    lr: float
    momentum: float


def phases(schedule: ScheduleRecipe) -> tuple[Phase, ...]:
    """One phase for the start and one for each milestone.

    After milestones with factors f_1..f_k the noise scale is g_0/F, F = f_1·…·f_k. The batch has
    been asked to grow by P, the product over those milestones that the policy gives to the batch:
    none (decay_lr), the first `batch_milestones` (hybrid), all (grow_batch). It grows by
    G = min(P, max_global_batch/B_0), to the nearest sample, and the learning rate pays the rest:
    ε = ε_0·G/F. All factors are cumulative, so rounding does not add up.
    """
    milestones = schedule.milestones
    paid_by_batch = {
        "decay_lr": 0,
        "hybrid": schedule.batch_milestones or 1,
        "grow_batch": len(milestones),
    }[schedule.policy]
    factors = [milestone.factor for milestone in milestones]
    first_batch = schedule.first_global_batch

    def phase(passed: int) -> Phase:
        fall = prod(factors[:passed])
        wanted = prod(factors[: min(passed, paid_by_batch)])
        growth = min(wanted, schedule.max_global_batch / first_batch)
        return Phase(
            epoch=milestones[passed - 1].epoch if passed else 0.0,
            global_batch=round(first_batch * growth),
            lr=schedule.first_lr * (growth / fall),
            momentum=schedule.first_momentum,
        )

    return tuple(phase(passed) for passed in range(len(milestones) + 1))
