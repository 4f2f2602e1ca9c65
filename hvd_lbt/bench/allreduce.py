"""`hvd_lbt bench allreduce`: bus bandwidth of Horovod's sum against message size, on real ranks.

Run it under a launcher: `launch/local 2 bench allreduce`. Bus bandwidth as nccl-tests define it:
bytes / seconds · 2(n−1)/n, what a link between two of n ranks has to carry.
"""

import argparse
from functools import partial

import torch

from hvd_lbt import comm
from hvd_lbt.arguments import positive
from hvd_lbt.bench.harness import Lines, add_common_arguments, check_equal, time_interleaved
from hvd_lbt.errors import UserError

SMALLEST = 4096  # bytes of a message
FORMS = {"fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench allreduce`."""
    parser.add_argument("--largest-mb", type=positive, default=64.0, help="of the messages [64]")
    add_common_arguments(parser, repetitions=20)


def main(args: argparse.Namespace) -> int:
    """Check the sum, then time it, for messages from 4 kB up in steps of 4."""
    if args.largest_mb * 2**20 < SMALLEST:
        raise UserError(
            f"--largest-mb {args.largest_mb:g}: the smallest message is {SMALLEST / 2**20:g} MB."
        )
    world = comm.init()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"world_size": world.size, "device": str(device), "repetitions": args.repetitions}
    lines = Lines("allreduce", settings=settings, path=args.out, speaks=world.rank == 0)
    size = SMALLEST
    while size <= args.largest_mb * 2**20:
        for form, dtype in FORMS.items():
            name = f"{form}.{size}"
            message = torch.full((size // dtype.itemsize,), world.rank + 1.0, device=device).to(
                dtype
            )
            expected = torch.full_like(message, world.size * (world.size + 1) / 2)
            comm.allreduce_(message, name)
            check_equal("sum", [message], [expected], tolerance=0.0)
            message.zero_()
            times = time_interleaved(
                {name: partial(comm.allreduce_, message, name)},
                repetitions=args.repetitions,
                synchronize=comm.barrier,
            )[name]
            bus = size / times.median * 2 * (world.size - 1) / world.size
            lines.result(
                case=f"allreduce {form}",
                bytes=size,
                bus_gigabytes_per_second=bus / 1e9,
                **times.summary(),
            )
        size *= 4
    comm.shutdown()
    return 0
