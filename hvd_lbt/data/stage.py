"""Copies of shards on a node's own disk, `data.stage`: made once, verified, and used again.

Below the folder are STAGE/hvd_lbt-UID/KEY/SPLIT/SHARD, and KEY/work for locks and unfinished
copies. KEY stands for the shards' place, names, sizes and times; changed data has another. A copy
gets its name only when it is whole and on the disk, so whatever has a shard's name, size and time
is the shard, whenever a process was killed.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hvd_lbt.data.downloads.arrays import ArrayStore
from hvd_lbt.data.formats import SUMS_FILE
from hvd_lbt.data.index import Index, locked
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.reading import open_regular
from hvd_lbt.errors import ReadError, UserError
from hvd_lbt.recipe import DataRecipe
from hvd_lbt.terminal import printable
from hvd_lbt.whole_file import write_whole

CHUNK = 8 << 20  # bytes read at once
SPARE = 64 << 20  # bytes that stay free
ABOUT = "about.json"  # what a KEY stands for
IN_USE = "in_use"  # locked, shared, by each process that reads the copies


class Stage:
    """The copies of one split's shards on this node.

    index: of shards. split: train or test. timeout: seconds after which another process that
    copies a shard and makes no progress is given up. Raises UserError for a folder that cannot be
    used.
    """

    def __init__(self, folder: Path, index: Index, split: str, timeout: float):
        self._index, self._timeout = index, timeout
        names = [index.files[number] for number in range(len(index.files))]
        try:
            about = [os.stat(index.root / name) for name in names]
            root = os.path.realpath(index.root)
        except OSError as error:
            raise ReadError(f"{error.filename}: {error.strerror}.") from error
        self._sizes = [one.st_size for one in about]
        self._times = [one.st_mtime_ns for one in about]
        text = json.dumps([root, names, self._sizes, self._times])
        key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        self.home = own_folder(folder) / key
        self._copies, self._work = self.home / split, self.home / "work" / split
        self._sums = _listed_sums(index.root)
        try:
            self._in_use = _use(self.home)
            for made in (self._copies, self._work):
                made.mkdir(parents=True, exist_ok=True)
            if not (self.home / ABOUT).exists():
                write_whole(self.home / ABOUT, json.dumps({"source": root}))
        except OSError as error:
            raise _unusable(folder, error) from error
        weakref.finalize(self, os.close, self._in_use)
        self._failed: Exception | None = None

    def __len__(self) -> int:
        return len(self._sizes)

    def path(self, shard: int) -> Path:
        """The copy of a shard; it is made now if it is not there, or waited for.

        Raises ReadError if it cannot be made: no space, a source that fails or has changed.
        """
        copy = self._copies / self._index.files[shard]
        if self._is_there(copy, shard):
            return copy
        if self._failed is not None:
            raise self._failed
        try:
            with self._alone(shard) as beat:
                if not self._is_there(copy, shard):
                    self._make(copy, shard, beat)
        except OSError as error:
            raise ReadError(self._told(error, shard)) from error
        return copy

    def bytes_missing(self) -> int:
        """What is still to be copied, without what unfinished copies have."""
        copies = [self._copies / self._index.files[number] for number in range(len(self))]
        missing = sum(
            size
            for number, (copy, size) in enumerate(zip(copies, self._sizes, strict=True))
            if not self._is_there(copy, number)
        )
        begun = 0
        for part in self._work.glob("*.part.*"):
            with suppress(FileNotFoundError):
                begun += part.stat().st_size
        return max(0, missing - begun)

    def copy_all(self) -> None:
        """Make every copy that is missing; an error is raised where a copy is asked for next."""
        try:
            for shard in range(len(self)):
                self.path(shard)
                if any(self._work.glob(f"{shard:06}.part.*")):  # of a process that was killed
                    with self._alone(shard):
                        pass
        except Exception as error:
            self._failed = error

    def _is_there(self, copy: Path, shard: int) -> bool:
        try:
            about = copy.stat()
        except FileNotFoundError:
            return False
        return (about.st_size, about.st_mtime_ns) == (self._sizes[shard], self._times[shard])

    @contextmanager
    def _alone(self, shard: int) -> Iterator[Callable[[], None]]:
        """Hold the shard's lock, which ends with its process; unfinished copies are removed."""

        def stalled(holder: str) -> UserError:
            return ReadError(
                f"{self._index.root / self._index.files[shard]} is being staged by {holder}, which "
                f"has not moved on for {self._timeout:g} s (data.timeout)."
            )

        with locked(self._work / f"{shard:06}.lock", stalled, self._timeout) as beat:
            for part in self._work.glob(f"{shard:06}.part.*"):
                part.unlink(missing_ok=True)
            yield beat

    def _make(self, copy: Path, shard: int, beat: Callable[[], None]) -> None:
        """Copy, bring it to the disk, read it back from there, and only then give it its name."""
        name = self._index.files[shard]
        source = self._index.root / name
        part = self._work / f"{shard:06}.part.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            digest = self._pour(source, descriptor, shard, beat)
            if self._sums.get(name, digest) != digest:
                raise ReadError(
                    f"{printable(source)} is not as {SUMS_FILE} has it: it was changed, or the "
                    "storage gives other bytes."
                )
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # read it from the disk
            if _digest(descriptor, beat) != digest:
                raise ReadError(
                    f"{printable(copy)}: the copy is not what was written to it. The disk under "
                    "data.stage fails; leave data.stage out, or give another disk."
                )
            os.fchmod(descriptor, 0o444)
            os.utime(descriptor, ns=(self._times[shard], self._times[shard]))
            os.fsync(descriptor)
            os.rename(part, copy)
            _sync_folder(copy.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _pour(self, source: Path, target: int, shard: int, beat: Callable[[], None]) -> str:
        """Copy a file's bytes; their SHA-256 (hex). ReadError if it is not the one indexed."""
        digest = hashlib.sha256()
        descriptor = open_regular(source)
        try:
            while chunk := os.read(descriptor, CHUNK):
                digest.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(target, rest) :]
                beat()
            about = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        copied = os.fstat(target).st_size
        now = (about.st_size, about.st_mtime_ns)
        if now != (self._sizes[shard], self._times[shard]) or copied != self._sizes[shard]:
            raise ReadError(
                f"{printable(source)} was changed after the start: it had {self._sizes[shard]:,} "
                f"bytes, and {copied:,} were read. Data must not change while it is trained on."
            )
        return digest.hexdigest()

    def _told(self, error: OSError, shard: int) -> str:
        source = printable(self._index.root / self._index.files[shard])
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"{source} cannot be staged: {self.home} has no space left. Free some, remove what "
                "other jobs have left by `hvd_lbt data unstage`, or leave data.stage out."
            )
        return f"{source} cannot be staged to {self.home}: {error.strerror or error}."


