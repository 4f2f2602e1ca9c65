"""Which sample comes where, and its random numbers: functions of (seed, epoch, position) (pure).

Both come from Philox 4×64 (J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), a function of key and counter with no state to keep. Only the generator's raw words are
used: NumPy promises their stream for all versions, and does not promise its `permutation`'s.
"""

import numpy as np
from numpy.typing import NDArray

WORDS = 4  # 64-bit words that one value of Philox's counter gives
# What the words are for; each has keys of its own: Philox's second key word is 2^48·(purpose // 2)
# + 2·epoch + purpose % 2, and epochs stay below 2^47.
ORDER, UNIFORMS, MIXING = 0, 1, 2


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of n samples in this epoch: a permutation of 0 … n − 1, int64 (n,).

    seed in [0, 2^64), epoch in [0, 2^47).
    """
    words = _philox(seed, epoch, ORDER, 0).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


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
    """The samples' indices, epoch after epoch, each in its own order; the newest order is kept."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, first: int, count: int) -> NDArray[np.int64]:
        """The indices of the stream's samples [first, first + count): int64 (count,)."""
        pieces = []
        for epoch, position, length in stream_ranges(first, count, self.n):
            if epoch != self._epoch:
                self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self.n)
            pieces.append(self._order[position : position + length])
        return np.concatenate(pieces)


def _philox(seed: int, epoch: int, purpose: int, counter: int) -> np.random.Philox:
    word = (purpose // 2 << 48) + 2 * epoch + purpose % 2
    return np.random.Philox(key=np.array([seed, word], np.uint64), counter=counter)
