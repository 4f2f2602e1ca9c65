"""Which samples a split has, in order: built once, kept in a file, built anew when the data changed.

The order is that of the samples' labels 0 … N − 1 of every run: of a folder, sorted by class name,
then file name (as bytes); of shards, sorted by the shards' names, then as they lie in the shard. A
data set converted from a folder therefore keeps the folder's order.

An index is kept as DATA/.hvd_lbt/SPLIT.npz, or where DATA cannot be written in the cache folder. It
holds names, sizes and times of what it was made from: of the shards, or of the class folders (whose
time changes when a file comes, goes or is renamed; a file's content is read afresh every time).
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hvd_lbt.data.digits import cache_folder
from hvd_lbt.data.formats import SCANS, SUFFIXES, Extents, shard_kind
from hvd_lbt.data.reading import Readers, bounded
from hvd_lbt.errors import ReadError, UserError

VERSION = 1
SCANNERS = 16  # folders or shards read at the same time: their disks' latency is what is waited for
# Data that changed so shortly before the index was made may have changed again within one tick of
# its clock (1 s on some network storage): that index is not trusted a second time.
TICK = 2.0
SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}


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
    (n, 3): shard, offset, length (see `formats.Extents`).
    """

    kind: str
    root: Path
    files: Names
    tokens: NDArray[np.int32]
    token_names: tuple[int | str, ...]
    extents: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def content_hash(self) -> str:
        """SHA-256 (hex) of the samples: labels and names in order, and their lengths in shards.

        Equal where two copies of a data set hold the same samples in the same order, wherever they
        lie; bytes and file times are not read. 0.03 s for 1.28 million files.
        """
        digest = hashlib.sha256()
        for array in (
            np.frombuffer(json.dumps([len(self), self.token_names]).encode(), np.uint8),
            self.tokens,
            self.files.ends,
            self.files.blob,
            np.empty(0, np.int64) if self.extents is None else self.extents[:, [0, 2]],
        ):
            digest.update(array.size.to_bytes(8, "little"))  # else parts could be shifted
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a split consists of: class folders or shards by name, with their size and time."""

    kind: str
    root: Path
    parts: tuple[str, ...]
    stats: tuple[tuple[int, int], ...]  # bytes (0 for a folder), mtime in ns

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that tells that the data changed."""
        about = [VERSION, self.kind, str(self.root.name), self.parts, self.stats]
        return hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()


def has_split(data: Path, split: str) -> bool:
    """Whether DATA has a folder for this split, or files that are called so."""
    words = SPLITS[split]
    folder = any((data / word).is_dir() for word in words)
    return folder or any(_says(entry.name, words) for entry in _entries(data))


def find_source(data: Path, split: str, asked: list[Path]) -> Source:
    """Find what `split` (train or test) consists of, by content.

    DATA/train (DATA/test, DATA/val) with CLASS/FILE or with shards, or shards in DATA itself whose names say
    train (test, val). asked: see `bounded`. Raises UserError for nothing, for a mixture, and for what
    cannot be read.
    """
    try:
        return _find_source(data, split, asked)
    except OSError as error:
        raise UserError(f"--data {data} cannot be read ({error}).") from error


