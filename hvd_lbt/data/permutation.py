"""A random permutation of 0 … n − 1 that needs no array: position → index, any n up to 2^62 (pure).

A Feistel network on pairs (left, right) with left < a, right < b and a·b just above n, so that the
halves need not be powers of two (J. Black and P. Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002, their generalised Feistel cipher). A round adds a keyed hash of one half to the other:
left ← left + hash(right) mod a, then right ← right + hash(left) mod b. What leaves [0, n) goes
through the network again until it is inside (cycle walking, the same paper).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LARGEST = 2**62  # halves stay below 2^31 + 2^27: times a 32-bit hash, they fit into 64 bits
# Rounds for n up to so many. The hash of a half of few values is a table of few entries, so that
# pairs of positions reach all pairs of indices equally often after more rounds only: with 8 rounds
# chi-square finds a bias up to n = 16 in 400,000 permutations, with 24 not even for n = 5.
SMALL, ROUNDS_SMALL, ROUNDS = 256, 24, 8
CANDIDATES = 64  # values of a that are tried, for a product a·b close to n
AT_ONCE = 8192  # positions computed together: their arrays stay in the second-level cache
HALF = np.uint64(32)
# Odd multipliers with irregular bits: Philox 4×64's two (Salmon et al., SC 2011, table 2).
FIRST, SECOND = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)


def rounds_of(n: int) -> int:
    """How many 64-bit words a permutation of n needs as its key."""
    return ROUNDS_SMALL if n <= SMALL else ROUNDS


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """A permutation of 0 … n − 1, chosen by its key.

    n: 1 … 2^62. key: uint64 (rounds_of(n),), random words. Raises ValueError for another n or
    another length of the key.
    """

    n: int
    key: NDArray[np.uint64]

    def __post_init__(self) -> None:
        if not 1 <= self.n <= LARGEST:
            raise ValueError(f"a permutation of {self.n} numbers; possible are 1 to 2^62")
        if len(self.key) != rounds_of(self.n):
            raise ValueError(f"a key of {len(self.key)} words; needed are {rounds_of(self.n)}")

    @cached_property
    def _halves(self) -> tuple[np.uint64, np.uint64]:
        """(a, b): near the square root of n, with the smallest product that is at least n."""
        root = math.isqrt(self.n - 1) + 1
        tried = range(root, root + min(root // 16, CANDIDATES) + 1)
        left = min(tried, key=lambda a: -self.n % a)
        return np.uint64(left), np.uint64(-(-self.n // left))

    def at(
        self, positions: NDArray[np.integer], tweak: NDArray[np.uint64] | None = None
    ) -> NDArray[np.int64]:
        """The indices at these positions: int64, of the same shape.

        positions: in [0, n), unchecked. tweak: a random word for each position; positions with the
        same word share a permutation, those with another word have another one.
        """
        return self._all(positions, tweak, backwards=False)

    def positions_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The inverse: at which positions these indices stand."""
        return self._all(indices, None, backwards=True)

    def _all(
        self,
        numbers: NDArray[np.integer],
        tweak: NDArray[np.uint64] | None,
        *,
        backwards: bool,
    ) -> NDArray[np.int64]:
        flat = np.array(numbers, dtype=np.uint64).reshape(-1)  # a copy, which is changed in place
        tweaks = None if tweak is None else np.broadcast_to(tweak, np.shape(numbers)).reshape(-1)
        n = np.uint64(self.n)
        for at in range(0, len(flat), AT_ONCE):
            part = flat[at : at + AT_ONCE]
            its = None if tweaks is None else tweaks[at : at + AT_ONCE]
            self._once(part, its, backwards=backwards)
            while len(outside := np.flatnonzero(part >= n)):
                again = part[outside]
                self._once(again, None if its is None else its[outside], backwards=backwards)
                part[outside] = again
        return flat.view(np.int64).reshape(np.shape(numbers))

    def _once(
        self, numbers: NDArray[np.uint64], tweak: NDArray[np.uint64] | None, *, backwards: bool
    ) -> None:
        """Once through the network, in place. numbers: uint64 below a·b."""
        a, b = self._halves
        left, right = np.divmod(numbers, b)
        hashed, other = np.empty_like(left), np.empty_like(left)
        numbered = list(enumerate(self.key))
        for number, word in reversed(numbered) if backwards else numbered:
            source, target, size = (right, left, a) if number % 2 == 0 else (left, right, b)
            np.bitwise_xor(source, word, out=hashed)
            if tweak is not None:
                np.add(hashed, tweak, out=hashed)
            np.multiply(hashed, FIRST, out=hashed)
            np.right_shift(hashed, HALF, out=other)
            np.bitwise_xor(hashed, other, out=hashed)
            np.multiply(hashed, SECOND, out=hashed)
            # the upper 32 bits are the hash; times size, shifted, they are uniform in [0, size)
            np.right_shift(hashed, HALF, out=hashed)
            np.multiply(hashed, size, out=hashed)
            np.right_shift(hashed, HALF, out=hashed)
            if backwards:
                np.subtract(size, hashed, out=hashed)
            # Modulo size: below it, target − size wraps around to more than any target.
            np.add(target, hashed, out=target)
            np.subtract(target, size, out=hashed)
            np.minimum(target, hashed, out=target)
        np.multiply(left, b, out=numbers)
        np.add(numbers, right, out=numbers)
