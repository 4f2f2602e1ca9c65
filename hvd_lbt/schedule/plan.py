"""The plan: a literal table of stages, made from a schedule and a data set's size (pure).

The one place where epochs become samples and samples become updates.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import overload

from hvd_lbt.errors import UserError
from hvd_lbt.schedule.growth import Growth
from hvd_lbt.schedule.layout import Layout, make_layout
from hvd_lbt.schedule.momentum import Buffer
from hvd_lbt.schedule.noise import exact_noise_scale, noise_scale
from hvd_lbt.schedule.phases import Phase, Shape, grown, lr_share, phases
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.world import World

MAX_UPDATES = 100_000_000  # 300 epochs of 21 million images with a batch of 64


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A span with one global batch; the lr is constant or follows a shape, and so does the momentum
    in a ramp that the lr compensates (1/(1−m) is linear in samples).

    first_sample: samples seen before it; samples: seen in it. Updates are of `global_batch`
    samples, except the last of the run, which takes what is left (or one sample more, so that none
    is a single sample), with the lr in proportion. lr, momentum and the noise scales are those of
    its first update, last_lr, last_momentum and last_noise_scale of its last. ghost_batch: None is
    the layout's; image_size: None is that of the data; in_ramp: the momentum is on its way
    (schedule.momentum_ramp).
    """

    index: int
    first_update: int
    updates: int
    first_sample: int
    samples: int
    global_batch: int
    lr: float
    momentum: float
    noise_scale: float
    exact_noise_scale: float
    last_lr: float
    last_noise_scale: float
    last_momentum: float
    shape: Shape
    ghost_batch: int | None
    image_size: int | None = None
    phase: int = 0
    """Place in `phases.phases`: stages of one phase differ only in what was decided."""
    in_ramp: bool = False


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step, counted from 0.

    epoch, samples_seen: before this update; global_batch: the samples of this very update. settled:
    how long this update of SGD with momentum is where gradients do not change, as a share of
    lr/(1−m): (1−m)·v with the momentum buffer v, zero at first; 1 − m^(index+1) for a constant m.
    ghost_batch: None is the layout's; image_size: None is that of the data.
    """

    index: int
    stage: int
    epoch: float
    samples_seen: int
    global_batch: int
    lr: float
    momentum: float
    noise_scale: float
    settled: float
    ghost_batch: int | None
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All updates of a run, as stages in order."""

    schedule: Schedule
    train_samples: int
    stages: tuple[Stage, ...]
    growth: tuple[Growth, ...] | None = None
    """What was decided so far, with policy measured; None: nothing was to be decided yet."""

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.stages[-1].first_update + self.stages[-1].updates

    @property
    def samples(self) -> int:
        """Samples of the whole run: epochs·N, rounded once."""
        return self.stages[-1].first_sample + self.stages[-1].samples

    def image_size_at(self, sample: int) -> int | None:
        """The size of the images where this many samples were seen, None: that of the data."""
        place = bisect_right(self.stages, sample, key=lambda stage: stage.first_sample)
        return self.stages[max(0, place - 1)].image_size

    def at(self, update: int) -> Update:
        """The update of this index. Raises IndexError outside of 0 … updates − 1."""
        if not 0 <= update < self.updates:
            raise IndexError(f"update {update} of a plan of {self.updates} updates")
        place = bisect_right(self.stages, update, key=lambda stage: stage.first_update)
        stage = self.stages[place - 1]
        before = (update - stage.first_update) * stage.global_batch
        seen = stage.first_sample + before
        is_last = update + 1 == stage.first_update + stage.updates
        global_batch = stage.samples - before if is_last else stage.global_batch
        # The lr of a smaller last update is smaller too, so that it is not noisier than planned.
        lr = self.lr_in(stage, seen) * (global_batch / stage.global_batch)
        momentum = self.momentum_in(stage, seen)
        return Update(
            index=update,
            stage=stage.index,
            epoch=seen / self.train_samples,
            samples_seen=seen,
            global_batch=global_batch,
            lr=lr,
            momentum=momentum,
            noise_scale=noise_scale(lr, momentum, self.train_samples, global_batch),
            settled=self.buffer_after(update + 1).settled,
            ghost_batch=stage.ghost_batch,
            image_size=stage.image_size,
        )

    def lr_in(self, stage: Stage, samples_seen: int) -> float:
        """Of an update of the stage's batch that begins there."""
        epoch, first = (n / self.train_samples for n in (samples_seen, stage.first_sample))
        shares = [lr_share(self.schedule, stage.shape, at) for at in (epoch, first)]
        rise = (1 - self.momentum_in(stage, samples_seen)) / (1 - stage.momentum)
        return stage.lr * (shares[0] / shares[1]) * rise

    def momentum_in(self, stage: Stage, samples_seen: int) -> float:
        """Of an update of the stage that begins there; beyond the stage's last, that of the
        last.
        """
        if stage.momentum == stage.last_momentum:
            return stage.momentum
        passed = (samples_seen - stage.first_sample) / ((stage.updates - 1) * stage.global_batch)
        low, high = 1 / (1 - stage.momentum), 1 / (1 - stage.last_momentum)
        return 1 - 1 / (low + (high - low) * min(1.0, passed))

    def buffer_after(self, updates: int) -> Buffer:
        """The momentum buffer after so many updates of the run, with a gradient of 1."""
        place = bisect_right(self.stages, updates - 1, key=lambda stage: stage.first_update) - 1
        if place < 0:
            return Buffer()
        return self.buffer_in(self.stages[place], updates - self.stages[place].first_update)

    def buffer_in(self, stage: Stage, updates: int) -> Buffer:
        """The same after so many updates of this stage, which may be longer than planned."""
        last = self.momentum_in(stage, stage.first_sample + (updates - 1) * stage.global_batch)
        rescale = self.schedule.momentum_change == "rescale"
        buffer, before = self._buffers[stage.index]
        return buffer.after(stage.momentum, last, before + updates, rescale=rescale)

    @cached_property
    def _buffers(self) -> tuple[tuple[Buffer, int], ...]:
        """Of each stage the buffer before the first stage of its momentum, and the updates since.

        So stages that differ in other things, such as the size of images, change no bit of it.
        """
        buffer, before = Buffer(), 0
        buffers = [(buffer, before)]
        rescale = self.schedule.momentum_change == "rescale"
        for stage, following in pairwise(self.stages):
            before += stage.updates
            momenta = {stage.momentum, stage.last_momentum}
            if momenta != {following.momentum, following.last_momentum} or len(momenta) > 1:
                ends = (stage.momentum, stage.last_momentum)
                buffer, before = buffer.after(*ends, before, rescale=rescale), 0
            buffers.append((buffer, before))
        return tuple(buffers)


