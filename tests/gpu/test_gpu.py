"""The CUDA kernels where they belong (launch/gpu_check runs this); skipped without a GPU.

The CPU kernels are tested against float64 in tests/native; here CUDA must give their bits.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt import FusedSGD, ops
from hvd_lbt.models import build_model
from hvd_lbt.recipe import ModelRecipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ROOT = Path(__file__).resolve().parents[2]
FORMS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 3, 4, 31, 4095, 4096, 4097, 1_000_003]


@pytest.fixture(autouse=True)
def kernels():
    ops.require_on(torch.device("cuda"))  # built without them is a failure, not a reason to skip


def tensors(sizes=SIZES, dtype=torch.float32, *, seed=0, offset=0):
    """The same random tensors on the CPU and on the GPU, `offset` elements past an allocation."""
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(n + offset, generator=generator).to(dtype) for n in sizes]
    return [t[offset:] for t in flat], [t.cuda()[offset:] for t in flat]


def assert_same(cpu, gpu):
    for i, (a, b) in enumerate(zip(cpu, gpu, strict=True)):
        # Bits, but NaNs are equal whatever their payload.
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0, equal_nan=True, msg=f"tensor {i}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 3])
def test_an_update_has_the_bits_of_the_cpu(form, offset):
    for momentum, decay, nesterov, maximize, extras in itertools.product(
        (0.0, 0.9), (0.0, 1e-2), (False, True), (False, True), (False, True)
    ):
        if nesterov and momentum == 0:
            continue
        pairs = {
            "params": tensors(seed=1, offset=offset),
            "grads": tensors(dtype=form, seed=2, offset=offset),
            "momenta": tensors(seed=3, offset=offset) if momentum else ([], []),
        }
        for side, device in enumerate(("cpu", "cuda")):
            ops.fused_sgd_(
                **{name: pair[side] for name, pair in pairs.items()},
                lr=0.1,
                momentum=momentum,
                weight_decay=decay,
                nesterov=nesterov,
                maximize=maximize,
                grad_scale=torch.tensor(24.0, device=device) if extras else None,
                found_inf=torch.zeros((), device=device) if extras else None,
            )
        for pair in pairs.values():
            assert_same(*pair)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("spoiled", [None, 1e30, 3e38, float("inf"), float("nan")])
def test_the_wire_has_the_bits_of_the_cpu(form, offset, spoiled):
    for summands in (1, 4):
        sources = tensors(offset=offset)
        if spoiled is not None:
            for side in sources:
                side[-1][12_345] = spoiled
        wires, flags, back = [], [], tensors(seed=1, offset=offset)
        for side, device in enumerate(("cpu", "cuda")):
            scale, flag = torch.tensor(1024.0, device=device), torch.zeros((), device=device)
            wire = torch.empty(sum(SIZES), dtype=form, device=device)
            ops.pack_wire_(wire.split(SIZES), sources[side], scale, flag, summands=summands)
            ops.unpack_wire_(back[side], wire.split(SIZES), scale)
            wires.append(wire)
            flags.append(flag)
        assert_same([wires[0], flags[0]], [wires[1], flags[1]])
        assert_same(*back)


def resnet50():
    torch.manual_seed(0)
    return build_model(ModelRecipe(name="resnet50", stem="imagenet"), 1000, 32).cuda()


def test_one_launch_updates_resnet50_and_nothing_waits():
    model = resnet50()
    optimizer = FusedSGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # makes the momentum
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]


def test_a_skipped_update_leaves_every_bit_the_first_one_too():
    params = [nn.Parameter(torch.randn(1000, device="cuda"))]
    optimizer = FusedSGD(params, 0.1, 0.9)
    before = params[0].detach().clone()
    params[0].grad = torch.full_like(params[0], float("inf"))
    optimizer.grad_scale = torch.tensor(8.0, device="cuda")
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state[params[0]]["momentum_buffer"].any()


def test_a_graph_captures_pack_and_update():
    _, params = tensors(seed=1)
    _, grads = tensors(seed=2)
    momenta = [torch.zeros_like(p) for p in params]
    eager = [[t.clone() for t in one] for one in (params, grads, momenta)]
    scale, flag = torch.tensor(64.0, device="cuda"), torch.zeros((), device="cuda")
    wire = torch.empty(sum(SIZES), dtype=torch.float16, device="cuda")
    views = wire.split(SIZES)

    def update(params, grads, momenta):
        ops.pack_wire_(views, grads, scale, flag)
        ops.fused_sgd_(
            params, views, momenta, lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False,
            maximize=False, grad_scale=scale, found_inf=flag,
        )  # fmt: skip

    for _ in range(3):
        update(*eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(params, grads, momenta)
    for _ in range(3):
        graph.replay()
    assert_same([t.cpu() for t in eager[0] + eager[2]], params + momenta)


def test_grad_scaler_and_autocast_train_as_with_torch():
    torch.manual_seed(0)
    images, labels = torch.randn(64, 32, device="cuda"), torch.randint(0, 5, (64,), device="cuda")
    weights = []
    for make in (FusedSGD, lambda *args, **kwargs: torch.optim.SGD(*args, fused=True, **kwargs)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.Softplus(), nn.Linear(64, 5)).cuda()
        optimizer = make(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wire", ["fp16", "fp32"])
def test_the_reducer_trains_on_the_gpu_as_torch_does(wire):
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32, device="cuda"), torch.randint(0, 10, (8,)).cuda()

    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(7200, 10)
        ).cuda()

    model, reference = make(), make()
    optimizer = FusedSGD(model.parameters(), 0.01, 0.9)
    peer = torch.optim.SGD(reference.parameters(), 0.01, 0.9)
    reducer = GradientReducer(
        model,
        optimizer,
        world=World(rank=0, size=1, local_rank=0, local_size=1),
        allreduce_async=lambda tensor, name: tensor,
        synchronize=lambda handle: handle,
        wire=wire,
    )
    for _ in range(10):
        for part in range(2):
            rows = slice(4 * part, 4 * part + 4)
            loss = F.cross_entropy(model(images[rows]), labels[rows], reduction="sum") / 8
            reducer.backward(loss, last=part == 1)
        optimizer.step()
        peer.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        peer.step()
    tolerance = {"fp16": 3e-3, "fp32": 1e-5}[wire]
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_run_on_the_gpu_learns(tmp_path):
    pytest.importorskip("horovod", reason="Horovod is not installed on this machine")
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    words = ["train", "digits", "--out", str(tmp_path / "run")]
    words += ["--set", "schedule.epochs=4", "--set", "schedule.milestones=[]"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hvd_lbt", *words],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [r for r in map(json.loads, lines) if r["event"] == "eval"]
    assert evaluations[-1]["top1"] > 0.9
