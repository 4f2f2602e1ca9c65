"""This rank's micro-batches of each update, for a DataLoader of your own."""

import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

from torch.utils.data import BatchSampler

from hvd_lbt.data.order import SampleStream
from hvd_lbt.errors import UserError
from hvd_lbt.schedule.layout import count_micro_batches
from hvd_lbt.schedule.plan import Plan, Update, layout_of, micro_batch_ranges
from hvd_lbt.world import World

Batch = TypeVar("Batch")


class MicroBatches(Generic[Batch]):
    """This rank's micro-batches of one update: `len()` says how many, iterating takes them.

    sizes: samples of each; none on a rank without samples in this update. ghost_batch: of the
    layout that cut them. first_samples: the place of each one's first sample in the stream of
    samples. parts: micro-batches of the update on all ranks; None: not known. waited: seconds that
    taking them has waited for the source so far.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        source: Iterable[Batch],
        ghost_batch: int = 1,
        first_samples: Sequence[int] = (),
        parts: int | None = None,
    ):
        self.sizes, self.ghost_batch, self.waited = tuple(sizes), ghost_batch, 0.0
        self.first_samples, self.parts = tuple(first_samples), parts
        self.taken = 0
        self._source = iter(source)

    @classmethod
    def of_update(
        cls,
        update: Update,
        source: Iterator[Batch],
        world: World,
        *,
        micro_batch: int,
        ghost_batch: int,
    ) -> "MicroBatches[Batch]":
        """This rank's of `update`, taken from `source`; ghost_batch: where it has none of its
        own.
        """
        own = layout_of(
            update, world, micro_batch=micro_batch, ghost_batch=ghost_batch
        ).micro_batches
        firsts = [update.samples_seen + part.start for part in own]
        ghosts = update.ghost_batch or ghost_batch
        parts = count_micro_batches(
            update.global_batch, size=world.size, micro_batch=micro_batch, ghost_batch=ghosts
        )
        return cls([len(part) for part in own], source, ghosts, firsts, parts)

    def check_all_taken(self, update: Update) -> None:
        """Raise UserError if some of the update's are left: all later ones would be wrong."""
        if self.taken < len(self):
            raise UserError(
                f"update {update.index}: {len(self) - self.taken} of {len(self)} micro-batches "
                "were not used. Take all of an update's before the next one."
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.taken == len(self.sizes):
            raise StopIteration
        began = time.perf_counter()
        try:
            batch = next(self._source)
        except StopIteration:
            raise UserError(
                f"the batches ended after {self.taken} of {len(self)} micro-batches of an update. "
                "Give the DataLoader this sampler as its batch_sampler, and begin both anew "
                "together."
            ) from None
        self.waited += time.perf_counter() - began
        self.taken += 1
        return batch


def by_update(
    updates: Iterable[Update],
    source: Iterable[Batch],
    world: World,
    *,
    micro_batch: int,
    ghost_batch: int,
) -> Iterator[tuple[Update, MicroBatches[Batch]]]:
    """Each update with this rank's micro-batches, taken one after the other from `source`.

    Raises UserError if micro-batches of the update before were left: all later ones would be wrong.
    """
    stream = iter(source)
    for update in updates:
        batches = MicroBatches.of_update(
            update, stream, world, micro_batch=micro_batch, ghost_batch=ghost_batch
        )
        yield update, batches
        batches.check_all_taken(update)


class PlanSampler(BatchSampler):
    """A `batch_sampler` for torch's DataLoader: the samples of a plan's updates, for this rank.

        sampler = PlanSampler(data, plan, micro_batch=64)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=2)
        for update, batches in sampler.updates(loader):
            for images, labels in batches: …

    Iterating gives one list of indices for each micro-batch of this rank, update after update. The
    order of the samples follows from (seed, epoch) alone, each sample is in exactly one micro-batch
    of one rank an epoch, and the samples of an update are the same on any number of ranks.

    data: map-style, with the plan's number of samples. micro_batch: samples of one forward, at most
    (one more where a single sample would be left). ghost_batch: micro-batches are cut at multiples
    of it; that of the model's `GhostBatchNorm2d`, 1 without such. start_update: updates done, to
    resume. world: of `hvd_lbt.init()` unless given. shuffle_block: shuffle blocks of so many
    samples that lie together, then shuffle_window blocks in a row; None: all samples. Raises
    UserError.
    """

    def __init__(
        self,
        data: Sized,
        plan: Plan,
        *,
        micro_batch: int,
        ghost_batch: int = 1,
        seed: int = 0,
        start_update: int = 0,
        world: World | None = None,
        shuffle_block: int | None = None,
        shuffle_window: int = 16,
    ) -> None:
        if len(data) != plan.train_samples:
            raise UserError(
                f"PlanSampler: the data has {len(data):,} samples, the plan was made for "
                f"{plan.train_samples:,}. Make it by make_plan(schedule, len(data))."
            )
        if plan.schedule.policy == "measured" and plan.growth is None:
            raise UserError(
                "PlanSampler: schedule.policy is measured, which decides the batches while "
                "`hvd_lbt train` trains. Take another policy, or make the plan with what such a "
                "run decided: make_plan(schedule, len(data), growth)."
            )
        for name, value, allowed in (
            ("micro_batch", micro_batch, micro_batch >= 1),
            ("ghost_batch", ghost_batch, ghost_batch >= 1),
            ("seed", seed, 0 <= seed < 2**63),
            ("start_update", start_update, 0 <= start_update <= plan.updates),
            ("shuffle_block", shuffle_block, shuffle_block is None or shuffle_block >= 2),
            ("shuffle_window", shuffle_window, shuffle_window >= 1),
        ):
            if not allowed:
                wanted = {
                    "seed": "0 to 2^63 − 1",
                    "start_update": f"0 to {plan.updates}",
                    "shuffle_block": "None or at least 2",
                }
                raise UserError(
                    f"PlanSampler: {name} is {value}; it must be {wanted.get(name, 'at least 1')}."
                )
        for ghosts in {stage.ghost_batch or ghost_batch for stage in plan.stages}:
            if micro_batch % ghosts:
                raise UserError(
                    f"PlanSampler: micro_batch {micro_batch} is no multiple of a ghost batch of "
                    f"{ghosts}; it must be, since ghost batches are not cut."
                )
        super().__init__(range(len(data)), micro_batch, drop_last=False)
        self.plan, self.seed, self.start_update = plan, seed, start_update
        self.micro_batch, self.ghost_batch = micro_batch, ghost_batch
        self._stream = partial(
            SampleStream,
            len(data),
            seed,
            shuffle_block=shuffle_block,
            shuffle_window=shuffle_window,
        )
        self._stream()  # raises UserError where the blocks cannot be
        if world is None:
            from hvd_lbt import comm  # not needed, nor Horovod, where the world is given

            world = comm.world()
        self.world = world

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for first, count, _ in self._ranges():
            yield stream.indices(first, count).tolist()

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self._ranges())

    def __len__(self) -> int:
        """Micro-batches of this rank, from start_update on."""
        return self._length

    def updates(self, loader: Iterable[Any]) -> Iterator[tuple[Update, MicroBatches[Any]]]:
        """Each update from start_update on, with this rank's batches of it from `loader`.

        `len(batches)` is 0 on a rank that has no samples in a small update; it still takes part in
        the sum, by `Training.update(update, batches)` or `reducer.backward(None)`.
        """
        return by_update(
            self._updates(),
            loader,
            self.world,
            micro_batch=self.micro_batch,
            ghost_batch=self.ghost_batch,
        )

    def _updates(self) -> Iterator[Update]:
        return (self.plan.at(index) for index in range(self.start_update, self.plan.updates))

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        return micro_batch_ranges(
            self._updates(),
            self.world,
            micro_batch=self.micro_batch,
            ghost_batch=self.ghost_batch,
        )
