"""Horovod behind one door: the only module that imports it.

Every collective sums (averages are the caller's arithmetic: weighting is by samples, not by ranks).
Collectives on tensors work in place and return when, or a handle to wait until, the world's sum is
there. `name` pairs the tensors of the ranks; a stable name lets Horovod's response cache skip the
negotiation.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_lbt.errors import UserError
from hvd_lbt.world import World

# Horovod finalises MPI when the library is unloaded unless mpi4py, imported first, owns that duty:
# the other order ends about one run in five with signal 11. Under Gloo no MPI must be touched.
_GLOO = os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "gloo"
try:
    if not _GLOO:
        from mpi4py import MPI
    import horovod.torch as hvd
except ImportError as error:
    raise UserError(
        f"Horovod and mpi4py are needed to train, and one does not import ({error}). "
        "`launch/setup` builds and installs both; `hvd_lbt doctor` says what is missing."
    ) from error


def init() -> World:
    """Join the world: start Horovod and, with a GPU per local rank, take this rank's GPU."""
    hvd.init()
    world = World(
        rank=hvd.rank(), size=hvd.size(), local_rank=hvd.local_rank(), local_size=hvd.local_size()
    )
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {world.local_rank} has no GPU: this node shows "
                f"{torch.cuda.device_count()}. Start at most one rank a GPU."
            )
        torch.cuda.set_device(world.local_rank)
    return world


def horovod() -> Any:
    """Horovod's own module, for what this one does not cover: process sets, timeline, peers to measure."""
    return hvd


def is_initialized() -> bool:
    """Whether this process has joined a world and not left it."""
    return hvd.is_initialized()


def allreduce_async_(tensor: Tensor, name: str) -> int:
    """Begin the in-place sum of `tensor` over all ranks; the handle goes to `synchronize`."""
    return hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)


def synchronize(handle: int) -> Tensor:
    """Wait for a handle of `allreduce_async_`."""
    return hvd.synchronize(handle)


def poll(handle: int) -> bool:
    """Whether `synchronize(handle)` would return at once."""
    return hvd.poll(handle)


def allreduce_(tensor: Tensor, name: str) -> Tensor:
    """Sum `tensor` over all ranks in place."""
    return hvd.synchronize(allreduce_async_(tensor, name))


def broadcast_(tensors: Mapping[str, Tensor], root: int = 0) -> None:
    """Give every rank `root`'s values of these tensors, in place."""
    handles = [
        hvd.broadcast_async_(_as_it_lies(tensor), root, name=f"broadcast.{name}")
        for name, tensor in tensors.items()
    ]
    for handle in handles:
        hvd.synchronize(handle)


def _as_it_lies(tensor: Tensor) -> Tensor:
    """A dense tensor's memory in its own order: Horovod refuses what is not contiguous (channels_last)."""
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def broadcast_object(value: Any, root: int = 0) -> Any:
    """Give every rank `root`'s picklable value."""
    return hvd.broadcast_object(value, root_rank=root)


def allgather_object(value: Any) -> list[Any]:
    """The picklable values of all ranks, by rank."""
    return hvd.allgather_object(value)


def barrier() -> None:
    """Return when every rank has come here."""
    hvd.barrier()


def shutdown() -> None:
    """Leave together: without the barrier a rank may tear down what another still uses."""
    if is_initialized():
        hvd.barrier()
        hvd.shutdown()


def abort(code: int) -> None:
    """End all ranks at once with this exit code; call it after the reason has been printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not _GLOO:
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # under Gloo the launcher ends the other ranks when one has failed
