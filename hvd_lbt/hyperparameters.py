"""From recipe and plan to the optimizer: which parameters decay, and each update's lr and
momentum.
"""

from torch import nn

from hvd_lbt.optim import FusedSGD
from hvd_lbt.recipe import OptimizerRecipe
from hvd_lbt.schedule.plan import Update
from hvd_lbt.schedule.settings import Schedule


def make_optimizer(
    model: nn.Module, settings: OptimizerRecipe, lr: float, momentum: float
) -> FusedSGD:
    """SGD with weight decay on matrices and convolutions; on norms and biases only if asked."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1 or settings.decay_norm_and_bias]
    others = [p for p in parameters if not (p.ndim > 1 or settings.decay_norm_and_bias)]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return FusedSGD(
        [group for group in groups if group["params"]],
        lr=lr,
        momentum=momentum,
        nesterov=settings.nesterov,
    )


def set_hyperparameters(optimizer: FusedSGD, update: Update, schedule: Schedule) -> None:
    """Give the optimizer this update's lr and momentum: the only place that does.

    A changed momentum leaves the buffer g/(1−m_old) away from its new steady state g/(1−m_new);
    `momentum_change: rescale` multiplies it there at once instead of waiting 1/(1−m_new) updates.

    A buffer that begins at zero suppresses the first updates: the t-th, from 1, is as long as if
    the lr were ε·(1−m^t), with Nesterov's momentum ε·(1−m^(t+1)). `momentum_start: corrected`
    divides the lr by that share, as Adam corrects its bias, so that a constant gradient moves the
    weights by ε/(1−m) times itself from the first update on. (Smith et al. 2018, section 4: the
    suppression, over B/(N(1−m)) epochs, as the cause of accuracy lost with a large m.)
    """
    before = optimizer.param_groups[0]["momentum"]
    if schedule.momentum_change == "rescale" and before != update.momentum:
        optimizer.rescale_momentum((1 - before) / (1 - update.momentum))
    for group in optimizer.param_groups:
        reached = 1.0
        if schedule.momentum_start == "corrected":
            reached = update.settled
            if group["nesterov"]:
                reached = 1 - update.momentum * (1 - reached)
        group["lr"], group["momentum"] = update.lr / reached, update.momentum
