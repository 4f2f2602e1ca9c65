"""Forward and loss of one micro-batch: precision, memory format, compiled or not."""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hvd_lbt.errors import UserError
from hvd_lbt.losses import Loss, right_answers

Forward = Callable[..., tuple[Tensor, Tensor]]


def make_forward(
    model: nn.Module,
    *,
    bf16: bool = False,
    channels_last: bool = False,
    loss: Loss | None = None,
) -> Forward:
    """images, labels → sum of their losses, and (3,): it, correct answers, samples counted.

    Mixed images come with their partners' labels and the weights of their own.
    """
    loss = loss or Loss()
    device = next(model.parameters()).device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(images: Tensor, labels: Tensor, *mixed: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(images.contiguous(memory_format=memory_format))
        total = loss(logits.float(), labels, *mixed)
        right = right_answers(logits, labels, *mixed)
        return total, torch.stack([total.detach(), right, (labels >= 0).sum()])

    return forward


def compiled(forward: Forward, graphs: int) -> Forward:
    """`forward` by torch.compile, which makes at most so many graphs, one a size; more is an error.

    The model itself, its names and its evaluation stay as they are. The gradients of all parameters
    come together at the end of backward, so no sum hides behind it.
    Raises UserError if there is no compiler.
    """
    missing = [what for what, there in _needs().items() if not there]
    if missing:
        raise UserError(f"run.compile: torch.compile needs {' and '.join(missing)}.")
    torch.compiler.reset()  # the graphs of a training before this one
    torch.compiler.config.recompile_limit = graphs
    # No CUDA graphs (mode "reduce-overhead"): the next replay overwrites the gradients of the last,
    # and the reducer may keep those until the step.
    return torch.compile(forward, fullgraph=True, dynamic=False)


def allow_graphs(more: int) -> None:
    """Let torch.compile make so many more graphs, for sizes that are new."""
    torch.compiler.config.recompile_limit += more


def _needs() -> dict[str, bool]:
    """What torch.compile calls on this machine, and whether it is there."""
    headers = Path(sysconfig.get_paths()["include"])
    needs = {f"Python's headers ({headers}/Python.h)": (headers / "Python.h").is_file()}
    if torch.cuda.is_available():
        needs["triton"] = importlib.util.find_spec("triton") is not None
        names = [os.environ.get("CC", ""), "gcc", "clang"]
        needs["a C compiler (gcc, clang, or CC)"] = any(map(shutil.which, names))
    else:
        name = os.environ.get("CXX", "g++")
        needs[f"a C++ compiler ({name}, or another by CXX)"] = shutil.which(name) is not None
    return needs
