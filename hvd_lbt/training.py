"""One update of everything that an update changes, for `hvd_lbt train`, benchmarks and own
loops.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_lbt.data.mixing import Mixing
from hvd_lbt.data.order import ORDER_VERSION, other_version
from hvd_lbt.ema import WeightAverage
from hvd_lbt.errors import OutOfMemoryError, UserError
from hvd_lbt.hyperparameters import make_optimizer, set_hyperparameters
from hvd_lbt.losses import Loss as RecipeLoss
from hvd_lbt.losses import load_loss
from hvd_lbt.measure.gradient_noise import GradientNoise
from hvd_lbt.measure.micro_batch_costs import micro_batch_costs
from hvd_lbt.measure.rank_times import PARTS, RankTimes
from hvd_lbt.models import (
    ByGhostBatch,
    RunningStatistics,
    build_model,
    check_network,
    compiled,
    draws_by_rank,
    is_foreign,
    load_pretrained,
    make_forward,
    samples_of,
    unused_settings,
)
from hvd_lbt.models.forward import Forward
from hvd_lbt.models.ghost_norm import GhostNorm
from hvd_lbt.optim import FusedSGD
from hvd_lbt.out_of_memory import is_out_of_memory, release_cached_memory
from hvd_lbt.recipe import Recipe
from hvd_lbt.reducer import PLACES, GradientReducer
from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule.plan import Update
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.world import World

Loss = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one update counted, the same on all ranks.

    sums: (3,) on the device: of losses, of right answers (NaN where the loss is your own), and of
    samples that count. skipped: whether the update was dropped for a gradient that is not finite.
    times: (ranks, 4) on the device: seconds of each rank's parts (`measure.rank_times.PARTS`) of
    the update *before* this one; zeros where they are not known. votes: (votes,) on the device: the
    sums of what each rank gave as `votes`.
    """

    sums: Tensor
    skipped: bool
    times: Tensor
    votes: Tensor

    @property
    def loss(self) -> float:
        """The mean loss of the global batch. Reading it waits for the device."""
        return float(self.sums[0] / self.sums[2])

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1. Reading it waits for the device."""
        return float(self.sums[1] / self.sums[2])


class Training:
    """Everything that an update changes: model, optimizer, reducer, statistics, noise averages.

        training = Training(model, optimizer, schedule)  # after hvd_lbt.init()
        for update, batches in sampler.updates(loader):
            tally = training.update(update, batches)

    model: on its device. optimizer: of its parameters; each update sets its lr and momentum.
    schedule: of the plan. loss(*batch): one loss a sample, (n,), of a micro-batch as the DataLoader
    gives it; cross-entropy of model(images) with labels unless given. forward: instead of loss, the
    sum of the losses and (3,) what `Tally.sums` adds up. reducer: with settings of your own.
    noise_every: measure the gradient's noise in every so many updates; 0: never. clip_norm: clip
    the sum over all ranks to this norm before each update. mixing: mixup or CutMix of batches of
    (images, labels); a loss of your own is then called with (images, labels, partners, weights),
    see `Mixing`. average: of the model's weights, moved after each update.

    Batch norm must be a ghost batch norm, whose statistics are the same on any number of ranks: see
    `prepare_model`.
    Raises UserError.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedSGD,
        schedule: Schedule,
        *,
        loss: Loss | None = None,
        forward: Forward | None = None,
        reducer: GradientReducer | None = None,
        noise_every: int = 0,
        clip_norm: float | None = None,
        mixing: Mixing | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        if loss is not None and forward is not None:
            raise UserError("Training: loss and forward exclude each other; leave one of them out.")
        if not isinstance(optimizer, FusedSGD):
            raise UserError(
                f"Training: the optimizer is {type(optimizer).__name__}; it must be FusedSGD."
            )
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(f"Training: clip_norm is {clip_norm}; it must be above 0, or None.")
        for name, module in model.named_modules():
            if module.training and draws_by_rank(module):
                raise UserError(
                    f"Training: {name} is {type(module).__name__}, whose masks would depend on the "
                    "number of ranks. Call prepare_model(model, ghost_batch=…) first."
                )
            if isinstance(module, GhostNorm):
                continue
            if isinstance(module, _BatchNorm) and module.training:
                raise UserError(
                    f"Training: {name} is {type(module).__name__}, whose statistics would depend "
                    "on the number of ranks. Call prepare_model(model, ghost_batch=…) first, or "
                    "put a frozen one in eval mode before."
                )
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.device = next(model.parameters()).device
        self.statistics = RunningStatistics(model)
        self.reducer = reducer or GradientReducer(model, optimizer)
        self.noise = GradientNoise(model, noise_every)
        self.times = RankTimes(self.device, self.reducer.world)
        self.reducer.on_received = self.times.end_sums
        self._forward = forward or (_summed(loss) if loss else make_forward(model))
        self._ghost_batch = self.statistics.ghost_batch
        self._clip_norm, self._mixing, self.average = clip_norm, mixing, average
        self.compiles = False  # torch.compile makes a graph for each size of micro-batch
        self._like: list[Tensor] | None = None  # one sample of each part of a batch
        optimizer.make_momenta()
        self._samples = samples_of(model)

    def update(
        self, update: Update, batches: MicroBatches[Any], votes: Sequence[float] = ()
    ) -> Tally:
        """Do one update: set lr and momentum, backpropagate all micro-batches, sum, step.

        batches: this rank's, from `PlanSampler.updates`. Every rank must call it for each update.
        votes: numbers to sum over the ranks along the way (`Tally.votes`), as many on each.
        Raises UserError if they are not the update's, BadUpdatesError after too many skipped ones.
        If the memory of any rank runs out, all ranks drop the update and raise OutOfMemoryError:
        everything is as before the update, which may be done again in smaller micro-batches.
        """
        reducer, times = self.reducer, self.times
        times.begin()
        set_hyperparameters(self.optimizer, update, self.schedule)
        self._use_ghost_batch(update, batches)
        self._begin_noise(update, batches)
        # what every update sums besides gradients: one message, that of the reducer's flags
        given = len(votes)
        room = reducer.room(given + 3 + times.numbers(update.index))
        room[:given].copy_(torch.tensor(votes), non_blocking=True)  # no wait for the device
        sums, rows = room[given : given + 3], room[given + 3 :]
        last = len(batches) - 1
        self._make_momenta()
        for index in range(len(batches)):
            if not reducer.dropped:
                self._micro_batch(update, batches, sums, rows if index == last else None)
            if reducer.dropped:
                break
        # a rank without samples, or without memory, only takes part in the sum
        if not batches or (reducer.dropped and not reducer.sent):
            times.fill(rows)
            reducer.backward(None, last=True)
        times.end_compute(batches.waited)
        handles = []
        if self.statistics.norms:
            handles.append(reducer.allreduce_async(self.statistics.collected, "batch norm"))
        handles += self.noise.send(reducer.allreduce_async)
        skipped_before = reducer.stats()["skipped"]
        try:
            if self._clip_norm is not None:
                reducer.clip_grad_norm_(self._clip_norm)
            self.optimizer.step()
        except OutOfMemoryError:
            for handle in handles:
                reducer.synchronize(handle)
            self.noise.discard()
            self.statistics.discard()
            release_cached_memory()
            raise
        for handle in handles:
            reducer.synchronize(handle)
        times.end()
        self.noise.end(reducer)
        skipped = reducer.stats()["skipped"] > skipped_before
        if skipped:
            self.statistics.discard()  # they may be NaN as the gradient was
        else:
            self.statistics.fold(update.global_batch)
            if self.average:
                self.average.update(update.global_batch)
        by_rank = rows.view(-1, len(PARTS)) if len(rows) else times.unknown
        return Tally(sums=sums, skipped=skipped, times=by_rank, votes=room[:given])

    def rehearse(self, ghost_batch: int, *batch: Any) -> None:
        """Forward and backward of one micro-batch, without a sum: to see what it takes.

        Nothing else of an update is done, and `forget` discards what this leaves. Memory that runs
        out in forward raises; in backward `reducer.dropped` says so.
        """
        self.statistics.use_ghost_batch(ghost_batch)
        if self._mixing:
            batch = self._mixing(*batch, first_sample=0, ghost_batch=ghost_batch)
        if self._samples:
            self._samples.begin(0, ghost_batch, self.device)
        loss, _ = self._forward(*batch)
        self.reducer.backward(loss / len(batch[0]), last=False)

    def forget(self) -> None:
        """Discard the gradients and statistics of what was rehearsed."""
        self.reducer.forget()
        self.statistics.discard()
        self.noise.discard()

    def _begin_noise(self, update: Update, batches: MicroBatches[Any]) -> None:
        """Begin to measure the update; one that is a single micro-batch in another way."""
        parts = batches.parts
        if parts is None and self.reducer.world.size == 1:
            parts = len(batches)
        setting = (batches.ghost_batch, update.image_size)
        self.noise.begin(update.index, update.global_batch, one_part=parts == 1, setting=setting)

    def _make_momenta(self) -> None:
        """Allocate the momentum buffers before the step, which no rank may leave by an error."""
        try:
            self.optimizer.make_momenta()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.reducer.drop_update("its momentum", error)

    def _micro_batch(
        self, update: Update, batches: MicroBatches[Any], sums: Tensor, rows: Tensor | None
    ) -> None:
        """Backpropagate the next micro-batch, and add what its forward counted to `sums`.

        rows: of the ranks' times, to fill before the last backward, with which they leave; None
        before that. If memory runs out, `reducer.dropped` says so: the other ranks will wait for
        this one's sums, so that no error may leave the update before they are sent.
        """
        index = batches.taken
        place, size = PLACES[0], batches.sizes[index]
        try:
            parts = _on(self.device, next(batches))
            _check_samples(update, parts, size)
            if self._like is None:
                self._like = [part[:1].clone() for part in parts if isinstance(part, Tensor)]
            place = PLACES[1]
            self.times.begin_part(batches.waited)
            if self._mixing:
                parts = _mixed(self._mixing, update, parts, batches, index)
            if self._samples:
                first = batches.first_samples[batches.taken - 1]
                self._samples.begin(first, batches.ghost_batch, self.device)
            loss, counted = self._forward(*parts)
            if self._samples:
                self._samples.end()
            share = loss / update.global_batch
            sums += counted
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.reducer.drop_update(place, error)
            return
        if rows is not None:
            self.times.fill(rows)
        self.reducer.backward(share, last=rows is not None)
        self.times.end_part()
        if not self.reducer.dropped:
            self.noise.add_part(size)

    def costs(self, sizes: Sequence[int]) -> dict[int, float]:
        """Seconds of forward and backward of a micro-batch, by its size; changes nothing.

        Between updates, after the first. Empty where it cannot be known: before this rank has had a
        batch, with a compiled forward (each size compiles anew), or if memory does not suffice.
        """
        if not self._like or self.compiles:
            return {}

        def forward(*parts: Any) -> tuple[Tensor, Tensor]:
            if self._samples:
                self._samples.begin(0, self._ghost_batch or 1, self.device)
            try:
                return self._forward(*parts)
            finally:
                if self._samples:
                    self._samples.end()

        return micro_batch_costs(forward, self.model, self._like, sizes)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs, on any number of ranks."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "order_version": ORDER_VERSION}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` gave; other keys of `state` are the caller's own.

        Raises UserError for a state whose samples came in the order of another version.
        """
        if version := other_version(state):
            raise UserError(
                f"Training: the state is of version {version} of the samples' order, and this "
                f"hvd_lbt has version {ORDER_VERSION}: PlanSampler would give some samples of the "
                "epoch twice and others never. Resume with the hvd_lbt that saved it, or begin "
                "anew from its weights: training.model.load_state_dict(state['model'])."
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "reducer": self.reducer,
            "gradient_noise": self.noise,
            **({"ema": self.average} if self.average else {}),
        }

    def _use_ghost_batch(self, update: Update, batches: MicroBatches[Any]) -> None:
        """Give the norms the update's ghost batch, which must be the one its layout was cut
        with.
        """
        wanted = update.ghost_batch or self._ghost_batch
        if self._ghost_batch is None or wanted is None:
            return  # no norm whose statistics depend on it
        if wanted != batches.ghost_batch:
            raise UserError(
                f"update {update.index}: the model's ghost batches are of {wanted} samples, and "
                f"the micro-batches are cut for ghost batches of {batches.ghost_batch}. Make "
                f"PlanSampler(…, ghost_batch={self._ghost_batch})."
            )
        self.statistics.use_ghost_batch(wanted)


def make_training(
    recipe: Recipe,
    classes: int,
    *,
    world: World,
    device: torch.device,
    graphs: int,
    train_samples: int,
    has_state: bool = False,
) -> Training:
    """The training of a recipe, its weights drawn by run.seed.

    train_samples: of an epoch. graphs: how many sizes of micro-batch there are, for run.compile.
    has_state: the training resumes, so that model.pretrained is not read. Raises UserError.
    """
    model, network = _make_network(recipe, classes, world, device, has_state)
    first = recipe.schedule
    optimizer = make_optimizer(model, recipe.optimizer, first.first_lr, first.first_momentum)
    reducer = GradientReducer(
        model,
        optimizer,
        world=world,
        wire=recipe.wire.form,
        bucket_mb=recipe.wire.bucket_mb,
        max_bad_updates=recipe.run.max_bad_updates,
    )
    own, outputs = recipe.loss.function, recipe.model.num_classes or classes
    forward = make_forward(
        network,
        bf16=recipe.run.precision == "bf16",
        channels_last=recipe.run.channels_last,
        loss=RecipeLoss(
            label_smoothing=recipe.loss.label_smoothing,
            function=load_loss(own, outputs, device) if own else None,
        ),
    )
    mixing = average = None
    if recipe.loss.mixes:
        alphas = {"mixup": recipe.loss.mixup, "cutmix": recipe.loss.cutmix}
        mixing = Mixing(seed=recipe.run.seed, train_samples=train_samples, **alphas)
    if recipe.ema.decay is not None:
        average = WeightAverage(model, decay=recipe.ema.decay, global_batch=first.global_batch)
    training = Training(
        model,
        optimizer,
        recipe.schedule,
        forward=compiled(forward, graphs) if recipe.run.compile else forward,
        reducer=reducer,
        noise_every=recipe.run.noise_every,
        clip_norm=recipe.optimizer.clip_norm,
        mixing=mixing,
        average=average,
    )
    training.compiles = recipe.run.compile
    return training


def _make_network(
    recipe: Recipe, classes: int, world: World, device: torch.device, has_state: bool
) -> tuple[nn.Module, nn.Module]:
    """The recipe's model on its device, and what its forward is called by; tested if not ours."""
    settings, size = recipe.model, recipe.data.image_size
    torch.manual_seed(recipe.run.seed)
    model = build_model(
        settings, classes, recipe.layout.ghost_batch, image_size=size, seed=recipe.run.seed
    )
    notes = []
    if settings.pretrained is not None and not has_state and world.rank == 0:
        notes.append(load_pretrained(model, Path(settings.pretrained), settings.pretrained_skip))
    model.to(device)
    memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's own stub lacks it
    if not is_foreign(settings.name):
        _print_on_rank_0(notes, world)
        return model, model
    outputs = settings.num_classes or classes
    notes += unused_settings(settings)
    notes += check_network(model, settings.name, image_size=size, outputs=outputs)
    samples = samples_of(model)
    by_ghost_batch = samples is not None and samples.by_ghost_batch
    if by_ghost_batch and recipe.run.compile:
        raise UserError(
            f"run.compile: {settings.name} draws random numbers within its forward, which "
            "torch.compile cannot be given by ghost batch. Leave run.compile out, or use "
            "nn.Dropout and timm's DropPath, as layers."
        )
    _print_on_rank_0(notes, world)
    return model, ByGhostBatch(model, samples) if samples and by_ghost_batch else model


