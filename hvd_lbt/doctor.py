"""`hvd_lbt doctor`: tries every part that training needs and prints the fix for what fails."""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from hvd_lbt import terminal
from hvd_lbt.terminal import printable

SETUP = "run launch/setup in the repository"
# Each rank contributes rank + 1; the sum over two is 3.
TWO_RANKS = """
import json, torch
from hvd_lbt import comm
world = comm.init()
ones = comm.allreduce_(torch.full((1000,), world.rank + 1.0), "doctor")
assert world.size == 2, f"the launcher started {world.size} ranks"
assert bool((ones == 3).all()), f"1 + 2 came back as {ones[0].item()}"
comm.shutdown()
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check saw. fix: what to do about it; empty if all is well."""

    part: str
    seen: str
    fix: str = ""


def python() -> Finding:
    """Python 3.11 or newer."""
    seen = f"{platform.python_version()} ({sys.executable})"
    old = sys.version_info < (3, 11)
    return Finding(part="Python", seen=seen, fix=f"set HVD_LBT_PYTHON and {SETUP}" if old else "")


def torch() -> Finding:
    """torch 2.11 to 2.13."""
    module = importlib.import_module("torch")
    major, minor = (int(number) for number in module.__version__.split(".")[:2])
    fits = (2, 11) <= (major, minor) <= (2, 13)
    cuda = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU build"
    return Finding(
        part="torch",
        seen=f"{module.__version__}, {cuda}, {module.cuda.device_count()} GPUs",
        fix="" if fits else f"2.11 to 2.13 is supported: HVD_LBT_TORCH=2.13.0 and {SETUP}",
    )


def horovod() -> Finding:
    """Horovod with MPI and Gloo, and with NCCL where torch sees a GPU."""
    hvd = importlib.import_module("hvd_lbt.comm").horovod()
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": bool(hvd.nccl_built())}
    gpu = importlib.import_module("torch").cuda.is_available()
    needed = {"MPI", "Gloo"} | ({"NCCL"} if gpu else set())
    missing = sorted(name for name in needed if not built[name])
    version = importlib.import_module("horovod").__version__
    seen = f"{version} with " + ", ".join(name for name, there in built.items() if there)
    cuda = "set HVD_LBT_CUDA=1 and " if "NCCL" in missing else ""
    fix = f"built without {' and '.join(missing)}: {cuda}{SETUP}" if missing else ""
    return Finding(part="Horovod", seen=seen, fix=fix)


def mpi() -> Finding:
    """mpi4py and the MPI library it found."""
    module = importlib.import_module("mpi4py.MPI")
    library = module.Get_library_version().split(",")[0].strip()
    return Finding(
        part="mpi4py", seen=f"{importlib.import_module('mpi4py').__version__}, {library}"
    )


def dali() -> Finding:
    """DALI, by decoding and resizing an image."""
    numpy = importlib.import_module("numpy")
    pipeline = importlib.import_module("hvd_lbt.data.pipeline")
    shape = pipeline.decode_one(numpy.zeros((5, 7, 3), dtype=numpy.uint8), size=16).shape
    version = importlib.import_module("nvidia.dali").__version__
    wrong = tuple(shape) != (3, 16, 16)
    return Finding(
        part="DALI",
        seen=f"{version}, decodes on the CPU",
        fix=f"an image came out as {tuple(shape)}: {SETUP}" if wrong else "",
    )


def extension() -> Finding:
    """The compiled operators, and their CUDA kernels where torch sees a GPU."""
    ops = importlib.import_module("hvd_lbt.ops")
    cuda = ops.has_kernels("CUDA")
    missing = importlib.import_module("torch").cuda.is_available() and not cuda
    return Finding(
        part="extension",
        seen=f"CPU kernels for {ops.cpu_isa()}, {'CUDA kernels' if cuda else 'no CUDA kernels'}",
        fix=f"set HVD_LBT_CUDA=1 and {SETUP}" if missing else "",
    )


def threads() -> Finding:
    """Cores, and the threads that torch takes."""
    cores = len(os.sched_getaffinity(0))
    taken = importlib.import_module("torch").get_num_threads()
    return Finding(part="threads", seen=f"{cores} cores for this process, torch takes {taken}")


def allreduce(launcher: str) -> Finding:
    """A sum over two ranks that this process starts."""
    here = Path(sys.executable).parent  # where horovodrun is, whether activated or not
    environment = os.environ | {
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(here / "horovodrun"), f"--{launcher}", "-np", "2", "-H", "localhost:2"]
    done = subprocess.run(
        [*command, sys.executable, "-c", TWO_RANKS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(next((line for line in lines if "Error" in line), "\n".join(lines[-3:])))
    return Finding(part=f"two ranks, {launcher}", seen="1 + 2 = 3 on both")


CHECKS: dict[str, tuple[Callable[[], Finding], str]] = {
    "Python": (python, SETUP),
    "torch": (torch, SETUP),
    "mpi4py": (mpi, f"apt-get install libopenmpi-dev openmpi-bin, then {SETUP}"),
    "Horovod": (horovod, SETUP),
    "DALI": (dali, SETUP),
    "extension": (extension, f"python setup.py build_ext --inplace, or {SETUP}"),
    "threads": (threads, "look at OMP_NUM_THREADS"),
    "two ranks, mpi": (
        lambda: allreduce("mpi"),
        "does `mpirun -np 2 hostname` work? Else apt-get install openmpi-bin",
    ),
    "two ranks, gloo": (
        lambda: allreduce("gloo"),
        "does `ssh localhost` or the loopback interface fail? Use MPI meanwhile",
    ),
}


def examine(part: str) -> Finding:
    """Run one check; whatever it raises becomes a finding with its fix."""
    check, fix = CHECKS[part]
    try:
        return check()
    except Exception as error:  # a broken part may raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(part=part, seen=f"FAILED: {lines[0]}", fix=fix)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    """Check everything; the exit code is 0 when all is well, else 1."""
    findings = [examine(part) for part in CHECKS]
    if args.json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        table = Table("part", "seen", "fix", title="hvd_lbt doctor")
        for finding in findings:
            style = "red" if finding.fix else ""
            cells = (finding.part, finding.seen, finding.fix or "–")
            table.add_row(*map(printable, cells), style=style)
        terminal.console().print(table)
    return 1 if any(finding.fix for finding in findings) else 0
