"""Linear regression, whose Σ and G are known, and thousands of updates of it at once."""

import math

import torch
from torch import Tensor

SIZE = 12


class Regression:
    """Loss of a sample: ½(x·δ − e)², x ~ N(0, C), e ~ N(0, σ²); δ is how far the weights are off.

    Its gradient x(x·δ − e) has the mean G = Cδ and, x being Gaussian, the covariance
    Σ = (δ·Cδ + σ²)·C + CδδᵀC (Isserlis). All in float64.
    """

    def __init__(self, seed: int = 0, distance: float = 0.5, sigma: float = 1.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.curvature = torch.linspace(0.2, 2.0, SIZE, dtype=torch.float64)  # C, diagonal
        self.off = distance * self._normal(SIZE)
        self.sigma = sigma

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def true(self, off: Tensor | None = None) -> Tensor:
        """tr(Σ) and |G|², (2, …), at `off` (…, SIZE), δ unless given."""
        off = self.off if off is None else off
        mean = self.curvature * off
        squared = mean.square().sum(-1)
        loss = (off * mean).sum(-1) + self.sigma**2
        return torch.stack([loss * self.curvature.sum() + squared, squared])

    def gradients(self, *shape: int, off: Tensor | None = None) -> Tensor:
        """Gradients of so many samples, (*shape, SIZE); off: (*shape[:-1], SIZE)."""
        inputs = self._normal(*shape, SIZE) * self.curvature.sqrt()
        where = self.off if off is None else off.unsqueeze(-2)
        errors = (inputs * where).sum(-1) - self.sigma * self._normal(*shape)
        return inputs * errors.unsqueeze(-1)


def by_parts(gradients: Tensor, parts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """S, |g|² and K of each update, (draws,); gradients: (draws, B, SIZE)."""
    total = sum(parts)
    means = torch.stack([part.mean(1) for part in gradients.split(parts, 1)], 1)
    weights = torch.tensor(parts, dtype=gradients.dtype) / total
    among = (means.square().sum(-1) * weights).sum(1)
    squared = gradients.mean(1).square().sum(-1)
    return among, squared, torch.full_like(among, len(parts))


def is_unbiased(found: Tensor, true: Tensor, *, errors: float = 3.0) -> list[bool]:
    """Whether the means of found (2, draws) lie within so many standard errors of true (2,)."""
    error = found.std(1) / math.sqrt(found.shape[1])
    return ((found.mean(1) - true).abs() < errors * error).tolist()
