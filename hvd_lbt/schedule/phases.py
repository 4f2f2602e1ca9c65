"""From a schedule to phases: what changes at each fall of the noise scale, lr or batch (pure)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from math import acos, cos, pi, prod
from typing import Literal

from hvd_lbt.schedule.growth import Growth
from hvd_lbt.schedule.momentum import Ramp
from hvd_lbt.schedule.settings import Schedule

Shape = Literal["constant", "warm_up", "cosine", "polynomial"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the optimizer is given from `epoch` on, until the next phase.

    lr: what `shape` scales, see `lr_share`; ghost_batch: None is the layout's; image_size: None is
    that of the data. in_ramp: whether the momentum is on its way (schedule.momentum_ramp); ramp:
    the line it follows from update to update, and the lr is that of `momentum`, its end.
    """

    epoch: float
    global_batch: int
    lr: float
    momentum: float
    shape: Shape = "constant"
    ghost_batch: int | None = None
    image_size: int | None = None
    in_ramp: bool = False
    ramp: Ramp | None = None

    def momentum_at(self, epoch: float) -> float:
        """Of an update that begins at `epoch`."""
        return self.momentum if self.ramp is None else self.ramp.at(epoch)

    def lr_at(self, epoch: float, schedule: Schedule) -> float:
        """The lr of an update that begins at `epoch`: g is that of the phase's lr and momentum."""
        share = lr_share(schedule, self.shape, epoch)
        return self.lr * share * ((1 - self.momentum_at(epoch)) / (1 - self.momentum))


def phases(schedule: Schedule) -> tuple[Phase, ...]:
    """One phase for the warm-up, one for what follows it, one for each fall of the noise scale.

    A milestone with an image_size begins a phase of its own within what it falls into, and so does
    each step of a momentum_ramp, and its end.
    """
    spans = _without_image_sizes(schedule)
    if schedule.momentum_ramp is not None:
        spans = tuple(_with_ramps(spans, schedule))
    return tuple(_with_image_sizes(spans, schedule))


def _without_image_sizes(schedule: Schedule) -> tuple[Phase, ...]:
    falls = _curve(schedule) if schedule.curve else _milestones(schedule)
    if schedule.warm_up is None:
        return tuple(falls)
    first, *later = falls
    # Both have the same batch, momentum and lr: only the shape says that this one rises.
    rise = Phase(
        epoch=0.0,
        global_batch=first.global_batch,
        lr=first.lr,
        momentum=first.momentum,
        shape="warm_up",
    )
    rest = Phase(
        epoch=schedule.warm_up.epochs,
        global_batch=first.global_batch,
        lr=first.lr,
        momentum=first.momentum,
        shape=first.shape,
    )
    return (rise, rest, *later)


def _with_ramps(spans: tuple[Phase, ...], schedule: Schedule) -> Iterator[Phase]:
    """The phases, cut where a momentum on its way takes another step, and at its end.

    While it is m instead of m_new, B·(1−m_new)/(1−m) samples have the phase's noise scale at the
    phase's lr ε (compensate: batch; the lr makes up for the rounding of the batch), or B samples at
    ε·(1−m)/(1−m_new) (compensate: lr).
    """
    assert schedule.momentum_ramp is not None
    settings = schedule.momentum_ramp
    ramps = [
        Ramp(begin=epoch, end=epoch + settings.epochs, first=before, last=after)
        for epoch, before, after in schedule.momentum_changes
    ]
    # The momentum on its way from an epoch on; 0: there is none.
    steps = {0.0: 0.0}
    for ramp in ramps:
        steps |= dict(
            ramp.steps() if settings.compensate == "batch" else [(ramp.begin, ramp.first)]
        )
        steps[ramp.end] = 0.0
    by_epoch = {span.epoch: span for span in spans}
    span, step = spans[0], 0.0
    for epoch in sorted(by_epoch.keys() | steps.keys()):
        span, step = by_epoch.get(epoch, span), steps.get(epoch, step)
        if not step:
            yield replace(span, epoch=epoch)
        elif settings.compensate == "lr":
            on = next(ramp for ramp in ramps if ramp.begin <= epoch < ramp.end)
            yield replace(span, epoch=epoch, in_ramp=True, ramp=on)
        else:
            wanted = (1 - span.momentum) / (1 - step)
            global_batch = schedule.rounded(span.global_batch * wanted)
            lr = span.lr * (global_batch / span.global_batch) / wanted
            yield replace(
                span, epoch=epoch, global_batch=global_batch, lr=lr, momentum=step, in_ramp=True
            )


def _with_image_sizes(spans: tuple[Phase, ...], schedule: Schedule) -> Iterator[Phase]:
    """The phases, cut where the images change their size."""
    sizes = {one.epoch: one.image_size for one in schedule.milestones if one.image_size}
    by_epoch = {span.epoch: span for span in spans}
    span, image_size = spans[0], None
    for epoch in sorted(by_epoch.keys() | sizes.keys()):
        span = by_epoch.get(epoch, span)
        image_size = sizes.get(epoch, image_size)
        yield replace(span, epoch=epoch, image_size=image_size)


