"""How one global batch is split over workers and micro-batches (pure).

The global batch is exact whatever the number of workers; only ghost batches are never cut.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One worker's part of one update.

    micro_batches: consecutive ranges of offsets within the update, [0, B); none for a worker
    without samples.
    """

    micro_batches: tuple[range, ...]

    @property
    def local_batch(self) -> int:
        """Samples of this worker."""
        return sum(len(part) for part in self.micro_batches)


def make_layout(
    global_batch: int, *, rank: int, size: int, micro_batch: int, ghost_batch: int
) -> Layout:
    """The micro-batches of worker `rank` of `size`.

    The update's ceil(B / ghost_batch) ghost batches (the last may be smaller) are dealt in
    contiguous runs, as evenly as possible, and each run is cut into micro-batches of at most
    `micro_batch` samples, a multiple of `ghost_batch`. With fewer ghost batches than workers, some
    workers have no samples. Raises ValueError for arguments that are none of this.
    """
    if min(global_batch, ghost_batch, micro_batch) < 1 or not 0 <= rank < size:
        raise ValueError(f"{global_batch=}, {ghost_batch=}, {micro_batch=}, {rank=}, {size=}")
    if micro_batch % ghost_batch:
        raise ValueError(f"{micro_batch=} is no multiple of {ghost_batch=}")
    ghost_batches = -(-global_batch // ghost_batch)
    first, end = (
        min(global_batch, ghost_batches * place // size * ghost_batch) for place in (rank, rank + 1)
    )
    starts = range(first, end, micro_batch)
    return Layout(
        micro_batches=tuple(range(start, min(start + micro_batch, end)) for start in starts)
    )
