"""Ghost batch norm: statistics over consecutive groups of `ghost_batch` samples.

Because the layout cuts a global batch only at multiples of `ghost_batch`, a network with this norm
gives the same update on any number of workers, and the noise of batch norm stays what it was while
the global batch grows (Hoffer et al. 2017, arXiv:1705.08741; Smith et al. 2018 use groups of 64).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_lbt.errors import UserError
from hvd_lbt.schedule.layout import count_ghost_batches


class GhostBatchNorm2d(nn.Module):
    """Batch norm of (n, C, H, W) over groups of `ghost_batch` samples; the last takes the rest.

    `hvd_lbt.schedule.layout.count_ghost_batches` says how large that is: a rest of one joins it.
    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`. In training, forward only
    *collects* the statistics of its groups; `RunningStatistics` folds the whole update's into the
    running ones, which therefore change once an update, alike on every rank.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    collected: Tensor

    def __init__(self, features: int, ghost_batch: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.ghost_batch, self.eps, self.momentum = ghost_batch, eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # (2, C): sums over groups of samples · mean and samples · unbiased variance.
        self.register_buffer("collected", torch.zeros(2, features), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                images, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        size = self.ghost_batch
        groups = count_ghost_batches(len(images), size)
        if 1 in (size, len(images)) and images[0, 0].numel() == 1:
            raise UserError(
                "a ghost batch of one sample reaches a batch norm on a 1×1 feature map, where one "
                "value has no variance. Make schedule.global_batch and layout.ghost_batch at least "
                "2 (and schedule.epochs such that the last update is no single sample), or "
                "data.image_size larger."
            )
        if not torch.compiler.is_compiling():
            sizes = [size] * (groups - 1) + [len(images) - size * (groups - 1)]
            parts = [(group, 1) for group in images.split(sizes)]
        elif len(images) == size * groups:  # as few kernels for many groups as for one
            parts = [(images, groups)]
        else:
            whole = groups - 1
            parts = [(images[: whole * size], whole), (images[whole * size :], 1)]
        done = [self._normalise(part, groups) for part, groups in parts if len(part)]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _normalise(self, images: Tensor, groups: int) -> Tensor:
        """Normalise equal groups; several lie side by side, as the channels of one batch norm."""
        weight, bias = self.weight, self.bias
        if groups > 1:
            images = images.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
            weight, bias = weight.repeat(groups), bias.repeat(groups)
        # momentum 1 makes batch_norm hand its statistics out instead of averaging them.
        mean_and_variance = self.collected.new_zeros(2, len(weight))
        mean, variance = mean_and_variance.unbind()
        normalised = F.batch_norm(
            images, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps
        )
        if groups > 1:
            normalised = normalised.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
            mean_and_variance = mean_and_variance.unflatten(1, (groups, -1)).sum(1)
        self.collected.add_(mean_and_variance, alpha=len(images))
        return normalised

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, ghost_batch={self.ghost_batch}"


class RunningStatistics:
    """The running statistics of all ghost norms of a model, kept the same on every rank.

    `collected` is one flat fp32 tensor: the sums of this rank's groups in this update. The trainer
    sums it over the ranks (2·C floats a layer: 0.2 MB for ResNet-50) and calls `fold`.
    """

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm2d)]
        like = next(model.parameters())
        self.collected = like.new_zeros(sum(n.collected.numel() for n in self.norms))
        views = self.collected.split([n.collected.numel() for n in self.norms])
        for norm, view in zip(self.norms, views, strict=True):
            norm.collected = view.view(2, -1)

    @property
    def ghost_batch(self) -> int | None:
        """Samples that share statistics, of the first norm; None for a model without ghost
        norms.
        """
        return self.norms[0].ghost_batch if self.norms else None

    def use_ghost_batch(self, ghost_batch: int) -> None:
        """From now on so many samples share statistics."""
        for norm in self.norms:
            norm.ghost_batch = ghost_batch

    def fold(self, global_batch: int) -> None:
        """Average the world's collected statistics into the running ones and begin a new update.

        An update of k groups moves the average as far as k updates of one group would:
        running ← (1−a)^k · running + (1−(1−a)^k) · Σ n_group · statistic / global_batch, a = 0.1.
        """
        for norm in self.norms:
            keep = (1 - norm.momentum) ** count_ghost_batches(global_batch, norm.ghost_batch)
            mean, variance = norm.collected
            norm.running_mean.mul_(keep).add_(mean, alpha=(1 - keep) / global_batch)
            norm.running_var.mul_(keep).add_(variance, alpha=(1 - keep) / global_batch)
            norm.num_batches_tracked += 1
        self.collected.zero_()

    def discard(self) -> None:
        """Forget what an update collected, as if it had not been."""
        self.collected.zero_()


@torch.no_grad()
def check_one_sample(model: nn.Module, image_size: int) -> None:
    """Raise UserError if the model in training cannot take a ghost batch of one sample.

    Only its forward knows where a feature map is 1×1. Call it before training, where a plan has
    such ghost batches; random numbers and collected statistics stay as they are.
    """
    norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm2d)]
    collected = [norm.collected.clone() for norm in norms]
    like = next(model.parameters())
    was_training = model.training
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        model.train()(like.new_zeros(1, 3, image_size, image_size))
    model.train(was_training)
    for norm, before in zip(norms, collected, strict=True):
        norm.collected.copy_(before)
