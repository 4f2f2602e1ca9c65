"""Which sample comes where, and its random numbers: functions of (seed, epoch, position) (pure).

Both come from Philox 4×64 (J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), a function of key and counter with no state to keep. Only the generator's raw words are
used: NumPy promises their stream for all versions, and does not promise its `permutation`'s. The
order of an epoch is a `Permutation` whose key are such words: no array of N numbers is kept.
"""

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.permutation import Permutation, rounds_of

WORDS = 4  # 64-bit words that one value of Philox's counter gives
# What the words are for; each has keys of its own: Philox's second key word is 2^48·(purpose // 2)
# + 2·epoch + purpose % 2, and epochs stay below 2^47.
ORDER, UNIFORMS, MIXING = 0, 1, 2


# Which order this is. A checkpoint keeps it: a run can only be resumed in the order that it had.
# 1 (and checkpoints without a number): the stable sort of N random words. 2: `Permutation`.
ORDER_VERSION = 2


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

    n: samples of the training set, 1 … 2^62.
    """

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epoch, self._order = -1, epoch_permutation(seed, 0, n)

    def indices(self, first: int, count: int) -> NDArray[np.int64]:
        """The indices of the stream's samples [first, first + count): int64 (count,)."""
        pieces = []
        for epoch, position, length in stream_ranges(first, count, self.n):
            if epoch != self._epoch:
                self._epoch, self._order = epoch, epoch_permutation(self.seed, epoch, self.n)
            pieces.append(self._order.at(np.arange(position, position + length)))
        return np.concatenate(pieces)


def _philox(seed: int, epoch: int, purpose: int, counter: int) -> np.random.Philox:
    word = (purpose // 2 << 48) + 2 * epoch + purpose % 2
    return np.random.Philox(key=np.array([seed, word], np.uint64), counter=counter)
