"""Who makes the batches of a recipe: DALI, or the device's memory."""

from types import ModuleType

from hvd_lbt.recipe import DataRecipe


def batch_maker(data: DataRecipe) -> ModuleType:
    """The module whose `train_batches` and `evaluation_batches` make this recipe's batches."""
    if data.cache_on_device:
        from hvd_lbt.data import on_device

        return on_device
    from hvd_lbt.data import pipeline  # needs DALI

    return pipeline
