"""The schedule of the noise scale: settings → phases → a plan of updates → each worker's part
(pure).

    from hvd_lbt.schedule import Milestone, Schedule, make_plan

    fall = Milestone(epoch=30, factor=5)
    schedule = Schedule(
        policy="grow_batch", epochs=90, lr=0.1, momentum=0.9, global_batch=256, milestones=(fall,)
    )
    plan = make_plan(schedule, train_samples=50_000)

It needs the standard library only.
"""

from hvd_lbt.schedule.growth import Growth
from hvd_lbt.schedule.layout import Layout, make_layout
from hvd_lbt.schedule.noise import batch_of_equal_noise, exact_noise_scale, noise_scale
from hvd_lbt.schedule.plan import Plan, Stage, Update, make_plan
from hvd_lbt.schedule.plan_time import Cluster, StageTime, stage_times
from hvd_lbt.schedule.settings import (
    Cosine,
    Milestone,
    MomentumRamp,
    Polynomial,
    ScaledStart,
    Schedule,
    SettingError,
    WarmUp,
)
from hvd_lbt.schedule.speed import Link, SpeedProfile, UpdateTime, Work, update_time
from hvd_lbt.schedule.weight_variance import (
    epoch_share,
    half_noise_curvature,
    predicted_variance,
    stationary_variance,
)

__all__ = [
    "Cluster",
    "Cosine",
    "Growth",
    "Layout",
    "Link",
    "Milestone",
    "MomentumRamp",
    "Plan",
    "Polynomial",
    "ScaledStart",
    "Schedule",
    "SettingError",
    "SpeedProfile",
    "Stage",
    "StageTime",
    "Update",
    "UpdateTime",
    "WarmUp",
    "Work",
    "batch_of_equal_noise",
    "epoch_share",
    "exact_noise_scale",
    "half_noise_curvature",
    "make_layout",
    "make_plan",
    "noise_scale",
    "predicted_variance",
    "stage_times",
    "stationary_variance",
    "update_time",
]
