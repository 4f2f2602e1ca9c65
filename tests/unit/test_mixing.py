"""mixup and CutMix: against plain torch with the same numbers, and by position alone."""

import numpy as np
import pytest
import torch

from hvd_lbt.data.mixing import Mixing
from hvd_lbt.errors import UserError
from hvd_lbt.schedule.layout import make_layout

N = 50


def samples(first, count):
    """Images and labels that tell their place in the stream."""
    place = torch.arange(first, first + count)
    images = (place[:, None, None, None] + torch.rand(count, 3, 8, 8)).float()
    return images, place % 7


def test_it_is_plain_mixup_with_the_same_shares_and_partners():
    mixing = Mixing(seed=3, train_samples=N, mixup=0.4)
    images, labels = samples(0, 12)
    before = images.clone()
    mixed = mixing(images, labels, first_sample=0, ghost_batch=4)
    numbers = mixing.mixture(0, 12, 4, 8, 8)
    assert len(np.unique(numbers.weights)) == 3  # one λ a ghost batch
    for ghost in range(3):
        own = range(4 * ghost, 4 * ghost + 4)
        assert sorted(numbers.partners[own]) == list(own)  # a permutation of the ghost batch
        lam = numbers.weights[own[0]]
        for place in own:
            other = images[numbers.partners[place]]
            assert torch.allclose(mixed.images[place], lam * images[place] + (1 - lam) * other)
            assert mixed.partners[place] == labels[numbers.partners[place]]
    assert torch.equal(mixed.labels, labels)
    assert torch.equal(images, before)
    assert (numbers.partners != np.arange(12)).any()


def test_cutmix_pastes_a_box_and_weighs_by_what_is_left():
    mixing = Mixing(seed=1, train_samples=N, cutmix=1.0)
    images, labels = samples(0, 48)
    mixed = mixing(images, labels, first_sample=0, ghost_batch=3)
    numbers = mixing.mixture(0, 48, 3, 8, 8)
    for place in range(48):
        left, top, right, bottom = numbers.boxes[place]
        wanted = images[place].clone()
        wanted[:, top:bottom, left:right] = images[
            numbers.partners[place], :, top:bottom, left:right
        ]
        assert torch.equal(mixed.images[place], wanted)
        if numbers.partners[place] != place:
            kept = (mixed.images[place] == images[place]).float().mean()
            assert mixed.weights[place] == pytest.approx(float(kept))
    assert len({tuple(box) for box in numbers.boxes}) > 8


@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
@pytest.mark.parametrize("global_batch", [21, 17, 16, 5, 1])  # rests of 5, 1, none; less than one
def test_it_does_not_depend_on_ranks_and_micro_batches(alphas, global_batch):
    mixing = Mixing(seed=5, train_samples=N, **alphas)
    first = N - 9  # across the end of an epoch
    images, labels = samples(first, global_batch)
    settings = {"global_batch": global_batch, "ghost_batch": 8}
    results = []
    for size, micro_batch in ((1, 32), (2, 8), (3, 16)):
        parts = []
        for rank in range(size):
            layout = make_layout(rank=rank, size=size, micro_batch=micro_batch, **settings)
            for part in layout.micro_batches:
                here = slice(part.start, part.stop)
                parts.append(
                    mixing(
                        images[here], labels[here], first_sample=first + part.start, ghost_batch=8
                    )
                )
        results.append([torch.cat(values) for values in zip(*parts, strict=True)])
    for other in results[1:]:
        for one, its in zip(results[0], other, strict=True):
            assert torch.equal(one, its)
    if global_batch == 1:  # no partner: as it was
        assert torch.allclose(results[0][0], images)


def test_with_both_each_ghost_batch_has_one_of_the_two():
    mixing = Mixing(seed=0, train_samples=10_000, mixup=0.2, cutmix=1.0)
    numbers = mixing.mixture(0, 4000, 4, 8, 8)
    by_ghost = numbers.cut.reshape(-1, 4)
    assert (by_ghost == by_ghost[:, :1]).all()
    assert 0.4 < by_ghost[:, 0].mean() < 0.6  # 1,000 fair coins: ±3 deviations are 0.05
    images, labels = samples(0, 40)
    mixed = mixing(images, labels, first_sample=0, ghost_batch=4).images
    first = numbers.partners
    for place in range(40):
        lam = float(numbers.weights[place])
        blend = lam * images[place] + (1 - lam) * images[first[place]]
        left, top, right, bottom = numbers.boxes[place]
        cut = images[place].clone()
        cut[:, top:bottom, left:right] = images[first[place], :, top:bottom, left:right]
        assert torch.allclose(mixed[place], cut if numbers.cut[place] else blend)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_shares_are_beta_distributed(alpha):
    mixing = Mixing(seed=2, train_samples=40_000, mixup=alpha)
    shares = mixing.mixture(0, 40_000, 2, 8, 8).weights[::2]
    # 20,000 draws of variance 1/(4(2α+1)): the mean's deviation is below 0.0036
    assert shares.mean() == pytest.approx(0.5, abs=0.011)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_a_skipped_sample_is_mixed_with_nothing():
    mixing = Mixing(seed=4, train_samples=N, mixup=1.0, cutmix=1.0)
    images, labels = samples(0, 32)
    labels[[3, 18]] = -100
    mixed = mixing(images, labels, first_sample=0, ghost_batch=16)
    partners = torch.from_numpy(mixing.mixture(0, 32, 16, 8, 8).partners)
    alone = (labels < 0) | (labels[partners] < 0)
    assert alone.sum() >= 3
    assert torch.equal(mixed.images[alone], images[alone])
    assert (mixed.weights[alone] == 1).all()
    assert torch.equal(mixed.partners[alone], labels[alone])
    assert not torch.equal(mixed.images[~alone], images[~alone])


def test_other_epochs_and_seeds_have_other_numbers():
    shares = {
        mixing.mixture(first, 8, 8, 8, 8).weights[0]
        for mixing in (Mixing(seed=seed, train_samples=N, mixup=1.0) for seed in (0, 1))
        for first in (0, N, 2 * N)
    }
    assert len(shares) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "mixup and cutmix are both 0"), ({"mixup": -1}, "mixup is -1"), ({"cutmix": 101}, "101")],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Mixing(seed=0, train_samples=N, **settings)
