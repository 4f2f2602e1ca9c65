"""How many samples one forward takes, by stage and in evaluation, and what to take when memory runs
out.

Ghost batches make an update independent of the micro-batch, so it may be smaller from any update
on.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule.layout import largest_share
from hvd_lbt.schedule.plan import Plan, Update, micro_batch_ranges
from hvd_lbt.world import World

Batch = TypeVar("Batch")
Range = tuple[int, int, int]  # first sample of the stream, count, ghost batch


@dataclass(frozen=True, kw_only=True)
class MicroBatchSizes:
    """Samples of one forward, at most.

    stages: by stage of the plan, each a multiple of the stage's ghost batch; evaluation: of test
    images. asked: what the recipe says, a number or auto; hardware: of the ranks that began with
    these.
    """

    stages: tuple[int, ...]
    evaluation: int
    asked: int | str = "auto"
    hardware: tuple[str, ...] = ()

    def smaller(
        self, update: Update, ghost_batches: Sequence[int], world: World
    ) -> "MicroBatchSizes | None":
        """About half of what `update` had; None where that is one ghost batch already.

        ghost_batches: by stage. The stages of larger sizes are limited to the same number.
        """
        ghost_batch = ghost_batches[update.stage]
        most = largest_share(update.global_batch, ghost_batch, world.size)
        whole = min(self.stages[update.stage], most) // ghost_batch
        if whole <= 1:
            return None
        limit = -(-whole // 2) * ghost_batch
        stages = tuple(
            max(ghosts, min(size, limit) // ghosts * ghosts)
            for size, ghosts in zip(self.stages, ghost_batches, strict=True)
        )
        return replace(self, stages=stages)

    def replanned(
        self, before: Plan, after: Plan, ghost_batches: Sequence[int]
    ) -> "MicroBatchSizes":
        """Of the stages of `after`, whose ghost batches are given: what the same phase has in
        `before`, or the phase before it, in whole ghost batches.
        """
        phases = [stage.phase for stage in before.stages]
        stages = []
        for stage, ghost_batch in zip(after.stages, ghost_batches, strict=True):
            size = self.stages[max(0, bisect_right(phases, stage.phase) - 1)]
            stages.append(max(ghost_batch, size // ghost_batch * ghost_batch))
        return replace(self, stages=tuple(stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "stages": list(self.stages),
            "evaluation": self.evaluation,
            "asked": self.asked,
            "hardware": list(self.hardware),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "MicroBatchSizes":
        """What `to_dict` gave."""
        return cls(
            stages=tuple(state["stages"]),
            evaluation=state["evaluation"],
            asked=state["asked"],
            hardware=tuple(state["hardware"]),
        )


class UpdateStream(Generic[Batch]):
    """Each update with this rank's micro-batches; they can be cut anew from the present update on.

    make(ranges, micro_batch): begins the source of the batches of these ranges, of at most
    micro_batch samples each (one more in a last one). ghost_batches: by stage of the plan.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        make: Callable[[Iterable[Range], int], Iterator[Batch]],
        world: World,
        sizes: MicroBatchSizes,
        ghost_batches: Sequence[int],
    ):
        self._updates, self._make, self._world = updates, make, world
        self.sizes, self.ghost_batches = sizes, ghost_batches
        self._place = 0
        self._source: Iterator[Batch] | None = None
        self._batches: MicroBatches[Batch] | None = None

    def __iter__(self) -> Iterator[tuple[Update, MicroBatches[Batch]]]:
        self._place = 0
        while self._place < len(self._updates):
            update = self._update = self._updates[self._place]
            yield update, self._next()
            assert self._batches is not None
            self._batches.check_all_taken(update)
            self._place += 1

    def replan(
        self, updates: Sequence[Update], sizes: MicroBatchSizes, ghost_batches: Sequence[int]
    ) -> None:
        """Go on with other updates after the present one, whose micro-batches are all taken.

        The stages that `sizes` and `ghost_batches` are of are those of the new plan.
        """
        assert self._batches is not None
        self._batches.check_all_taken(self._update)
        self.close()
        self.sizes, self.ghost_batches = sizes, ghost_batches
        self._updates, self._place = updates, -1

    def again(self, sizes: MicroBatchSizes) -> MicroBatches[Batch]:
        """The micro-batches of the present update once more, of other sizes; so are later ones.

        The batches come from a new source: their samples, crops and pixels are functions of the
        place in the stream alone.
        """
        self.close()
        self.sizes = sizes
        return self._next()

    def close(self) -> None:
        """End the source, and with it what it has prepared."""
        close = getattr(self._source, "close", None)
        self._source = None
        if close is not None:
            close()

    def shapes(self, sizes: MicroBatchSizes) -> set[tuple[int, int, int | None]]:
        """(samples, ghost batch, image size) of all micro-batches from the present update on."""
        return {
            (count, ghost_batch, update.image_size)
            for update in self._updates[max(0, self._place) :]
            for _, count, ghost_batch in self._ranges([update], sizes)
        }

    def _next(self) -> MicroBatches[Batch]:
        if self._source is None:
            most = max(self.sizes.stages[self._update.stage :])
            self._source = self._make(self._ranges(self._updates[self._place :], self.sizes), most)
        self._batches = MicroBatches.of_update(
            self._update, self._source, self._world, **self._cut(self._update, self.sizes)
        )
        return self._batches

    def _ranges(self, updates: Iterable[Update], sizes: MicroBatchSizes) -> Iterator[Range]:
        for update in updates:
            yield from micro_batch_ranges([update], self._world, **self._cut(update, sizes))

    def _cut(self, update: Update, sizes: MicroBatchSizes) -> dict[str, int]:
        stage = update.stage
        return {"micro_batch": sizes.stages[stage], "ghost_batch": self.ghost_batches[stage]}
