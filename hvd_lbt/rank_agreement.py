"""What must be the same on all ranks, and is compared: a collective, and one error on every rank.

Each rank fills its own row of a table of zeros; the sum over the ranks is everyone's. The numbers
have 16 bits, which fp32 holds exactly.
"""

import hashlib
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_lbt.errors import UserError
from hvd_lbt.world import World


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of the optimizer, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def compare_models(
    trained: Sequence[tuple[str, Tensor]],
    settings: str,
    world: World,
    sum_: Callable[[Tensor, str], None],
    name: str,
    device: torch.device,
) -> None:
    """Raise UserError, on all ranks, unless all have the same parameters and settings."""
    lines = [f"{n} {tuple(p.shape)} {p.stride()} {p.dtype}" for n, p in trained]
    table = torch.zeros(world.size, 10, device=device)
    own = [1, len(lines), *hash_words(settings, 4), *hash_words("\n".join(lines), 4)]
    table[world.rank] = torch.tensor(own, dtype=torch.float32)
    sum_(table, name)
    rows = table.tolist()
    if any(row[0] != 1 for row in rows):
        raise UserError(
            f"allreduce_async does not sum over the {world.size} ranks of `world`: a one of each "
            f"rank came back as {[row[0] for row in rows]}. Give a sum (op=Sum), not an average."
        )
    counts = [int(row[1]) for row in rows]
    if len(set(counts)) > 1:
        raise UserError(f"the ranks' models differ: by rank they have {counts} parameters.")
    if any(row[2:6] != rows[0][2:6] for row in rows):
        raise UserError(
            "the ranks' reducers differ in wire, bucket_mb or overlap. This rank has: " + settings
        )
    if any(row[6:] != rows[0][6:] for row in rows):
        first, others = _first_difference(lines, world, sum_, name, device)
        raise UserError(
            f"the ranks' models differ: parameter {first} on rank {world.rank} is {lines[first]}, "
            f"and ranks 0 and {others[0]} do not agree on it."
        )


@torch.no_grad()
def compare_weights(
    named: Sequence[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    world: World,
    sum_: Callable[[Tensor, str], None],
    name: str,
    device: torch.device,
) -> None:
    """Raise UserError, on all ranks, unless all begin with the same weights and optimizer state."""
    lines = [f"{n} {_checksum(p)}" for n, p in named]
    state = [optimizer.state.get(p, {}) for p in parameters_of(optimizer)]
    lines += [
        f"the optimizer's {key} of parameter {number} {_checksum(value)}"
        for number, values in enumerate(state)
        for key, value in values.items()
        if isinstance(value, Tensor)
    ]
    table = torch.zeros(world.size, 5, device=device)
    own = [len(lines), *hash_words("\n".join(lines), 4)]
    table[world.rank] = torch.tensor(own, dtype=torch.float32)
    sum_(table, f"{name}.weights")
    rows = table.tolist()
    if all(row == rows[0] for row in rows):
        return
    if len({row[0] for row in rows}) > 1:
        others = [rank for rank, row in enumerate(rows) if row[0] != rows[0][0]]
        what = "what the optimizer's state holds"
    else:
        first, others = _first_difference(lines, world, sum_, f"{name}.weights", device)
        what = lines[first].rpartition(" ")[0]
    ranks = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
    raise UserError(
        f"the ranks begin with different weights: {what} differs between rank 0 and {ranks}. Send "
        "rank 0's to all before the first update: comm.broadcast_(model.state_dict()), or "
        "hvd.broadcast_parameters(model.state_dict(), root_rank=0) and "
        "hvd.broadcast_optimizer_state(optimizer, root_rank=0)."
    )


def _first_difference(
    lines: Sequence[str],
    world: World,
    sum_: Callable[[Tensor, str], None],
    name: str,
    device: torch.device,
) -> tuple[int, list[int]]:
    """The first line that the ranks do not agree on, and which of them differ from rank 0."""
    hashes = torch.zeros(world.size, len(lines), device=device)
    hashes[world.rank] = torch.tensor([hash_words(line, 1)[0] for line in lines])
    sum_(hashes, f"{name}.parameters")
    differs = hashes != hashes[0]
    first = int(differs.any(0).float().argmax())
    return first, differs[:, first].nonzero().flatten().tolist()


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes())


def hash_words(text: str, words: int) -> list[int]:
    """So many 16-bit numbers of the text's SHA-256."""
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[2 * i : 2 * i + 2]) for i in range(words)]
