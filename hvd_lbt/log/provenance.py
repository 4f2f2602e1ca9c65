"""What a number depends on: versions of the packages, the revision of this program, the job."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """The versions a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("hvd_lbt", "horovod", "mpi4py", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The git revision of this program, with + if files differ from it; empty outside a
    checkout.
    """
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def slurm_job() -> dict[str, str] | None:
    """The Slurm job this is a part of, and how often Slurm has started it again."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"id": job, "restarts": os.environ.get("SLURM_RESTART_COUNT", "0")} if job else None
