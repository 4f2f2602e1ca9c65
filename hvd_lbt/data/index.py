"""Which samples a split has, in order: built once, kept in a file, built anew when the data
changed.

The order is that of the samples' labels 0 … N − 1 of every run: of a folder, sorted by class name,
then file name (as bytes); of shards, sorted by the shards' names, then as they lie in the shard. A
data set converted from a folder therefore keeps the folder's order.

An index is kept as DATA/.hvd_lbt/SPLIT.index, or where DATA cannot be written in the cache folder.
Its arrays are mapped into memory, so that the ranks of a node share them (`array_file`). It holds
names, sizes and times of what it was made from: of the shards, or of the class folders (whose
ctime moves when a file comes, goes or is renamed; a file's content is read afresh every time).
"""

import errno
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hvd_lbt import terminal
from hvd_lbt.data.array_file import map_arrays, write_arrays
from hvd_lbt.data.digits import cache_folder
from hvd_lbt.data.formats import SCANS, SUFFIXES, Extents, Findings, SplitError
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.folder import ClassFiles, scan_class
from hvd_lbt.data.formats.side_files import compare_with_counts
from hvd_lbt.data.reading import Readers, bounded
from hvd_lbt.data.source import Source, find_source
from hvd_lbt.errors import ReadError, UserError
from hvd_lbt.run_lock import start_of
from hvd_lbt.terminal import printable

SCANNERS = 16  # folders or shards read at the same time: their disks' latency is what is waited for
# Data that changed so shortly before the index was made may have changed again within one tick of
# its clock (1 s on some network storage): that index is not trusted a second time.
TICK = 2.0
SUFFIX, BEFORE = ".index", ".npz"  # of an index file; what they were before they were mapped
FUTURE = 60.0  # seconds: more is no clock that is a little ahead, but a wrong one


