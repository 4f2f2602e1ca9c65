"""The settings of a schedule: when the noise scale falls, and what changes then (pure).

Frozen dataclasses of the standard library, checked when they are made: an impossible value, or a
setting that can have no effect, is a `SettingError` that names it. All arithmetic of batches is in
this package; a recipe (YAML) only fills these classes in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice, pairwise
from math import inf, isfinite, log, prod
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hvd_lbt.errors import UserError, shortened
from hvd_lbt.schedule.noise import batch_of_equal_noise


class SettingError(UserError):
    """Settings that cannot be.

    problems: each begins with the key inside of `settings`, such as `.lr: -1 is not allowed; …`.
    """

    def __init__(self, settings: str, *problems: str):
        super().__init__(" ".join(f"{settings}{problem}" for problem in problems))
        self.problems = problems

    def at(self, place: str) -> str:
        """The message with the place where the settings were read, such as
        `schedule.milestones[0]`.
        """
        return " ".join(f"{place}{problem}" for problem in self.problems)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a number must be: above `above`, at least `least`, at most `most`, below `below`."""

    above: float = -inf
    least: float = -inf
    most: float = inf
    below: float = inf

    def wanted(self, number: float) -> str:
        """What `number` would have to be; empty if it is."""
        if number <= self.above:
            return f"greater than {self.above:g}"
        if number < self.least:
            return f"greater than or equal to {self.least:g}"
        if number > self.most:
            return f"less than or equal to {self.most:g}"
        return f"less than {self.below:g}" if number >= self.below else ""


# Far beyond any training, and small enough that no product of settings overflows or takes long.
MAX_STAGES = 1_000
MAX_FALL = 1e12  # of the noise scale, from the first stage to the last
Count = Annotated[int, Bounds(least=1, most=10**10)]
Pixels = Annotated[int, Bounds(least=1, most=16_384)]
Positive = Annotated[float, Bounds(above=0, most=1e9)]
Power = Annotated[float, Bounds(above=0, least=0.01, most=10)]
LearningRate = Annotated[float, Bounds(above=0, least=1e-12, most=1e9)]
Factor = Annotated[float, Bounds(above=1, most=MAX_FALL)]
Momentum = Annotated[float, Bounds(least=0, below=1)]


class _Checked:
    """Base of the settings: checks each value against the annotation of its field."""

    def __post_init__(self) -> None:
        problems = []
        for field in fields(self):  # type: ignore[arg-type]  # each subclass is a dataclass
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _fitted(value, field.type))
            except _UnfitError as error:
                problems.append(
                    f".{field.name}: {_shown(value)} is not allowed; it must be {error}."
                )
        # Conflicts compare values, so all of them must be sound; the first often explains the rest.
        problems = problems or list(islice(self._conflicts(), 1))
        if problems:
            raise SettingError(_name_of(type(self)), *problems)

    def _conflicts(self) -> Iterator[str]:
        """Which settings cannot be together, each as in `SettingError.problems`."""
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Milestone(_Checked):
    """At `epoch` the noise scale falls by `factor`, or the images change their size, or both."""

    epoch: Positive
    factor: Factor | None = None
    """None: the noise scale stays, and only `image_size` changes here."""
    momentum: Momentum | None = None
    """The momentum from here on; batch or lr change so that the noise scale is as planned."""
    ghost_batch: Count | None = None
    """The ghost batch from here on; None: as before."""
    image_size: Pixels | None = None
    """Side of the training images from here on, in pixels; None: as before."""

    @property
    def falls(self) -> bool:
        """Whether the noise scale falls here."""
        return self.factor is not None

    def _conflicts(self) -> Iterator[str]:
        if self.factor is not None:
            return
        if self.image_size is None:
            yield ".factor: it is missing; a milestone has a factor, an image_size, or both."
        for name in ("momentum", "ghost_batch"):
            if getattr(self, name) is not None:
                yield (
                    f".{name}: {getattr(self, name):g} is for a milestone at which the noise scale "
                    "falls; give it a factor too."
                )


