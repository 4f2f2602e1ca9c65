"""Who pays when the noise scale falls: the learning rate or the batch (pure)."""

from dataclasses import dataclass
from itertools import pairwise
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

    At milestone k the noise scale g ∝ ε/(B(1−m)) falls by its factor, and the momentum may change
    from m' to m; so ε/B falls by f_k = factor·(1−m')/(1−m). After k milestones the batch has been
    asked to grow by P, the product of those f that the policy gives to the batch: none (decay_lr),
    the first `batch_milestones` (hybrid), all (grow_batch). It grows by G = min(P,
    max_global_batch/B_0), to the nearest sample, and the learning rate pays the rest:
    ε = ε_0·G/(f_1·…·f_k). All factors are cumulative, so rounding does not add up.
    """
    milestones = schedule.milestones
    paid_by_batch = {
        "decay_lr": 0,
        "hybrid": schedule.batch_milestones or 1,
        "grow_batch": len(milestones),
    }[schedule.policy]
    momenta = [schedule.first_momentum]
    for milestone in milestones:
        momenta.append(momenta[-1] if milestone.momentum is None else milestone.momentum)
    factors = [
        milestone.factor * (1 - before) / (1 - after)
        for milestone, (before, after) in zip(milestones, pairwise(momenta), strict=True)
    ]
    first_batch = schedule.first_global_batch

    def phase(passed: int) -> Phase:
        fall = prod(factors[:passed])
        wanted = prod(factors[: min(passed, paid_by_batch)])
        growth = min(wanted, schedule.max_global_batch / first_batch)
        return Phase(
            epoch=milestones[passed - 1].epoch if passed else 0.0,
            global_batch=max(1, round(first_batch * growth)),
            lr=schedule.first_lr * (growth / fall),
            momentum=momenta[passed],
        )

    return tuple(phase(passed) for passed in range(len(milestones) + 1))
