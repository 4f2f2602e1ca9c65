"""Who takes part: a value handed to everything that must know (pure)."""

from dataclasses import dataclass

# By which a launcher gives a process its rank, before the process has joined the world.
RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of this process among the workers.

    rank, size: over all nodes; local_rank, local_size: on this node. device: number of its GPU on
    this node: the local rank, unless an elastic worker has outlived a smaller one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: int = 0
