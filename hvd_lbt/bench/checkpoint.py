"""`hvd_lbt bench checkpoint`: what a checkpoint costs an update, and what its writer does
meanwhile.

copy: of a network's weights and momentum to the CPU, which the update waits for, with `compare`,
the checksum by which the ranks' weights are compared. write: the whole save, which a thread does.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from hvd_lbt.bench.harness import (
    Lines,
    add_common_arguments,
    add_model_argument,
    check_equal,
    model_recipe,
    speedup,
    time_interleaved,
)
from hvd_lbt.checkpoint import Checkpoints, load_newest, weights_checksum
from hvd_lbt.errors import UserError
from hvd_lbt.models import build_model
from hvd_lbt.recipe import RunRecipe
from hvd_lbt.state import on_cpu
from hvd_lbt.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench checkpoint`."""
    add_model_argument(parser)
    parser.add_argument("--folder", type=Path, help="the disk to write to [a temporary folder]")
    add_common_arguments(parser, repetitions=20)


def main(args: argparse.Namespace) -> int:
    """Check that what is read back is what was saved, then time copy, comparison and write."""
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: there is no such folder; make it first.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = build_model(model_recipe(args.model), 1000, 32).to(device).state_dict()
    momentum = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    state = {"model": weights, "optimizer": momentum}
    settings = {
        "model": args.model,
        "device": str(device),
        "repetitions": args.repetitions,
        "folder": str(args.folder),
    }
    lines = Lines("checkpoint", settings=settings, path=args.out)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saved = Checkpoints(Path(folder), RunRecipe(keep_checkpoints=1), World(), lambda one: [one])
        update = 0

        def write() -> None:
            nonlocal update
            update += 1
            saved.save(update, state)
            saved.wait()

        write()
        read = load_newest(Path(folder))
        assert read is not None
        for part, tensors in state.items():
            check_equal(part, read[part].values(), on_cpu(tensors).values(), tolerance=0.0)
        times = time_interleaved(
            {
                "copy": lambda: on_cpu(state),
                "compare": lambda: weights_checksum(weights),
                "write": write,
            },
            repetitions=args.repetitions,
        )
    for name, measured in times.items():
        lines.result(
            case=name,
            **measured.summary(),
            write_takes_times_as_long=speedup(measured, times["write"]),
        )
    return 0