@dataclass(frozen=True, kw_only=True)
class WarmUp(_Checked):
    """The lr rises linearly over the first epochs, then is schedule.lr (Goyal et al. 2017, 2.2)."""

    epochs: Positive
    first_lr: LearningRate
    """Of the first update; Goyal et al.: that of one worker, 0.1."""


@dataclass(frozen=True, kw_only=True)
class Cosine(_Checked):
    """The noise scale falls as (1 + cos πt)/2, t from 0 (after the warm-up) to 1 (the end).

    With policy decay_lr the lr follows the curve, as is common; with grow_batch the batch rises in
    steps, and within a step the lr follows, so that each update has exactly the noise scale of the
    curve.
    """

    batch_factor: Factor | None = None
    """grow_batch only: by how much the batch rises at each step [2]."""


@dataclass(frozen=True, kw_only=True)
class Polynomial(_Checked):
    """The noise scale falls as (1 − t)^power, t from 0 (after the warm-up) to 1 (the end).

    The policies are those of `Cosine`. power 1: linear; 2: as in MLPerf's ResNet-50.
    """

    power: Power
    batch_factor: Factor | None = None
    """grow_batch only: by how much the batch rises at each step [2]."""


@dataclass(frozen=True, kw_only=True)
class ScaledStart(_Checked):
    """Start from a larger lr or momentum; the first batch grows to keep the noise scale."""

    lr: LearningRate | None = None
    momentum: Momentum | None = None


@dataclass(frozen=True, kw_only=True)
class MomentumRamp(_Checked):
    """The momentum rises over some epochs instead of at once, and g stays as planned.

    It rises from schedule.momentum to schedule.scaled_start.momentum from the start on, and to the
    momentum of a milestone from that milestone on, linearly in 1/(1−m), the updates over which a
    momentum averages: so the buffer is nearly full all the time (`hvd_lbt.schedule.momentum`).
    """

    epochs: Positive
    """From the momentum before to the new one."""
    compensate: Literal["batch", "lr"] = "batch"
    """What keeps g = εN/(B(1−m)) meanwhile. batch: B rises with 1/(1−m), in steps of √2 in both;
    lr: the lr falls with 1−m in each update, from ε·(1−m_old)/(1−m_new), at the new batch."""


