"""The simple noise scale tr(Σ) / |G|² of the gradient, in samples, measured while training.

Source: S. McCandlish, J. Kaplan, D. Amodei, "An Empirical Model of Large-Batch Training", 2018
(arXiv:1812.06162), section 2.2 and appendix A.1. Σ is the covariance of one sample's gradient, G
the mean gradient. A global batch far below tr(Σ) / |G|² is nearly all noise, one far above nearly
all gradient. How it relates to the planned noise scale g: docs/gradient_noise.md.

An update that is one micro-batch has no parts to compare. There two consecutive updates are, as
AdaptDL does with one replica: A. Qiao et al., "Pollux", OSDI 2021 (arXiv:2008.12260), section 3.1.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvd_lbt.reducer import GradientReducer

MEMORY = 0.9  # of a measurement, what is left of it after one more
Source = Literal["parts", "differences"]  # of one update, or of two consecutive ones


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """The gradient of an update that was one micro-batch, as it lay on the wire.

    A copy in the wire's form: 2 bytes a weight with fp16. setting: as `begin` had it; wires: one a
    bucket; scale: what they were multiplied by; squared: |g|².
    """

    update: int
    global_batch: int
    setting: Hashable
    wires: tuple[Tensor, ...]
    scale: Tensor
    squared: Tensor


class GradientNoise:
    """Estimates tr(Σ) and |G|² in every `every`-th update (0: never).

        noise.begin(update.index, update.global_batch, one_part=…)
        reducer.backward(loss, last=…); noise.add_part(samples)  # every micro-batch
        handles += noise.send(allreduce_async)  # before the step, waited for after it
        noise.end(reducer)

    An update's B samples are cut into K parts (micro-batches), over all ranks. With K > 1 the parts
    are compared (`noise_of_parts`), with K = 1 the update and the one before it
    (`noise_of_difference`), if that was one part too. `source` says which. tr(Σ) and |G|² are
    averaged apart, over some 10 measurements: the ratio of the averages is what is logged. Averages
    of the two sources are not mixed: the first measurement of the other one begins them anew. An
    update that was skipped or sent again in fp32 is not counted, nor is a pair that has one.

    model: whose parameters' gradients count. Everything stays on the device, and is the same on all
    ranks. The gradient that is kept from one update to the next is not in `state_dict()`: a resume
    between the two loses that one measurement.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every = every
        self.source: Source = "parts"  # of the averages
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sums = self._parameters[0].new_zeros(2, dtype=torch.float32)  # S and K
        self._averages = self._sums.new_zeros(3)  # of tr(Σ), of |G|², and of 1 since the start
        self._measurements = self._sums.new_zeros((), dtype=torch.int64)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._norms: list[Tensor] = []  # of this micro-batch's gradient, parameter by parameter
        self._update, self._global_batch, self._one_part = 0, 0, False
        self._setting: Hashable = None
        self._kept: _Kept | None = None

    def begin(
        self, update: int, global_batch: int, *, one_part: bool = False, setting: Hashable = None
    ) -> None:
        """Begin the update of this index; decides whether it is measured.

        one_part: whether the update is one micro-batch, over all ranks; the same on every rank.
        setting: what else the gradient depends on (ghost batch, image size): two updates are
        compared only if it is the same.
        """
        self._update, self._global_batch = update, global_batch
        self._one_part, self._setting = one_part, setting
        if one_part:
            return
        self._kept = None  # its memory is free again
        if self._measures:
            # On the parameter itself: the hook sees this backward's gradient before it is
            # accumulated.
            self._sums.zero_()
            self._hooks = [parameter.register_hook(self._note) for parameter in self._parameters]

    @property
    def _measures(self) -> bool:
        """Whether this update is measured."""
        return self.every > 0 and self._update % self.every == 0

    @property
    def _keeps(self) -> bool:
        """Whether the next update is measured, so that this one's gradient is wanted."""
        return self.every > 0 and (self._update + 1) % self.every == 0

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
    def end(self, reducer: GradientReducer) -> None:
        """Take what this update says into the averages; after its step."""
        if self._one_part:
            self._compare_with_kept(reducer)
            return
        if not self._hooks:
            return
        self._remove_hooks()
        squared = reducer.squared_norm()
        if squared is None:
            return
        among, parts = self._sums
        found = noise_of_parts(among, squared, parts, self._global_batch)
        self._take(found, "parts")
        # A caller that did not say one_part: parts is known on the device only, and what was told
        # before is not told on.
        self._averages *= parts > 1

    def _compare_with_kept(self, reducer: GradientReducer) -> None:
        """Measure against the update before, and keep this one for the next, where wanted."""
        if not (self._measures or self._keeps):
            return
        before, self._kept = self._kept, None
        squared, scale = reducer.squared_norm(), reducer.applied_scale
        if squared is None or scale is None:
            return
        wires = reducer.wire_buffers
        same = (self._update - 1, self._setting)
        if self._measures and before and (before.update, before.setting) == same:
            difference = _squared_difference(before, wires, scale)
            batches = (before.global_batch, self._global_batch)
            self._take(
                noise_of_difference(before.squared, squared, difference, batches), "differences"
            )
        if self._keeps:
            del before
            # Does not run out of memory: the gradients, larger, have just been freed.
            self._kept = _Kept(
                update=self._update,
                global_batch=self._global_batch,
                setting=self._setting,
                wires=tuple(wire.clone() for wire in wires),
                scale=scale,
                squared=squared,
            )

    def _take(self, found: Tensor, source: Source) -> None:
        """Take one measurement into the averages, if it is finite."""
        if source != self.source:
            self._averages.zero_()
            self.source = source
        finite = found.isfinite().all()
        moved = MEMORY * self._averages + (1 - MEMORY) * torch.cat([found, found.new_ones(1)])
        self._averages.copy_(torch.where(finite, moved, self._averages))
        self._measurements += finite

    def discard(self) -> None:
        """Forget what was begun of an update that was dropped, and the kept gradient."""
        self._remove_hooks()
        self._norms.clear()
        self._kept = None

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

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

    def state_dict(self) -> dict[str, Any]:
        """The averages and the count: a resumed run continues them, on any number of ranks."""
        return {
            "averages": self._averages.cpu(),
            "measurements": self._measurements.cpu(),
            "source": self.source,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what `state_dict()` gave; an older state has no count (from 0) and no
        source (parts).
        """
        self._averages.copy_(state["averages"])
        self._measurements.copy_(state.get("measurements", torch.zeros_like(self._measurements)))
        self.source = state.get("source", "parts")
        self._kept = None


def noise_of_parts(among: Tensor, squared: Tensor, parts: Tensor, global_batch: int) -> Tensor:
    """Estimate tr(Σ) and |G|², (2, …), from an update's K parts of b_k samples, of B in all.

    among: S = Σ (b_k/B)·|g_k|² with the parts' mean gradients g_k; squared: |g|² of their mean,
    weighted by samples; parts: K, above 1 (else not finite). All of one shape.

        E S = |G|² + K·tr(Σ)/B        E |g|² = |G|² + tr(Σ)/B

    whatever the b_k, so B·(S − |g|²)/(K − 1), and |g|² minus a B-th of that, are unbiased. With
    equal parts they are those of McCandlish et al., appendix A.1.
    """
    variance = global_batch * (among - squared) / (parts - 1)
    return torch.stack([variance, squared - variance / global_batch])


def noise_of_difference(
    before: Tensor, squared: Tensor, difference: Tensor, batches: tuple[int, int]
) -> Tensor:
    """Estimate tr(Σ) and |G|², (2, …), from the gradients h, g of two consecutive updates.

    before: |h|²; squared: |g|²; difference: |g − h|²; batches: the samples B', B of each.

        E |g − h|² = tr(Σ)·(1/B' + 1/B)        E g·h = |G|²

    if G does not change between the two; |g − h|² / (1/B' + 1/B) and g·h are the estimates. How
    far the step between them biases both: docs/gradient_noise.md.
    """
    first, second = batches
    variance = difference / (1 / first + 1 / second)
    return torch.stack([variance, (before + squared - difference) / 2])


def _squared_difference(kept: _Kept, wires: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """|g − h|² in fp32, of the sum on the wire and the kept one; bucket by bucket, which are
    small.
    """
    norms = []
    for old, new in zip(kept.wires, wires, strict=True):
        # fp32 before anything is scaled: a scalar tensor would leave it fp16
        difference = old.to(torch.float32, copy=True).mul_(scale / kept.scale).sub_(new)
        norms.append(torch.linalg.vector_norm(difference))
    return (torch.stack(norms) / scale).square().sum()


def simple_noise_scale(variance: float, squared: float) -> float | None:
    """tr(Σ) / |G|² in samples; None before the first measurement, or while |G|² is noise."""
    return variance / squared if variance > 0 and squared > 0 else None
