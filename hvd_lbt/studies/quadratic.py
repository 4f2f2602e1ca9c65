"""SGD on a quadratic loss whose curvature and gradient noise are known exactly.

The loss of sample i is ½ wᵀHw − xᵢᵀw, so its gradient is Hw − xᵢ: the noise of a batch does not
depend on the weights. H is diagonal: SGD does the same in every rotated basis, and the weights are
those along H's eigenvectors. Updates are those of `FusedSGD`, many trainings side by side.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_lbt import ops
from hvd_lbt.data.order import epoch_order
from hvd_lbt.optim import FusedSGD
from hvd_lbt.schedule.noise import noise_scale
from hvd_lbt.schedule.weight_variance import Sampling, largest_curvature

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An (ε, B, m), and the kind of momentum."""

    lr: float
    momentum: float
    global_batch: int
    nesterov: bool

    def stable(self, curvatures: Floats) -> NDArray[np.bool_]:
        """Which of the curvatures its updates do not diverge on: (modes,)."""
        return np.asarray(curvatures < largest_curvature(self.lr, self.momentum, self.nesterov))

    def burn_in(self, curvatures: Floats, updates: int) -> int:
        """Epochs of `updates` updates until w² is within e⁻⁵ of its stationary mean, every mode."""
        m, steps = self.momentum, self.lr * curvatures[self.stable(curvatures)]
        kept = 1 - steps if self.nesterov else np.ones_like(steps)
        roots = [
            np.roots([1, step - 1 - m * k, m * k]) for step, k in zip(steps, kept, strict=True)
        ]
        slowest = max(float(np.abs(both).max()) for both in roots)
        return math.ceil(-2.5 / math.log(slowest) / updates)


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Means of w² of each training: (trainings, modes), NaN where updates would diverge.

    mean: over all updates; end: over the ends of the epochs.
    """

    mean: Floats
    end: Floats


def settings_of_equal_noise(
    scale: float,
    train_samples: int,
    batches: Sequence[int],
    momenta: Sequence[tuple[float, bool]],
) -> list[Setting]:
    """One for each batch and (momentum, nesterov); its lr is the one that makes g = `scale`."""
    return [
        Setting(
            lr=scale / noise_scale(1, momentum, train_samples, batch),
            momentum=momentum,
            global_batch=batch,
            nesterov=nesterov,
        )
        for batch in batches
        for momentum, nesterov in momenta
    ]


def make_samples(train_samples: int, modes: int, seed: int) -> NDArray[np.float32]:
    """xᵢ as (N, modes): correlated between modes, each mode of mean 0 and variance 1 over the N."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((train_samples, modes)) @ generator.standard_normal(
        (modes, modes)
    )
    mixed -= mixed.mean(0)
    return (mixed / mixed.std(0)).astype(np.float32)


