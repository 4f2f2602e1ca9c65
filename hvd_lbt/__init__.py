"""Large-batch training for PyTorch on Horovod: grow the batch instead of decaying the learning rate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd_lbt.optim import FusedSGD as FusedSGD
    from hvd_lbt.reducer import GradientReducer as GradientReducer
    from hvd_lbt.world import World as World

__all__ = ["FusedSGD", "GradientReducer", "World"]
_HOME = {"FusedSGD": "optim", "GradientReducer": "reducer", "World": "world"}


def __getattr__(name: str) -> Any:
    """The public classes, imported when first asked for: the plan needs no torch."""
    if name in _HOME:
        return getattr(import_module(f"hvd_lbt.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hvd_lbt' has no attribute {name!r}")
