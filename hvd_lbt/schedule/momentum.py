"""A momentum that rises over many updates, and how full the momentum buffer is (pure).

The buffer is v_t = m_t·v_{t−1} + gradient, zero at first, and an update moves the weights by
−ε_t·v_t. With a constant gradient a constant momentum brings v to L = 1/(1−m) gradients, the number
of updates over which it averages. If m rises so that L grows by b an update, v_t tends to
(L_t + b)/(1 + b): the buffer stays 1/(1+b) full, whatever L is. So a rise that is linear in 1/(1−m)
keeps every update nearly as long as ε/(1−m) says, where a jump begins (1−m')/(1−m) full.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import exp, lgamma, log1p, sqrt

RISE = sqrt(2)  # of the batch and of 1/(1−m), from one step of a ramp to the next
MANY = 1e7  # updates in which L grows by itself: from here on L counts as constant


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """1/(1−m) rises linearly, in samples, from `first` to `last` momentum; times are in epochs."""

    begin: float
    end: float
    first: float
    last: float

    def at(self, epoch: float) -> float:
        """The momentum of an update that begins at `epoch`; `first` before, `last` after it."""
        if epoch >= self.end:
            return self.last
        low, high = 1 / (1 - self.first), 1 / (1 - self.last)
        passed = max(0.0, (epoch - self.begin) / (self.end - self.begin))
        return 1 - 1 / (low + (high - low) * passed)

    def steps(self) -> Iterator[tuple[float, float]]:
        """(epoch, momentum) of each step of √2 in 1/(1−m), where the line reaches it; then the
        end.
        """
        low, high = 1 / (1 - self.first), 1 / (1 - self.last)
        for rise in count():
            length = low * RISE**rise
            if length >= high * (1 - 1e-9):
                break
            share = (length - low) / (high - low)
            yield self.begin + (self.end - self.begin) * share, 1 - 1 / length
        yield self.end, self.last


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """The momentum buffer after some updates, with a gradient that is always 1.

    length: v, in gradients; momentum: of the last update.
    """

    length: float = 0.0
    momentum: float = 0.0

    @property
    def settled(self) -> float:
        """v·(1−m): the last update's length as a share of ε/(1−m)."""
        return self.length * (1 - self.momentum)

    def after(self, first: float, last: float, updates: int, *, rescale: bool = False) -> "Buffer":
        """After `updates` more, with 1/(1−m) rising linearly from the first's momentum to the last.

        rescale: the buffer is multiplied by (1−m_old)/(1−m_new) where m changes. Closed forms: for
        a constant m, v·(1−m) nears 1 by the factor m an update; for L_t = L_0 + b·t the recursion
        has the particular solution (L_t + b)/(1+b), and what differs from it shrinks by the product
        of the m_t (rescaled: so does 1 − v·(1−m)).
        """
        if not updates:
            return self
        low, high = 1 / (1 - first), 1 / (1 - last)
        slope = (high - low) / (updates - 1) if updates > 1 else 0.0
        left = _product(low, slope, updates)
        begin = self.length if self.momentum else 0.0  # SGD without momentum keeps no buffer
        if rescale:
            # Before the first update nothing is there that could be rescaled: settled is 0.
            return Buffer(
                length=(1 - (1 - begin * (1 - self.momentum)) * left) * high, momentum=last
            )
        length = (high + slope) / (1 + slope) + (begin - low / (1 + slope)) * left
        return Buffer(length=length, momentum=last)


def _product(low: float, slope: float, updates: int) -> float:
    """m_0·m_1·…, of `updates` momenta 1 − 1/L with L = low, low + slope, …: a quotient of gammas.

    Π (L_t − 1)/L_t = Γ(n + (low−1)/b)·Γ(low/b) / (Γ((low−1)/b)·Γ(n + low/b)) for a slope b.
    """
    if low <= 1:
        return 0.0  # m_0 is 0
    if low >= MANY * slope:
        middle = low + slope * (updates - 1) / 2
        return _exp(updates * log1p(-1 / middle))
    before, after = (low - 1) / slope, low / slope
    return _exp(lgamma(updates + before) - lgamma(before) + lgamma(after) - lgamma(updates + after))


def _exp(logarithm: float) -> float:
    return min(1.0, exp(logarithm))
