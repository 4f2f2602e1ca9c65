"""How much weight decay shrinks the weights, an update and an epoch, in each stage (pure).

With w ← w − ε(∇C + λw) and momentum m, an update multiplies a weight on which no gradient acts by
about 1 − ελ/(1−m). An epoch has N/B updates, so that it shrinks the weight by the share λ·g, with g
= εN/(B(1−m)): policies of equal noise scale decay the weights equally, however they reach it.
"""

from dataclasses import dataclass

from hvd_lbt.schedule.plan import Plan, Stage, Update


@dataclass(frozen=True, kw_only=True)
class StageDecay:
    """Of one stage: e^−(these) is what is left of a weight on which no gradient acts.

    an_update: ελ/(1−m) of its first update; an_epoch: Σ ελ/(1−m) over its updates, for each epoch
    that it lasts; in_all: the same sum, of the whole stage.
    """

    stage: int
    an_update: float
    an_epoch: float
    in_all: float


def stage_decays(plan: Plan, weight_decay: float) -> list[StageDecay]:
    """What weight decay does in each stage of the plan. weight_decay: λ ≥ 0."""
    found = []
    for stage in plan.stages:
        in_all = weight_decay * _summed_lr(plan, stage)
        found.append(
            StageDecay(
                stage=stage.index,
                an_update=weight_decay * stage.lr / (1 - stage.momentum),
                an_epoch=in_all * plan.train_samples / stage.samples,
                in_all=in_all,
            )
        )
    return found


def _summed_lr(plan: Plan, stage: Stage) -> float:
    """Σ ε/(1−m) over a stage's updates, whose momentum may rise."""
    updates = (plan.at(stage.first_update + place) for place in range(stage.updates))
    return sum(update.lr / (1 - update.momentum) for update in updates)


def decay_of_equal_epochs(plan: Plan, update: Update, weight_decay: float) -> float:
    """λ for this update that shrinks the weights as much in each epoch as λ does in the first.

    λ·g₁/g: larger the more the noise scale has fallen, whether by lr or by batch.
    """
    return weight_decay * plan.stages[0].noise_scale / update.noise_scale