def _find_source(data: Path, split: str, asked: list[Path]) -> Source:
    asked.append(data)
    if not data.is_dir():
        raise UserError(
            f"--data {data}: there is no such folder. It must hold train/CLASS/FILE and "
            "test/CLASS/FILE (or val/…), or shards; without --data the built-in digits are used."
        )
    words = SPLITS[split]
    root = next((data / word for word in words if (data / word).is_dir()), None)
    where = f"{data}/{{{','.join(words)}}}" if len(words) > 1 else f"{data}/{words[0]}"
    if root is None:
        root = data
        files = [e for e in _entries(data) if e.is_file() and _says(e.name, words)]
        folders = []
    else:
        where = str(root)
        asked.append(root)
        entries = _entries(root)
        folders = [entry for entry in entries if entry.is_dir()]
        files = [entry for entry in entries if not entry.is_dir() and entry.is_file()]
    kinds: dict[str, list[os.DirEntry[str]]] = {}
    for entry in files:
        asked.append(Path(entry.path))
        kind = shard_kind(asked[-1])
        if kind:
            kinds.setdefault(kind, []).append(entry)
    if folders:
        kinds["folder"] = folders
    if len(kinds) > 1:
        seen = ", ".join(f"{kind} ({found[0].name})" for kind, found in sorted(kinds.items()))
        raise UserError(
            f"{where} is ambiguous, it has {seen}. One split is either class folders or shards of "
            "one format: give each format a folder of its own."
        )
    if not kinds:
        raise UserError(
            f"{where} has no images. A split is CLASS/FILE, or shards in WebDataset's (tar), "
            f"TFRecord's or RecordIO's format; among {len(files)} files there is none of these."
        )
    ((kind, parts),) = kinds.items()
    stats = []
    for entry in parts:
        asked.append(Path(entry.path))
        stats.append(entry.stat())
    return Source(
        kind=kind,
        root=root,
        parts=tuple(entry.name for entry in parts),
        stats=tuple((0 if kind == "folder" else s.st_size, s.st_mtime_ns) for s in stats),
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted, without hidden things."""
    found = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return sorted(found, key=lambda entry: os.fsencode(entry.name))


def _says(name: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words stands in the name, between what is no letter: train-0001.tar."""
    separated = "".join(letter if letter.isalpha() else " " for letter in name.lower())
    return any(word in separated.split() for word in words)


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
            index, _ = _load(file, source, began)  # another process may have been faster
            return index or _build(source, file, why, timeout, beat)
    except OSError as error:
        raise UserError(f"The index {file} cannot be written ({error}).") from error


def _look(
    data: Path, split: str, asked: list[Path]
) -> tuple[Source, float, Path, Index | None, str]:
    """What is there: the source, when that was seen, the index's file, and what `_load` says of it."""
    source = find_source(data, split, asked)
    began = time.time()
    file = _index_file(data, split)
    asked.append(file)
    return source, began, file, *_load(file, source, began)


def _index_file(data: Path, split: str) -> Path:
    """Beside the data where that can be written or has one already; else in the cache folder."""
    beside = data / ".hvd_lbt" / f"{split}.npz"
    if os.access(
        beside if beside.exists() else beside.parent if beside.parent.exists() else data, os.W_OK
    ):
        return beside
    digest = hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]
    return cache_folder() / "index" / digest / f"{split}.npz"


def _load(file: Path, source: Source, asked: float) -> tuple[Index | None, str]:
    """The index in the file, if it is of this source; else None and why."""
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            about = json.loads(stored["about"].tobytes())
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        return None, f"{file} is damaged ({error})"
    if about["fingerprint"] != source.fingerprint():
        return None, f"the data changed since {file} was made"
    newest = max(time_ns for _, time_ns in source.stats) / 1e9
    if about["begun"] < newest + TICK and about["begun"] < asked:
        return None, f"the data changed while {file} was made"
    return (
        Index(
            kind=source.kind,
            root=source.root,
            files=Names(arrays["blob"], arrays["ends"]),
            tokens=arrays["tokens"],
            token_names=tuple(about["token_names"]),
            extents=arrays.get("extents"),
        ),
        "",
    )


def _build(source: Source, file: Path, why: str, timeout: float, beat: Callable[[], None]) -> Index:
    began, begun = time.perf_counter(), time.time()
    console = Console(stderr=True)
    if why:
        console.print(f"Indexing {source.root} anew: {why}.", highlight=False, soft_wrap=True)
    index = _index_of(source, _scan_all(source, timeout, beat, console))
    about = {
        "fingerprint": source.fingerprint(),
        "begun": begun,
        "token_names": index.token_names,
    }
    arrays: dict[str, NDArray[Any]] = {
        "about": np.frombuffer(json.dumps(about).encode("utf-8", "surrogateescape"), np.uint8),
        "blob": index.files.blob,
        "ends": index.files.ends,
        "tokens": index.tokens,
    }
    if index.extents is not None:
        arrays["extents"] = index.extents
    scratch = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # a name could be allow_pickle
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
    console.print(
        f"Indexed {source.root}: {len(index):,} images, {len(index.token_names):,} classes, "
        f"{source.kind}, in {time.perf_counter() - began:.1f} s; kept in {file}",
        highlight=False,
        soft_wrap=True,
    )
    return index


