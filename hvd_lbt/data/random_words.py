"""Random words by number, without a generator's state (pure)."""

import numpy as np
from numpy.typing import NDArray


def random_words(numbers: NDArray[np.integer], key: int = 0) -> NDArray[np.uint64]:
    """A random-looking 64-bit word for each number, of the same shape; another key, other words.

    SplitMix64's output function: G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014, figure 17 (variant 13 of D. Stafford's mixers).
    """
    words = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(key)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
