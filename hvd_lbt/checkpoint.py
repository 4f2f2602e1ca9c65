"""The one place that writes checkpoints: whole files or none, checked when read.

A checkpoint is `update-NNNNNNNN.pt` (torch.save of plain state) and `update-NNNNNNNN.pt.sha256`
(as sha256sum writes it). It knows nothing of the number of workers.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe


class Checkpoints:
    """The newest `keep` checkpoints in `folder`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def files(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted(self.folder.glob("update-*.pt"))

    def save(self, update: int, state: dict[str, Any]) -> Path:
        """Write the state after `update` updates; it is on disk, or an error, when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"update-{update:08}.pt"
        scratch = file.with_suffix(".pt.part")
        try:
            with scratch.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            digest = _digest(scratch)
            _write_durably(file.with_suffix(".pt.sha256"), f"{digest}  {file.name}\n")
            os.replace(scratch, file)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            scratch.unlink(missing_ok=True)
            raise UserError(
                f"The checkpoint {file} could not be written ({error}). "
                "Free space or mend the folder, then go on with --resume from the one before: "
                f"{[old.name for old in self.files()] or 'there is none yet'}."
            ) from error
        for old in self.files()[: -self.keep]:
            old.unlink()
            old.with_suffix(".pt.sha256").unlink(missing_ok=True)
        return file

    def load_newest(self) -> dict[str, Any] | None:
        """The newest undamaged state, on the CPU; None if there is no checkpoint.

        A damaged file is said and the one before it is taken; UserError if all are damaged.
        """
        files = self.files()
        for file in reversed(files):
            try:
                return load(file)
            except UserError as error:
                print(f"{error} Trying the one before.", flush=True)
        if files:
            raise UserError(f"All {len(files)} checkpoints in {self.folder} are damaged.")
        return None

    def last_good(self) -> str:
        """A sentence that names the checkpoint to go on from."""
        files = self.files()
        return (
            f"The last good checkpoint is {files[-1]}." if files else "No checkpoint was written."
        )


def open_run(out: Path, recipe: Recipe, train_samples: int, resume: bool) -> dict[str, Any] | None:
    """Open the folder of a run; the state to go on from, or None for a fresh run.

    Raises UserError if the folder holds a run and `resume` is not asked for, if there is nothing to
    resume, or if that run had other settings or another number of training images.
    """
    checkpoints = Checkpoints(out / "checkpoints", recipe.run.keep_checkpoints)
    if not resume and (out / "metrics.jsonl").exists():
        raise UserError(
            f"{out} already holds a run. Go on with it by --resume, or choose another --out."
        )
    state = checkpoints.load_newest() if resume else None
    if state is not None:
        changes = recipe.changes_since(state["recipe"])
        if changes:
            raise UserError(
                f"{out} was trained with another recipe: {changes}. Resume with the same recipe and "
                "--set values, or choose another --out."
            )
        if state["train_samples"] != train_samples:
            raise UserError(
                f"{out} was trained on {state['train_samples']:,} images, and this training folder "
                f"has {train_samples:,}. Resume with the same --data, or choose another --out."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    except OSError as error:
        raise UserError(f"--out {out}: the folder cannot be written ({error}).") from error
    return state


def load(file: Path) -> dict[str, Any]:
    """The state in `file`, on the CPU. Raises UserError if it is missing or damaged."""
    try:
        expected = file.with_suffix(".pt.sha256").read_text().split()[0]
        if _digest(file) != expected:
            raise UserError(f"The checkpoint {file} is damaged: its SHA-256 is not {expected}.")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, IndexError) as error:
        raise UserError(f"The checkpoint {file} or its .sha256 cannot be read: {error}.") from error


def weights_checksum(model: nn.Module) -> int:
    """CRC-32 over all parameters and buffers; equal on all ranks, compared at each checkpoint."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(
            tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), checksum
        )
    return checksum


def weights_agree(checksums: Sequence[int], updates_done: int) -> None:
    """Raise RuntimeError unless the ranks' `weights_checksum` are all the same."""
    if len(set(checksums)) > 1:
        raise RuntimeError(
            f"the ranks' weights differ after {updates_done} updates (CRC-32 by rank: {checksums}). "
            "Nothing was written; resume from the checkpoint before."
        )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
