"""Tests a network of others before training: what would be wrong without a word is an error.

A few forward passes of random images show what only its forward knows: whether the output of a
ghost batch depends on other samples, what it returns, what it changes, and what it draws.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_lbt.errors import UserError, one_line
from hvd_lbt.models.forward_samples import ForwardSamples, random_states, samples_of
from hvd_lbt.models.ghost_norm import GhostNorm
from hvd_lbt.models.random_masks import ByGhostBatch, random_layers
from hvd_lbt.own import place_of

GHOST_BATCH = 2  # samples, while testing
SAME = 1e-5  # of the largest output: the same kernels on the same images, in any order of sums
SIMILAR = 1e-2  # other kernels, whose rounding a norm over two samples may enlarge


def check_network(model: nn.Module, what: str, *, image_size: int, outputs: int) -> list[str]:
    """Raise UserError if `model` cannot be trained the same on any number of workers.

    what: its name, for errors. image_size: of data.image_size; outputs: how many it must give. The
    model is in train mode, prepared by `prepare_model`, on its device; weights, statistics, random
    numbers and gradients stay as they are. Sets `forward_samples.by_ghost_batch` where the network
    draws random numbers in a way that cannot be followed by sample. Returns what the user should
    know, one sentence each.
    """
    samples = samples_of(model)
    assert samples is not None
    assert model.training
    probe = _Probe(model, samples, what, image_size, outputs)
    with _left_as_it_is(model):
        notes = probe.train_mode()
        model.eval()
        probe.eval_mode()
        model.train()
    return notes


class _Probe:
    def __init__(
        self, model: nn.Module, samples: ForwardSamples, what: str, image_size: int, outputs: int
    ) -> None:
        self.model, self.samples, self.what, self.outputs = model, samples, what, outputs
        self.device = next(model.parameters()).device
        shape = (3 * GHOST_BATCH, 3, image_size, image_size)
        numbers = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=numbers).to(self.device)
        # the third pair is of another kind, so that statistics over it would differ much
        self.first, self.second, self.third = images.split(GHOST_BATCH)
        self.third = self.third * 5 + 3

    def train_mode(self) -> list[str]:
        """Two ghost batches; then the first with another second, and alone."""
        both, others = torch.cat([self.first, self.second]), torch.cat([self.first, self.third])
        notes = []
        random_before, python_before = random_states(self.device), _python_states()
        buffers = {name: value.clone() for name, value in self._buffers()}
        logits = self._logits(self.model, both)
        if not _equal(python_before, _python_states()):
            self._refuse(
                "draws from Python's random or numpy.random in forward, which would differ between "
                "workers. Draw by torch, such as torch.rand"
            )
        self._check_buffers(buffers)
        drew = not _equal(random_before, random_states(self.device))
        notes += self._unreached(logits)
        network: Callable[[Tensor], Any] = self.model
        if not drew:
            self._check_mixing(logits, others)
            alone = self._logits(self.model, self.first)
            if not _close(alone, logits[:GHOST_BATCH], SIMILAR):
                if not any(True for _ in random_layers(self.model)):
                    self._refuse(
                        "gives a ghost batch another output in a micro-batch of another size"
                    )
                drew = True  # a mask over another dimension than the samples'
        if drew:
            self.samples.by_ghost_batch = True
            network = ByGhostBatch(self.model, self.samples)
            logits = self._logits(network, both)
            if not _close(self._logits(network, both), logits, SAME):
                self._refuse(
                    "gives different outputs for the same images, weights and random numbers; "
                    "something else in it changes"
                )
            notes.append(
                f"model.name: {self.what} draws random numbers within its forward (F.dropout, "
                "attention's dropout, DropBlock or the like): each ghost batch is computed on its "
                "own, so that the numbers follow the samples. That is exact, and slower; dropout "
                "as nn.Dropout or timm's DropPath does not need it."
            )
        return notes

    def eval_mode(self) -> None:
        """An image with one other image, and with another."""
        random_before = random_states(self.device)
        buffers = {name: value.clone() for name, value in self._buffers()}
        with torch.no_grad():
            logits = self._logits(self.model, torch.cat([self.first[:1], self.second[:1]]))
            others = self._logits(self.model, torch.cat([self.first[:1], self.third[:1]]))
        if not _equal(random_before, random_states(self.device)):
            self._refuse(
                "draws random numbers in eval mode too (F.dropout without training=self.training?)"
            )
        if not _close(logits[:1], others[:1], SAME):
            self._refuse(
                "gives an image another output in eval mode when the other image of its batch "
                "changes: a norm over the batch. Use running statistics there"
            )
        self._check_buffers(buffers)

    def _logits(self, network: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """The network's output of these images, which must be (n, outputs)."""
        self.samples.begin(0, GHOST_BATCH, self.device)
        try:
            logits = network(images)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                raise
            message = one_line(error)
            raise UserError(
                f"model.name: {self.what}: its forward of images {tuple(images.shape)} fails "
                f"({type(error).__name__}: {message}{place_of(error)}). data.image_size is "
                f"{images.shape[-1]}; does the network take it?"
            ) from error
        mode = "train" if self.model.training else "eval"
        if not isinstance(logits, Tensor):
            self._refuse(
                f"returns {_described(logits)} in {mode} mode; it must return the logits alone, "
                f"(n, {self.outputs}). Switch auxiliary outputs off by model.arguments (such as "
                "{aux_logits: false}), or name a function that returns a network around it"
            )
        if logits.shape != (len(images), self.outputs):
            self._refuse(
                f"returns {tuple(logits.shape)} for {len(images)} images in {mode} mode; it must "
                f"return logits, ({len(images)}, {self.outputs}): one for each class "
                "(model.num_classes)"
            )
        if not logits.isfinite().all():
            self._refuse(f"returns infinite or NaN logits for random images in {mode} mode")
        sums = logits.detach().float().sum(1)
        if self.outputs > 1 and (logits >= 0).all() and _close(sums, torch.ones_like(sums), 1e-3):
            self._refuse(
                "returns probabilities, not logits: each row is positive and sums to 1. Leave its "
                "softmax out, since the loss has one"
            )
        return logits.detach() if mode == "eval" else logits

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.model.named_modules():
            for own, value in module.named_buffers(recurse=False):
                if not (isinstance(module, GhostNorm) and own == "collected"):
                    yield f"{name}.{own}".lstrip("."), value

    def _check_buffers(self, before: dict[str, Tensor]) -> None:
        """Refuse buffers that a forward changes: each rank would have its own."""
        for name, value in self._buffers():
            if name not in before or not torch.equal(value, before[name]):
                owner = self.model.get_submodule(name.rpartition(".")[0])
                self._refuse(
                    f"changes the buffer {name} (of {type(owner).__name__}) in forward: it would "
                    "be of each worker's own samples. Only nn.BatchNorm's running statistics are "
                    "kept alike; use that, or a norm without running statistics"
                )

    def _check_mixing(self, logits: Tensor, others: Tensor) -> None:
        with torch.no_grad():
            changed = self._logits(self.model, others)[:GHOST_BATCH]
            if _close(changed, logits[:GHOST_BATCH], SAME):
                return
            again = self._logits(self.model, others)[:GHOST_BATCH]
        if not _close(again, changed, SAME):
            self._refuse(
                "gives different outputs for the same images and weights, without drawing from "
                "torch's generators: random numbers of another source, or a state that changes"
            )
        self._refuse(
            "gives a ghost batch another output when another ghost batch of its micro-batch "
            "changes: a norm or attention over the whole batch, or batch statistics of its own. "
            "The result would depend on workers and micro-batch. Use nn.BatchNorm, GroupNorm or "
            "LayerNorm"
        )

    def _unreached(self, logits: Tensor) -> list[str]:
        """Say which parameters the loss does not reach; gradients are left as they were."""
        labels = torch.arange(len(logits), device=self.device) % self.outputs
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        before = {name: p.grad for name, p in trained.items()}
        for p in trained.values():
            p.grad = None
        if not logits.requires_grad:
            self._refuse("returns logits without a gradient (torch.no_grad, detach?)")
        F.cross_entropy(logits.float(), labels).backward()
        unreached = [name for name, p in trained.items() if p.grad is None]
        for name, p in trained.items():
            p.grad = before[name]
        if not unreached:
            return []
        more = f" and {len(unreached) - 6} more" if len(unreached) > 6 else ""
        note = (
            f"model.name: {self.what}: the loss does not reach {len(unreached)} of {len(trained)} "
            f"parameters ({', '.join(unreached[:6])}{more}). Their gradient is zero, and weight "
            "decay shrinks them; set requires_grad=False for what is not to be trained."
        )
        return [note]

    def _refuse(self, reason: str) -> None:
        raise UserError(f"model.name: {self.what} {reason}.")


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Statistics, ghost batches and random numbers are afterwards what they were."""
    norms = [module for module in model.modules() if isinstance(module, GhostNorm)]
    before = [(norm.ghost_batch, norm.collected.clone()) for norm in norms]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    python = _python_states()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for norm in norms:
                norm.ghost_batch = GHOST_BATCH
            yield
    finally:
        model.train()
        random.setstate(python[0])
        np.random.set_state(python[1])
        for norm, (ghost_batch, collected) in zip(norms, before, strict=True):
            norm.ghost_batch = ghost_batch
            norm.collected.copy_(collected)
        for name, value in model.named_buffers():
            if name in buffers and buffers[name].shape == value.shape:
                value.copy_(buffers[name])


def _python_states() -> list[Any]:
    return [random.getstate(), np.random.get_state()]


def _equal(before: list[Any], after: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else _words(a) == _words(b)
        for a, b in zip(before, after, strict=True)
    )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach().float(), b.detach().float()
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))


def _described(value: Any) -> str:
    """What a network returned: `InceptionOutputs(logits (4, 10), aux_logits (4, 10))`."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, dict):
        parts = [f"{key!r} {_described(part)}" for key, part in [*value.items()][:6]]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", [""] * len(value))
        named = [*zip(names, value, strict=True)][:6]
        parts = [f"{name} {_described(part)}".strip() for name, part in named]
        return f"{type(value).__name__}({', '.join(parts)})"
    return type(value).__name__


def _words(state: Any) -> list[Any]:
    """A state of random or numpy.random as plain values."""
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in state]
