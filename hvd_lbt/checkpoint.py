"""The one place that writes checkpoints: whole files or none, checked when read.

A checkpoint is `update-NNNNNNNN.pt` (torch.save of plain state, with a version) and
`update-NNNNNNNN.pt.sha256` (as sha256sum writes it). It knows nothing of the number of workers.
`best.pt` is a link to the one with the best top-1 accuracy, or a copy where links are not possible.

The two files cannot be replaced at once. The new digest is written to `….sha256.part`, then the
file is renamed to its name, then the digest. `load` accepts a file that either digest fits, so that
whenever the writer is killed, there is the old checkpoint or the new one.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hvd_lbt.data.identity import Identity, same_at_resume
from hvd_lbt.data.order import ORDER_VERSION, other_version
from hvd_lbt.errors import CheckpointError, UserError
from hvd_lbt.recipe import Recipe, RunRecipe, recipe_of
from hvd_lbt.run_lock import RunLock
from hvd_lbt.state import on_cpu
from hvd_lbt.world import World

VERSION = 1
BEST = "best.pt"
DAMAGED = ".damaged"  # is added to the names of a checkpoint that cannot be used
# What vfat, CIFS, FUSE and others answer to a link, or to fsync of a folder, instead of doing it.
UNSUPPORTED = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES}
_announced: set[str] = set()  # what a file system lacks is printed once


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

        Raises on all ranks: CheckpointError if the save before could not be written, RuntimeError
        if the ranks' weights differ.
        """
        of_ranks = self._allgather((self._error(), weights_checksum(state["model"])))
        _raise_first(error for error, _ in of_ranks)
        _weights_agree([checksum for _, checksum in of_ranks], update)
        self._saved_at = time.monotonic()
        if self._writes:
            copy = on_cpu({"version": VERSION, "best_top1": self.best_top1, **state})
            self._writing = self._writer.submit(self._write, update, copy, best)

    def wait(self) -> None:
        """Return when the last save is on disk; raises CheckpointError on all ranks if it is
        not.
        """
        _raise_first(self._allgather(self._error()))

    def last_good(self) -> str:
        """A sentence that names the checkpoint to resume from."""
        self._error()
        file = newest_good(self.folder)
        return f"The last good checkpoint is {file}." if file else "No checkpoint was written."

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _part(file).open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                _sync(stream.fileno())
            _replace_pair(file)
            if best:
                _name_best(file)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's writer makes a RuntimeError of a full disk
            for scratch in (_part(file), _part(self.folder / BEST)):
                with suppress(OSError):
                    scratch.unlink(missing_ok=True)
            there = newest_good(self.folder)
            raise CheckpointError(
                f"The checkpoint {file} could not be written ({reason_of(error)}). Free space or "
                "correct the folder, then start again with --resume from the last good one: "
                f"{there.name if there else 'there is none yet'}."
            ) from error
        best_file = (self.folder / BEST).resolve()
        others = [old for old in checkpoint_files(self.folder) if old != file]
        for old in others[: max(0, len(others) + 1 - self.keep)]:
            if old.resolve() != best_file:
                try:
                    old.unlink()
                    _digest_of(old).unlink(missing_ok=True)
                except OSError as error:
                    _announce(old, f"it cannot be removed ({error.strerror})")


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    files = [file for file in folder.glob("update-*.pt") if re.fullmatch(r"update-\d+", file.stem)]
    return sorted(files, key=lambda file: int(file.stem.removeprefix("update-")))


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose digest fits; None if there is none."""
    for file in reversed(checkpoint_files(folder)):
        try:
            check(file)
        except DamagedError:
            continue
        return file
    return None


def load_newest(folder: Path, *, set_aside: bool = False) -> dict[str, Any] | None:
    """The newest undamaged state in a folder, on the CPU; None if there is no checkpoint.

    A damaged file is named, and the one before it is taken; UserError if all are damaged, or if the
    newest was written in a format of another version. set_aside: rename damaged files to
    `….damaged`, so that they do not count as checkpoints; for the owner of the run.
    """
    files, damaged = checkpoint_files(folder), list[Path]()
    for file in reversed(files):
        try:
            state = load(file)
        except DamagedError as error:
            print(f"{error} Trying the one before.", flush=True)
            damaged.append(file)
            continue
        for old in damaged if set_aside else ():
            _set_aside(old)
        return state
    if files:
        raise UserError(
            f"All {len(files)} checkpoints in {folder} are damaged. Restore one from a backup, or "
            "move the folder away to train from the start."
        )
    return None


def open_run(
    out: Path, recipe: Recipe, splits: Mapping[str, Identity], resume: bool
) -> dict[str, Any] | None:
    """Open the folder of a run; the state to resume from, or None for a fresh run.

    splits: what `data.identity` says of `train` and `test`. Raises UserError if the folder holds a
    run and `resume` is not asked for, or if that run had other settings or other data.
    """
    if not resume and ((out / "metrics.jsonl").exists() or checkpoint_files(out / "checkpoints")):
        raise UserError(
            f"{out} already holds a run. Go on with it by --resume, or choose another --out."
        )
    # by the thread that writes, which may be at work for an elastic world before this one
    Checkpoints._writer.submit(_finish_interrupted, out / "checkpoints").result()
    state = load_newest(out / "checkpoints", set_aside=True) if resume else None
    if state is not None:
        _check_order(state, out)
        changes = recipe.changes_since(state["recipe"])
        if changes:
            raise UserError(
                f"{out} was trained with another recipe: {changes}. Resume with the same recipe "
                "and --set values, or choose another --out."
            )
        count = int(splits["train"]["count"])
        if state["train_samples"] != count:
            raise UserError(
                f"{out} was trained on {state['train_samples']:,} images, and this training folder "
                f"has {count:,}. Resume with the same --data, or choose another --out."
            )
        if said := same_at_resume(state, splits, str(out)):
            print(f"{out}: {said}", flush=True)
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    folder, file = out / "checkpoints", out / "recipe.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # not after the first hours of training
        _part(file).write_text(text)
        os.replace(_part(file), file)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise UserError(
            f"{error.filename2 or error.filename} cannot be written ({error.strerror}). Free space "
            f"or correct it, then start again with --resume, or choose another --out than {out}."
        ) from error
    return state


def _check_order(state: Mapping[str, Any], out: Path) -> None:
    """Raise UserError if the run's samples came in the order of another version."""
    if version := other_version(state):
        raise UserError(
            f"{out} was trained with version {version} of the samples' order, and this program has "
            f"version {ORDER_VERSION}: the epoch that was under way would get some samples twice "
            "and others never. Resume with the hvd_lbt that wrote the run, or choose another --out "
            f"and start from its weights: --set model.pretrained={out / 'checkpoints' / BEST}."
        )


