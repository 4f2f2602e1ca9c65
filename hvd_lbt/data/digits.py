"""The built-in data set: scikit-learn's handwritten digits as real image files."""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

TEST_EVERY = 5  # every fifth image is a test image: 1,437 train and 360 test


def cache_folder() -> Path:
    """Where data made by this program is kept: $XDG_CACHE_HOME/hvd_lbt, else ~/.cache/hvd_lbt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_lbt"


def write_digits(folder: Path | None = None) -> Path:
    """Write the 1,797 digits (8×8 grey PNG) as FOLDER/{train,test}/CLASS/NNNN.png, once.

    Returns the folder, by default `cache_folder()/digits`. The folder appears whole or not at all,
    so several ranks may call this at the same time.
    """
    folder = folder or cache_folder() / "digits"
    if folder.is_dir():
        return folder
    from sklearn.datasets import load_digits  # slow to import, needed once

    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            split = "test" if index % TEST_EVERY == 0 else "train"
            file = Path(scratch, "digits", split, str(label), f"{index:04}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            # 0..16 → 0..255
            Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(file)
        try:
            os.rename(Path(scratch, "digits"), folder)
        except OSError:
            if not folder.is_dir():  # another rank was faster: its files are the same
                raise
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt data digits`."""
    parser.add_argument("--out", type=Path, help="the folder to write [the cache folder]")


def main(args: argparse.Namespace) -> int:
    """Write the digits and print where they are."""
    try:
        print(printable(write_digits(args.out)))
    except OSError as error:
        raise UserError(
            f"--out {args.out}: the digits cannot be written there ({error.strerror}). Give a "
            "folder that can be made or written to."
        ) from error
    return 0
