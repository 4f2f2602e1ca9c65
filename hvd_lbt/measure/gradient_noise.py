"""The simple noise scale tr(Σ) / |G|² of the gradient, in samples, measured while training.

Source: S. McCandlish, J. Kaplan, D. Amodei, "An Empirical Model of Large-Batch Training", 2018
(arXiv:1812.06162), section 2.2 and appendix A.1. Σ is the covariance of one sample's gradient, G
the mean gradient. A global batch far below tr(Σ) / |G|² is nearly all noise, one far above nearly
all gradient. How it relates to the planned noise scale g: docs/gradient_noise.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MEMORY = 0.9  # of a measurement, what is left of it after one more


class GradientNoise:
    """Estimates tr(Σ) and |G|² from the micro-batches of every `every`-th update (0: never).

        noise.begin(update.index, update.global_batch)
        reducer.backward(loss, last=…); noise.add_part(samples)  # every micro-batch
        handles += noise.send(allreduce_async)  # before the step, waited for after it
        noise.end(reducer.squared_norm)

    An update's B samples are cut into K parts of b_k samples, over all ranks, with mean gradients
    g_k. Their mean, weighted by samples, is the update's gradient g, and with S = Σ (b_k/B)·|g_k|²

        E S = |G|² + K·tr(Σ)/B        E |g|² = |G|² + tr(Σ)/B

    whatever the b_k; so B·(S − |g|²)/(K − 1) and |g|² minus a B-th of that are unbiased. With
    equal parts they are the paper's. Both are averaged apart, over some 10 measurements: the ratio
    of the averages is what is logged. One part alone (K = 1) gives no measurement: the averages are
    forgotten until there are more. An update that was skipped or sent again in fp32 is not counted.

    model: whose parameters' gradients count. Everything stays on the device, and is the same on all
    ranks.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every = every
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sums = self._parameters[0].new_zeros(2, dtype=torch.float32)  # S and K
        self._averages = self._sums.new_zeros(3)  # of tr(Σ), of |G|², and of 1 since the start
        self._measurements = self._sums.new_zeros((), dtype=torch.int64)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._norms: list[Tensor] = []  # of this micro-batch's gradient, parameter by parameter
        self._global_batch = 0

    def begin(self, update: int, global_batch: int) -> None:
        """Begin the update of this index; decides whether it is measured."""
        self._global_batch = global_batch
        if self.every and update % self.every == 0:
            # On the parameter itself: the hook sees this backward's gradient before it is
            # accumulated.
            self._sums.zero_()
            self._hooks = [parameter.register_hook(self._note) for parameter in self._parameters]

    def _note(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    @torch.no_grad()
    def add_part(self, samples: int) -> None:
        """Count the micro-batch whose backward just ran (its loss divided by the global batch)."""
        if self._hooks:
            # b/B · |g_k|² with the mean gradient g_k = B/b · (what backward made)
            share = torch.stack(self._norms).square().sum() * (self._global_batch / samples)
            self._sums += torch.stack([share, torch.ones_like(share)])
            self._norms.clear()

    def send(self, allreduce_async: Callable[[Tensor, str], Any]) -> list[Any]:
        """Begin to sum what the ranks counted; handles to wait for, none if nothing is measured."""
        return [allreduce_async(self._sums, "gradient noise")] if self._hooks else []

    @torch.no_grad()
    def end(self, squared_norm: Callable[[], Tensor | None]) -> None:
        """Take the world's sums and |g|² into the averages.

        squared_norm: gives |g|² of the summed gradient, or None if there is none; only asked if
        this update is measured.
        """
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        squared = squared_norm()
        if squared is None:
            return
        among, parts = self._sums
        variance = self._global_batch * (among - squared) / (parts - 1)
        found = torch.stack([variance, squared - variance / self._global_batch, parts / parts])
        moved = MEMORY * self._averages + (1 - MEMORY) * found
        finite = found.isfinite().all()
        kept = torch.where(finite, moved, self._averages)
        self._averages.copy_(torch.where(parts > 1, kept, 0.0))
        self._measurements += finite & (parts > 1)

    def discard(self) -> None:
        """Forget what was begun of an update that was dropped."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._norms.clear()

    @property
    def averages(self) -> Tensor:
        """fp32 (2,) on the device: tr(Σ) per sample, and |G|²; NaN before the first measurement."""
        return self._averages[:2] / self._averages[2]

    @property
    def measurements(self) -> Tensor:
        """int64 () on the device: measurements taken since the start of the run, before a resume
        too; the same on all ranks.
        """
        return self._measurements

    def state_dict(self) -> dict[str, Tensor]:
        """The averages and the count: a resumed run continues them, on any number of ranks."""
        return {"averages": self._averages.cpu(), "measurements": self._measurements.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with what `state_dict()` gave; an older state has no count: from 0."""
        self._averages.copy_(state["averages"])
        self._measurements.copy_(state.get("measurements", torch.zeros_like(self._measurements)))


def simple_noise_scale(variance: float, squared: float) -> float | None:
    """tr(Σ) / |G|² in samples; None before the first measurement, or while |G|² is noise."""
    return variance / squared if variance > 0 and squared > 0 else None
