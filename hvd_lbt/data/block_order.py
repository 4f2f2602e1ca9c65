"""The order of an epoch in which samples that lie together are read together (pure).

The index is cut into blocks of S samples that lie together; the last one may be shorter. The blocks
are shuffled, W of them in a row are a window, and the samples of each window are shuffled. Each
sample comes once. As the whole shuffle, it is a function of (seed, epoch, position) without an
array: three permutations by position (`permutation`), of the blocks and within windows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.permutation import Permutation, rounds_of
from hvd_lbt.data.random_words import random_words


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Blocks of `block` samples, `window` of which are shuffled together, of n samples.

    n: at most 2^62 − block.
    """

    n: int
    block: int
    window: int

    @property
    def blocks(self) -> int:
        """How many blocks there are, the last one perhaps shorter."""
        return -(-self.n // self.block)

    @property
    def missing(self) -> int:
        """Samples that the last block has less than the others."""
        return self.blocks * self.block - self.n


@dataclass(frozen=True, kw_only=True)
class BlockOrder:
    """The sample at each position of an epoch.

    block_key: uint64 (rounds_of(blocks),), random words that shuffle the blocks. window_key: uint64
    (24,) that shuffle within windows.
    """

    windows: Windows
    block_key: NDArray[np.uint64]
    window_key: NDArray[np.uint64]

    @cached_property
    def _blocks(self) -> Permutation:
        return Permutation(n=self.windows.blocks, key=self.block_key)

    @cached_property
    def _short_slot(self) -> int:
        """Where among the shuffled blocks the last of the index stands, which may be shorter."""
        return int(self._blocks.positions_of(np.array([self.windows.blocks - 1]))[0])

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The samples at these positions: int64, of the same shape. positions: in [0, n)."""
        its, places = self.windows, np.asarray(positions, dtype=np.int64)
        per_window = its.block * its.window
        window = self._padded(places) // per_window
        start = self._unpadded(window * per_window)
        last = its.blocks * its.block  # of the padded positions
        length = self._unpadded(np.minimum((window + 1) * per_window, last)) - start
        inside, tweak = places - start, random_words(window)
        shuffled = np.empty_like(inside)
        for size in map(int, np.unique(length)):  # whole windows, the short block's, the last one
            here = length == size
            order = Permutation(n=size, key=self.window_key[: rounds_of(size)])
            shuffled[here] = order.at(inside[here], tweak[here])
        slot, within = np.divmod(self._padded(start + shuffled), its.block)
        return self._blocks.at(slot) * its.block + within

    def window_of(self, position: int) -> tuple[int, list[range]]:
        """The window of a position and the samples of its blocks, in the order of the index."""
        its = self.windows
        padded = int(self._padded(np.array([position]))[0])
        window = padded // (its.block * its.window)
        slots = np.arange(window * its.window, min((window + 1) * its.window, its.blocks))
        firsts = np.sort(self._blocks.at(slots)) * its.block
        return window, [range(at, min(at + its.block, its.n)) for at in firsts.tolist()]

    def window_end(self, window: int) -> int:
        """The position after the last one of a window."""
        its = self.windows
        padded = min((window + 1) * its.window, its.blocks) * its.block
        return int(self._unpadded(np.array([padded]))[0])

    def _padded(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions as if the short block had as many samples as the others."""
        end = self._short_slot * self.windows.block + self.windows.block - self.windows.missing
        return positions + self.windows.missing * (positions >= end)

    def _unpadded(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of these padded starts of blocks."""
        end = self._short_slot * self.windows.block
        return starts - self.windows.missing * (starts > end)