class PlannedUpdates(Sequence[Update]):
    """The updates of a plan from `first` on, each made when it is asked for."""

    def __init__(self, plan: Plan, first: int = 0):
        self._plan, self._first = plan, first

    def __len__(self) -> int:
        return max(0, self._plan.updates - self._first)

    @overload
    def __getitem__(self, place: int) -> Update: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Update]: ...
    def __getitem__(self, place: int | slice) -> Update | Sequence[Update]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if (stop, step) == (len(self), 1):
                return PlannedUpdates(self._plan, self._first + start)
            return [self[one] for one in range(start, stop, step)]
        return self._plan.at(self._first + range(len(self))[place])


def make_plan(
    schedule: Schedule, train_samples: int, growth: Sequence[Growth] | None = None
) -> Plan:
    """The plan of a schedule for N = `train_samples`.

    growth: with policy measured what was decided so far; the rest of the plan has the last batch.

    A stage runs as many full updates as end at or before its milestone, in samples seen from the
    start of the run. The samples left over, fewer than its batch, go to the next stage; so no
    update straddles two learning rates and no sample is dropped. The last stage uses up the rest:
    the last update of the run may be smaller; a single sample that is left joins the update before
    it (batch norm needs two). A stage too short for one update is left out.

    Raises UserError if there are no samples, or more than MAX_UPDATES updates.
    """
    total = round(schedule.epochs * train_samples)
    if total < 1:
        raise UserError(
            f"schedule.epochs: {schedule.epochs:g} epochs of {train_samples} training samples are "
            "no sample at all; at least one is needed."
        )
    spans = _spans(schedule, train_samples, growth or ())
    ends = [begin for begin, _, _ in spans[1:]] + [total]
    stages: list[Stage] = []
    seen = done = 0
    for (_, phase, span), end in zip(spans, ends, strict=True):
        updates, left = divmod(end - seen, span.global_batch)
        samples = end - seen - left
        if end == total and left:
            samples = end - seen
            if left > 1 or not (stages or updates):
                updates += 1
            elif not updates:  # one sample for a stage: it joins the stage before
                stages[-1] = replace(stages[-1], samples=stages[-1].samples + 1)
                seen = end
        if updates > 0:
            extent = (done, updates, seen, samples)
            stages.append(_stage(schedule, len(stages), phase, span, train_samples, extent))
            seen, done = seen + samples, done + updates
    plan = Plan(
        schedule=schedule,
        train_samples=train_samples,
        stages=tuple(stages),
        growth=None if growth is None else tuple(growth),
    )
    assert plan.samples == total, (plan, total)
    if plan.updates > MAX_UPDATES:
        raise UserError(
            f"schedule.epochs: {schedule.epochs:g} epochs of {train_samples:,} training samples "
            f"are {plan.updates:,} updates; at most {MAX_UPDATES:,} are allowed. Take fewer epochs "
            "or a larger schedule.global_batch."
        )
    return plan


