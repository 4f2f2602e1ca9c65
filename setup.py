"""Builds hvd_lbt._C, the extension; everything else about the package stands in pyproject.toml.

HVD_LBT_CUDA=1 adds the CUDA kernels: it needs nvcc (CUDA_HOME) and a CUDA build of PyTorch, and no
GPU. TORCH_CUDA_ARCH_LIST picks the GPUs, "8.0;9.0+PTX" unless set. HVD_LBT_SANITIZE=1 builds the
CPU part for AddressSanitizer and UndefinedBehaviorSanitizer (launch/sanitize).
"""

import os
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    """The yes or no of an environment variable."""
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name}={value}: it must be 0 or 1")
    return value == "1"


def sources(*patterns: str) -> list[str]:
    """The files matching any of the patterns, relative to this folder as setuptools wants them."""
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in files)


def extension():
    """The extension, with the CUDA kernels if HVD_LBT_CUDA asks for them."""
    # No contraction to fused multiply-adds: every instruction set then gives the same bits.
    # OpenMP is what at::parallel_for is made of; without the flag it would run on one thread.
    host = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp", "-Wall"]
    host += ["-Wextra", "-Wno-unused-parameter"]
    link = ["-fopenmp"]
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    if flag("HVD_LBT_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        host += ["-g", "-O1", "-fno-sanitize-recover=undefined", *sanitize]
        link += sanitize
    if not flag("HVD_LBT_CUDA"):
        return cpp_extension.CppExtension(
            "hvd_lbt._C", files, extra_compile_args=host, extra_link_args=link
        )
    if cpp_extension.CUDA_HOME is None:
        raise SystemExit("HVD_LBT_CUDA=1 needs the CUDA toolkit: set CUDA_HOME to its folder")
    if torch.version.cuda is None:
        raise SystemExit(
            f"HVD_LBT_CUDA=1 needs a CUDA build of PyTorch, and this is {torch.__version__}"
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return cpp_extension.CUDAExtension(
        "hvd_lbt._C",
        files + sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
        extra_compile_args={"cxx": host, "nvcc": ["-O3", "-std=c++20", "--fmad=false"]},
        extra_link_args=link,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
