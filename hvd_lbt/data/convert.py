"""`hvd_lbt data convert`: a data set as WebDataset, TFRecord or RecordIO shards, in the same order.

The encoded bytes are copied as they are. Each shard is written aside, read back and compared image
by image with the source, and only then gets its name and a line in sha256sums.txt (as sha256sum -c
reads it). Started again, the command keeps the shards whose checksum still holds and
continues.
"""

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from hvd_lbt import terminal
from hvd_lbt.arguments import count, threads
from hvd_lbt.data.class_names import CLASSES_FILE, as_lines
from hvd_lbt.data.formats import (
    SCANS,
    SUFFIXES,
    SUMS_FILE,
    Extents,
    join_recordio,
    recordio,
    tfrecord,
)
from hvd_lbt.data.formats.extents import LabelError, class_name
from hvd_lbt.data.identity import identity
from hvd_lbt.data.index import locked
from hvd_lbt.data.reading import read_regular
from hvd_lbt.data.source import find_source, has_split
from hvd_lbt.data.store import Store, open_test_split, open_train_split
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

ABOUT_FILE, LOCK_FILE = "convert.json", ".convert.lock"
OWN_FILES = {LOCK_FILE, f".{ABOUT_FILE}.part"}  # may be left without ABOUT_FILE
LARGEST = 1 << 20  # bytes of ABOUT_FILE
ENDINGS = {"webdataset": "tar", "tfrecord": "tfrecord", "recordio": "rec"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt data convert`."""
    parser.add_argument("data", type=Path, help="a data set in any format")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--format", choices=sorted(ENDINGS), default="webdataset")
    parser.add_argument(
        "--samples-per-shard",
        type=count,
        default=2000,
        metavar="N",
        help="[2000: 220 MB of ImageNet]",
    )
    parser.add_argument("--classes", type=Path, help="one class name a line [DATA/classes.txt]")
    parser.add_argument("--jobs", type=threads, help="shards written at once [the cores]")


def main(args: argparse.Namespace) -> int:
    """Convert all splits and say where they are."""
    convert(
        args.data,
        args.out,
        form=args.format,
        samples_per_shard=args.samples_per_shard,
        classes_file=args.classes,
        jobs=args.jobs or len(os.sched_getaffinity(0)),
    )
    return 0


def convert(
    data: Path,
    out: Path,
    *,
    form: str,
    samples_per_shard: int,
    classes_file: Path | None = None,
    jobs: int = 1,
) -> None:
    """Write OUT/{train,test}/*.{tar,tfrecord,rec} and OUT/classes.txt.

    Raises UserError if OUT holds the conversion of something else, or cannot be written.
    """
    sources = {"train": find_source(data, "train", []).fingerprint()}
    train = open_train_split(data, classes_file)
    stores = {"train": train}
    if has_split(data, "test"):
        sources["test"] = find_source(data, "test", []).fingerprint()
        stores["test"] = open_test_split(data, train.classes, classes_file)
    about: dict[str, Any] = {
        "format": form,
        "samples_per_shard": samples_per_shard,
        "samples": {split: len(store) for split, store in stores.items()},
        "data": {split: identity(store) for split, store in stores.items()},
    }
    class_lines = as_lines(train.classes)
    if form == "tfrecord":
        _check_labels(train.classes)
    for store in stores.values():
        if out.resolve().is_relative_to(store.index.root.resolve()):
            raise UserError(
                f"{out} lies in {store.index.root}, which is converted: choose another."
            )

    def busy(holder: str) -> UserError:
        return UserError(
            f"{out} is being written by another `hvd_lbt data convert` ({holder}). Wait for its "
            "end, or choose another folder."
        )

    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK_FILE, busy):
            before = {split: _stamps(store, jobs) for split, store in stores.items()}
            about["source"] = {
                split: hashlib.sha256(stamps[:, :2].tobytes()).hexdigest()
                for split, stamps in before.items()
            }
            _begin_or_continue(out, about)
            _replace(out / CLASSES_FILE, class_lines)
            for split, store in stores.items():
                shards = Shards(store, out / split, split, form, before[split])
                _write_split(shards, store, out / split, samples_per_shard, jobs)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}). Free space, or correct the folder and its "
            "permissions, and start the same command again: whole shards are kept."
        ) from error
    for split, store in stores.items():
        if find_source(data, split, []).fingerprint() != sources[split]:
            raise UserError(
                f"{store.index.root} was changed while it was converted: files came, went or were "
                "replaced. Start the same command again once nothing writes there."
            )


def _write_split(shards: "Shards", store: Store, folder: Path, per_shard: int, jobs: int) -> None:
    """Write a split's missing shards with `jobs` threads, and say how many there are."""
    console = terminal.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(terminal.description(f"writing {folder}"), total=len(store))
        kept = written = 0
        with ThreadPoolExecutor(jobs) as threads:
            starts = range(0, len(store), per_shard)
            ranges = [range(at, min(at + per_shard, len(store))) for at in starts]
            ends = [
                threads.submit(shards.write, number, len(ranges), part)
                for number, part in enumerate(ranges)
            ]
            try:
                for end in as_completed(ends):
                    new, samples = end.result()
                    written, kept = written + new, kept + (not new)
                    bar.update(task, advance=samples)
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
    terminal.say(
        console,
        f"{folder}: {len(store):,} images, {written} shards written"
        + (f", {kept} were there" if kept else "")
        + f"; checked against {store.index.root} and listed in {SUMS_FILE}",
    )


def _stamps(store: Store, jobs: int) -> NDArray[np.int64]:
    """Size, mtime and ctime (ns) of each of the index's files; -1 for one that cannot be looked
    at.
    """
    folder = os.fsencode(store.index.root) + b"/"
    files = store.index.files

    def stamp(number: int) -> tuple[int, int, int]:
        try:
            about = os.stat(folder + files.raw(number))
        except OSError:  # reading it says what is wrong
            return (-1, -1, -1)
        return (about.st_size, about.st_mtime_ns, about.st_ctime_ns)

    stamps = np.empty((len(files), 3), np.int64)
    with ThreadPoolExecutor(max(jobs, 8)) as threads:  # it is the storage that is waited for
        for start in range(0, len(files), 10_000):
            part = range(start, min(start + 10_000, len(files)))
            stamps[part.start : part.stop] = list(threads.map(stamp, part))
    return stamps


def _replace(file: Path, data: bytes) -> None:
    """Write a file whole or not at all. An OSError names the file."""
    scratch = file.with_name(f".{file.name}.part")
    try:
        with scratch.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, file)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise _named(error, file) from error


def _named(error: OSError, file: Path) -> OSError:
    """The error with a file's name: those of a write have none."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(file))


def _check_labels(classes: tuple[str, ...]) -> None:
    """Raise UserError for a name that scan_tfrecord would refuse as a label."""
    for name in classes:
        try:
            class_name(name.encode())
        except LabelError as error:
            raise UserError(
                f"The class {name!r} cannot be a label in TFRecord: {error}. Rename the class, or "
                "choose --format webdataset or recordio, whose labels are numbers."
            ) from error


def _begin_or_continue(out: Path, about: dict) -> None:
    """Write convert.json, or compare it; other files in a folder without one are not ours."""
    file = out / ABOUT_FILE
    if os.path.lexists(file):
        try:
            raw = read_regular(file, LARGEST)
            before = json.loads(raw) if raw else None
        except (OSError, ValueError, RecursionError) as error:  # not UTF-8, or no JSON
            raise _damaged(file, error) from error
        if before is None:
            raise _damaged(file, "it is empty, as after a power loss")
        if before != about:
            differs = [key for key in about if not _same(before, about, key)]
            if differs == ["source"]:
                raise UserError(
                    f"The images of {' and '.join(about['samples'])} were changed since the "
                    f"conversion in {out} began (their sizes or times, {file}), and shards there "
                    "have what they were. Empty the folder, or choose another."
                )
            raise UserError(
                f"{out} holds the conversion of other data or with other settings ({file}: "
                f"{', '.join(differs) or 'further keys'}). Choose another folder, or empty it."
            )
    elif any(entry.name not in OWN_FILES for entry in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no conversion. Choose another folder.")
    else:
        _replace(file, json.dumps(about).encode() + b"\n")


def _same(before: object, about: dict, key: str) -> bool:
    return isinstance(before, dict) and before.get(key) == about[key]


def _damaged(file: Path, why: object) -> UserError:
    return UserError(
        f"{file} is damaged ({why}), so what {file.parent} holds is not known. Empty the folder "
        "and start the same command again, or choose another folder."
    )


class Shards:
    """The shards of one split in `folder`; stamps: of the source's files, as `_stamps` gives
    them.
    """

    def __init__(
        self, store: Store, folder: Path, split: str, form: str, stamps: NDArray[np.int64]
    ):
        self._store, self._folder, self._split, self._form = store, folder, split, form
        self._stamps, self._source = stamps, os.fsencode(store.index.root) + b"/"
        folder.mkdir(exist_ok=True)
        self._file = folder / SUMS_FILE
        raw = read_regular(self._file) if os.path.lexists(self._file) else b""
        line = rf"([0-9a-f]{{64}})  ({split}-\d+-of-\d+\.{ENDINGS[form]})"
        matches = (re.fullmatch(line, one) for one in raw.decode("utf-8", "replace").splitlines())
        # a line that a full disk cut off does not match, and its shard is written anew
        self._sums = {match[2]: match[1] for match in matches if match}
        self._lock = threading.Lock()

    def write(self, number: int, count: int, part: range) -> tuple[bool, int]:
        """Write shard `number` of `count` with these samples; (whether it was missing, samples)."""
        name = f"{self._split}-{number:05}-of-{count:05}.{ENDINGS[self._form]}"
        file = self._folder / name
        if name in self._sums and file.exists() and _digest(file) == self._sums[name]:
            return False, len(part)
        scratch = self._folder / f".{name}.part"
        try:
            with scratch.open("wb") as stream:
                sums = list(self._fill(stream, part))
                self._unchanged(part)
                stream.flush()
                os.fsync(stream.fileno())
            self._compare(scratch, part, sums)
            digest = _digest(scratch)
            os.replace(scratch, file)
        except OSError as error:
            raise _named(error, scratch) from error
        finally:
            with suppress(OSError):
                scratch.unlink()
        with self._lock:
            self._sums[name] = digest
            listed = "".join(f"{self._sums[one]}  {one}\n" for one in sorted(self._sums))
            _replace(self._file, listed.encode("utf-8", "replace"))
        return True, len(part)

    def _unchanged(self, part: range) -> None:
        """Raise UserError naming a file of these samples that is not as it was at the start."""
        index = self._store.index
        files = (
            part if index.extents is None else np.unique(index.extents[part.start : part.stop, 0])
        )
        for number in map(int, files):
            try:
                about = os.stat(self._source + index.files.raw(number))
                now = (about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            except FileNotFoundError:
                now = (-1, -1, -1)
            if now != tuple(self._stamps[number].tolist()):
                raise UserError(
                    f"{printable(index.root / index.files[number])} was changed while it was "
                    "converted. Start the same command again once nothing writes there."
                )

    def _fill(self, stream: BinaryIO, part: range) -> Iterator[bytes]:
        """Write the samples; gives the SHA-256 of each image as it was read."""
        store = self._store
        with _writer(stream, self._form) as write:
            for index in part:
                image, label = store.read(index), int(store.labels[index])
                write(index, image, store.member(index), label, store.classes[label])
                yield hashlib.sha256(image).digest()

    def _compare(self, file: Path, part: range, sums: list[bytes]) -> None:
        """Read the shard back, as training will, and compare it with what was to be written."""
        extents = Extents()
        SCANS[self._form](file, extents)
        names = list(extents.names)
        labels = [names[token] for token in extents.tokens]
        classes = self._store.classes
        expected = [int(label) for label in self._store.labels[part.start : part.stop]]
        with file.open("rb") as stream:
            places = zip(extents.offsets, extents.lengths, strict=True)
            images = (
                (os.pread(stream.fileno(), abs(length), offset), length >= 0)
                for offset, length in places
            )
            found = [
                hashlib.sha256(image if whole else join_recordio(image)).digest()
                for image, whole in images
            ]
        wanted = [classes[label] for label in expected] if self._form == "tfrecord" else expected
        if (found, labels) != (sums, wanted):
            raise OSError(f"{file} reads back otherwise than it was written")


@contextmanager
def _writer(stream: BinaryIO, form: str) -> Iterator:
    if form == "tfrecord":
        yield lambda index, *sample: stream.write(tfrecord(*sample))
        return
    if form == "recordio":
        yield lambda index, image, name, label, _: stream.write(recordio(image, label, index))
        return
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:

        def write(index: int, image: bytes, name: str, label: int, class_name: str) -> None:
            ending = os.path.splitext(name)[1].lower()
            about = {"name": name, "class": class_name}
            members = {
                ending if ending in SUFFIXES else ".jpg": image,
                ".cls": str(label).encode(),
                ".json": json.dumps(about).encode("utf-8", "surrogateescape"),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(
                    f"{index:08}{suffix}"
                )  # no times: the same bytes every time
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

        yield write


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
