"""Ghost batch norm: statistics over consecutive groups of `ghost_batch` samples.

Because the layout cuts a global batch only at multiples of `ghost_batch`, a network with this norm
gives the same update on any number of workers, and the noise of batch norm stays what it was while
the global batch grows (Hoffer et al. 2017, arXiv:1705.08741; Smith et al. 2018 use groups of 64).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_lbt.errors import UserError
from hvd_lbt.models.forward_samples import ForwardSamples, is_recomputing
from hvd_lbt.schedule.layout import count_ghost_batches


class GhostNorm(nn.Module):
    """Batch norm of (n, C, …) over groups of `ghost_batch` samples; the last takes the rest.

    `hvd_lbt.schedule.layout.count_ghost_batches` says how large that is: a rest of one joins it.
    Parameters, buffers and evaluation are those of torch's batch norm. In training, forward only
    *collects* the statistics of its groups; `RunningStatistics` folds the whole update's into the
    running ones, which therefore change once an update, alike on every rank.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    collected: Tensor
    eps: float
    momentum: float | None
    ghost_batch: int
    samples: ForwardSamples | None = None  # where a sample may be several rows

    def begin_collecting(self, ghost_batch: int) -> None:
        """Make the buffer for what groups collect."""
        self.ghost_batch = ghost_batch
        # (2·C + 1): sums over groups of samples · mean, samples · unbiased variance, and samples.
        size = 2 * self.running_mean.numel() + 1
        self.register_buffer("collected", self.running_mean.new_zeros(size), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                images, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        rows = 1 if self.samples is None else self.samples.rows_of(len(images), type(self).__name__)
        samples, size = len(images) // rows, self.ghost_batch
        groups = count_ghost_batches(samples, size)
        if 1 in (size, samples) and rows == 1 and images[0, 0].numel() == 1:
            raise UserError(
                "a ghost batch of one sample reaches a batch norm on a 1×1 feature map, where one "
                "value has no variance. Make schedule.global_batch and layout.ghost_batch at least "
                "2 (and schedule.epochs such that the last update is no single sample), or "
                "data.image_size larger."
            )
        if not torch.compiler.is_compiling():
            sizes = [size] * (groups - 1) + [samples - size * (groups - 1)]
            parts = [(group, 1) for group in images.split([rows * each for each in sizes])]
        elif samples == size * groups:  # as few kernels for many groups as for one
            parts = [(images, groups)]
        else:
            whole = (groups - 1) * size * rows
            parts = [(images[:whole], groups - 1), (images[whole:], 1)]
        done = [self._normalise(part, groups, rows) for part, groups in parts if len(part)]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _normalise(self, images: Tensor, groups: int, rows: int) -> Tensor:
        """Normalise equal groups; several lie side by side, as the channels of one batch norm."""
        weight, bias, samples = self.weight, self.bias, len(images) // rows
        if groups > 1:
            images = images.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
            weight, bias = (None if p is None else p.repeat(groups) for p in (weight, bias))
        # momentum 1 makes batch_norm hand its statistics out instead of averaging them.
        channels = groups * self.running_mean.numel()
        mean_and_variance = self.collected.new_zeros(2, channels)
        mean, variance = mean_and_variance.unbind()
        normalised = F.batch_norm(
            images, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps
        )
        if groups > 1:
            normalised = normalised.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
            mean_and_variance = mean_and_variance.unflatten(1, (groups, -1)).sum(1)
        if not is_recomputing():  # they were collected the first time
            self.collected[:-1].add_(mean_and_variance.view(-1), alpha=samples // groups)
            self.collected[-1] += samples
        return normalised

    def extra_repr(self) -> str:
        return f"{self.running_mean.numel()}, ghost_batch={self.ghost_batch}"


class GhostBatchNorm2d(GhostNorm):
    """Batch norm of (n, C, H, W) over groups of `ghost_batch` samples; the last takes the rest.

    `hvd_lbt.schedule.layout.count_ghost_batches` says how large that is: a rest of one joins it.
    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`. In training, forward only
    *collects* the statistics of its groups; `RunningStatistics` folds the whole update's into the
    running ones, which therefore change once an update, alike on every rank.
    """

    def __init__(self, features: int, ghost_batch: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.begin_collecting(ghost_batch)


class RunningStatistics:
    """The running statistics of all ghost norms of a model, kept the same on every rank.

    `collected` is one flat fp32 tensor: the sums of this rank's groups in this update. The trainer
    sums it over the ranks (2·C + 1 floats a layer: 0.2 MB for ResNet-50) and calls `fold`.
    """

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, GhostNorm)]
        like = next(model.parameters())
        sizes = [norm.collected.numel() for norm in self.norms]
        self.collected = like.new_zeros(sum(sizes))
        for norm, view in zip(self.norms, self.collected.split(sizes), strict=True):
            norm.collected = view
        self._counts = torch.tensor(sizes, device=like.device).cumsum(0) - 1
        # A cumulative average (momentum=None) weighs all ghost batches alike.
        self._keeps = like.new_tensor([1 - (norm.momentum or 0.0) for norm in self.norms]).double()

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
        running ← (1−a)^k · running + (1−(1−a)^k) · Σ n_group · statistic / Σ n_group, a = 0.1. A
        norm that is called c times in a forward has c times as many groups; one that is not called,
        or is in eval mode, keeps its statistics.
        """
        if not self.norms:
            return
        counts = self.collected[self._counts].double()
        groups = count_ghost_batches(global_batch, self.norms[0].ghost_batch)
        groups_each = (groups * counts / global_batch).round()
        keeps = self._keeps**groups_each
        shares = ((1 - keeps) / counts.clamp(min=1)).float()
        parts = zip(
            self.norms, keeps.float(), shares, groups_each, counts.clamp(max=1).long(), strict=True
        )
        for norm, keep, share, k, called in parts:
            if norm.momentum is None:
                before = norm.num_batches_tracked.double()
                keep = (before / (before + k).clamp(min=1)).float()
                share = ((1 - keep) / norm.collected[-1].clamp(min=1)) * called
                keep = torch.where(called > 0, keep, torch.ones_like(keep))
                called = k.long()
            mean, variance = norm.collected[:-1].view(2, -1)
            norm.running_mean.mul_(keep).addcmul_(mean, share)
            norm.running_var.mul_(keep).addcmul_(variance, share)
            norm.num_batches_tracked += called
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
    norms = [m for m in model.modules() if isinstance(m, GhostNorm)]
    collected = [norm.collected.clone() for norm in norms]
    like = next(model.parameters())
    was_training = model.training
    devices = [like.device] if like.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()(like.new_zeros(1, 3, image_size, image_size))
    finally:
        model.train(was_training)
        for norm, before in zip(norms, collected, strict=True):
            norm.collected.copy_(before)