def _scan_class(folder: Path, names: list[bytes]) -> None:
    """File names that look like images, sorted. A link that leads nowhere is one: reading it tells."""
    with os.scandir(folder) as entries:
        names += sorted(
            os.fsencode(entry.name)
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.is_dir()
        )


def _scan_all(
    source: Source, timeout: float, beat: Callable[[], None], console: Console
) -> list[Any]:
    """What each part of the source holds: file names of a class, Extents of a shard."""
    scan: Callable[[Path, Any], None] = SCANS.get(source.kind, _scan_class)
    found: list[Any] = [[] if source.kind == "folder" else Extents() for _ in source.parts]
    readers = Readers(min(SCANNERS, len(source.parts)))
    scans = {
        readers.submit(scan, source.root / part, into): part
        for part, into in zip(source.parts, found, strict=True)
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"indexing {source.root}", total=len(scans))
        pending, before, moved = set(scans), -1, time.monotonic()
        while pending:
            done, pending = wait(pending, timeout=0.5)
            for ended in done:
                ended.result()
            so_far = sum(map(len, found)) + len(scans) - len(pending)
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
    return found


def _index_of(source: Source, found: list[Any]) -> Index:
    if not any(map(len, found)):
        what = "class folders" if source.kind == "folder" else "shards"
        raise UserError(
            f"{source.root} has no images: {len(found)} {what} and no file that ends in "
            f"{', '.join(sorted(SUFFIXES))}."
        )
    counts = [len(part) for part in found]
    if source.kind == "folder":
        parts = zip(map(os.fsencode, source.parts), found, strict=True)
        return Index(
            kind=source.kind,
            root=source.root,
            files=Names.of(
                [b"/".join((folder, name)) for folder, names in parts for name in names]
            ),
            tokens=np.repeat(np.arange(len(found), dtype=np.int32), counts),
            token_names=source.parts,
        )
    place: dict[int | str, int] = {}
    tokens = []
    for part in found:
        table = np.array([place.setdefault(name, len(place)) for name in part.names], np.int32)
        tokens.append(table[np.frombuffer(part.tokens, dtype=np.int32)] if len(part) else table)
    columns = (
        np.repeat(np.arange(len(found)), counts),
        np.concatenate([np.frombuffer(part.offsets, dtype=np.int64) for part in found]),
        np.concatenate([np.frombuffer(part.lengths, dtype=np.int64) for part in found]),
    )
    return Index(
        kind=source.kind,
        root=source.root,
        files=Names.of([os.fsencode(part) for part in source.parts]),
        tokens=np.concatenate(tokens),
        token_names=tuple(place),
        extents=np.stack(columns, axis=1),
    )


@contextmanager
def _lock(file: Path, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold FILE.lock; yields a function that tells those who wait that this process moves on.

    The lock is the kernel's: it goes when its holder dies. Storage without locks lets all build the
    index, each whole.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("a+", encoding="utf-8") as lock:
        beaten, moved = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                beat = os.fstat(lock.fileno()).st_mtime_ns
                if beat != beaten:
                    beaten, moved = beat, time.monotonic()
                elif time.monotonic() - moved > timeout:
                    lock.seek(0)
                    raise ReadError(
                        f"{file} is being made by {lock.read() or 'another process'}, which has not "
                        f"moved on for {timeout:g} s (data.timeout)."
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                    raise
                break
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield lambda: os.utime(lock.fileno())
