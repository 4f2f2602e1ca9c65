"""Makes a network of any origin equal on any number of workers: ghost norms, masks by sample."""

from torch import nn
from torch.nn.modules.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    _BatchNorm,
)

from hvd_lbt.errors import UserError
from hvd_lbt.models.forward_samples import ForwardSamples, watch
from hvd_lbt.models.ghost_norm import GhostNorm
from hvd_lbt.models.random_masks import follow_samples

PLAIN = (BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm)


def prepare_model(model: nn.Module, *, ghost_batch: int, seed: int = 0) -> nn.Module:
    """Let batch norm and dropout of `model` work per ghost batch and per sample, in place.

        model = hvd_lbt.prepare_model(my_network(), ghost_batch=32)

    nn.BatchNorm1d, 2d, 3d and SyncBatchNorm (also timm's BatchNormAct2d, and subclasses that call
    `super().forward`) become ghost batch norms: statistics are of groups of `ghost_batch` samples,
    running statistics are the same on all ranks. nn.Dropout…, timm's DropPath and torchvision's
    StochasticDepth draw masks that follow (seed, the sample's place in the stream). Names of
    parameters and buffers, hooks, and layers that are used twice stay as they are, so that
    state_dict loads into the original and back. Returns `model`. Raises UserError for a batch norm
    that cannot be changed.
    """
    if ghost_batch < 1:
        raise UserError(f"prepare_model: ghost_batch is {ghost_batch}; it must be at least 1.")
    samples = ForwardSamples(seed)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, GhostNorm):
            _become_ghost_norm(name, module, ghost_batch, samples)
    follow_samples(model, samples)
    watch(model, samples)
    return model


def _become_ghost_norm(
    name: str, norm: _BatchNorm, ghost_batch: int, samples: ForwardSamples
) -> None:
    cls = type(norm)
    what = f"model: the batch norm {name or 'itself'} ({cls.__name__})"
    if norm.running_mean is None or norm.running_var is None:
        raise UserError(
            f"{what} has track_running_stats=False: it would normalise a test image by the others "
            "of its batch, so that the accuracy would depend on the number of workers. Make it "
            "with track_running_stats=True."
        )
    if cls.forward in (_BatchNorm.forward, SyncBatchNorm.forward):
        bases: tuple[type, ...] = (GhostNorm, cls)
    elif cls.__module__.startswith("timm.") and {"drop", "act"} <= norm._modules.keys():
        bases = (_NormThenActivation, cls)  # its forward repeats torch's batch norm
    elif isinstance(norm, SyncBatchNorm):
        raise UserError(
            f"{what} is a SyncBatchNorm with a forward of its own, which needs a process group of "
            "torch. Use nn.BatchNorm2d; ghost batches need no communication."
        )
    elif "super" in getattr(getattr(cls.forward, "__code__", None), "co_names", ()):
        plain = next(base for base in cls.__mro__ if base in PLAIN)
        between = type("GhostBatchNorm", (GhostNorm, plain), {"__module__": __name__})
        bases = (cls, between)  # its super().forward is the ghost norm's
    else:
        raise UserError(
            f"{what} has a forward of its own that does not call super().forward, so its "
            "statistics would be of whatever samples a worker has. Let it call super().forward(x) "
            "for the norm, or use nn.BatchNorm2d."
        )
    norm.__class__ = type(f"Ghost{cls.__name__}", bases, {"__module__": __name__})
    assert isinstance(norm, GhostNorm)
    object.__setattr__(norm, "samples", samples)
    norm.begin_collecting(ghost_batch)


class _NormThenActivation(GhostNorm):
    """timm's BatchNormAct2d and SyncBatchNormAct: the norm, a dropout, an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, images):
        return self.act(self.drop(super().forward(images)))
