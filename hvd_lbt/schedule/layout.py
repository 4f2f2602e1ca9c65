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


def count_ghost_batches(samples: int, ghost_batch: int) -> int:
    """How many ghost batches `samples` consecutive samples are.

    All have `ghost_batch` samples but the last, which has the rest. A rest of one sample joins the
    ghost batch before it, since batch norm cannot normalise one value of a 1×1 feature map; so the
    last has 2 to ghost_batch + 1 samples, and one only if samples or ghost_batch is 1.
    """
    whole, rest = divmod(samples, ghost_batch)
    return max(1, whole + (rest > 1))


def count_micro_batches(global_batch: int, *, size: int, micro_batch: int, ghost_batch: int) -> int:
    """Micro-batches of one update on all `size` workers together, as `make_layout` cuts them."""
    each, more = divmod(count_ghost_batches(global_batch, ghost_batch), size)
    at_once = micro_batch // ghost_batch
    return more * -(-(each + 1) // at_once) + (size - more) * -(-each // at_once)


def largest_share(global_batch: int, ghost_batch: int, workers: int) -> int:
    """Samples of the worker with most ghost batches, each counted as whole."""
    return -(-count_ghost_batches(global_batch, ghost_batch) // workers) * ghost_batch


def typical_workers(ghost_batches: int, workers: int) -> set[int]:
    """Workers of which one does what any worker does: the most, the fewest, the smaller rest.

    Of G ghost batches on W workers, G mod W workers have one more than the others: the first worker
    never has, the last one has if any does and ends with the smaller rest, the third is another
    one.
    """
    more = ghost_batches % workers
    return {0, -(-workers // max(1, more)) - 1, workers - 1}


def make_layout(
    global_batch: int, *, rank: int, size: int, micro_batch: int, ghost_batch: int
) -> Layout:
    """The micro-batches of worker `rank` of `size`.

    The update's ghost batches (`count_ghost_batches`) are dealt in contiguous runs, as evenly as
    possible, and each run is cut into micro-batches of at most `micro_batch` samples, a multiple of
    `ghost_batch`; the update's last one may have one sample more. With fewer ghost batches than
    workers, some workers have no samples. Raises ValueError for impossible arguments.
    """
    if min(global_batch, ghost_batch, micro_batch) < 1 or not 0 <= rank < size:
        raise ValueError(f"{global_batch=}, {ghost_batch=}, {micro_batch=}, {rank=}, {size=}")
    if micro_batch % ghost_batch:
        raise ValueError(f"{micro_batch=} is no multiple of {ghost_batch=}")
    ghost_batches = count_ghost_batches(global_batch, ghost_batch)
    first, end = (ghost_batches * place // size for place in (rank, rank + 1))

    def start_of(ghost: int) -> int:
        return global_batch if ghost == ghost_batches else ghost * ghost_batch

    at_once = micro_batch // ghost_batch
    return Layout(
        micro_batches=tuple(
            range(start_of(ghost), start_of(min(ghost + at_once, end)))
            for ghost in range(first, end, at_once)
        )
    )
