"""Copies of plain state: nested dicts, lists and tensors, as `state_dict()` gives them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_cpu(state: Any) -> Any:
    """A copy in which every tensor is a copy of its own on the CPU."""
    return copied(state, device=torch.device("cpu"))


def copied(state: Any, into: Any = None, *, device: torch.device | None = None) -> Any:
    """A copy of `state`, in the memory of `into` where that fits.

    into: an earlier copy, or None; device: of the copy's tensors, or None: where they are.
    """
    if isinstance(state, Tensor):
        on = device or state.device
        wanted = (state.shape, state.dtype, on)
        if isinstance(into, Tensor) and (into.shape, into.dtype, into.device) == wanted:
            return into.copy_(state)
        return state.detach().to(on, copy=True)
    if isinstance(state, Mapping):
        old = into if isinstance(into, Mapping) else {}
        return {key: copied(part, old.get(key), device=device) for key, part in state.items()}
    if isinstance(state, list | tuple):
        fits = isinstance(into, list | tuple) and len(into) == len(state)
        before = into if fits else [None] * len(state)
        parts = zip(state, before, strict=True)
        return type(state)(copied(part, old, device=device) for part, old in parts)
    return state
