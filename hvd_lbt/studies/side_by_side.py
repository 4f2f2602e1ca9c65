"""Train many small perceptrons at once: the same plan, each with its own seed, data and weights.

For studies of hundreds of trainings: a network of some thousand weights costs more in calls than in
arithmetic, so these networks share their calls. Each one's weights are those that `FusedSGD` gives
it alone (tests/unit/test_side_by_side.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hvd_lbt.data.order import SampleStream
from hvd_lbt.schedule.plan import Plan, PlannedUpdates, Update, make_plan
from hvd_lbt.schedule.settings import Schedule


@dataclass(frozen=True, kw_only=True)
class Task:
    """Training samples of S networks and the test samples of all of them.

    inputs: float32 (S, N, features), labels: int64 (S, N); test_inputs: (n, features), test_labels:
    (n,). S networks have S data sets, so that what they find is independent.
    """

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One value a network: test accuracy and accuracy on the training labels in percent, losses in
    nats. A network that diverged has the loss of the null model, ln(classes), and its accuracy.
    """

    accuracy: list[float]
    test_loss: list[float]
    train_accuracy: list[float]
    train_loss: list[float]


class Perceptrons:
    """S networks with one hidden layer of `width` ReLUs, drawn as `models.Perceptron` draws one.

    weights: (S, features, width), (S, 1, width), (S, classes, width), (S, classes, 1). Classes come
    before samples: that is the order in which the products and the softmax are fast on a CPU.
    """

    def __init__(self, features: int, width: int, classes: int, seeds: Sequence[int]):
        first, last = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            scale = (2 / features) ** 0.5
            first.append(scale * torch.randn(features, width, generator=generator))
            last.append((2 * torch.rand(classes, width, generator=generator) - 1) / width**0.5)
        count = len(seeds)
        self.weights = [
            torch.stack(first),
            torch.zeros(count, 1, width),
            torch.stack(last),
            torch.zeros(count, classes, 1),
        ]

    def logits(self, inputs: Tensor) -> Tensor:
        """(S, n, features), or (n, features) for all of them → (S, classes, n)."""
        return self._forward(inputs.expand(len(self.weights[0]), -1, -1))[1]

    def gradients(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Of each network's mean cross-entropy. inputs: (S, B, features), labels: (S, B)."""
        hidden, logits = self._forward(inputs)
        output = logits.softmax(1)
        minus = torch.full_like(output[:, :1], -1.0)
        output.scatter_add_(1, labels[:, None], minus).div_(labels.shape[1])
        inner = torch.bmm(output.transpose(1, 2), self.weights[2])
        # one pass; a product with a mask of booleans takes twenty times as long
        inner = torch.ops.aten.threshold_backward(inner, hidden, 0)
        return [
            torch.bmm(inputs.transpose(1, 2), inner),
            inner.sum(1, keepdim=True),
            torch.bmm(output, hidden),
            output.sum(2, keepdim=True),
        ]

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        first, first_bias, last, last_bias = self.weights
        hidden = torch.baddbmm(first_bias, inputs, first).clamp_min_(0)
        return hidden, torch.baddbmm(last_bias, last, hidden.transpose(1, 2))


def train_on_teacher(
    schedule: Schedule,
    *,
    train_samples: int,
    test_samples: int,
    label_noise: float,
    width: int,
    seeds: Sequence[int],
) -> tuple[Plan, Outcomes]:
    """The plan of this schedule, and what came of it on `teacher_task`'s data; one value a seed."""
    task = teacher_task(
        train_samples=train_samples, test_samples=test_samples, seeds=seeds, label_noise=label_noise
    )
    plan = make_plan(schedule, train_samples)
    return plan, train_side_by_side(task, plan, width=width, seeds=seeds)


@torch.inference_mode()
def train_side_by_side(
    task: Task,
    plan: Plan,
    *,
    width: int,
    seeds: Sequence[int],
    weight_decay: Callable[[Update], float] | None = None,
) -> Outcomes:
    """Train one perceptron a seed for the whole plan; the order of samples is that of its seed.

    weight_decay: λ of each update, on the weights of the layers and not on biases, added to the
    gradient as `FusedSGD` adds it. Raises ValueError if seeds and data sets differ in number.
    """
    count, samples, features = task.inputs.shape
    if len(seeds) != count or plan.train_samples != samples:
        raise ValueError(
            f"{len(seeds)} seeds and a plan for {plan.train_samples} samples; the task has {count} "
            f"data sets of {samples}"
        )
    networks = Perceptrons(features, width, task.classes, seeds)
    momenta = [torch.zeros_like(weight) for weight in networks.weights]
    streams = [SampleStream(samples, seed) for seed in seeds]
    inputs, labels = task.inputs.flatten(0, 1), task.labels.flatten()
    first_of_set = samples * torch.arange(count)[:, None]
    for update in PlannedUpdates(plan):
        where = np.stack([one.indices(update.samples_seen, update.global_batch) for one in streams])
        chosen = (torch.from_numpy(where) + first_of_set).flatten()
        batch = inputs.index_select(0, chosen).view(*where.shape, features)
        gradients = networks.gradients(batch, labels[chosen].view(where.shape))
        for weight, momentum, gradient in zip(networks.weights, momenta, gradients, strict=True):
            if weight_decay and 1 not in weight.shape[1:]:  # a layer's weights, not its bias
                gradient.add_(weight, alpha=weight_decay(update))
            momentum.mul_(update.momentum).add_(gradient)
            weight.add_(momentum, alpha=-update.lr)
    accuracy, test_loss = _judge(networks, task.test_inputs, task.test_labels.expand(count, -1))
    train_accuracy, train_loss = _judge(networks, task.inputs, task.labels)
    return Outcomes(
        accuracy=accuracy,
        test_loss=test_loss,
        train_accuracy=train_accuracy,
        train_loss=train_loss,
    )


def _judge(
    networks: Perceptrons, inputs: Tensor, labels: Tensor
) -> tuple[list[float], list[float]]:
    """Accuracy in percent and mean cross-entropy of each network. labels: (S, n)."""
    logits = networks.logits(inputs)
    diverged = ~logits.isfinite().all(2).all(1)
    logits[diverged] = 0.0  # the null model: all classes equally likely
    accuracy = 100 * (logits.argmax(1) == labels).float().mean(1)
    losses = F.cross_entropy(logits, labels, reduction="none").mean(1)
    return accuracy.tolist(), losses.tolist()


def teacher_task(
    *,
    train_samples: int,
    test_samples: int,
    seeds: Sequence[int],
    label_noise: float,
    features: int = 16,
    hidden: int = 32,
    classes: int = 10,
) -> Task:
    """Normal inputs, labelled by a fixed random network; each seed has training samples of its own.

    label_noise: the share of the training labels that are drawn anew from all classes. The test
    labels are the teacher's.
    """
    made = np.random.default_rng(0)
    first = made.standard_normal((features, hidden)) * (2 / features) ** 0.5
    last = made.standard_normal((hidden, classes)) / hidden**0.5
    middle = (np.maximum(made.standard_normal((100_000, features)) @ first, 0) @ last).mean(0)

    def drawn(generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], Tensor]:
        inputs = generator.standard_normal((n, features))
        logits = np.maximum(inputs @ first, 0) @ last - middle  # all classes about as frequent
        return inputs, torch.from_numpy(logits.argmax(1))

    test_inputs, test_labels = drawn(np.random.default_rng(1), test_samples)
    sets = []
    for seed in seeds:
        generator = np.random.default_rng([2, seed])
        inputs, labels = drawn(generator, train_samples)
        noisy = torch.from_numpy(generator.permutation(train_samples))
        noisy = noisy[: round(label_noise * train_samples)]
        labels[noisy] = torch.from_numpy(generator.integers(0, classes, len(noisy)))
        sets.append((torch.from_numpy(inputs).float(), labels))
    return Task(
        inputs=torch.stack([inputs for inputs, _ in sets]),
        labels=torch.stack([labels for _, labels in sets]),
        test_inputs=torch.from_numpy(test_inputs).float(),
        test_labels=test_labels,
        classes=classes,
    )
