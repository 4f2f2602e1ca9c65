"""Large-batch training for PyTorch on Horovod: grow the batch instead of decaying the learning
rate.

    import hvd_lbt
    from hvd_lbt import Milestone, Schedule

    fall = Milestone(epoch=30, factor=5)
    schedule = Schedule(
        policy="grow_batch", epochs=90, lr=0.1, momentum=0.9, global_batch=256, milestones=(fall,)
    )
    plan = hvd_lbt.make_plan(schedule, train_samples=50_000)

Each name is imported when it is first used: a plan needs neither torch nor Horovod.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import version

    from hvd_lbt.comm import init, shutdown
    from hvd_lbt.data.mixing import Mixing
    from hvd_lbt.ema import WeightAverage
    from hvd_lbt.errors import OutOfMemoryError, UserError
    from hvd_lbt.models.ghost_norm import GhostBatchNorm2d
    from hvd_lbt.models.prepare import prepare_model
    from hvd_lbt.optim import FusedSGD
    from hvd_lbt.reducer import GradientReducer
    from hvd_lbt.sampler import MicroBatches, PlanSampler
    from hvd_lbt.schedule import (
        Cosine,
        Growth,
        Layout,
        Milestone,
        MomentumRamp,
        Plan,
        Polynomial,
        ScaledStart,
        Schedule,
        Stage,
        Update,
        WarmUp,
        make_layout,
        make_plan,
    )
    from hvd_lbt.training import Tally, Training
    from hvd_lbt.world import World

    __version__ = version("hvd_lbt")

_SCHEDULE = (
    *("Cosine", "Growth", "Layout", "Milestone", "MomentumRamp", "Plan", "Polynomial"),
    *("ScaledStart", "Schedule", "Stage", "Update", "WarmUp", "make_layout", "make_plan"),
)
_HOME = {
    **dict.fromkeys(_SCHEDULE, "schedule"),
    "FusedSGD": "optim",
    "GhostBatchNorm2d": "models.ghost_norm",
    "GradientReducer": "reducer",
    "MicroBatches": "sampler",
    "Mixing": "data.mixing",
    "OutOfMemoryError": "errors",
    "PlanSampler": "sampler",
    "Tally": "training",
    "Training": "training",
    "UserError": "errors",
    "WeightAverage": "ema",
    "World": "world",
    "init": "comm",
    "prepare_model": "models.prepare",
    "shutdown": "comm",
}
__all__ = [
    "Cosine",
    "FusedSGD",
    "GhostBatchNorm2d",
    "GradientReducer",
    "Growth",
    "Layout",
    "MicroBatches",
    "Milestone",
    "Mixing",
    "MomentumRamp",
    "OutOfMemoryError",
    "Plan",
    "PlanSampler",
    "Polynomial",
    "ScaledStart",
    "Schedule",
    "Stage",
    "Tally",
    "Training",
    "Update",
    "UserError",
    "WarmUp",
    "WeightAverage",
    "World",
    "__version__",
    "init",
    "make_layout",
    "make_plan",
    "prepare_model",
    "shutdown",
]


if not TYPE_CHECKING:  # a type checker would take any misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("hvd_lbt")
        elif name in _HOME:
            value = getattr(import_module(f"hvd_lbt.{_HOME[name]}"), name)
        else:
            raise AttributeError(f"module 'hvd_lbt' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
