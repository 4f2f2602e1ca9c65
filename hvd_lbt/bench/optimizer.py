"""One optimizer update on a network's real shapes: FusedSGD and the wire kernels against torch.

Every case checks that all sides compute the same before it times them, interleaved, on the same
machine. Times are of whole calls, checks and Python included.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt import arguments, ops
from hvd_lbt.bench.harness import (
    Lines,
    Times,
    add_common_arguments,
    add_model_argument,
    check_equal,
    device_of,
    model_recipe,
    speedup,
    time_interleaved,
)
from hvd_lbt.errors import UserError
from hvd_lbt.models import build_model
from hvd_lbt.optim import FusedSGD, StepGradients

SETTINGS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-5}
SCALE = 1024.0
FORMS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHECKED_UPDATES = 3
# An update rounds 8 times or fewer, each time by 2^-24 of a value not above twice the largest.
TOLERANCE = CHECKED_UPDATES * 16 * 2.0**-24


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: what it runs, and the tensors that must come out equal."""

    run: Callable[[], object]
    results: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """Our way, the peers', and the bytes that have to be read and written for each element."""

    name: str
    bytes_per_element: int
    ours: Variant
    peers: dict[str, Variant] = field(default_factory=dict)


class Shapes:
    """A network's weights, and flat buckets that hold a gradient of each of them."""

    def __init__(self, shapes: list[torch.Size], device: torch.device) -> None:
        self.shapes = shapes
        self.device = device
        self.elements = sum(shape.numel() for shape in shapes)

    def random(self, seed: int) -> Tensor:
        """A flat bucket of small numbers."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.elements, generator=generator).mul_(1e-2).to(self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The bucket's slice for each weight."""
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def weights(self) -> list[nn.Parameter]:
        """The same weights at every call, each in memory of its own."""
        return [nn.Parameter(piece.clone()) for piece in self.views(self.random(1))]


def _updated(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    momenta = [optimizer.state[param]["momentum_buffer"] for param in params]
    return [*(param.detach() for param in params), *momenta]


def _ours(net: Shapes, gradient: Tensor, *, scaled: bool = False) -> Variant:
    """FusedSGD, straight from a bucket; `scaled`: divides by the wire's scale, as in training."""
    params = net.weights()
    optimizer = FusedSGD(params, **SETTINGS)
    given = StepGradients(
        grads=dict(zip(params, net.views(gradient), strict=True)),
        grad_scale=torch.full((), SCALE, device=net.device) if scaled else None,
    )
    optimizer.set_gradient_source(lambda: given)
    return Variant(run=optimizer.step, results=lambda: _updated(params, optimizer))


def _torch(net: Shapes, gradient: Tensor, kind: str, *, scaled: str = "") -> Variant:
    """torch.optim.SGD. It wants fp32 gradients: another form is copied to fp32 first, all at once.

    scaled: "in the kernel" hands the scale to the fused kernel; "by GradScaler" has its pass over
    the gradients find infinite ones and unscale.
    """
    params = net.weights()
    optimizer = torch.optim.SGD(params, **{kind: True}, **SETTINGS)
    single = gradient.clone() if gradient.dtype == torch.float32 else gradient.float()
    for param, grad in zip(params, net.views(single), strict=True):
        param.grad = grad
    found = torch.zeros((), device=net.device)
    scale = torch.full((), SCALE, device=net.device)
    if scaled == "in the kernel":
        optimizer.grad_scale, optimizer.found_inf = scale, found  # type: ignore[attr-defined]

    def run() -> None:
        if gradient.dtype != torch.float32:
            single.copy_(gradient)
        if scaled == "by GradScaler":
            grads = [param.grad for param in params]
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, 1 / scale)  # type: ignore[arg-type]
        optimizer.step()

    return Variant(run=run, results=lambda: _updated(params, optimizer))


def _apex(net: Shapes, gradient: Tensor) -> dict[str, Variant]:
    """apex's FusedSGD, where it is installed (it has CUDA kernels only)."""
    if net.device.type != "cuda":
        return {}
    try:
        apex = importlib.import_module("apex.optimizers")
    except ImportError:
        return {}
    params = net.weights()
    optimizer = apex.FusedSGD(params, **SETTINGS)
    for param, grad in zip(params, net.views(gradient), strict=True):
        param.grad = grad
    return {"apex": Variant(run=optimizer.step, results=lambda: _updated(params, optimizer))}


def _update_cases(net: Shapes) -> Iterator[Case]:
    # Weight and momentum are read and written (16 bytes), the gradient is read.
    for name, form in FORMS.items():
        gradient = net.random(2).to(form)
        peers = {"torch fused": _torch(net, gradient, "fused")}
        if form == torch.float32:
            peers["torch foreach"] = _torch(net, gradient, "foreach")
            peers |= _apex(net, gradient)
        yield Case(f"update, {name} gradients", 16 + form.itemsize, _ours(net, gradient), peers)
    gradient = net.random(2).mul_(SCALE).half()
    yield Case(
        "update as in training: fp16 gradients, unscaled",
        16 + 2,
        _ours(net, gradient, scaled=True),
        {
            f"torch fused, scale {how}": _torch(net, gradient, "fused", scaled=how)
            for how in ("in the kernel", "by GradScaler")
        },
    )


