"""SHA-256 of what a training ends with, to compare two versions of the program bit for bit.

    python tests/dist/state_hash.py FOLDER --ranks 1 2 [--set schedule.epochs=2 …]
    python tests/dist/state_hash.py FOLDER --ranks 1 2 3 --recipe digits_measured --replay

Trains a recipe (`digits`) on each number of ranks and prints one JSON line for each: the hashes of
all weights and buffers, of all momentum buffers, and the wire scale at the end. With --replay it
trains each again by the decisions of the first, and prints a second line.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from launching import run_ranks
from torch import Tensor

from hvd_lbt import checkpoint


def sha256(tensors: Iterable[Tensor]) -> str:
    """Of the bytes of these tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def summary(run: Path) -> dict[str, object]:
    """What the newest checkpoint of a run holds."""
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None, f"{run} has no checkpoint"
    momentum = state["optimizer"]["state"]
    return {
        "updates": state["update"],
        "weights": sha256(state["model"].values()),
        "momentum": sha256(momentum[key]["momentum_buffer"] for key in sorted(momentum)),
        "wire_scale": state["reducer"]["wire_scale"],
        "overflows": state["reducer"]["overflows"],
    }


def main() -> None:
    """Train on each number of ranks and print the hashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the runs; one that does not exist yet")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--replay", action="store_true", help="of a recipe with policy measured")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    overrides = [word for one in args.set for word in ("--set", one)]
    for ranks in args.ranks:
        out = args.folder / f"{ranks}-ranks"
        words = ["-m", "hvd_lbt", "train", args.recipe, *overrides]
        run_ranks(ranks, *words, "--out", out, timeout=3000)
        print(json.dumps({"ranks": ranks, **summary(out)}), flush=True)
        if args.replay:
            again = args.folder / f"{ranks}-ranks-replayed"
            run_ranks(ranks, *words, "--out", again, "--replay", out, timeout=3000)
            print(json.dumps({"ranks": ranks, "replays": True, **summary(again)}), flush=True)


if __name__ == "__main__":
    main()
