"""What is doubtful about a plan, whatever it runs on (pure)."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, log
from typing import Any

from hvd_lbt.schedule.weight_variance import HALF, half_noise_curvature

LARGEST_SHARE = 0.1  # of the training set in one batch
UNSETTLED = 0.05  # of an earlier gradient that is still in the momentum buffer
LONG_MEMORY = 0.1  # epochs over which the momentum buffer averages


def settling_updates(momentum: float) -> int:
    """Updates after which 5 % of what the momentum buffer held are left: m^t ≤ 0.05.

    About 3/(1−m): 29 for m = 0.9, 149 for 0.98. The buffer averages over 1/(1−m) updates (Smith et
    al. 2018, section 3.2), and until it has settled, updates are not as long as lr and m say.
    """
    return ceil(log(UNSETTLED) / log(momentum)) if 0 < momentum < 1 else 0


def plan_warnings(stages: Sequence[Mapping[str, Any]], train_samples: int) -> list[str]:
    """One sentence for each kind of doubt; stages: the fields of each `Stage`."""
    warnings = []
    bound = LARGEST_SHARE * train_samples
    large = [stage for stage in stages if stage["global_batch"] > bound]
    if large:
        largest = max(stage["global_batch"] for stage in large)
        warnings.append(
            f"Warning: the global batch of {_stages(large)} (up to {largest:,}) is above a tenth "
            f"of the {train_samples:,} training samples: g ≈ εN/(B(1−m)) holds for B ≪ N only, and "
            "the papers stay below about N/10 (Smith et al. 2018). "
            f"schedule.max_global_batch: {max(1, int(bound))} keeps to it."
        )
    # A ramp's stages begin with a buffer that is nearly full.
    short = [
        stage
        for stage in stages
        if stage["updates"] < settling_updates(stage["momentum"]) and not stage.get("in_ramp")
    ]
    if short:
        settling = sorted({settling_updates(stage["momentum"]) for stage in short})
        warnings.append(
            f"Warning: {_stages(short)} {'has' if len(short) == 1 else 'have'} fewer updates than "
            f"the momentum takes to settle ({' or '.join(map(str, settling[:4]))}, until "
            f"m^updates ≤ {UNSETTLED:g}): the noise scale is not what the table says all the time."
        )
    return warnings


def sampling_note(
    stages: Sequence[Mapping[str, Any]], train_samples: int, *, nesterov: bool
) -> str | None:
    """Where the plan's g overstates the noise, as every sample comes once an epoch; None: nowhere.

    Stages (no ramps) whose momentum averages over more than a tenth of an epoch, 1/(1−m) updates.
    The curvature below which less than half of the noise is left (`half_noise_curvature`) is that
    of the stage with the longest memory, at its first lr.
    """

    def memory(stage: Mapping[str, Any]) -> float:
        return float(stage["global_batch"] / (train_samples * (1 - stage["momentum"])))

    long = [one for one in stages if memory(one) > LONG_MEMORY and not one.get("in_ramp")]
    if not long:
        return None
    longest = max(long, key=lambda stage: (memory(stage), stage["index"]))
    curvature = half_noise_curvature(
        lr=longest["lr"],
        momentum=longest["momentum"],
        train_samples=train_samples,
        global_batch=longest["global_batch"],
        nesterov=nesterov,
    )
    where = f"In stage {longest['index'] + 1}"
    half = (
        f"{where} no direction has half of it"
        if curvature is None
        else f"{where} directions in which the curvature of the mean loss is below "
        f"{curvature:,.3g} are predicted to have less than half of it (if 1/(1−m) updates were a "
        f"small part of an epoch: below {HALF / longest['noise_scale']:,.3g})"
    )
    return (
        f"Note: in {_stages(long)} the 1/(1−m) updates that the momentum averages over are more "
        f"than a tenth of an epoch (up to {memory(longest):.2g} epochs). Every sample comes once "
        f"an epoch, so directions of small curvature have less noise than g says. {half}. See "
        "docs/noise_scale.md."
    )


def _stages(stages: Iterable[Mapping[str, Any]]) -> str:
    """`stage 2`, `stages 2, 3`, and at most eight of them."""
    names = [str(stage["index"] + 1) for stage in stages]
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"stage{'s' if len(names) > 1 else ''} {listed}"
