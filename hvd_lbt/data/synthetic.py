"""`--data synthetic`: random images that lie in memory, to see what a run would cost without
input.
"""

from pathlib import Path

import numpy as np

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe

SYNTHETIC = Path("synthetic")
TEST_SAMPLES = 1000


class SyntheticStore:
    """So many samples; every micro-batch of them is the same random images with the same labels."""

    def __init__(self, samples: int, classes: tuple[str, ...]):
        self.classes = classes
        self.labels = np.random.default_rng(0).integers(0, len(classes), samples)

    def __len__(self) -> int:
        return len(self.labels)


def synthetic_splits(recipe: Recipe) -> tuple[SyntheticStore, SyntheticStore]:
    """As many training images as data.train_samples says, of model.num_classes [1,000] classes."""
    if recipe.data.train_samples is None:
        raise UserError(
            f"--data synthetic: recipe {recipe.name} does not say how many images there are; give "
            "--set data.train_samples=N."
        )
    if recipe.data.label_noise:
        raise UserError(
            "data.label_noise has no effect with --data synthetic, whose labels are random: leave "
            "it out."
        )
    classes = tuple(str(label) for label in range(recipe.model.num_classes or 1000))
    train = SyntheticStore(recipe.data.train_samples, classes)
    return train, SyntheticStore(min(TEST_SAMPLES, len(train)), classes)