def _spans(
    schedule: Schedule, train_samples: int, growth: Sequence[Growth]
) -> list[tuple[int, int, Phase]]:
    """The phases, each with the sample from which it holds and its place, cut where the batch was
    changed.
    """
    begun = [
        (round(span.epoch * train_samples), place, span)
        for place, span in enumerate(phases(schedule))
    ]
    if not growth:
        return begun
    cut = []
    for sample in sorted({begin for begin, _, _ in begun} | {one.samples_seen for one in growth}):
        _, place, span = [one for one in begun if one[0] <= sample][-1]
        decided = [one for one in growth if one.samples_seen <= sample]
        if decided:
            span = grown(span, schedule, decided[-1], sample / train_samples)
        cut.append((sample, place, span))
    return cut


def _stage(
    schedule: Schedule,
    index: int,
    phase: int,
    span: Phase,
    train_samples: int,
    extent: tuple[int, int, int, int],
) -> Stage:
    first_update, updates, first_sample, samples = extent
    last_sample = first_sample + (updates - 1) * span.global_batch
    first, last = (
        (span.lr_at(epoch, schedule), span.momentum_at(epoch))
        for epoch in (first_sample / train_samples, last_sample / train_samples)
    )
    of = (train_samples, span.global_batch)
    return Stage(
        index=index,
        first_update=first_update,
        updates=updates,
        first_sample=first_sample,
        samples=samples,
        global_batch=span.global_batch,
        lr=first[0],
        momentum=first[1],
        noise_scale=noise_scale(*first, *of),
        exact_noise_scale=exact_noise_scale(*first, *of),
        last_lr=last[0],
        last_noise_scale=noise_scale(*last, *of),
        last_momentum=last[1],
        shape=span.shape,
        ghost_batch=span.ghost_batch,
        image_size=span.image_size,
        phase=phase,
        in_ramp=span.in_ramp,
    )


def has_single_samples(plan: Plan, ghost_batch: int) -> bool:
    """Whether some ghost batch of the plan has one sample only."""
    ghosts = [stage.ghost_batch or ghost_batch for stage in plan.stages]
    batches = [stage.global_batch for stage in plan.stages]
    return 1 in (*ghosts, *batches, plan.at(plan.updates - 1).global_batch)


def layout_of(update: Update, world: World, *, micro_batch: int, ghost_batch: int) -> Layout:
    """This rank's micro-batches of `update`; ghost_batch: where the update has none of its own."""
    return make_layout(
        update.global_batch,
        rank=world.rank,
        size=world.size,
        micro_batch=micro_batch,
        ghost_batch=update.ghost_batch or ghost_batch,
    )


def micro_batch_ranges(
    updates: Iterable[Update], world: World, *, micro_batch: int, ghost_batch: int
) -> Iterator[tuple[int, int, int]]:
    """(first sample of the stream, count, ghost batch) of each micro-batch of this rank."""
    for update in updates:
        layout = layout_of(update, world, micro_batch=micro_batch, ghost_batch=ghost_batch)
        for part in layout.micro_batches:
            yield update.samples_seen + part.start, len(part), update.ghost_batch or ghost_batch


def target_workers(stage: Stage, local_batch: int | None) -> int | None:
    """ceil(global_batch / local_batch) workers for the stage; None without a local batch."""
    return None if local_batch is None else -(-stage.global_batch // local_batch)