def _wire_cases(net: Shapes) -> Iterator[Case]:
    source = net.random(3)
    sources = [piece.clone() for piece in net.views(source)]
    scale = torch.full((), SCALE, device=net.device)
    for name in ("fp16", "bf16"):
        ours, theirs = (
            torch.empty(net.elements, dtype=FORMS[name], device=net.device) for _ in range(2)
        )
        overflow, flag = (torch.zeros(1, device=net.device) for _ in range(2))
        pack = partial(ops.pack_wire_, net.views(ours), sources, scale, overflow)

        def torch_pack(theirs: Tensor = theirs, flag: Tensor = flag) -> None:
            torch.mul(source, scale, out=theirs)  # it may read one flat source, we read 161
            flag.copy_(theirs.isfinite().all().logical_not())

        yield Case(
            f"pack to {name} with flag",
            4 + 2,
            Variant(run=pack, results=partial(list, (ours, overflow))),
            {"torch": Variant(run=torch_pack, results=partial(list, (theirs, flag)))},
        )
    wire = net.random(3).half()
    wires = net.views(wire)
    targets = [torch.empty_like(piece) for piece in sources]
    flat = torch.empty_like(source)
    yield Case(
        "unpack from fp16",
        2 + 4,
        Variant(run=lambda: ops.unpack_wire_(targets, wires, scale), results=lambda: targets),
        {
            "torch": Variant(
                run=lambda: flat.copy_(wire).div_(scale),  # torch.div would round to fp16
                results=lambda: net.views(flat),
            )
        },
    )


def _launches(way: Variant) -> int:
    """How many kernels one run starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        way.run()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in event.name
    ]
    return len(kernels)


def _repeat(run: Callable[[], object], times: int) -> Callable[[], None]:
    def many() -> None:
        for _ in range(times):
            run()

    return many


def _measure(case: Case, net: Shapes, args: argparse.Namespace, lines: Lines, threads: int) -> None:
    ways = {"hvd_lbt": case.ours} | case.peers
    for _ in range(CHECKED_UPDATES):
        for way in ways.values():
            way.run()
    differences = {
        name: check_equal(
            f"{case.name}: {name}", case.ours.results(), peer.results(), tolerance=TOLERANCE
        )
        for name, peer in case.peers.items()
    }
    on_gpu = net.device.type == "cuda"
    # On a GPU one update is shorter than the wait for it: the mean of several is timed.
    inner = 20 if on_gpu else 1
    copied, copy = (
        torch.ones(net.elements, device=net.device),
        torch.empty(net.elements, device=net.device),
    )
    times = time_interleaved(
        {name: _repeat(way.run, inner) for name, way in ways.items()}
        | {"copy": _repeat(lambda: copy.copy_(copied), inner)},
        repetitions=args.repetitions,
        synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
    )
    times = {name: Times(tuple(s / inner for s in one.seconds)) for name, one in times.items()}
    copy_rate = 8 * net.elements / times["copy"].median  # reads 4 bytes of an element, writes 4
    for name, way in ways.items():
        rate = case.bytes_per_element * net.elements / times[name].median
        extra: dict[str, object] = {"launches": _launches(way)} if on_gpu else {}
        if name != "hvd_lbt":
            extra |= speedup(times["hvd_lbt"], times[name])
            extra |= {"difference": differences[name], "tolerance": TOLERANCE}
        lines.result(
            case=case.name,
            way=name,
            threads=threads,
            **times[name].summary(),
            # Of the bytes that must move at the least, whatever else this way moves.
            gb_per_s=rate / 1e9,
            share_of_copy=rate / copy_rate,
            **extra,
        )
    lines.result(
        case=case.name,
        way="copy",
        threads=threads,
        **times["copy"].summary(),
        gb_per_s=copy_rate / 1e9,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `hvd_lbt bench optimizer`."""
    add_model_argument(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=arguments.threads, nargs="+", default=[1, 2], help="CPU threads [1 2]"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    add_common_arguments(parser, repetitions=60)


def main(args: argparse.Namespace) -> int:
    """Run all cases; 0 if every one was equal to its peers."""
    device = device_of(args.device)
    recipe = model_recipe(args.model)
    shapes = [param.shape for param in build_model(recipe, 1000, 32).parameters()]
    net = Shapes(shapes, device)
    settings = {
        "model": args.model,
        "tensors": len(shapes),
        "elements": net.elements,
        "device": args.device,
        "instructions": ops.cpu_isa(),
        **SETTINGS,
    }
    lines = Lines("optimizer", settings=settings, path=args.out)
    before, measured = torch.get_num_threads(), 0
    try:
        for threads in args.threads if args.device == "cpu" else [before]:
            torch.set_num_threads(threads)
            for cases in (_update_cases(net), _wire_cases(net)):
                for case in cases:
                    if args.only in case.name:
                        measured += 1
                        _measure(case, net, args, lines, threads)
    finally:
        torch.set_num_threads(before)
    if not measured:
        raise UserError(f"--only {args.only}: there is no case whose name contains this.")
    return 0
