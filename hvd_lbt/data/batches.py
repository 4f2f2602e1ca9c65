"""Who makes the batches of a recipe: DALI, or the device's memory."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from types import ModuleType
from typing import Any

from hvd_lbt.data.samples import Batch, Images
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.recipe import DataRecipe


def batch_maker(data: DataRecipe) -> ModuleType:
    """The module whose `train_batches` and `evaluation_batches` make this recipe's batches."""
    if data.cache_on_device:
        from hvd_lbt.data import on_device

        return on_device
    from hvd_lbt.data import pipeline  # needs DALI

    return pipeline


def batches_of(
    store: Images | SyntheticStore,
    data: DataRecipe,
    ranges: Iterable[tuple[int, int, int]],
    image_size_at: Callable[[int], int | None],
    **options: Any,
) -> Iterator[Batch]:
    """One batch for each (first sample of the stream, count, ghost batch) of `ranges`, of its size.

    image_size_at: the size of the images at a sample of the stream, None: data.image_size. options:
    the others of `train_batches`. Where the size changes, another pipeline begins when the last
    batch of the one before has been taken: nothing is made ahead across it.
    """
    for image_size, some in groupby(ranges, key=lambda part: image_size_at(part[0])):
        sized = data.at(image_size)
        yield from batch_maker(sized).train_batches(store, sized, some, **options)