def batch_means(
    samples: NDArray[np.float32], batch: int, sampling: Sampling, trainings: int, epochs: int
) -> Iterator[Tensor]:
    """For each epoch the mean xᵢ of each batch: (N/B updates, trainings, modes). B divides N.

    Each training draws on its own: independent and subset from one generator, epoch by
    `epoch_order` with its number as the seed.
    """
    count, modes = samples.shape
    generator = np.random.default_rng([batch, len(sampling)])
    drawn = np.tile(np.arange(count), (trainings, 1))
    for epoch in range(epochs):
        if sampling == "epoch":
            for training in range(trainings):
                drawn[training] = epoch_order(training, epoch, count)
            chosen = drawn
        elif sampling == "independent":
            chosen = generator.integers(count, size=(trainings, count))
        else:
            subsets = [_shuffle_first(drawn, batch, generator) for _ in range(count // batch)]
            chosen = np.concatenate(subsets, axis=1)
        means = samples[chosen].reshape(trainings, count // batch, batch, modes).mean(2)
        yield torch.from_numpy(np.ascontiguousarray(means.transpose(1, 0, 2)))


def _shuffle_first(
    drawn: NDArray[np.int64], count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """The first `count` steps of a Fisher-Yates shuffle of each row, in place; a copy of them.

    From whatever permutation a row is in, they are a uniform draw without replacement.
    """
    rows = np.arange(len(drawn))
    others = generator.integers(np.arange(count)[:, None], drawn.shape[1], size=(count, len(drawn)))
    for place, other in enumerate(others):
        first = drawn[:, place].copy()
        drawn[:, place] = drawn[rows, other]
        drawn[rows, other] = first
    return drawn[:, :count].copy()


def simulate(
    settings: Sequence[Setting],
    curvatures: Floats,
    means: Iterator[Tensor],
    burn_in: int,
    trainings: int,
) -> list[Squares]:
    """Train all `settings` (of one batch) on the same batches; measure after `burn_in` epochs.

    means: of `batch_means`.
    """
    weights = [nn.Parameter(torch.zeros(trainings, len(curvatures))) for _ in settings]
    optimizer = FusedSGD(
        [
            {"params": [weight], "lr": one.lr, "momentum": one.momentum, "nesterov": one.nesterov}
            for one, weight in zip(settings, weights, strict=True)
        ]
    )
    h = torch.from_numpy(curvatures).float()
    kept = [torch.from_numpy(one.stable(curvatures)).float() for one in settings]
    all_updates = [torch.zeros(trainings, len(curvatures), dtype=torch.float64) for _ in settings]
    ends = [torch.zeros_like(total) for total in all_updates]
    updates = epochs = 0
    for epoch, noises in enumerate(means):
        sums = [torch.zeros(trainings, len(curvatures)) for _ in settings]
        for noise in noises:
            for weight, stable in zip(weights, kept, strict=True):
                weight.grad = (weight.detach() * h).sub_(noise).mul_(stable)
            optimizer.step()
            if epoch >= burn_in:
                for weight, total in zip(weights, sums, strict=True):
                    total.addcmul_(weight.detach(), weight.detach())
        if epoch >= burn_in:
            updates, epochs = updates + len(noises), epochs + 1
            for weight, total, summed, end in zip(weights, sums, all_updates, ends, strict=True):
                summed.add_(total)
                end.add_(weight.detach().double().square())

    def measured(total: Tensor, count: int, stable: Tensor) -> Floats:
        return np.where(stable.numpy() > 0, total.numpy() / count, np.nan)

    return [
        Squares(mean=measured(total, updates, stable), end=measured(end, epochs, stable))
        for total, end, stable in zip(all_updates, ends, kept, strict=True)
    ]


def difference_from_reference(
    samples: NDArray[np.float32], curvatures: Floats, setting: Setting, updates: int
) -> float:
    """How far one training of `simulate` is from plain torch in float64, in the basis of a rotated
    H, with gradients by autograd: the largest difference of a weight over the largest weight.
    """
    batch = setting.global_batch
    order = np.concatenate(
        [
            epoch_order(0, epoch, len(samples))
            for epoch in range(-(-updates * batch // len(samples)))
        ]
    )
    rotation = torch.linalg.qr(
        torch.randn(len(curvatures), len(curvatures), generator=torch.Generator().manual_seed(0))
    ).Q.double()
    hessian = rotation @ torch.diag(torch.from_numpy(curvatures)) @ rotation.T
    rotated = torch.from_numpy(samples).double() @ rotation.T
    plain = torch.zeros(len(curvatures), dtype=torch.float64, requires_grad=True)
    momentum = torch.zeros_like(plain)
    fused = nn.Parameter(torch.zeros(len(curvatures)))
    optimizer = FusedSGD(
        [fused], lr=setting.lr, momentum=setting.momentum, nesterov=setting.nesterov
    )
    largest = apart = 0.0
    for update in range(updates):
        chosen = torch.from_numpy(order[update * batch : (update + 1) * batch])
        loss = (0.5 * plain @ hessian @ plain - rotated[chosen] @ plain).mean()
        (gradient,) = torch.autograd.grad(loss, plain)
        _reference_update(plain.data, gradient, momentum, setting)
        means = torch.from_numpy(samples)[chosen].mean(0)
        fused.grad = fused.detach() * torch.from_numpy(curvatures).float() - means
        optimizer.step()
        seen = plain.detach() @ rotation
        largest = max(largest, float(seen.abs().max()))
        apart = max(apart, float((seen - fused.detach()).abs().max()))
    return apart / largest


def _reference_update(weights: Tensor, gradient: Tensor, momentum: Tensor, one: Setting) -> None:
    update: Callable[..., None] = ops.fused_sgd_reference
    update(
        [weights],
        [gradient],
        [momentum] if one.momentum else (),
        lr=one.lr,
        momentum=one.momentum,
        weight_decay=0.0,
        nesterov=one.nesterov,
        maximize=False,
    )


def end_of_epoch_variance(setting: Setting, curvature: float, train_samples: int) -> float:
    """The exact variance of a weight at the end of an epoch, with every sample once an epoch.

    In units of one sample's variance; inf where updates diverge. The state (w, b) at the ends of
    epochs is a linear process with independent noise: P = AᵏPAᵏᵀ + C, where C is what the k updates
    of one epoch add, less their mean's part (`schedule.weight_variance`). B divides N.
    """
    if not setting.stable(np.array([curvature]))[0]:
        return math.inf
    count = train_samples // setting.global_batch
    m, step = setting.momentum, setting.lr * curvature
    one = 1 + m if setting.nesterov else 1.0  # of the gradient, in the weight's step
    kept = m * m if setting.nesterov else m  # of the buffer
    matrix = np.array([[1 - step * one, -setting.lr * kept], [curvature, m]])
    power, summed = np.eye(2), np.zeros(2)
    added = np.zeros((2, 2))
    for _ in range(count):
        answer = power @ np.array([-setting.lr * one, 1.0])
        summed += answer
        added += np.outer(answer, answer)
        power = matrix @ power
    added -= np.outer(summed, summed) / count
    if count == 1:
        return 0.0
    stationary = np.linalg.solve(np.eye(4) - np.kron(power, power), added.ravel())
    return float(stationary[0]) / setting.global_batch * train_samples / (train_samples - 1)
