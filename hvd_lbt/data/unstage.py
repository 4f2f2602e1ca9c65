"""`hvd_lbt data unstage FOLDER`: remove the copies that `data.stage: FOLDER` has made on this node.

Copies that a running process reads stay, and are an error. Run it on each node, for instance at the
end of the last job: `srun --ntasks-per-node=1 hvd_lbt data unstage /local/nvme`.
"""

import argparse
from pathlib import Path

from hvd_lbt.data.stage import remove
from hvd_lbt.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt data unstage`."""
    parser.add_argument("folder", type=Path, help="of data.stage")
    parser.add_argument("--data", type=Path, help="the copies of this data set only [all]")


def main(args: argparse.Namespace) -> int:
    """Remove them, and print how much that was."""
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: there is no such folder; give that of data.stage.")
    removed, size = remove(args.folder, source=args.data)
    print(
        f"{args.folder}: copies of {removed} split{'s' * (removed != 1)} removed, {size:,} bytes."
    )
    return 0