def own_folder(folder: Path) -> Path:
    """Where this user's copies lie below `folder`, which must exist."""
    return folder / f"hvd_lbt-{os.geteuid()}"


def stage_data(stores: Mapping[str, object], data: DataRecipe, *, copies: bool) -> str:
    """Have these stores, by split, read copies of their shards below data.stage; a line to tell.

    copies: whether this process, one of its node, also makes all copies that are missing, in a
    thread. Without data.stage nothing is done, and the line is empty. Raises UserError, before
    anything is copied, if they do not fit or the folder cannot be used.
    """
    if data.stage is None:
        return ""
    folder = Path(data.stage)
    shards = {}
    for split, store in stores.items():
        if isinstance(store, ArrayStore):
            raise UserError(
                f"data.stage: the pixels of {store.index.root} are in memory from the start, and "
                "nothing is read later. Leave data.stage out."
            )
        if not isinstance(store, Store) or store.index.extents is None:
            raise UserError(
                "data.stage: this data set is no shards, and shards are staged: `hvd_lbt data "
                "convert DATA OUT --format webdataset` makes them of image files. Leave data.stage "
                "out to read the data where it is."
            )
        shards[split] = store
    _check_folder(folder)
    stages = []
    for split, its in shards.items():
        stages.append(Stage(folder, its.index, split, data.timeout))
        its.place_of = stages[-1].path
    missing = sum(one.bytes_missing() for one in stages)
    if copies:
        free = shutil.disk_usage(folder).free
        if missing and missing + SPARE > free:
            raise UserError(
                f"data.stage: {folder} has {_gib(free)} free, and {_gib(missing)} of shards are to "
                "be copied there (64 MiB stay free). Free some space (`hvd_lbt data unstage` "
                "removes what other runs have left), give another folder, or leave data.stage out."
            )

        def copy() -> None:
            for one in stages:
                one.copy_all()

        threading.Thread(target=copy, name="stage", daemon=True).start()
    told = f"{sum(map(len, stages))} shards are read from {folder}"
    return told + (f"; {_gib(missing)} are copied there now." if missing else ", all are there.")


