"""mixup and CutMix: which samples are mixed, and how, from the samples' positions alone.

Every number is Philox's for (seed, epoch, position), and a sample's partner is another one of its
ghost batch, which is never split. So the mixed images are the same on any number of ranks, with any
micro-batch, and after a resume.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_lbt.data.order import MIXING, sample_uniforms, stream_ranges
from hvd_lbt.errors import UserError
from hvd_lbt.schedule.layout import count_ghost_batches

# The uniforms of one sample, by place. The first is its own; the others are those of its ghost
# batch's first sample.
PARTNER, KIND, SHARE, LEFT, TOP = range(5)
DRAWS = 5


class Mixed(NamedTuple):
    """images: the mixed images; labels, partners: int64 (n,), of each sample and of the other one
    in it; weights: fp32 (n,), of the sample's own label, 1 − weights of the partner's.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What is mixed with what. partners: int64 (n,), places within the micro-batch; weights: fp32
    (n,); boxes: int64 (n, 4), left, top, right and bottom of the partner's pixels with CutMix;
    cut: bool (n,), CutMix instead of mixup.
    """

    partners: NDArray[np.int64]
    weights: NDArray[np.float32]
    boxes: NDArray[np.int64]
    cut: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes each sample of a micro-batch with another one of its ghost batch.

    mixup: x ← λ·x + (1−λ)·x', weight λ (H. Zhang et al., "mixup: Beyond Empirical Risk
    Minimization", ICLR 2018, equations 1 and 2). cutmix: a box of x is replaced by that of x',
    with sides √(1−λ) of the image's, around a uniform centre, cut off at the image's edge; the
    weight is the share of x's pixels that are left (S. Yun et al., "CutMix", ICCV 2019, equations 1
    and 2). λ ~ Beta(α, α) with α = `mixup` or `cutmix`, 0: off. With both, each ghost batch has one
    of the two, with equal odds.

    As in the papers, where a worker's batch is what a ghost batch is here, λ and the box are one
    ghost batch's, and the partners are a random permutation of it; a sample may be its own partner,
    as the only one of a ghost batch is. A sample whose own label or whose partner's is missing
    (below 0: it was skipped) is not mixed.

    seed, train_samples: of the plan's stream of samples.
    """

    seed: int
    train_samples: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if not 0 <= alpha <= 100:
                raise UserError(f"Mixing: {name} is {alpha}; it must be 0 (off) to 100.")
        if not self.mixup and not self.cutmix:
            raise UserError(
                "Mixing: mixup and cutmix are both 0, so it has no effect; leave it out."
            )

    def __call__(
        self, images: Tensor, labels: Tensor, *, first_sample: int, ghost_batch: int
    ) -> Mixed:
        """Mix a micro-batch that begins with a ghost batch.

        images: fp32 (n, C, H, W); labels: int64 (n,); first_sample: place of the first one in the
        stream of samples. The given images are only read.
        """
        height, width = images.shape[-2:]
        mixture = self.mixture(first_sample, len(images), ghost_batch, height, width)
        device = images.device
        others = torch.from_numpy(mixture.partners).to(device)
        weights = torch.from_numpy(mixture.weights).to(device)
        partners = labels[others]
        mixes = (labels >= 0) & (partners >= 0)
        partner_images = images[others]
        wide = (-1, 1, 1, 1)
        mixed = images
        if self.mixup:
            share = torch.where(mixes, weights, 1.0).view(wide)
            mixed = share * images + (1 - share) * partner_images
        if self.cutmix:
            left, top, right, bottom = (
                torch.from_numpy(mixture.boxes).to(device)[..., None].unbind(1)
            )
            rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
            down = (rows >= top) & (rows < bottom) & mixes[:, None]
            across = (columns >= left) & (columns < right)
            inside = (down[:, :, None] & across[:, None, :])[:, None]
            pasted = torch.where(inside, partner_images, images)
            if self.mixup:
                pasted = torch.where(
                    torch.from_numpy(mixture.cut).to(device).view(wide), pasted, mixed
                )
            mixed = pasted
        weights = torch.where(mixes, weights, 1.0)
        return Mixed(mixed, labels, torch.where(mixes, partners, labels), weights)

    def mixture(
        self, first_sample: int, count: int, ghost_batch: int, height: int, width: int
    ) -> Mixture:
        """The numbers of the samples [first_sample, first_sample + count) of the stream."""
        uniforms = np.concatenate(
            [
                sample_uniforms(self.seed, epoch, position, length, DRAWS, purpose=MIXING)
                for epoch, position, length in stream_ranges(
                    first_sample, count, self.train_samples
                )
            ]
        )
        ghost_batches = count_ghost_batches(count, ghost_batch)
        starts = np.arange(ghost_batches) * ghost_batch
        sizes = np.diff(np.append(starts, count))
        partners = np.concatenate(
            [
                start + np.argsort(uniforms[start : start + size, PARTNER], kind="stable")
                for start, size in zip(starts, sizes, strict=True)
            ]
        )
        drawn = uniforms[starts]
        cut = np.full(ghost_batches, bool(self.cutmix))
        if self.mixup and self.cutmix:
            cut = drawn[:, KIND] < 0.5
        shares = _beta(np.where(cut, self.cutmix, self.mixup), drawn[:, SHARE])
        boxes = _boxes(shares, drawn, height, width)
        left, top, right, bottom = boxes.T
        covered = (right - left) * (bottom - top) / (height * width)
        weights = np.where(cut, 1 - covered, shares)
        return Mixture(
            partners=partners,
            weights=np.repeat(weights, sizes).astype(np.float32),
            boxes=np.repeat(boxes, sizes, axis=0),
            cut=np.repeat(cut, sizes),
        )


def _beta(alpha: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draws of Beta(α, α): the inverse of its distribution function at uniform numbers."""
    from scipy.special import betaincinv  # slow to import

    return betaincinv(alpha, alpha, uniforms)


def _boxes(
    shares: NDArray[np.float64], drawn: NDArray[np.float64], height: int, width: int
) -> NDArray[np.int64]:
    """CutMix's boxes (k, 4), rounded as in its authors' code: sides down to whole pixels, half of
    them, rounded down, on each side of the centre's pixel.
    """
    root = np.sqrt(1 - shares)
    box = np.empty((len(shares), 4), dtype=np.int64)
    for column, length, place in ((0, width, LEFT), (1, height, TOP)):
        half = np.floor(length * root).astype(np.int64) // 2
        centre = np.floor(drawn[:, place] * length).astype(np.int64)
        box[:, column] = np.clip(centre - half, 0, length)
        box[:, column + 2] = np.clip(centre + half, 0, length)
    return box
