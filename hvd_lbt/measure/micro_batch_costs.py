"""What a micro-batch costs, by its size: tried once, with nothing changed."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvd_lbt.models.forward import Forward

ROUNDS = 4  # over all sizes; the first warms up, and of the others the fastest counts


def micro_batch_costs(
    forward: Forward, model: nn.Module, like: Sequence[Tensor], sizes: Sequence[int]
) -> dict[int, float]:
    """Seconds of forward and backward of a micro-batch of each size; empty if one cannot be run.

    like: one sample of each part of a batch, (1, …), on the device; micro-batches repeat it. Call
    it between updates. No gradient is accumulated, and buffers, collected statistics and random
    numbers are afterwards what they were. It needs the memory of the largest micro-batch and of the
    gradients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = parameters[0].device
    fastest: dict[int, float] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for turn in range(ROUNDS):
                for size in sizes:
                    seconds = _seconds(forward, parameters, like, size, device)
                    if turn:
                        fastest[size] = min(seconds, fastest.get(size, seconds))
        except RuntimeError:  # out of memory, or a model that takes no such size
            return {}
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    return fastest


def _seconds(
    forward: Forward,
    parameters: Sequence[Tensor],
    like: Sequence[Tensor],
    size: int,
    device: torch.device,
) -> float:
    parts = [one.expand(size, *one.shape[1:]).contiguous() for one in like]
    _wait(device)
    began = time.perf_counter()
    loss, _ = forward(*parts)
    # unlike loss.backward() this leaves .grad alone and calls no hook of an accumulated gradient
    torch.autograd.grad(loss, parameters, allow_unused=True)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