class Names:
    """Many names in little memory: n byte strings, one after the other."""

    def __init__(self, blob: NDArray[np.uint8], ends: NDArray[np.int64]):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: list[bytes]) -> "Names":
        """Of a list."""
        return cls(
            np.frombuffer(b"".join(names), dtype=np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """The bytes of one name."""
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].tobytes()


@dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of one split.

    kind: folder, webdataset, tfrecord or recordio. root: what `files` are relative to. files: of a
    folder one a sample, else the shards. tokens: int32 (n,), each sample's label as an index into
    `token_names` (numbers: as shards have them; text: class names). extents: of shards, int64
    (n, 3): shard, offset, length (see `formats.Extents`). findings: what else lies in the split.
    nested: of a folder, the folders below classes, which have no images.
    """

    kind: str
    root: Path
    files: Names
    tokens: NDArray[np.int32]
    token_names: tuple[int | str, ...]
    extents: NDArray[np.int64] | None = None
    findings: Findings = field(default_factory=Findings)
    nested: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


def open_index(data: Path, split: str, timeout: float) -> Index:
    """The index of DATA's split: from its file, or built now by one process while others wait.

    timeout: give up, with a ReadError that says where, when the storage gives nothing for so many
    seconds.
    """
    source, began, file, index, why = bounded(partial(_look, data, split), timeout)
    if index is not None:
        return index
    try:
        with _lock(file, timeout) as beat:
            _remove_scratch(file)
            index, _ = _load(file, source, began)  # another process may have been faster
            return index or _build(source, file, why, timeout, beat)
    except OSError as error:
        raise UserError(f"The index {file} cannot be written ({error}).") from error


def _look(
    data: Path, split: str, asked: list[Path]
) -> tuple[Source, float, Path, Index | None, str]:
    """What is there: the source, when that was seen, the index's file, and what `_load` says of
    it.
    """
    source = find_source(data, split, asked)
    began = time.time()
    file = index_file(data, split)
    asked.append(file)
    return source, began, file, *_load(file, source, began)


def _remove_scratch(file: Path) -> None:
    """Remove temporary index files of processes of this host that have ended."""
    start = f".{file.name}.{socket.gethostname()}."
    for scratch in file.parent.iterdir():
        pid = scratch.name.removeprefix(start)
        if pid == scratch.name or not pid.isdecimal() or start_of(int(pid)) is not None:
            continue
        with suppress(OSError):
            scratch.unlink()


def index_file(data: Path, split: str) -> Path:
    """Beside the data where that can be written or has one already; else in the cache folder."""
    beside = data / ".hvd_lbt" / f"{split}{SUFFIX}"
    if os.access(
        beside if beside.exists() else beside.parent if beside.parent.exists() else data, os.W_OK
    ):
        return beside
    digest = hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]
    return cache_folder() / "index" / digest / f"{split}{SUFFIX}"


def _load(file: Path, source: Source, asked: float) -> tuple[Index | None, str]:
    """The index in the file, if it is of this source; else None and why."""
    try:
        with file.open("rb") as stream:
            about, arrays = map_arrays(stream)
            about["verified"] = os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{file} is damaged ({error})"
    if about["fingerprint"] != source.fingerprint():
        return None, f"the data changed since {file} was made"
    # A future mtime was set by someone, and the ctime says when; where both lie in the future, the
    # storage's clock is wrong, and times that did not move must do.
    changed = max(min(stats[1:]) for stats in source.stats) / 1e9
    young = about["begun"] < changed + TICK and changed < asked + FUTURE
    if about["begun"] < asked and young:
        return None, f"the data changed while {file} was made"
    findings = Findings.of_json(about["findings"])
    findings.merge(source.findings)
    index = Index(
        kind=source.kind,
        root=source.root,
        files=Names(arrays["blob"], arrays["ends"]),
        tokens=arrays["tokens"],
        token_names=tuple(about["token_names"]),
        extents=arrays.get("extents"),
        findings=findings,
        nested=tuple(about["nested"]),
    )
    began = time.time()
    if source.kind == "folder" and not _listed_as_before(source, index, about):
        return None, f"the data changed since {file} was made"
    if about["verified"] < _newest(source, 2) + TICK < began:
        with suppress(OSError):  # of another user: it is listed again the next time
            os.utime(file, (began, began))
    return index, ""


def _newest(source: Source, column: int) -> float:
    """The newest mtime (1) or ctime (2) of the source's parts, in seconds."""
    return max(stats[column] for stats in source.stats) / 1e9


def _listed_as_before(source: Source, index: Index, about: dict[str, Any]) -> bool:
    """Whether class folders still hold what the index says, where their times do not tell.

    That is where the ctime was as young as TICK when the index was made, though the mtime is old
    (it was set back by tar or rsync): these folders are listed again, once they are older than
    TICK for the last time. And where there are folders below class folders, whose times must be
    what they were.
    """
    if about["nested_times"] != _times_of(source, index.nested):
        return False
    starts = np.searchsorted(index.tokens, np.arange(len(source.parts) + 1))
    for number, (part, (_, _, ctime)) in enumerate(zip(source.parts, source.stats, strict=True)):
        if about["verified"] < ctime / 1e9 + TICK:
            now = ClassFiles()
            try:
                scan_class(source.root / part, now)
            except UserError:
                return False
            before = [index.files.raw(at) for at in range(starts[number], starts[number + 1])]
            folder = os.fsencode(part)
            if before != [b"/".join((folder, name)) for name in now.names]:
                return False
    return True


def _times_of(source: Source, folders: Iterable[str]) -> list[list[int]]:
    times = []
    for folder in folders:
        try:
            about = os.stat(source.root / folder)
        except FileNotFoundError:
            return []
        times.append([about.st_mtime_ns, about.st_ctime_ns])
    return times


def _build(source: Source, file: Path, why: str, timeout: float, beat: Callable[[], None]) -> Index:
    began, begun = time.perf_counter(), time.time()
    console = terminal.console(stderr=True)
    if why:
        terminal.say(console, f"Indexing {source.root} anew: {why}.")
    index = keep(source, file, index_of(source, _scan_all(source, timeout, beat, console)), begun)
    terminal.say(
        console,
        f"Indexed {source.root}: {len(index):,} images, {len(index.token_names):,} classes, "
        f"{source.kind}, in {time.perf_counter() - began:.1f} s; kept in {file}",
    )
    index.findings.merge(source.findings)
    for line in index.findings.lines():
        terminal.say(console, f"{source.root.name}: {line}")
    return index


def keep(source: Source, file: Path, index: Index, begun: float) -> Index:
    """Write the index file, and give the index with its arrays in memory that all share.

    begun: the time before its source was looked at.
    """
    about = {
        "fingerprint": source.fingerprint(),
        "begun": begun,
        "token_names": index.token_names,
        "findings": index.findings.as_json(),
        "nested": index.nested,
        "nested_times": _times_of(source, index.nested),
    }
    arrays: dict[str, NDArray[Any]] = {
        "blob": index.files.blob,
        "ends": index.files.ends,
        "tokens": index.tokens,
    }
    if index.extents is not None:
        arrays["extents"] = index.extents
    _write(file, arrays, about)
    with file.open("rb") as stream:  # this process too uses what all share
        _, arrays = map_arrays(stream)
    return replace(
        index,
        files=Names(arrays["blob"], arrays["ends"]),
        tokens=arrays["tokens"],
        extents=arrays.get("extents"),
    )


def _write(file: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write the index file, whole or not at all.

    The file before it stays under another name until the next one: processes on other nodes may
    have it mapped, and a page of a file that NFS has removed is SIGBUS.
    """
    scratch = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    kept = file.with_name(f".{file.name}.before")
    try:
        with scratch.open("wb") as stream:
            write_arrays(stream, arrays, about)
        # when the folders were last known to be as it says
        os.utime(scratch, (about["begun"], about["begun"]))
        with suppress(OSError):
            kept.unlink(missing_ok=True)
            os.link(file, kept)
        os.replace(scratch, file)
        with suppress(OSError):
            file.with_suffix(BEFORE).unlink(missing_ok=True)
    finally:
        scratch.unlink(missing_ok=True)


def _scan_all(
    source: Source, timeout: float, beat: Callable[[], None], console: Console
) -> list[Any]:
    """What each part of the source holds: file names of a class, Extents of a shard."""
    scan: Callable[[Path, Any], None] = SCANS.get(source.kind, scan_class)
    made: list[Any] = [ClassFiles() if source.kind == "folder" else Extents() for _ in source.parts]
    readers = Readers(min(SCANNERS, len(source.parts)))
    scans = {
        readers.submit(scan, source.root / part, into): part
        for part, into in zip(source.parts, made, strict=True)
    }
    wrong: dict[str, str] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(terminal.description(f"indexing {source.root}"), total=len(scans))
        pending, before, moved = set(scans), -1, time.monotonic()
        while pending:
            done, pending = wait(pending, timeout=0.5)
            for ended in done:
                try:
                    ended.result()
                except ReadError:
                    raise
                except UserError as error:  # the others are looked at too, to name all at once
                    wrong[scans[ended]] = str(error)
            so_far = sum(map(len, made)) + len(scans) - len(pending)
            if so_far != before:
                before, moved = so_far, time.monotonic()
                beat()
            elif time.monotonic() - moved > timeout:
                stuck = next(scans[future] for future in pending if future.running())
                raise ReadError(
                    f"{source.root / stuck}: the storage gave nothing for {timeout:g} s "
                    "(data.timeout) while the index was made."
                )
            bar.update(task, completed=len(scans) - len(pending))
    readers.close()
    if wrong:
        findings = Findings(errors=[wrong[part] for part in source.parts if part in wrong])
        for part, its in zip(source.parts, made, strict=True):
            findings.merge(its.findings, f"{part}/")
        findings.merge(source.findings)
        raise SplitError(findings, str(source.root.parent))
    return made


def index_of(source: Source, made: list[Any]) -> Index:
    """The index of what the parts hold: file names of a class, Extents of a shard; SplitError."""
    findings, shards = Findings(), source.kind != "folder"
    for part, its in zip(source.parts, made, strict=True):
        findings.merge(its.findings, f"{part}{':' if shards else '/'}")
        if not len(its):
            if shards:
                findings.errors.append(
                    f"{printable(source.root / part)} is a shard without images: it is "
                    "damaged, or not meant to be here. Remove it."
                )
            else:
                findings.add(found.EMPTY_CLASS, part)
    if not any(map(len, made)):
        what = "shards" if shards else "class folders"
        raise UserError(
            f"{printable(source.root)} has no images: {len(made)} {what} and no file that ends in "
            f"{', '.join(sorted(SUFFIXES))}. {'; '.join(findings.lines())}"
        )
    index = (_of_shards if shards else _of_folders)(source, made, findings)
    used = np.unique(index.tokens)
    if len(used) == 1:
        findings.add(found.ONE_CLASS, str(index.token_names[used[0]]))
    if findings.errors:
        findings.merge(source.findings)
        raise SplitError(findings, str(source.root.parent))
    return index


def _of_folders(source: Source, made: list[ClassFiles], findings: Findings) -> Index:
    parts = zip(map(os.fsencode, source.parts), made, strict=True)
    return Index(
        kind=source.kind,
        root=source.root,
        files=Names.of([b"/".join((part, name)) for part, its in parts for name in its.names]),
        tokens=np.repeat(np.arange(len(made), dtype=np.int32), [len(its) for its in made]),
        token_names=source.parts,
        findings=findings,
        nested=tuple(
            f"{part}/{folder}"
            for part, its in zip(source.parts, made, strict=True)
            for folder in its.nested
        ),
    )


def _of_shards(source: Source, made: list[Extents], findings: Findings) -> Index:
    place: dict[int | str, int] = {}
    tokens = []
    for part in made:
        table = np.array([place.setdefault(name, len(place)) for name in part.names], np.int32)
        tokens.append(table[np.frombuffer(part.tokens, dtype=np.int32)] if len(part) else table)
    _compare_labels(source, made, findings)
    unpadded = [name for name, its in zip(source.parts, made, strict=True) if its.unpadded]
    if len(unpadded) < len(made):  # one writer does not pad some of its files
        for name in unpadded:
            if found.ODD_END not in made[source.parts.index(name)].findings.counts:
                findings.add(found.ODD_END, name)
    compare_with_counts(source.root, source.name, sum(map(len, made)), findings)
    extents = np.empty((sum(map(len, made)), 3), dtype=np.int64)
    at = 0
    for number, part in enumerate(made):
        rows = extents[at : at + len(part)]
        rows[:, 0] = number
        if len(part):
            rows[:, 1] = np.frombuffer(part.offsets, dtype=np.int64)
            rows[:, 2] = np.frombuffer(part.lengths, dtype=np.int64)
        at += len(part)
    return Index(
        kind=source.kind,
        root=source.root,
        files=Names.of([os.fsencode(part) for part in source.parts]),
        tokens=np.concatenate(tokens),
        token_names=tuple(place),
        extents=extents,
        findings=findings,
    )


def _compare_labels(source: Source, made: list[Extents], findings: Findings) -> None:
    """All shards must label in one way, and a name must always stand for the same number."""
    seen: dict[tuple[str, type], str] = {}
    aliases: dict[int | str, tuple[int | str | None, ...]] = {}
    owners: dict[tuple[int, int | str], int | str] = {}
    for name, part in zip(source.parts, made, strict=True):
        for label in part.names:
            example = f"{label!r} in {name}, from {part.labels_from}"
            seen.setdefault((part.labels_from, type(label)), example)
        for label, others in part.aliases.items():
            first = aliases.setdefault(label, others)
            clash = first != others
            for place, other in enumerate(others):
                if other is not None:
                    clash |= owners.setdefault((place, other), label) != label
            if clash:
                findings.errors.append(
                    f"{printable(source.root / name)} has the labels {others} for one image "
                    f"(a name and a number), which other images have with other partners: {first}."
                )
    if len(seen) > 1:
        findings.errors.append(
            f"{printable(source.root)} has labels of different kinds "
            f"({printable('; '.join(seen.values()))}): whether two of them are one class is not "
            "certain. Give all images numbers, or all names."
        )


@contextmanager
def _lock(file: Path, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold FILE.lock. Storage without locks lets all build the index, each whole."""

    def stalled(holder: str) -> UserError:
        return ReadError(
            f"{file} is being made by {holder}, which has not moved on for {timeout:g} s "
            "(data.timeout)."
        )

    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock"), stalled, timeout) as beat:
        yield beat


@contextmanager
def locked(
    file: Path, refuse: Callable[[str], UserError], timeout: float = 0.0
) -> Iterator[Callable[[], None]]:
    """Hold the kernel's lock on a file; it is released when its holder dies.

    Yields a function that shows those who wait that this process makes progress. Raises what
    `refuse` makes of the holder's name (process and host) once the holder has shown nothing for
    `timeout` seconds; 0: at once. Where the file system has no locks, nobody is refused.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    with open(descriptor, "r+", encoding="utf-8", errors="replace") as lock:
        beaten, moved = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                beat = os.fstat(lock.fileno()).st_mtime_ns
                if timeout and beat != beaten:
                    beaten, moved = beat, time.monotonic()
                elif time.monotonic() - moved >= timeout:
                    lock.seek(0)
                    raise refuse(lock.read(1000) or "another process") from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                    raise
                break
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield lambda: os.utime(lock.fileno())
