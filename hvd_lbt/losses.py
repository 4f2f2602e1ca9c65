"""The loss of a micro-batch: cross-entropy, with label smoothing, of mixed labels, or your own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_lbt.errors import UserError, one_line
from hvd_lbt.own import load_object

OwnLoss = Callable[[Tensor, Tensor], Tensor]
PROBED = 4  # samples with which a loss of one's own is tried before training


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The sum of a micro-batch's losses, as `F.cross_entropy(…, reduction="sum")`.

    With the probabilities p = softmax(logits) over K classes and ε = label_smoothing, the loss of a
    sample with label y is

        −(1 − ε)·log p_y − ε/K · Σ_k log p_k

    (C. Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7; torch's
    `label_smoothing`). Of a mixed sample (`data.mixing`) it is w·loss(y) + (1 − w)·loss(y'), with
    the partner's label y' and the weight w of the sample's own label (H. Zhang et al., "mixup",
    2018; for the cross-entropy that is the loss of the mixed label).

    function: your own, (logits, labels) → (n,) losses, used in place of the cross-entropy.
    A sample without a label (below 0: it was skipped) has no loss.
    """

    label_smoothing: float = 0.0
    function: OwnLoss | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        partners: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """logits: fp32 (n, K); labels, partners: int64 (n,); weights: fp32 (n,) of `labels`."""
        if partners is None or weights is None:
            if self.function is not None:
                return self._own(logits, labels).sum()
            return F.cross_entropy(
                logits, labels, reduction="sum", label_smoothing=self.label_smoothing
            )
        one, other = (self._single(logits, which) for which in (labels, partners))
        return (weights * one + (1 - weights) * other).sum()

    def _single(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.function is not None:
            return self._own(logits, labels)
        return F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.label_smoothing
        )

    def _own(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Your own losses; it is given label 0 for a sample that does not count."""
        assert self.function is not None
        losses = self.function(logits, labels.clamp(min=0))
        if losses.shape != labels.shape:
            raise UserError(
                f"loss.function: it gave a tensor of shape {tuple(losses.shape)} for "
                f"{len(labels)} samples; it must be (n,), one loss a sample, such as "
                "F.cross_entropy(logits, labels, reduction='none')."
            )
        return torch.where(labels >= 0, losses.float(), 0.0)


def right_answers(
    logits: Tensor, labels: Tensor, partners: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """How many of the micro-batch's answers are right, as one number on the device.

    The right answer of a mixed sample is the label with the larger weight, its own at w = 1/2.
    """
    if partners is not None and weights is not None:
        labels = torch.where((weights >= 0.5) | (labels < 0), labels, partners)
    return (logits.argmax(1) == labels).sum()


def load_loss(text: str, outputs: int, device: torch.device) -> OwnLoss:
    """The function that `package.module:function` names, tried on random logits.

    outputs: columns of the logits. Raises UserError if it gives anything but one loss a sample, if
    it has weights of its own (nothing would train them), or if a sample's loss depends on the
    others: the result would then depend on the micro-batch and on the number of ranks.
    """
    what = f"loss.function: {text}"
    function: Any = load_object(text, "loss.function")
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise UserError(
            f"{what} is {kind}; it must be a function (logits, labels) → (n,) losses, or an object "
            "that can be called so."
        )
    if isinstance(function, nn.Module):
        if any(parameter.requires_grad for parameter in function.parameters()):
            raise UserError(
                f"{what} has weights of its own, and only the network is trained. Put them into "
                "the network, or freeze them (requires_grad_(False))."
            )
        function = function.to(device)
    drawn = torch.Generator().manual_seed(0)
    logits = torch.randn(PROBED, outputs, generator=drawn).to(device).requires_grad_()
    labels = torch.randint(outputs, (PROBED,), generator=drawn).to(device)
    losses = _tried(function, logits, labels, what)
    alone = torch.cat(
        [
            _tried(function, logits[one : one + 1], labels[one : one + 1], what)
            for one in range(PROBED)
        ]
    )
    if not torch.allclose(losses, alone, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{what}: {PROBED} samples together have the losses {_shown(losses)}, each alone has "
            f"{_shown(alone)}. A sample's loss must depend on this sample only, and not on random "
            "numbers; else the result depends on the micro-batch and on the number of ranks."
        )
    return function


def _tried(function: OwnLoss, logits: Tensor, labels: Tensor, what: str) -> Tensor:
    """The losses of a trial, checked."""
    wanted = "one loss a sample, such as F.cross_entropy(logits, labels, reduction='none')"
    try:
        losses = function(logits, labels)
    except Exception as error:
        reason = one_line(error) or "no message"
        raise UserError(
            f"{what}: called with logits {tuple(logits.shape)} and labels {tuple(labels.shape)} it "
            f"raised {type(error).__name__}: {reason}. It must give {wanted}."
        ) from error
    if not isinstance(losses, Tensor) or losses.shape != labels.shape:
        gave = (
            f"a tensor of shape {tuple(losses.shape)}"
            if isinstance(losses, Tensor)
            else f"a {type(losses).__name__}"
        )
        raise UserError(f"{what}: of {len(labels)} samples it gave {gave}; it must give {wanted}.")
    if not losses.requires_grad:
        raise UserError(
            f"{what}: its losses have no gradient (detach(), no_grad() or argmax?); nothing would "
            f"be trained. It must give {wanted}."
        )
    return losses.detach().float()


def _shown(losses: Tensor) -> str:
    return ", ".join(f"{loss:.4g}" for loss in losses.tolist())