class DamagedError(UserError):
    """A checkpoint that is not whole: the one before it may be."""


def check(file: Path) -> None:
    """Raise DamagedError unless `file` is there, and has the digest in the file beside it."""
    digest_file, found, reasons = _digest_of(file), "", list[str]()
    # The second is of a writer that was killed, or is at work, between its two renames.
    for candidate in (digest_file, _part(digest_file)):
        try:
            text = candidate.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            reasons.append(f"{candidate} cannot be read ({reason_of(error)})")
            continue
        expected = re.match(rb"\\?([0-9a-f]{64})(?=\s|$)", text)
        if not expected:
            reasons.append(f"{candidate} holds no SHA-256 as sha256sum writes it")
            continue
        try:
            found = found or _digest(file)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise DamagedError(f"The checkpoint {file} is missing.") from error
            raise DamagedError(
                f"The checkpoint {file} cannot be read: {reason_of(error)}."
            ) from error
        if found == expected[1].decode():
            return
        reasons.append(f"its SHA-256 is not the one in {candidate}")
    if reasons:
        raise DamagedError(f"The checkpoint {file} is damaged: {'; '.join(reasons)}.")
    if not file.exists():
        raise DamagedError(f"The checkpoint {file} is missing.")
    raise DamagedError(
        f"The checkpoint {file} cannot be checked: {digest_file} is missing. Copy it along (for "
        f"{BEST}, which is a link, that of the file it leads to). If you know that the file is "
        f"whole: sha256sum {file} > {digest_file}"
    )