def grown(span: Phase, schedule: Schedule, growth: Growth, epoch: float) -> Phase:
    """The phase from `epoch` on with a batch that was decided while training, and the lr that keeps
    its g.

    Where that lr would be above schedule.max_lr the batch is the largest multiple that keeps to it,
    but at least the phase's own.
    """
    batch, multiple = growth.global_batch, growth.multiple
    lr = span.lr * lr_share(schedule, span.shape, epoch)  # no later one of the phase is larger
    most = schedule.largest_lr * (1 + 1e-9) * span.global_batch / lr
    if batch > most:
        batch = max(int(most) // multiple * multiple, span.global_batch)
    return replace(span, global_batch=batch, lr=span.lr * (batch / span.global_batch))


def lr_share(schedule: Schedule, shape: Shape, epoch: float) -> float:
    """The lr of an update that begins at `epoch`, as a share of its phase's lr.

    warm_up: s + (1−s)·epoch/W for first_lr = s·lr and W epochs (Goyal et al. 2017, 2.2); cosine:
    (1 + cos πt)/2 with t = (epoch−W)/(E−W), E epochs in all (Loshchilov & Hutter 2017); polynomial:
    (1 − t)^power.
    """
    if shape == "warm_up":
        assert schedule.warm_up is not None
        first = schedule.warm_up.first_lr / schedule.first_lr
        return first + (1 - first) * epoch / schedule.warm_up.epochs
    if shape in ("cosine", "polynomial"):
        begin = _curve_begin(schedule)
        # An update may begin just before the epoch at which the warm-up is to end.
        passed = max(0.0, epoch - begin) / (schedule.epochs - begin)
        if schedule.polynomial is not None:
            return (1 - passed) ** schedule.polynomial.power
        return (1 + cos(pi * passed)) / 2
    return 1.0


def _milestones(schedule: Schedule) -> Iterator[Phase]:
    """One phase for the start and one for each milestone.

    At milestone k the noise scale g ∝ ε/(B(1−m)) falls by its factor, and the momentum may change
    from m' to m; so ε/B falls by f_k = factor·(1−m')/(1−m). After k milestones the batch has been
    asked to grow by P, the product of those f that the policy gives to the batch: none (decay_lr,
    measured), the first `batch_milestones` (hybrid), all (grow_batch). The batch is B = P·B_0,
    rounded to a multiple and at most max_global_batch, and the learning rate does the rest, so that
    g is met exactly: ε = ε_0·(B/B_0)/(f_1·…·f_k). B_0 is the batch of the first noise scale, not
    rounded, and all factors are cumulative, so rounding does not add up.
    """
    milestones = schedule.falling_milestones
    momenta = [schedule.first_momentum]
    for milestone in milestones:
        momenta.append(momenta[-1] if milestone.momentum is None else milestone.momentum)
    factors = [
        (milestone.factor or 1.0) * (1 - before) / (1 - after)
        for milestone, (before, after) in zip(milestones, pairwise(momenta), strict=True)
    ]
    first_batch = schedule.wanted_global_batch
    ghost_batch = None
    for passed in range(len(milestones) + 1):
        fall = prod(factors[:passed])
        growth = prod(factors[: min(passed, schedule.growing_milestones)])
        global_batch = schedule.rounded(first_batch * growth)
        if passed:
            ghost_batch = milestones[passed - 1].ghost_batch or ghost_batch
        yield Phase(
            epoch=milestones[passed - 1].epoch if passed else 0.0,
            global_batch=global_batch,
            lr=schedule.first_lr * (global_batch / first_batch) / fall,
            momentum=momenta[passed],
            ghost_batch=ghost_batch,
        )


def _curve(schedule: Schedule) -> Iterator[Phase]:
    """One phase of a curve, or with grow_batch one for each rise of the batch.

    The batch is B_k = min(factor^k·B_0, max_global_batch) from where the curve has fallen to
    B_0/B_k
    on: with lr = ε_0·(B_k/B_0)·curve each update has g = g_0·curve, and the lr is never above ε_0
    (but for rounding).
    """
    assert schedule.curve is not None
    first_batch = schedule.wanted_global_batch
    factor = schedule.curve.batch_factor or 2.0
    largest = schedule.rounded(schedule.max_global_batch)
    begin = _curve_begin(schedule)
    before = 0
    for rise in count():
        wanted = min(first_batch * factor**rise, float(largest))
        global_batch = schedule.rounded(wanted)
        if global_batch > before:
            share = first_batch / wanted
            yield Phase(
                epoch=begin + (schedule.epochs - begin) * _reached(schedule, share)
                if rise
                else 0.0,
                global_batch=global_batch,
                lr=schedule.first_lr * (global_batch / first_batch),
                momentum=schedule.first_momentum,
                shape="cosine" if schedule.cosine else "polynomial",
            )
        if schedule.policy != "grow_batch" or wanted == largest:
            return
        before = max(before, global_batch)


def _reached(schedule: Schedule, share: float) -> float:
    """Where on its way, 0 to 1, the curve has fallen to this share of its beginning."""
    if schedule.polynomial is not None:
        return 1 - share ** (1 / schedule.polynomial.power)
    return acos(2 * share - 1) / pi


def _curve_begin(schedule: Schedule) -> float:
    return schedule.warm_up.epochs if schedule.warm_up else 0.0