def _check_folder(folder: Path) -> None:
    """Raise UserError unless copies can be made there, and nobody else's would be read."""
    if not folder.is_dir():
        raise UserError(
            f"data.stage: {folder} is no folder on {os.uname().nodename}. It must be there on each "
            "node: a folder on the node's own disk."
        )
    own = own_folder(folder)
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        about = os.lstat(own)
    except OSError as error:
        raise _unusable(folder, error) from error
    if not own.is_dir() or own.is_symlink() or about.st_uid != os.geteuid():
        raise UserError(
            f"data.stage: {own} is not a folder of this user. Another user has made it; remove it, "
            "or give another folder."
        )


def remove(folder: Path, *, source: Path | None = None) -> tuple[int, int]:
    """Remove this user's copies below `folder`; of how many splits, and their bytes.

    source: of this data set only. Raises UserError, and removes none, if a running process reads
    one of them.
    """
    own = own_folder(folder)
    if not own.is_dir() or own.is_symlink():
        return 0, 0
    chosen = []
    for home in sorted(own.iterdir()):
        if home.name.startswith(".removed.") or home.is_symlink() or not home.is_dir():
            continue
        told = _source_of(home)
        if source is None or os.path.realpath(source) in (told, os.path.dirname(told)):
            chosen.append((home, told or home.name))
    if source is not None and not chosen:
        raise UserError(f"--data {source}: there are no copies of it in {folder}.")
    size = 0
    with ExitStack() as held:  # all are held before the first is removed
        for home, told in chosen:
            held.enter_context(_unused(home, told))
        for home, _ in chosen:
            size += sum(f.lstat().st_size for f in home.rglob("*") if not f.is_dir())
            # what is a shard must not be found once its neighbours are gone, by whoever starts now
            home.rename(own / f".removed.{secrets.token_hex(8)}")
    for left in own.glob(".removed.*"):
        shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):
        own.rmdir()
    return len(chosen), size


@contextmanager
def _unused(home: Path, what: str) -> Iterator[None]:
    """Hold a data set's copies alone. UserError if a process reads them."""
    descriptor = os.open(home / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"the staged copies of {printable(what)} ({home}) are read by a running process; "
                "unstage them when it has ended."
            ) from None
        yield
    finally:
        os.close(descriptor)


def _use(home: Path) -> int:
    """Hold a shared lock for as long as this process lives, so that nobody removes the copies."""
    while True:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(home / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # removed meanwhile
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(home / IN_USE)):
                return descriptor
        os.close(descriptor)


def _source_of(home: Path) -> str:
    try:
        return str(json.loads((home / ABOUT).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _listed_sums(root: Path) -> dict[str, str]:
    """The checksums that `data convert` has written, by shard."""
    try:
        lines = (root / SUMS_FILE).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _digest(descriptor: int, beat: Callable[[], None]) -> str:
    digest, at = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, CHUNK, at):
        digest.update(chunk)
        at += len(chunk)
        beat()
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.stage: {folder} cannot be written to ({error.strerror or error}). Give a folder on "
        "the node's own disk that this user may write to."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
