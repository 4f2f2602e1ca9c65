"""Training labels of which a share is random: the noise of a study, or a test of memorisation.

Which samples, and which labels they get, is a function of the sample's index alone: the same in
every epoch, on every rank, and for every run.seed (pure but for NumPy).
"""

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.random_words import random_words

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
    whether, which = (random_words(2 * indices + word, KEY) for word in (0, 1))
    drawn = (which % np.uint64(classes)).astype(np.int64)
    uniform = (whether >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.where((uniform < share) & (labels >= 0), drawn, labels)
