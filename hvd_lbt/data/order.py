"""Which sample comes where, and its random numbers: functions of (seed, epoch, position) (pure).

Both come from Philox 4×64 (J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), a function of key and counter with no state to keep. Only the generator's raw words are
used: NumPy promises their stream for all versions, and does not promise its `permutation`'s. The
order of an epoch is a `Permutation` whose key are such words: no array of N numbers is kept.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.block_order import BlockOrder, Windows
from hvd_lbt.data.permutation import ROUNDS_SMALL, Permutation, rounds_of
from hvd_lbt.errors import UserError

WORDS = 4  # 64-bit words that one value of Philox's counter gives
# What the words are for; each has keys of its own: Philox's second key word is 2^48·(purpose // 2)
# + 2·epoch + purpose % 2, and epochs stay below 2^47.
ORDER, UNIFORMS, MIXING, BLOCKS, WINDOWS = 0, 1, 2, 3, 4


# Which order this is. A checkpoint keeps it: a run can only be resumed in the order that it had.
# 1 (and checkpoints without a number): the stable sort of N random words. 2: `Permutation`.
ORDER_VERSION = 2


def other_version(kept: Mapping[str, Any]) -> int | None:
    """The version of the order that a checkpoint or a run was trained in; None: this program's."""
    version = int(kept.get("order_version", 1))
    return None if version == ORDER_VERSION else version


def epoch_permutation(seed: int, epoch: int, n: int) -> Permutation:
    """The order of n samples in this epoch, as a function of the position.

    seed in [0, 2^64), epoch in [0, 2^47), n in [1, 2^62].
    """
    key = _philox(seed, epoch, ORDER, 0).random_raw(rounds_of(n))
    return Permutation(n=n, key=key)


def order_at(seed: int, epoch: int, positions: NDArray[np.integer], n: int) -> NDArray[np.int64]:
    """The samples at these positions of the epoch's order: int64, of the same shape.

    Memory and time follow the number of positions, not n. positions: in [0, n).
    """
    return epoch_permutation(seed, epoch, n).at(positions)


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The whole order of n samples in this epoch: a permutation of 0 … n − 1, int64 (n,)."""
    return order_at(seed, epoch, np.arange(n), n)


def block_order(seed: int, epoch: int, windows: Windows) -> BlockOrder:
    """The order of an epoch whose samples are shuffled in blocks (`data.shuffle_block`)."""
    block_key = _philox(seed, epoch, BLOCKS, 0).random_raw(rounds_of(windows.blocks))
    window_key = _philox(seed, epoch, WINDOWS, 0).random_raw(ROUNDS_SMALL)
    return BlockOrder(windows=windows, block_key=block_key, window_key=window_key)


def sample_uniforms(
    seed: int,
    epoch: int,
    first_position: int,
    count: int,
    draws: int,
    *,
    purpose: int = UNIFORMS,
) -> NDArray[np.float64]:
    """`draws` numbers in [0, 1) for each position of [first, first + count): (count, draws).

    A position has ceil(draws / 4) counter values to itself, so a part of a range has the numbers
    that the whole range has there. purpose: another one has other numbers.
    """
    blocks = -(-draws // WORDS)
    generator = _philox(seed, epoch, purpose, first_position * blocks)
    words = generator.random_raw(count * blocks * WORDS).reshape(count, blocks * WORDS)
    bits = words[:, :draws] >> np.uint64(11)  # the 53 that float64 holds
    return bits.astype(np.float64) * 2.0**-53


def stream_ranges(first_sample: int, count: int, n: int) -> list[tuple[int, int, int]]:
    """[first, first + count) of the stream, cut at epochs: (epoch, first position, count) each.

    The stream is epoch 0's n samples in their order, then epoch 1's, and so on.
    """
    ranges = []
    at, end = first_sample, first_sample + count
    while at < end:
        epoch, position = divmod(at, n)
        length = min(end - at, n - position)
        ranges.append((epoch, position, length))
        at += length
    return ranges


class SampleStream:
    """The samples' indices, epoch after epoch, each in its own order. No order is kept in memory.

    n: samples of the training set, 1 … 2^62. shuffle_block: shuffle blocks of so many samples that
    lie together, then `shuffle_window` blocks in a row; None: all samples. Raises UserError for
    windows that are as large as the training set.
    """

    def __init__(
        self, n: int, seed: int, shuffle_block: int | None = None, shuffle_window: int = 1
    ):
        self.n, self.seed = n, seed
        self._windows: Windows | None = None
        if shuffle_block is not None:
            if shuffle_block * shuffle_window >= n:
                raise UserError(
                    f"data.shuffle_block: {shuffle_window:,} blocks (data.shuffle_window) of "
                    f"{shuffle_block:,} samples are shuffled together, and the training set has "
                    f"{n:,}: that is the whole shuffle. Leave both out, or make them smaller."
                )
            self._windows = Windows(n=n, block=shuffle_block, window=shuffle_window)
        self._epoch, self._order = 0, self._order_of(0)

    def indices(self, first: int, count: int) -> NDArray[np.int64]:
        """The indices of the stream's samples [first, first + count): int64 (count,)."""
        pieces = []
        for epoch, position, length in stream_ranges(first, count, self.n):
            self._to(epoch)
            pieces.append(self._order.at(np.arange(position, position + length)))
        return np.concatenate(pieces)

    def windows(self, first: int, count: int) -> dict[tuple[int, int], list[range]]:
        """The windows of these samples: (epoch, number) → the samples of its blocks, sorted.

        Empty without blocks: then every sample is read on its own.
        """
        found: dict[tuple[int, int], list[range]] = {}
        for epoch, position, length in stream_ranges(first, count, self.n):
            self._to(epoch)
            at, end = position, position + length
            while isinstance(self._order, BlockOrder) and at < end:
                number, blocks = self._order.window_of(at)
                found[epoch, number] = blocks
                at = self._order.window_end(number)
        return found

    def _to(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)

    def _order_of(self, epoch: int) -> Permutation | BlockOrder:
        if self._windows is None:
            return epoch_permutation(self.seed, epoch, self.n)
        return block_order(self.seed, epoch, self._windows)


def _philox(seed: int, epoch: int, purpose: int, counter: int) -> np.random.Philox:
    word = (purpose // 2 << 48) + 2 * epoch + purpose % 2
    return np.random.Philox(key=np.array([seed, word], np.uint64), counter=counter)