@dataclass(frozen=True, kw_only=True)
class Schedule(_Checked):
    """When the noise scale falls, and whether the learning rate or the batch changes for it."""

    policy: Literal["decay_lr", "hybrid", "grow_batch", "measured"]
    """Where the noise scale falls: the lr falls, the batch grows for the first milestones, or for
    all; measured: the batch grows as the measured gradient noise allows, and the lr does the rest
    (`hvd_lbt.schedule.growth`)."""
    epochs: Positive
    lr: LearningRate
    momentum: Momentum
    global_batch: Count
    max_global_batch: Count = 65_536
    milestones: tuple[Milestone, ...] = ()
    cosine: Cosine | None = None
    """Instead of milestones at which the noise scale falls."""
    polynomial: Polynomial | None = None
    """Another such curve."""
    scaled_start: ScaledStart | None = None
    warm_up: WarmUp | None = None
    batch_multiple: Count = 1
    """Each global batch is the nearest multiple of this; the lr makes up for the rounding."""
    batch_milestones: Count | None = None
    """hybrid only: so many first milestones raise the batch [1], the rest lower the lr."""
    max_lr: LearningRate | None = None
    """measured only: the batch grows no further where the lr would be above this [the first lr]."""
    overhead: Positive | None = None
    """measured only: what an update takes beside its samples, as the number of samples that take as
    long on all workers; None: from the times of the run's own updates."""
    momentum_change: Literal["keep", "rescale"] = "keep"
    """rescale: the momentum buffer is multiplied by (1−m_old)/(1−m_new) when m changes."""
    momentum_start: Literal["zero", "corrected"] = "zero"
    """corrected: all updates are as long as if the buffer, which is zero at first, had settled.

    In our study it lost accuracy: SGD without momentum must bear an lr of lr/(1−m)
    (docs/studies)."""
    momentum_ramp: MomentumRamp | None = None
    """Instead of a momentum that is large, or rises, at once."""

    @property
    def first_lr(self) -> float:
        """The lr the run starts with."""
        return (
            self.lr
            if self.scaled_start is None or self.scaled_start.lr is None
            else self.scaled_start.lr
        )

    @property
    def first_momentum(self) -> float:
        """The momentum the run starts with."""
        start = self.scaled_start
        return self.momentum if start is None or start.momentum is None else start.momentum

    @property
    def momentum_changes(self) -> tuple[tuple[float, float, float], ...]:
        """(epoch, momentum before, after) of scaled_start (epoch 0) and of the milestones."""
        changes = [(0.0, self.momentum, self.first_momentum)]
        for one in self.falling_milestones:
            before = changes[-1][2]
            changes.append((one.epoch, before, before if one.momentum is None else one.momentum))
        return tuple(change for change in changes if change[1] != change[2])

    @property
    def first_global_batch(self) -> int:
        """The global batch the run starts with: g is that of lr, momentum and global_batch.

        With a momentum_ramp it is the batch after the first ramp.
        """
        return self.rounded(self.wanted_global_batch)

    @property
    def wanted_global_batch(self) -> float:
        """The same before it is rounded."""
        return batch_of_equal_noise(
            self.global_batch,
            lr=self.lr,
            momentum=self.momentum,
            new_lr=self.first_lr,
            new_momentum=self.first_momentum,
        )

    @property
    def growing_milestones(self) -> int:
        """How many of the first milestones raise the batch; the others lower the lr."""
        return {
            "decay_lr": 0,
            "hybrid": self.batch_milestones or 1,
            "grow_batch": len(self.falling_milestones),
            "measured": 0,  # by what is measured instead
        }[self.policy]

    @property
    def falling_milestones(self) -> tuple[Milestone, ...]:
        """Those at which the noise scale falls."""
        return tuple(milestone for milestone in self.milestones if milestone.falls)

    @property
    def curve(self) -> Cosine | Polynomial | None:
        """The curve that the noise scale falls along, if it does not fall at milestones."""
        return self.cosine or self.polynomial

    @property
    def largest_lr(self) -> float:
        """The lr up to which a measured batch grows."""
        return self.first_lr if self.max_lr is None else self.max_lr

    def rounded(self, global_batch: float) -> int:
        """The nearest multiple of batch_multiple, at least one, at most max_global_batch."""
        largest = self.max_global_batch // self.batch_multiple
        nearest = max(1, round(global_batch / self.batch_multiple))
        return self.batch_multiple * min(nearest, largest)

    def _conflicts(self) -> Iterator[str]:
        yield from self._milestone_conflicts()
        yield from self._batch_conflicts()
        yield from self._warm_up_conflicts()
        yield from self._curve_conflicts()
        yield from self._momentum_conflicts()
        yield from self._ramp_conflicts()
        yield from self._hybrid_conflicts()
        yield from self._measured_conflicts()

    def _milestone_conflicts(self) -> Iterator[str]:
        epochs = [milestone.epoch for milestone in self.milestones]
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            yield (
                f".milestones: their epochs are {', '.join(f'{epoch:g}' for epoch in epochs)}; "
                "each must be later than the one before it."
            )
        if epochs and epochs[-1] >= self.epochs:
            yield (
                f".milestones: the last is at epoch {epochs[-1]:g}; it must be before the end, "
                f"schedule.epochs = {self.epochs:g}."
            )
        if len(self.milestones) >= MAX_STAGES:
            yield (
                f".milestones: {len(self.milestones):,} are too many; at most {MAX_STAGES - 1:,} "
                "are allowed."
            )
        if (fall := prod(one.factor or 1.0 for one in self.milestones)) > MAX_FALL:
            yield (
                f".milestones: their factors together lower the noise scale by {fall:g}; at most "
                f"{MAX_FALL:g} is allowed."
            )
        sizes = [(place, one.image_size) for place, one in enumerate(self.milestones)]
        for (_, before), (place, size) in pairwise([one for one in sizes if one[1] is not None]):
            if size == before:
                yield (
                    f".milestones[{place}].image_size: the images are of {size} pixels before it "
                    "too; leave it out."
                )

    def _batch_conflicts(self) -> Iterator[str]:
        if self.global_batch > self.max_global_batch:
            yield (
                f".global_batch: {self.global_batch} is more than schedule.max_global_batch = "
                f"{self.max_global_batch}; it must not be."
            )
        if self.global_batch % self.batch_multiple:
            yield (
                f".batch_multiple: {self.batch_multiple} does not divide "
                f"schedule.global_batch = {self.global_batch}; it must."
            )
        wanted = round(self.wanted_global_batch)
        if not self.batch_multiple <= wanted <= self.max_global_batch:
            yield (
                f".scaled_start: with lr {self.first_lr:g} and momentum {self.first_momentum:g} "
                f"the noise scale is kept by a first global batch of {wanted}; it must be from "
                f"{self.batch_multiple} to schedule.max_global_batch = {self.max_global_batch}."
            )

    def _warm_up_conflicts(self) -> Iterator[str]:
        if self.warm_up is None:
            return
        if self.warm_up.first_lr >= self.first_lr:
            yield (
                f".warm_up.first_lr: {self.warm_up.first_lr:g} must be smaller than the lr "
                f"that it rises to, {self.first_lr:g}."
            )
        falls = self.falling_milestones
        end = falls[0].epoch if falls else self.epochs
        if self.warm_up.epochs >= end:
            yield f".warm_up.epochs: {self.warm_up.epochs:g} must be fewer than " + (
                f"the epoch of the first of schedule.milestones, {end:g}."
                if falls
                else f"schedule.epochs = {end:g}."
            )

    def _curve_conflicts(self) -> Iterator[str]:
        curve, name = self.curve, "cosine" if self.cosine else "polynomial"
        if curve is None:
            return
        if self.cosine and self.polynomial:
            yield (
                ".polynomial: schedule.cosine is a curve too, and the noise scale falls along one; "
                "leave one of the two out."
            )
        if self.falling_milestones:
            yield (
                f".{name}: the noise scale falls along the curve or at schedule.milestones; leave "
                "out one of the two (milestones with an image_size alone may stay)."
            )
        if self.policy == "hybrid":
            yield (
                f".policy: 'hybrid' shares milestones out, and schedule.{name} has none; it must "
                "be decay_lr or grow_batch."
            )
        rise = self.max_global_batch / self.wanted_global_batch
        factor = curve.batch_factor or 2.0
        if self.policy == "grow_batch" and rise > 1 and log(rise) > MAX_STAGES * log(factor):
            yield (
                f".{name}.batch_factor: {factor:.12g} makes more than {MAX_STAGES:,} stages on the "
                f"way to schedule.max_global_batch = {self.max_global_batch}; it must be at least "
                f"{rise ** (1 / MAX_STAGES):.6g}."
            )
        if self.policy != "grow_batch" and curve.batch_factor is not None:
            yield (
                f".{name}.batch_factor: {curve.batch_factor:g} has no effect with policy "
                f"{self.policy}; leave it out, or set schedule.policy to grow_batch."
            )

    def _momentum_conflicts(self) -> Iterator[str]:
        if self.momentum_start == "corrected" and self.first_momentum == 0:
            yield (
                ".momentum_start: 'corrected' has no effect with schedule.momentum = 0; leave it "
                "out."
            )
        changes = any(milestone.momentum is not None for milestone in self.milestones)
        changes |= self.momentum_ramp is not None
        if self.momentum_change == "rescale" and not changes:
            yield (
                ".momentum_change: 'rescale' has no effect where momentum never changes; leave it "
                "out, or give a milestone a momentum."
            )

    def _ramp_conflicts(self) -> Iterator[str]:
        if self.momentum_ramp is None:
            return
        changes = self.momentum_changes
        if not changes:
            yield (
                ".momentum_ramp: it has no effect where the momentum never changes; leave it out, "
                "or set schedule.scaled_start.momentum or the momentum of a milestone."
            )
            return
        if self.policy == "measured":
            yield (
                ".momentum_ramp: with policy measured the batch follows the gradient's noise, and "
                "a ramp plans it; leave one of the two out."
            )
        ends = [epoch for epoch, _, _ in changes[1:]] + [self.epochs]
        for (epoch, before, after), end in zip(changes, ends, strict=True):
            if not 0 < before < after:
                yield (
                    f".momentum_ramp: at epoch {epoch:g} the momentum changes from {before:g} to "
                    f"{after:g}; with a ramp it must rise, from more than 0."
                )
            if epoch + self.momentum_ramp.epochs >= end:
                yield (
                    f".momentum_ramp.epochs: {self.momentum_ramp.epochs:g} must be fewer than "
                    f"{end - epoch:g}, from the change at epoch {epoch:g} to "
                    + ("the end." if end == self.epochs else f"the next, at epoch {end:g}.")
                )

    def _measured_conflicts(self) -> Iterator[str]:
        if self.policy != "measured":
            for name in ("max_lr", "overhead"):
                if getattr(self, name) is not None:
                    yield (
                        f".{name}: {getattr(self, name):g} has no effect with policy "
                        f"{self.policy}; leave it out, or set schedule.policy to measured."
                    )
        elif self.max_lr is None and not self.falling_milestones and self.curve is None:
            yield (
                ".max_lr: it is missing, and without milestones or a curve the noise scale never "
                "falls: the batch could grow at a larger lr only. Set it, or take another policy."
            )
        elif self.max_global_batch <= self.first_global_batch:
            yield (
                f".max_global_batch: {self.max_global_batch} leaves no room to grow from "
                f"{self.first_global_batch}; it must be larger with policy measured."
            )
        elif self.max_lr is not None and self.max_lr < self.first_lr:
            yield (
                f".max_lr: {self.max_lr:g} is less than the lr that the run starts with, "
                f"{self.first_lr:g}; it must not be."
            )

    def _hybrid_conflicts(self) -> Iterator[str]:
        if self.policy != "hybrid":
            if self.batch_milestones is not None:
                yield (
                    f".batch_milestones: {self.batch_milestones} has no effect with policy "
                    f"{self.policy}; leave it out, or set schedule.policy to hybrid."
                )
        elif self.growing_milestones > len(self.falling_milestones):
            yield (
                f".batch_milestones: {self.growing_milestones} milestones are to raise the batch, "
                f"and schedule.milestones has {len(self.falling_milestones)} with a factor; it "
                "must have at least as many."
            )


