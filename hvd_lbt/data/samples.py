"""The stream of training samples, and what a batch of them is."""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from hvd_lbt.data.crops import DRAWS
from hvd_lbt.data.labels import Labels
from hvd_lbt.data.order import SampleStream, sample_uniforms, stream_ranges
from hvd_lbt.data.pixels import Encoded
from hvd_lbt.recipe import DataRecipe

SKIPPED = -100  # the label of a sample that is not to count: cross_entropy gives it no loss


class Images(Protocol):
    """The samples of one split by index, of files (`Store`) or a Python data set (`OwnData`)."""

    classes: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray | Labels:
        """int64 (n,); a sample's is known at the latest once its image was asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What errors call sample `index`."""

    def image(self, index: int) -> Encoded:
        """The image of sample `index`. Raises SampleError if its bytes are no whole image."""


class Batch(NamedTuple):
    """images: fp32 (n, 3, H, W), normalised; labels: int64 (n,), SKIPPED where a sample was bad."""

    images: Tensor
    labels: Tensor


class TrainSamples:
    """The stream of training samples, epoch after epoch, each in its own order."""

    def __init__(self, store: Images, seed: int, data: DataRecipe):
        self.store, self.seed = store, seed
        stream = SampleStream(len(store), seed, data.shuffle_block, data.blocks_in_window)
        self.indices, self.windows = stream.indices, stream.windows

    def uniforms(self, first: int, count: int) -> np.ndarray:
        """Their random numbers: fp64 (count, DRAWS) in [0, 1)."""
        pieces = [
            sample_uniforms(self.seed, epoch, position, length, DRAWS)
            for epoch, position, length in stream_ranges(first, count, len(self.store))
        ]
        return np.concatenate(pieces)
