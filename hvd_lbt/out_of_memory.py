"""Which errors mean that memory ran out, and what frees some of it."""

import gc

import torch

# What torch, DALI, CUDA's libraries and the C++ runtime write where no type of its own says it.
SAYS_SO = (
    "can't allocate memory",  # DefaultCPUAllocator
    "out of memory",  # CUDA's runtime, and DALI
    "bad_alloc",
    "bad allocation",
    "_ALLOC_FAILED",  # CUBLAS_STATUS_…, CUDNN_STATUS_…
    "could not create a memory",  # oneDNN
)
# Of plain types only: a collective's error ends the world, whatever it says.
TYPES = (RuntimeError, torch.OutOfMemoryError, torch.AcceleratorError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this rank's own memory, of the device or of the host, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) in TYPES and any(words in str(error) for words in SAYS_SO)


def release_cached_memory() -> None:
    """Give back what torch keeps for later allocations, so that other sizes find room."""
    gc.collect()  # a failed forward may have left cycles that hold its activations
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