class _UnfitError(Exception):
    """What a value would have to be, as its message."""


def _fitted(value: Any, kind: Any) -> Any:
    """`value` as its annotation says: int, float, a literal, settings, a tuple of them, or None."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        one, _ = sorted(arguments, key=lambda argument: argument is NoneType)
        return None if value is None else _fitted(value, one)
    if origin is Annotated:
        number = _fitted(value, arguments[0])
        if wanted := arguments[1].wanted(number):
            raise _UnfitError(wanted)
        return number
    if origin is Literal:
        if value not in arguments:
            *others, last = map(repr, arguments)
            raise _UnfitError(f"{', '.join(others)} or {last}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _UnfitError(f"a tuple of {arguments[0].__name__}")
        return tuple(_fitted(part, arguments[0]) for part in value)
    if is_dataclass(kind):
        if not isinstance(value, kind):  # type: ignore[arg-type]  # a class
            raise _UnfitError(f"a {kind.__name__}")  # type: ignore[union-attr]
        return value
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise _UnfitError("a whole number")
        return int(value)
    assert kind is float, kind
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _UnfitError("a number")
    if not isfinite(value):
        raise _UnfitError("a finite number")
    return float(value)


def _name_of(kind: type) -> str:
    """What a recipe calls these settings: `warm_up` for WarmUp."""
    name = kind.__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)[1:]


def _shown(value: Any) -> str:
    return shortened(repr(value).removesuffix(".0"))
