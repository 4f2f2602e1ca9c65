"""The extension's operators, typed, and a twin of each in plain torch.

The operators are `torch.ops.hvd_lbt.*`; csrc/ops.cpp has the schemas. Every function here changes
its tensors in place and returns nothing. Without the built extension the module imports, and
calling an operator raises `UserError` with the command that builds it; the twins always work.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from hvd_lbt.errors import UserError

try:
    import_module("hvd_lbt._C")  # it registers the operators
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None

WIRE_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def require() -> None:
    """Raise `UserError` with the build command unless the extension loads."""
    if _missing is not None:
        raise UserError(
            f"the extension hvd_lbt._C does not load ({_missing}). Build it with "
            "`python setup.py build_ext --inplace` in the repository (HVD_LBT_CUDA=1 for GPUs)."
        )


def has_kernels(key: str) -> bool:
    """Whether the extension was built with kernels for "CPU", "CUDA", …"""
    require()
    return torch._C._dispatch_has_kernel_for_dispatch_key("hvd_lbt::fused_sgd_", key)


def require_on(device: torch.device) -> None:
    """Raise `UserError` unless the extension has kernels for this kind of device."""
    key = device.type.upper()
    if not has_kernels(key):
        raise UserError(
            f"the extension hvd_lbt._C has no {key} kernels, and this process sees such a device. "
            "Build them (HVD_LBT_CUDA=1 launch/setup), or hide the GPU (CUDA_VISIBLE_DEVICES=) to "
            "train on the CPU."
        )


def cpu_isa(choose: str | None = None) -> str:
    """Name of the CPU instruction set in use: avx512, avx2 or plain; `choose` changes it."""
    require()
    return torch.ops.hvd_lbt.cpu_isa(choose)


def laid_out_as(tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` in the other's order of memory and in `dtype` [its own], copied only if it is
    not.
    """
    if tensor.dtype == (dtype or tensor.dtype) and all(  # strides of size 1 do not matter
        own == its or size == 1
        for own, its, size in zip(tensor.stride(), like.stride(), like.shape, strict=True)
    ):
        return tensor
    with torch.no_grad():
        return torch.empty_like(like, dtype=dtype or tensor.dtype).copy_(tensor)


def fused_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update weights and momentum in one pass over memory.

    g = ±grads / grad_scale + weight_decay·params (minus: maximize); momenta = momentum·momenta + g;
    params -= lr·(momenta, or with nesterov g + momentum·momenta). The gradients are only read.

    params, momenta: float32, dense; grads: float32, float16 or bfloat16, each of its own; tensor i
    of every list has params[i]'s sizes and strides, all on one device. momenta may be empty when
    momentum is 0. grad_scale, found_inf: one float32 on that device; found_inf ≠ 0 leaves
    everything as it is, bit for bit. Nothing written may overlap anything else. Raises ValueError
    or TypeError naming the tensor.
    """
    require()
    if not params:  # without a tensor torch does not know whose kernel to call
        return
    torch.ops.hvd_lbt.fused_sgd_(
        params,
        grads,
        momenta,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


@torch.no_grad()
def fused_sgd_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`fused_sgd_` in plain torch, in the precision of params (float64 for an exact answer)."""
    if found_inf is not None and found_inf.item() != 0:
        return
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        g = grad.to(param.dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(param.dtype)
        if maximize:
            g = -g
        if weight_decay != 0:
            g = g + weight_decay * param
        if momenta:
            momenta[i].mul_(momentum).add_(g)
            g = g + momentum * momenta[i] if nesterov else momenta[i]
        param.sub_(lr * g)


def pack_wire_(
    wires: Sequence[Tensor],
    sources: Sequence[Tensor],
    scale: Tensor,
    overflow: Tensor,
    *,
    summands: int = 1,
) -> None:
    """Round scaled gradients to their places on the wire: wires = scale · sources.

    wires: all float16, all bfloat16 or all float32 (rounding to nearest even); sources: float32,
    dense; wires[i] has sources[i]'s sizes and strides (views into a bucket, or the whole bucket);
    scale: one float32. overflow: one float32, raised (never lowered) to 1 if a finite source does
    not fit the wire, to 2 if a source is infinite or NaN. summands: how many such wires will be
    summed in their form; above 1, the flag is raised to 1 also where 2·summands of the largest
    value do not fit. Raises ValueError or TypeError naming the tensor.
    """
    require()
    torch.ops.hvd_lbt.pack_wire_(wires, sources, scale, overflow, summands=summands)


@torch.no_grad()
def pack_wire_reference(
    wires: Sequence[Tensor],
    sources: Sequence[Tensor],
    scale: Tensor,
    overflow: Tensor,
    *,
    summands: int = 1,
) -> None:
    """`pack_wire_` in plain torch."""
    room = 2.0 * summands if summands > 1 else 1.0
    for wire, source in zip(wires, sources, strict=True):
        wire.copy_(source * scale)
        lost = (~(source * scale * room).to(wire.dtype).isfinite()).any().float()
        broken = (~source.isfinite()).any().float()
        overflow.copy_(torch.maximum(overflow, torch.maximum(lost, 2 * broken).expand_as(overflow)))


def unpack_wire_(targets: Sequence[Tensor], wires: Sequence[Tensor], scale: Tensor) -> None:
    """The way back: targets = wires / scale.

    targets: float32, dense; wires, scale: as `pack_wire_` has them.
    """
    require()
    torch.ops.hvd_lbt.unpack_wire_(targets, wires, scale)


@torch.no_grad()
def unpack_wire_reference(
    targets: Sequence[Tensor], wires: Sequence[Tensor], scale: Tensor
) -> None:
    """`unpack_wire_` in plain torch."""
    for target, wire in zip(targets, wires, strict=True):
        target.copy_(wire.float() / scale)


if _missing is None:
    # They return nothing, so there is no shape to infer: tracing passes, the checks come at run
    # time.
    for _name in ("fused_sgd_", "pack_wire_", "unpack_wire_"):
        torch.library.register_fake(f"hvd_lbt::{_name}")(lambda *args, **kwargs: None)
