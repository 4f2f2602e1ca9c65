"""The one place that writes checkpoints: whole files or none, checked when read.

A checkpoint is `update-NNNNNNNN.pt` (torch.save of plain state, with a version) and
`update-NNNNNNNN.pt.sha256` (as sha256sum writes it). It knows nothing of the number of workers.
`best.pt` is a link to the one with the best top-1 accuracy.
"""

import argparse
import hashlib
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hvd_lbt.errors import CheckpointError, UserError
from hvd_lbt.recipe import Recipe, RunRecipe
from hvd_lbt.run_lock import RunLock
from hvd_lbt.state import on_cpu
from hvd_lbt.world import World

VERSION = 1
BEST = "best.pt"


class Checkpoints:
    """The newest checkpoints of a run and its best one, written by a thread of rank 0.

    All ranks call `save` and `wait` together: the ranks' weights are compared, and what went wrong
    on the disk of rank 0 is raised on every rank. allgather: the picklable values of all ranks.
    best_top1: of the run so far. owner: nothing is written once another has taken the run over.
    """

    # One for the process: elastic workers begin anew while a save of theirs is under way.
    _writer = ThreadPoolExecutor(1, "checkpoint")

    def __init__(
        self,
        folder: Path,
        settings: RunRecipe,
        world: World,
        allgather: Callable[[Any], list[Any]],
        best_top1: float = -1.0,
        owner: RunLock | None = None,
    ):
        self.folder, self.keep, self.best_top1 = folder, settings.keep_checkpoints, best_top1
        self._every = 60 * settings.checkpoint_minutes
        self._writes, self._allgather = world.rank == 0, allgather
        self._writing: Future[None] | None = None
        self._owner = owner
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether the last save is `run.checkpoint_minutes` ago, by the clock of rank 0."""
        return self._writes and time.monotonic() - self._saved_at > self._every

    def better(self, top1: float) -> bool:
        """Note an accuracy; whether it is the run's best. The next save becomes `best.pt` then."""
        better = top1 > self.best_top1
        self.best_top1 = max(top1, self.best_top1)
        return better

    def save(self, update: int, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Copy the state after `update` updates now; the thread writes it. No more than one waits.

        Raises on all ranks: CheckpointError if the save before could not be written, RuntimeError if the
        ranks' weights differ.
        """
        told = self._allgather((self._error(), weights_checksum(state["model"])))
        _raise_first(error for error, _ in told)
        _weights_agree([checksum for _, checksum in told], update)
        self._saved_at = time.monotonic()
        if self._writes:
            copy = on_cpu({"version": VERSION, "best_top1": self.best_top1, **state})
            self._writing = self._writer.submit(self._write, update, copy, best)

    def wait(self) -> None:
        """Return when the last save is on disk; raises CheckpointError on all ranks if it is not."""
        _raise_first(self._allgather(self._error()))

    def last_good(self) -> str:
        """A sentence that names the checkpoint to go on from."""
        self._error()
        files = checkpoint_files(self.folder)
        return (
            f"The last good checkpoint is {files[-1]}." if files else "No checkpoint was written."
        )

    def _error(self) -> str:
        """Wait for the save before; what went wrong with it, or nothing."""
        writing, self._writing = self._writing, None
        error = writing.exception() if writing else None
        if error is None and self._owner is not None:
            try:
                self._owner.check()
            except UserError as taken_over:
                error = taken_over
        if error is not None and not isinstance(error, UserError):
            raise error
        return str(error or "")

    def _write(self, update: int, state: dict[str, Any], best: bool) -> None:
        file = self.folder / f"update-{update:08}.pt"
        scratch = file.with_suffix(".pt.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            _write_durably(_digest_of(file), f"{_digest(scratch)}  {file.name}\n")
            os.replace(scratch, file)
            if best:
                link = self.folder / f"{BEST}.part"
                link.unlink(missing_ok=True)
                link.symlink_to(file.name)
                os.replace(link, self.folder / BEST)
            _sync_folder(self.folder)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's writer makes a RuntimeError of a full disk
            scratch.unlink(missing_ok=True)
            if not file.exists():
                _digest_of(file).unlink(missing_ok=True)
            there = [old.name for old in checkpoint_files(self.folder)]
            raise CheckpointError(
                f"The checkpoint {file} could not be written ({_reason(error)}). Free space or mend "
                f"the folder, then go on with --resume from the one before: "
                f"{there[-1] if there else 'there is none yet'}."
            ) from error
        best_file = (self.folder / BEST).resolve()
        for old in checkpoint_files(self.folder)[: -self.keep]:
            if old.resolve() != best_file:
                old.unlink()
                _digest_of(old).unlink(missing_ok=True)


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("update-*.pt"))


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest undamaged state in a folder, on the CPU; None if there is no checkpoint.

    A damaged file is said and the one before it is taken; UserError if all are damaged, or if the
    newest was written in a format of another version.
    """
    files = checkpoint_files(folder)
    for file in reversed(files):
        try:
            return load(file)
        except DamagedError as error:
            print(f"{error} Trying the one before.", flush=True)
    if files:
        raise UserError(f"All {len(files)} checkpoints in {folder} are damaged.")
    return None


def open_run(out: Path, recipe: Recipe, train_samples: int, resume: bool) -> dict[str, Any] | None:
    """Open the folder of a run; the state to go on from, or None for a fresh run.

    Raises UserError if the folder holds a run and `resume` is not asked for, if there is nothing to
    resume, or if that run had other settings or another number of training images.
    """
    if not resume and (out / "metrics.jsonl").exists():
        raise UserError(
            f"{out} already holds a run. Go on with it by --resume, or choose another --out."
        )
    state = load_newest(out / "checkpoints") if resume else None
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


class DamagedError(UserError):
    """A checkpoint that is not whole: the one before it may be."""


def load(file: Path) -> dict[str, Any]:
    """The state in `file`, on the CPU; only plain data is read, never code.

    Raises DamagedError if it is missing or damaged, UserError if its version is not ours.
    """
    file = file.resolve()  # best.pt is a link
    try:
        expected = _digest_of(file).read_text().split()[0]
        if _digest(file) != expected:
            raise DamagedError(f"The checkpoint {file} is damaged: its SHA-256 is not {expected}.")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, IndexError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedError(
            f"The checkpoint {file} or its .sha256 cannot be read: {_reason(error)}."
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise UserError(
            f"The checkpoint {file} is of version {version}, and this program reads version "
            f"{VERSION}. Go on with the program that wrote it, or choose another --out."
        )
    return state


def weights_checksum(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 over a model's state_dict; equal on all ranks, compared at each checkpoint."""
    checksum = 0
    for tensor in weights.values():
        flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        checksum = zlib.crc32(flat.numpy().data, checksum)
    return checksum


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt export`."""
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/update-NNNNNNNN.pt")
    parser.add_argument("--out", type=Path, help="the file to write [RECIPE.pth]")


def main(args: argparse.Namespace) -> int:
    """Write a checkpoint's weights alone, as torch.save of a state_dict with torchvision's names."""
    state = load(args.checkpoint)
    out = args.out or Path(f"{state['recipe']['name']}.pth")
    try:
        torch.save({name: tensor.contiguous() for name, tensor in state["model"].items()}, out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out {out}: it could not be written ({_reason(error)}).") from error
    print(f"{out}: the weights after {state['update']:,} updates, for model.load_state_dict")
    return 0


def _raise_first(errors: Iterable[str]) -> None:
    for error in filter(None, errors):
        raise CheckpointError(error)


def _weights_agree(checksums: Sequence[int], updates_done: int) -> None:
    if len(set(checksums)) > 1:
        raise RuntimeError(
            f"the ranks' weights differ after {updates_done} updates (CRC-32 by rank: {checksums}). "
            "Nothing was written; resume from the checkpoint before."
        )


def _reason(error: Exception) -> str:
    """What the system said, where torch's writer hides it, else the first line of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0] or type(error).__name__


def _digest_of(file: Path) -> Path:
    return file.with_suffix(".pt.sha256")


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
