"""Which updates a branch from a checkpoint does: another global batch over the same samples (pure).

Several batches over the samples that follow a checkpoint show up to which one nothing is lost: the
critical batch, measured by branching (W. Merrill et al., "Critical Batch Size Revisited", 2025,
arXiv:2505.23971).
"""

from dataclasses import dataclass
from typing import Literal

from hvd_lbt.errors import UserError
from hvd_lbt.schedule.noise import noise_scale
from hvd_lbt.schedule.plan import Plan, Stage, Update

# What is kept while the batch is larger: the noise scale g, with the lr in proportion to the batch;
# or the lr itself, so that g falls.
Kept = Literal["noise", "lr"]
EPOCHS = 0.1
LEAST_UPDATES = 4  # of the largest batch, where the span or the largest batch is not given
MAX_UPDATES = 1_000_000  # of one branch


@dataclass(frozen=True, kw_only=True)
class Span:
    """The batches of the branches, and the samples that each of them trains on.

    first_update, first_sample: updates and samples before the branches; samples: of each branch, a
    whole number of updates of every batch; batches: B of the plan first, each twice the one before.
    """

    first_update: int
    first_sample: int
    samples: int
    batches: tuple[int, ...]


def make_span(
    plan: Plan, updates_done: int, *, epochs: float | None = None, largest: int | None = None
) -> Span:
    """The branches after `updates_done` updates of a plan, 0 … plan.updates.

    epochs: how long each is, at most; None: EPOCHS, or as long as LEAST_UPDATES updates of 4·B take
    if that is longer. largest: of the batches; None: at most N/4, and with LEAST_UPDATES updates,
    but at least 2·B. Raises UserError, which names --epochs or --largest.
    """
    train_samples, batch = plan.train_samples, _stage_after(plan, updates_done).global_batch
    if 2 * batch > train_samples:
        raise UserError(
            f"The checkpoint's next update has a global batch of {batch:,}, and there are "
            f"{train_samples:,} training samples: a batch twice as large would have some of them "
            "twice. Branch from a checkpoint of an earlier stage."
        )
    if largest is not None and not 2 * batch <= largest <= train_samples:
        raise UserError(
            f"--largest {largest:,} is not allowed: the checkpoint's next update has a global "
            f"batch of {batch:,}; it must be {2 * batch:,} (twice that) to {train_samples:,} (the "
            "training samples)."
        )
    wanted = round((EPOCHS if epochs is None else epochs) * train_samples)
    if epochs is None:
        factor = 4 if 4 * batch <= train_samples else 2
        wanted = max(wanted, LEAST_UPDATES * (largest or factor * batch))
    most = largest or max(2 * batch, min(train_samples // 4, wanted // LEAST_UPDATES))
    batches = [batch]
    while 2 * batches[-1] <= most:
        batches.append(2 * batches[-1])
    updates = wanted // batches[-1]
    if not updates:
        raise UserError(
            f"--epochs {epochs:g} is {wanted:,} of {train_samples:,} training samples, less than "
            f"one update of the largest batch, {batches[-1]:,}; it must be at least "
            f"{batches[-1] / train_samples:.3g}."
        )
    samples = updates * batches[-1]
    if samples // batch > MAX_UPDATES:
        raise UserError(
            f"--epochs {epochs or EPOCHS:g} is {samples // batch:,} updates of {batch:,} samples; "
            f"at most {MAX_UPDATES:,} are allowed."
        )
    return Span(
        first_update=updates_done,
        first_sample=_samples_after(plan, updates_done),
        samples=samples,
        batches=tuple(batches),
    )


def branch_updates(plan: Plan, span: Span, batch: int, kept: Kept) -> list[Update]:
    """The updates of one branch, as if the stage of the plan's next update did not end.

    With the plan's own batch they are the plan's updates for as long as the stage lasts. Beyond it
    the lr stays what it was at the stage's last update. Where the momentum is on its way
    (momentum_ramp) it stays what it is at the checkpoint.
    """
    stage = _stage_after(plan, span.first_update)
    factor = batch / stage.global_batch if kept == "noise" else 1.0
    last = stage.first_sample + (stage.updates - 1) * stage.global_batch
    momentum = plan.momentum_in(stage, span.first_sample)
    in_ramp = stage.momentum != stage.last_momentum
    begin = plan.buffer_after(span.first_update)
    updates = []
    for place in range(span.samples // batch):
        seen = span.first_sample + place * batch
        index = span.first_update + place
        at = min(seen, last)
        lr = plan.lr_in(stage, at) * ((1 - momentum) / (1 - plan.momentum_in(stage, at))) * factor
        buffer = (
            begin.after(momentum, momentum, place + 1)
            if in_ramp
            else plan.buffer_in(stage, index - stage.first_update + 1)
        )
        updates.append(
            Update(
                index=index,
                stage=stage.index,
                epoch=seen / plan.train_samples,
                samples_seen=seen,
                global_batch=batch,
                lr=lr,
                momentum=momentum,
                noise_scale=noise_scale(lr, momentum, plan.train_samples, batch),
                settled=buffer.settled,
                ghost_batch=stage.ghost_batch,
                image_size=stage.image_size,
            )
        )
    return updates


def _stage_after(plan: Plan, updates_done: int) -> Stage:
    """The stage of the next update; the last one where there is none."""
    following = (
        stage for stage in plan.stages if updates_done < stage.first_update + stage.updates
    )
    return next(following, plan.stages[-1])


def _samples_after(plan: Plan, updates_done: int) -> int:
    return plan.samples if updates_done == plan.updates else plan.at(updates_done).samples_seen
