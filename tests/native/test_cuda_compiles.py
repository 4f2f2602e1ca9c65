"""The CUDA sources without a GPU: they compile, and the kernels compute right, run on the host."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from hvd_lbt import ops

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
FORMS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as wire_rule.h's Form


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit, if there is one."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parents[1] if nvcc else None
    for folder in (os.environ.get("CUDA_HOME"), beside, *sorted(Path("/usr/local").glob("cuda*"))):
        if folder and all(
            (Path(folder) / file).exists() for file in ("bin/nvcc", "include/cuda_runtime.h")
        ):
            return Path(folder).resolve()
    return None


needs_nvcc = pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit here (CUDA_HOME)")


def compile_(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
def test_kernels_compile_for_a100_and_h100_without_spilling(tmp_path):
    home = toolkit()
    compile_(
        home / "bin" / "nvcc", "-O3", "-std=c++20", "--fmad=false", "-Werror", "all-warnings",
        "-Xptxas", "-warn-spills", "-gencode", "arch=compute_80,code=sm_80",
        "-gencode", "arch=compute_90,code=sm_90", "-c", CUDA / "kernels.cu",
        "-o", tmp_path / "kernels.o",
    )  # fmt: skip


@needs_nvcc
def test_operators_compile(tmp_path):
    # The one header that a CPU build of torch leaves out.
    missing = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    missing.parent.mkdir(parents=True)
    missing.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [*cpp_extension.include_paths(), toolkit() / "include", tmp_path]
    compile_(
        "c++", "-fsyntax-only", "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter",
        "-Werror", *(f"-isystem{folder}" for folder in folders), CUDA / "ops.cpp",
    )  # fmt: skip


# ---- the kernels on the host, one thread after the other ----------------------------------------

INTERFACE = """
#include "{here}/cuda_on_host.h"
{kernels}
using namespace hvd_lbt;
extern "C" {{
int sgd(int count, SgdTensor* tensors, const float* scale, const float* found_inf,
        const SgdSettings* settings) {{
  launches = 0;
  cuda_sgd({{tensors, tensors + count}}, scale, found_inf, *settings, nullptr);
  return launches;
}}
int pack(int count, WireTensor* tensors, int form, const float* scale, float* overflow,
         float summands) {{
  launches = 0;
  cuda_pack({{tensors, tensors + count}}, Form(form), scale, overflow, summands, nullptr);
  return launches;
}}
int unpack(int count, WireTensor* tensors, int form, const float* scale) {{
  launches = 0;
  cuda_unpack({{tensors, tensors + count}}, Form(form), scale, nullptr);
  return launches;
}}
}}
"""


class SgdTensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "buffer")),
        ("count", ctypes.c_int64),
        ("gradient_form", ctypes.c_uint8),
    ]


class SgdSettings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("lr", "momentum", "weight_decay")),
        *((name, ctypes.c_bool) for name in ("has_momentum", "has_scale", "nesterov", "maximize")),
    ]


class WireTensor(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("wire", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    text = (CUDA / "kernels.cu").read_text()
    text, found = re.subn(
        r"(\w+(?:<W>)?)\s*<<<blocks, kThreads, 0, stream>>>\(",
        r"run_on_host(blocks, kThreads, \1, ",
        text,
    )
    assert found == text.count("__global__") == 3
    text = text.replace('#include "kernels.h"', (CUDA / "kernels.h").read_text())
    text = text.replace("#pragma once", "").replace('"../', f'"{ROOT}/csrc/')
    text = re.sub(r"#include <cuda_runtime(_api)?.h>", "", text)
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "host.cpp"
    source.write_text(INTERFACE.format(here=Path(__file__).parent, kernels=text))
    compile_(
        "c++", "-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-unknown-pragmas",
        "-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-static-libubsan",
        source, "-o", folder / "host.so",
    )  # fmt: skip
    return ctypes.CDLL(folder / "host.so")


def tensors(sizes, shift=0, dtype=torch.float32, seed=0):
    """One tensor of each size, `shift` elements past where memory is aligned."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size + shift, generator=generator).to(dtype)[shift:] for size in sizes
    ]  # fmt: skip


