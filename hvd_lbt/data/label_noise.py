"""Training labels of which a share is random: the noise of a study, or a test of memorisation.

Which samples, and which labels they get, is a function of the sample's index alone: the same in
every epoch, on every rank, and for every run.seed (pure but for NumPy).
"""

import numpy as np
from numpy.typing import NDArray

KEY = 0x6C6162656C730001  # another has other random labels


def noisy_labels(
    labels: NDArray[np.int64], indices: NDArray[np.int64], classes: int, share: float
) -> NDArray[np.int64]:
    """`labels` (n,) of the samples `indices` (n,), `share` of them drawn anew from all classes.

    A drawn label is uniform over 0 … classes − 1, and may be the right one. Labels below 0 (of
    skipped samples) stay.
    """
    if not share:
        return labels
    whether, which = (_hash(2 * indices.astype(np.uint64) + np.uint64(word)) for word in (0, 1))
    drawn = (which % np.uint64(classes)).astype(np.int64)
    uniform = (whether >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.where((uniform < share) & (labels >= 0), drawn, labels)


def _hash(counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Random words at these counters: SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    words = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(KEY)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
