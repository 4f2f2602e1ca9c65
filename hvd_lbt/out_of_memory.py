"""Which errors mean that memory ran out, and what frees some of it."""

import gc

import torch

from hvd_lbt.errors import one_line

# What torch, DALI, CUDA's libraries and the C++ runtime write where no type of its own says it.
SAYS_SO = (
    "can't allocate memory",  # DefaultCPUAllocator
    "out of memory",  # CUDA's runtime, and DALI
    "bad_alloc",
    "bad allocation",
    "_ALLOC_FAILED",  # CUBLAS_STATUS_…, CUDNN_STATUS_…
    "could not create a memory",  # oneDNN
)
# Of oneDNN, where there is no room for a kernel of its own. A longer text is of another cause.
SAYS_NO_MORE = ("could not create a primitive", "could not execute a primitive")
# Of plain types only: a collective's error ends the world, whatever it says.
TYPES = (RuntimeError, torch.OutOfMemoryError, torch.AcceleratorError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this rank's own memory, of the device or of the host, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).strip()
    says_so = any(words in text for words in SAYS_SO) or text in SAYS_NO_MORE
    return type(error) in TYPES and says_so


def reason(error: BaseException) -> str:
    """The error in one line, for who wonders whether it was memory indeed."""
    return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")


def release_cached_memory() -> None:
    """Give back what torch keeps for later allocations, so that other sizes find room."""
    gc.collect()  # a failed forward may have left cycles that hold its activations
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
