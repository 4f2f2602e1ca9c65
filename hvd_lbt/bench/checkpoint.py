"""`hvd_lbt bench checkpoint`: what a checkpoint costs an update, and what its writer does meanwhile.

copy: of ResNet-50's weights and momentum to the CPU, which the update waits for, with `compare`, the
checksum by which the ranks' weights are compared. write: the whole save, which a thread does.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from hvd_lbt.bench.harness import Lines, check_equal, speedup, time_interleaved
from hvd_lbt.checkpoint import Checkpoints, load_newest, weights_checksum
from hvd_lbt.models.resnet import ResNet
from hvd_lbt.recipe import RunRecipe
from hvd_lbt.state import on_cpu
from hvd_lbt.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench checkpoint`."""
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="the disk to write to [a temporary folder]")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")


def main(args: argparse.Namespace) -> int:
    """Check that what is read back is what was saved, then time copy, comparison and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = ResNet(50, 1000, norm=torch.nn.BatchNorm2d).to(device).state_dict()
    momentum = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    state = {"model": weights, "optimizer": momentum}
    settings = {"device": str(device), "repetitions": args.repetitions, "folder": str(args.folder)}
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