def _print_on_rank_0(lines: Sequence[str], world: World) -> None:
    for line in lines if world.rank == 0 else ():
        print(line, flush=True)


def _summed(loss: Loss) -> Forward:
    """A loss of one's own as `Training` calls it."""

    def forward(*batch: Any) -> tuple[Tensor, Tensor]:
        losses = loss(*batch)
        if losses.ndim != 1:
            raise UserError(
                f"Training: loss gave a tensor of shape {tuple(losses.shape)}; it must be (n,), "
                "one loss a sample, such as F.cross_entropy(…, reduction='none')."
            )
        total = losses.float().sum()
        unknown = total.new_full((), float("nan"))
        return total, torch.stack([total.detach(), unknown, total.new_full((), len(losses))])

    return forward


def _on(device: torch.device, batch: Any) -> tuple[Any, ...]:
    """The parts of a batch as arguments, their tensors on the device."""
    parts = batch if isinstance(batch, list | tuple) else (batch,)
    return tuple(_moved(part, device) for part in parts)


def _mixed(
    mixing: Mixing, update: Update, parts: tuple[Any, ...], batches: MicroBatches[Any], index: int
) -> tuple[Any, ...]:
    """A micro-batch of (images, labels), mixed."""
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"update {update.index}: mixing needs batches of (images, labels), two tensors, and "
            f"this one has {len(parts)} parts. Mix in a loss of your own, or leave mixing out."
        )
    if batches.ghost_batch == 1:
        raise UserError(
            "mixing: with ghost batches of one sample none has a partner. Make PlanSampler(…, "
            "ghost_batch=…) at least 2."
        )
    return mixing(
        *parts, first_sample=batches.first_samples[index], ghost_batch=batches.ghost_batch
    )


def _check_samples(update: Update, parts: tuple[Any, ...], wanted: int) -> None:
    """Raise UserError unless a micro-batch has the samples of the plan, by its first tensor."""
    values = [
        value for part in parts for value in (part.values() if isinstance(part, dict) else [part])
    ]
    found = next(
        (len(value) for value in values if isinstance(value, Tensor) and value.ndim), wanted
    )
    if found != wanted:
        raise UserError(
            f"update {update.index}: a micro-batch has {found} samples, the plan gives it "
            f"{wanted}. Give the DataLoader this sampler as its batch_sampler, and begin both anew "
            "together."
        )


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, Mapping):
        return {key: _moved(value, device) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_moved(value, device) for value in part]
    return part
