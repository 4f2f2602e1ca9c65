"""`Training` with mixing, clipping and an average, against plain PyTorch on one rank."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvd_lbt.data.mixing import Mixing
from hvd_lbt.ema import WeightAverage
from hvd_lbt.errors import UserError
from hvd_lbt.losses import Loss
from hvd_lbt.models import make_forward
from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.sampler import MicroBatches, by_update
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.training import Training
from hvd_lbt.world import World

N, B, GHOST = 48, 16, 4
SCHEDULE = Schedule(policy="decay_lr", epochs=3, lr=0.3, momentum=0.9, global_batch=B)
WORLD = World(rank=0, size=1)
MIXING = {"seed": 7, "train_samples": N, "mixup": 0.5, "cutmix": 1.0}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5))


def training_of(model, schedule=SCHEDULE, **settings):
    optimizer = FusedSGD(model.parameters(), lr=0.3, momentum=0.9)
    reducer = GradientReducer(
        model,
        optimizer,
        world=WORLD,
        wire="fp32",
        allreduce_async=lambda tensor, name: None,
        synchronize=lambda handle: None,
    )
    return Training(model, optimizer, schedule, reducer=reducer, **settings)


def stream(plan, micro_batch):
    """Images and labels of the stream's samples, in micro-batches; both are known by place."""
    drawn = torch.Generator().manual_seed(5)
    images = torch.randn(plan.samples, 3, 8, 8, generator=drawn)
    labels = torch.randint(5, (plan.samples,), generator=drawn)
    parts = zip(images.split(micro_batch), labels.split(micro_batch), strict=True)
    updates = [plan.at(index) for index in range(plan.updates)]
    layout = {"micro_batch": micro_batch, "ghost_batch": GHOST}
    return images, labels, by_update(updates, parts, WORLD, **layout)


def test_it_is_plain_pytorch_with_the_same_partners():
    plan = make_plan(SCHEDULE, N)
    model, twin = network(), network()
    average = WeightAverage(model, decay=0.8, global_batch=B)
    training = training_of(
        model,
        forward=make_forward(model, loss=Loss(label_smoothing=0.1)),
        clip_norm=0.2,
        mixing=Mixing(**MIXING),
        average=average,
        noise_every=1,
    )
    images, labels, updates = stream(plan, 8)
    losses = [training.update(update, batches).loss for update, batches in updates]

    peer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
    torchs = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    clipped = 0
    for index in range(plan.updates):
        x, y = images[index * B : (index + 1) * B], labels[index * B : (index + 1) * B]
        numbers = Mixing(**MIXING).mixture(index * B, B, GHOST, 8, 8)
        mixed, targets = x.clone(), torch.zeros(B, 5)
        for place in range(B):
            other, weight = int(numbers.partners[place]), float(numbers.weights[place])
            if numbers.cut[place]:
                left, top, right, bottom = numbers.boxes[place]
                mixed[place, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
            else:
                mixed[place] = weight * x[place] + (1 - weight) * x[other]
            targets[place] = weight * F.one_hot(y[place], 5) + (1 - weight) * F.one_hot(y[other], 5)
        loss = F.cross_entropy(twin(mixed), targets, label_smoothing=0.1)
        loss.backward()
        clipped += clip_grad_norm_(twin.parameters(), 0.2) > 0.2
        peer.step()
        peer.zero_grad()
        torchs.update_parameters(twin)
        assert losses[index] == pytest.approx(loss.item(), rel=1e-4)
    assert clipped > 2  # it had an effect
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    for name, value in torchs.module.state_dict().items():
        torch.testing.assert_close(average.averages[name], value, rtol=1e-4, atol=1e-5)


def test_the_gradients_noise_is_measured_before_clipping():
    plan = make_plan(SCHEDULE, N)
    noises = []
    for clip_norm in (None, 1e-4):
        training = training_of(network(), clip_norm=clip_norm, noise_every=1)
        update, batches = next(stream(plan, 4)[2])
        training.update(update, batches)
        noises.append(training.noise.averages)
    torch.testing.assert_close(*noises)


def test_a_loss_of_ones_own_is_given_partners_and_weights():
    plan = make_plan(SCHEDULE, N)
    model, seen = network(), []

    def loss(images, labels, partners, weights):
        seen.append((labels, partners, weights))
        logits = model(images)
        one, other = (F.cross_entropy(logits, y, reduction="none") for y in (labels, partners))
        return weights * one + (1 - weights) * other

    training = training_of(model, loss=loss, mixing=Mixing(**MIXING))
    update, batches = next(stream(plan, 8)[2])
    training.update(update, batches)
    assert len(seen) == 2
    assert all((weights < 1).any() for *_, weights in seen)


def test_what_cannot_be_mixed_or_clipped_is_refused():
    plan = make_plan(SCHEDULE, N)
    with pytest.raises(UserError, match="clip_norm is 0; it must be above 0"):
        training_of(network(), clip_norm=0)
    training = training_of(network(), mixing=Mixing(**MIXING))
    three = (torch.randn(B, 3, 8, 8), torch.zeros(B, dtype=torch.long), torch.zeros(B))
    with pytest.raises(
        UserError, match="batches of \\(images, labels\\), two tensors, and this one"
    ):
        training.update(plan.at(0), MicroBatches([B], [three], GHOST, [0]))
    training = training_of(network(), mixing=Mixing(**MIXING))
    with pytest.raises(UserError, match="none has a partner"):
        training.update(plan.at(0), MicroBatches([B], [three[:2]], 1, [0]))


def test_a_skipped_update_does_not_move_the_average():
    plan = make_plan(SCHEDULE, N)
    model = network()
    average = WeightAverage(model, decay=0.5, global_batch=B)
    training = training_of(model, average=average)
    images, _, updates = stream(plan, 16)
    images[B] = float("nan")
    for update, batches in updates:
        tally = training.update(update, batches)
        assert tally.skipped == (update.index == 1)
        assert average.updates == update.index + (update.index < 1)
        if update.index == 2:
            break