def load(file: Path) -> dict[str, Any]:
    """The state in `file`, on the CPU; only plain data is read, never code.

    Raises DamagedError if it is missing or damaged, UserError if its version is not ours.
    """
    file = Path(os.path.realpath(file))  # best.pt is a link; a loop of links is found later
    if os.path.exists(file) and not os.path.isfile(file):  # a FIFO would be waited for
        raise DamagedError(f"The checkpoint {file} is not a regular file.")
    check(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a file that is no checkpoint makes torch's reader raise
        raise DamagedError(f"The checkpoint {file} cannot be read: {reason_of(error)}.") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise UserError(
            f"The checkpoint {file} is of version {version}, and this program reads version "
            f"{VERSION}. Go on with the program that wrote it, or choose another --out."
        )
    return state


def load_trained(file: Path) -> tuple[dict[str, Any], Recipe]:
    """The state in `file` and the recipe in it, for who needs the trained network alone.

    Raises DamagedError and UserError as `load`, and UserError if a part of the state is missing.
    """
    state = load(file)
    parts = {"update": int, "recipe": dict, "classes": list, "model": dict}
    if missing := missing_parts(state, parts):
        raise UserError(
            f"The checkpoint {file} has no {', '.join(missing)}: it is not one that "
            "`hvd_lbt train` wrote."
        )
    return state, recipe_of(state["recipe"], f"The checkpoint {file}")


def missing_parts(state: Mapping[str, Any], parts: Mapping[str, type]) -> list[str]:
    """Which of these parts the state has not, or not of their type."""
    return [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]


def averages_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint's state, by name; none without `ema.decay`."""
    return dict(state.get("ema", {}).get("averages", {}))


def weights_checksum(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 over a model's state_dict; equal on all ranks, compared at each checkpoint."""
    checksum = 0
    for tensor in weights.values():
        flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        checksum = zlib.crc32(flat.numpy().data, checksum)
    return checksum


def _raise_first(errors: Iterable[str]) -> None:
    for error in filter(None, errors):
        raise CheckpointError(error)


def _weights_agree(checksums: Sequence[int], updates_done: int) -> None:
    if len(set(checksums)) > 1:
        raise RuntimeError(
            f"the ranks' weights differ after {updates_done} updates (CRC-32 by rank: "
            f"{checksums}). Nothing was written; resume from the checkpoint before."
        )


def reason_of(error: Exception) -> str:
    """What the system said, where torch's writer hides it, else the first line of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0] or type(error).__name__


def _digest_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _part(file: Path) -> Path:
    """Where a file is written, to be renamed when it is whole."""
    return file.with_name(f"{file.name}.part")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace_pair(file: Path) -> None:
    """Give a whole `FILE.part` its name, and write its digest; see the head of this module."""
    digest_file = _digest_of(file)
    with _part(digest_file).open("w") as stream:
        stream.write(f"{_digest(_part(file))}  {file.name}\n")
        stream.flush()
        _sync(stream.fileno())
    os.replace(_part(file), file)
    _sync_folder(file.parent)  # the digest must not arrive on disk before the file
    os.replace(_part(digest_file), digest_file)
    _sync_folder(file.parent)


def _name_best(file: Path) -> None:
    """Let best.pt be this checkpoint: a link, or a copy with a digest of its own."""
    best = file.with_name(BEST)
    try:
        _part(best).unlink(missing_ok=True)
        _part(best).symlink_to(file.name)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _announce(file.parent, f"no symbolic links here ({error.strerror}); {BEST} is a copy")
        with file.open("rb") as source, _part(best).open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            _sync(copy.fileno())
        _replace_pair(best)
    else:
        os.replace(_part(best), best)
        _digest_of(best).unlink(missing_ok=True)  # of a copy, before links were possible
        _sync_folder(file.parent)


def _finish_interrupted(folder: Path) -> None:
    """Complete what a writer that was killed has begun, and remove its leftovers."""
    for scratch in sorted(folder.glob("*.part")):
        digest_file = scratch.with_suffix("")
        file = digest_file.with_suffix("")
        try:
            if (
                digest_file.suffix == ".sha256"
                and file.is_file()
                and scratch.read_bytes().startswith(_digest(file).encode())
            ):
                os.replace(scratch, digest_file)
            else:
                scratch.unlink()
        except OSError as error:
            _announce(folder, f"{scratch.name} of an earlier run stays there ({error.strerror})")


def _set_aside(file: Path) -> None:
    aside = file.with_name(file.name + DAMAGED)
    try:
        os.replace(file, aside)
        print(f"It is {aside} now.", flush=True)
        with suppress(FileNotFoundError):
            digest_file = _digest_of(file)
            os.replace(digest_file, digest_file.with_name(digest_file.name + DAMAGED))
    except OSError as error:
        print(f"{file} cannot be renamed ({error.strerror}).", flush=True)


def _sync(descriptor: int) -> None:
    """fsync, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _announce(None, f"no fsync here ({error.strerror}); a power failure may cost a checkpoint")


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError as error:
        _announce(folder, f"it cannot be opened for fsync ({error.strerror})")
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _announce(path: Path | None, text: str) -> None:
    """Print what the storage cannot do, once."""
    line = f"{path or 'checkpoints'}: {text}."
    if line not in _announced:
        _announced.add(line)
        print(line, flush=True)