SIZES = (0, 1, 3, 4, 31, 4095, 4096, 4097, 10_001)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_sgd_kernel_gives_the_bits_of_the_cpu(kernels, form, shift, extras):
    expected = {
        "params": tensors(SIZES, shift),
        "grads": tensors(SIZES, shift, form, seed=1),
        "momenta": tensors(SIZES, shift, seed=2),
    }
    settings = {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "nesterov": extras,
        "maximize": extras,
    }
    options = {}
    if extras:
        options = {"grad_scale": torch.tensor([8.0]), "found_inf": torch.tensor([0.0])}
    copies = {
        name: [t.clone() for t in value] if isinstance(value, list) else value
        for name, value in {**expected, **options}.items()
    }
    ops.fused_sgd_(**expected, **settings, **options)

    table = (SgdTensor * len(SIZES))(
        *(
            SgdTensor(*map(address, pointers), size, FORMS[form])
            for size, *pointers in zip(
                SIZES, copies["params"], copies["grads"], copies["momenta"], strict=True
            )
        )
    )
    given = SgdSettings(0.1, 0.9, 1e-2, True, extras, extras, extras)
    scale, found_inf = copies.get("grad_scale"), copies.get("found_inf")
    launched = kernels.sgd(
        len(SIZES), table, address(scale), address(found_inf), ctypes.byref(given)
    )
    assert launched == 1
    for name, wanted in {**expected, **options}.items():
        assert all(map(torch.equal, copies[name], wanted)), name

    if extras:  # a skipped update changes nothing
        before = [t.clone() for t in copies["params"]]
        found_inf.fill_(1.0)
        kernels.sgd(len(SIZES), table, address(scale), address(found_inf), ctypes.byref(given))
        assert all(map(torch.equal, copies["params"], before))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_wire_kernels_give_the_bits_of_the_cpu(kernels, form, shift):
    sources = tensors(SIZES, shift)
    scale, overflow = torch.tensor(1024.0), torch.zeros(1)
    wanted = torch.zeros(sum(SIZES), dtype=form)
    wire = torch.zeros_like(wanted)

    def table(of):
        wires = map(address, wire.split(SIZES))
        return (WireTensor * len(SIZES))(
            *(WireTensor(*entry) for entry in zip(map(address, of), wires, SIZES, strict=True))
        )

    def pack(summands=1):
        overflow.zero_()
        wanted_overflow = torch.zeros(1)
        ops.pack_wire_(wanted.split(SIZES), sources, scale, wanted_overflow, summands=summands)
        launched = kernels.pack(
            len(SIZES), table(sources), FORMS[form], address(scale), address(overflow),
            ctypes.c_float(summands),
        )  # fmt: skip
        assert launched == 1
        assert torch.equal(wire.view(torch.uint8), wanted.view(torch.uint8))
        assert overflow.item() == wanted_overflow.item()
        return overflow.item()

    assert pack() == 0
    back, wanted_back = tensors(SIZES, shift, seed=5), tensors(SIZES, shift, seed=6)
    ops.unpack_wire_(wanted_back, wire.split(SIZES), scale)
    assert kernels.unpack(len(SIZES), table(back), FORMS[form], address(scale)) == 1
    assert all(map(torch.equal, back, wanted_back))

    largest = torch.finfo(form).max / 1024
    sources[5][17] = largest / 3  # fits, a sum of two such does not surely fit
    assert pack(summands=1) == 0
    assert pack(summands=2) == 1
    sources[5][17] = min(largest * 2, torch.finfo(torch.float32).max)
    assert pack() == 1
    sources[8][-1] = float("nan")
    assert pack() == 2


def test_more_tensors_than_one_launch_holds(kernels):
    sizes = [5] * 1_200
    params, grads = tensors(sizes), tensors(sizes, seed=1)
    wanted = [p - 0.5 * g for p, g in zip(params, grads, strict=True)]
    table = (SgdTensor * len(sizes))(
        *(SgdTensor(address(p), address(g), None, 5, 0) for p, g in zip(params, grads, strict=True))
    )
    given = SgdSettings(0.5, 0.0, 0.0, False, False, False, False)
    assert kernels.sgd(len(sizes), table, None, None, ctypes.byref(given)) == 2
    assert all(map(torch.equal, params, wanted))
