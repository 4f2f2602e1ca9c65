"""`hvd_lbt data convert`: a data set as WebDataset, TFRecord or RecordIO shards, in the same order.

DATA is a data set in any format that training reads, or as it is downloaded: ImageNet's archives,
Kaggle's tree, tiny-ImageNet, Parquet files of the Hugging Face hub, CIFAR's and MNIST's files.

The encoded bytes are copied as they are, or made smaller once by --shorter-side. Each shard is
written aside, read back and compared image by image with what was to be written, and only then gets
its name and a line in sha256sums.txt (as sha256sum -c reads it). Started again, the command keeps
the shards whose checksum still holds and continues.
"""

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from hvd_lbt import terminal
from hvd_lbt.arguments import count, threads
from hvd_lbt.data.class_names import CLASSES_FILE, as_lines
from hvd_lbt.data.downloads import Download, find_files, find_tree
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
from hvd_lbt.data.formats.side_files import ABOUT_FILE, SHRINK_KEY, pixels_of
from hvd_lbt.data.identity import identity
from hvd_lbt.data.image_notes import ImageNotes
from hvd_lbt.data.index import locked
from hvd_lbt.data.reading import read_regular
from hvd_lbt.data.shrink import QUALITY, Shrink, Shrunk
from hvd_lbt.data.source import find_source, has_split
from hvd_lbt.data.store import Store, open_test_split, open_train_split
from hvd_lbt.errors import ReadError, UserError
from hvd_lbt.terminal import printable

LOCK_FILE = ".convert.lock"
OWN_FILES = {LOCK_FILE, f".{ABOUT_FILE}.part"}  # may be left without ABOUT_FILE
LARGEST = 1 << 20  # bytes of ABOUT_FILE
MEASURED_EVERY = 8  # images: the pixels of so many are compared with those before JPEG
ENDINGS = {"webdataset": "tar", "tfrecord": "tfrecord", "recordio": "rec"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt data convert`."""
    parser.add_argument("data", type=Path, help="a data set in any format, or as downloaded")
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
    parser.add_argument(
        "--shorter-side",
        type=count,
        metavar="PIXELS",
        help="make larger images smaller, once, and store them as JPEG [images as they are]",
    )
    parser.add_argument(
        "--quality", type=quality, metavar="Q", help=f"of that JPEG, 1 to 100 [{QUALITY}]"
    )
    parser.add_argument("--label-column", metavar="NAME", help="of Parquet files [label]")


def quality(text: str) -> int:
    """The value of --quality."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 100")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Convert all splits and say where they are."""
    if args.quality is not None and args.shorter_side is None:
        raise UserError(
            f"--quality {args.quality} has no effect without --shorter-side: images are copied as "
            "they are."
        )
    shrink = None
    if args.shorter_side is not None:
        shrink = Shrink(shorter_side=args.shorter_side, quality=args.quality or QUALITY)
    convert(
        args.data,
        args.out,
        form=args.format,
        samples_per_shard=args.samples_per_shard,
        classes_file=args.classes,
        jobs=args.jobs or len(os.sched_getaffinity(0)),
        shrink=shrink,
        label_column=args.label_column,
    )
    return 0


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What is converted.

    changed: whether a split is not as it was when it was opened. guarded: OUT must not lie there.
    """

    stores: dict[str, Store]
    changed: Callable[[str], bool]
    guarded: tuple[Path, ...]


def _open(data: Path, classes_file: Path | None, label_column: str | None) -> _Opened:
    """Open DATA: as it is downloaded, or in a format that training reads."""
    found = find_tree(data)
    if found is None:
        try:
            sources = {"train": find_source(data, "train", []).fingerprint()}
            stores = {"train": open_train_split(data, classes_file)}
            if has_split(data, "test"):
                sources["test"] = find_source(data, "test", []).fingerprint()
                stores["test"] = open_test_split(data, stores["train"].classes, classes_file)
        except ReadError:
            raise
        except UserError:
            if (found := find_files(data, label_column)) is None:
                raise
    parquet = found is not None and found.train.index.kind == "parquet"
    if label_column is not None and not parquet:
        raise UserError(
            f"--label-column {label_column} has no effect: {printable(data)} has no Parquet files."
        )
    if found is None:

        def changed(split: str) -> bool:
            return find_source(data, split, []).fingerprint() != sources[split]

        roots = tuple(store.index.root for store in stores.values())
        return _Opened(stores=stores, changed=changed, guarded=roots)
    if classes_file is not None:
        raise UserError(
            f"--classes {classes_file} has no effect: {found.what} has classes of its own."
        )
    return _of_download(found)


def _of_download(found: Download) -> _Opened:
    """A downloaded data set; says what it is and what was found in it."""
    console = terminal.console(stderr=True)
    before = found.fingerprint()
    stores = found.stores()
    for split, store in stores.items():
        terminal.say(
            console,
            f"{split}: {len(store):,} images, {len(store.classes):,} classes of {found.what}",
        )
        for line in store.index.findings.lines():
            terminal.say(console, f"{split}: {line}")
    if "test" not in stores:
        terminal.say(console, f"{found.what} has no test images here: only train is converted.")
    folders = (store.index.root for store in stores.values() if store.index.kind == "folder")
    return _Opened(
        stores=stores,
        changed=lambda _: found.fingerprint() != before,
        guarded=tuple(folders),
    )


def convert(
    data: Path,
    out: Path,
    *,
    form: str,
    samples_per_shard: int,
    classes_file: Path | None = None,
    jobs: int = 1,
    shrink: Shrink | None = None,
    label_column: str | None = None,
) -> None:
    """Write OUT/{train,test}/*.{tar,tfrecord,rec} and OUT/classes.txt.

    Raises UserError if OUT holds the conversion of something else, or cannot be written.
    """
    opened = _open(data, classes_file, label_column)
    stores, train = opened.stores, opened.stores["train"]
    about: dict[str, Any] = {
        "format": form,
        "samples_per_shard": samples_per_shard,
        "samples": {split: len(store) for split, store in stores.items()},
        "data": {split: identity(store) for split, store in stores.items()},
    }
    before_it = pixels_of(train.index.root)  # of a source that was made smaller already
    if shrink is not None or before_it:
        about[SHRINK_KEY] = _made_smaller(shrink, before_it)
    class_lines = as_lines(train.classes)
    if form == "tfrecord":
        _check_labels(train.classes)
    for root in opened.guarded:
        if out.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{out} lies in {root}, which is converted: choose another.")

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
            notes: dict[str, ImageNotes] = {}
            for split, store in stores.items():
                with ThreadPoolExecutor(jobs) as decoders:
                    work = Work(shrink, decoders, jobs) if shrink is not None else None
                    shards = Shards(store, out / split, split, form, before[split], work)
                    _write_split(shards, store, out / split, samples_per_shard, jobs)
                notes[split] = shards.notes
                _say_notes(split, shards, notes)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}). Free space, or correct the folder and its "
            "permissions, and start the same command again: whole shards are kept."
        ) from error
    for split, store in stores.items():
        if opened.changed(split):
            raise UserError(
                f"{store.index.root} was changed while it was converted: files came, went or were "
                "replaced. Start the same command again once nothing writes there."
            )


def _made_smaller(shrink: Shrink | None, before: str) -> dict[str, Any]:
    """What the stored pixels depend on. before: of the source, JSON or ""."""
    earlier: dict[str, Any] = json.loads(before) if before else {}
    if shrink is None:
        return earlier
    return shrink.about() | ({"source": earlier} if earlier else {})


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


def _say_notes(split: str, shards: "Shards", notes: dict[str, ImageNotes]) -> None:
    """What the images of a split are, and what made them smaller did."""
    console = terminal.console(stderr=True)
    found = shards.notes.findings()
    if split != "train":
        found.merge(shards.notes.leaks(notes["train"]))
    for line in found.lines():
        terminal.say(console, f"{split}: {line}")
    if shards.work is not None:
        terminal.say(console, f"{split}: {shards.work.summary()}")


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
            keys = [*about, *(key for key in (SHRINK_KEY,) if key not in about)]
            differs = [key for key in keys if not _same(before, about, key)]
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
    return isinstance(before, dict) and before.get(key) == about.get(key)


def _damaged(file: Path, why: object) -> UserError:
    return UserError(
        f"{file} is damaged ({why}), so what {file.parent} holds is not known. Empty the folder "
        "and start the same command again, or choose another folder."
    )


class Work:
    """Making images smaller, in `decoders`, and what that changed so far."""

    def __init__(self, shrink: Shrink, decoders: ThreadPoolExecutor, jobs: int):
        self.ahead = 4 * jobs  # images read before the first of them is written
        self._shrink, self._decoders, self._lock = shrink, decoders, threading.Lock()
        self._images = self._changed = self._before = self._after = 0
        self._differences: list[float] = []

    def submit(self, index: int, data: bytes) -> "Future[tuple[Shrunk, str]]":
        """Start on an image; the result is what is to be stored, and what is wrong with it."""
        return self._decoders.submit(self._make, index, data)

    def _make(self, index: int, data: bytes) -> tuple[Shrunk, str]:
        try:
            made, fault = self._shrink(data, measure=index % MEASURED_EVERY == 0), ""
        except ValueError as error:  # kept as it is, so that each sample keeps its place
            made, fault = Shrunk(data, False), str(error)
        with self._lock:
            self._images += 1
            self._changed += made.changed
            self._before += len(data)
            self._after += len(made.data)
            if made.difference is not None:
                self._differences.append(made.difference)
        return made, fault

    def summary(self) -> str:
        """One line: how many images became smaller, bytes, pixels."""
        about = self._shrink.about()
        side = about["shorter_side"]
        if not self._images:
            return "no image was read: all shards were there"
        if not self._changed:
            return (
                f"warning: no image is larger than --shorter-side {side}, and all "
                f"{self._images:,} are stored as they are"
            )
        compared = ""
        if self._differences:
            compared = (
                f"; a pixel differs by {np.mean(self._differences):.2f} of 255 on average from "
                f"that before JPEG ({len(self._differences):,} images compared)"
            )
        return (
            f"{self._changed:,} of {self._images:,} images made smaller, to a shorter side of "
            f"{side} pixels, JPEG of quality {about['quality']}, {about['subsampling']}: "
            f"{self._before / 1e6:,.2f} MB became {self._after / 1e6:,.2f} MB{compared}"
        )


class Shards:
    """The shards of one split in `folder`; stamps: of the source's files, as `_stamps` gives
    them. work: makes images smaller, None stores them as they are.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        split: str,
        form: str,
        stamps: NDArray[np.int64],
        work: Work | None = None,
    ):
        self.notes, self.work = ImageNotes(store), work
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
            for index, image in zip(part, self._images_of(file, Extents()), strict=True):
                self.notes.add(index, image, image, self._store.name(index))
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
            for index, image, name in self._made(part):
                label = int(store.labels[index])
                write(index, image, name, label, store.classes[label])
                yield hashlib.sha256(image).digest()

    def _made(self, part: range) -> Iterator[tuple[int, bytes, str]]:
        """(sample, what to store, CLASS/FILE) of these samples, in order."""
        store, work = self._store, self.work
        if work is None:
            for index in part:
                image, name = store.read(index), store.member(index)
                self.notes.add(index, image, image, name)
                yield index, image, name
            return
        waiting: deque[tuple[int, bytes, str, Future[tuple[Shrunk, str]]]] = deque()
        for index in part:
            image, name = store.read(index), store.member(index)
            waiting.append((index, image, name, work.submit(index, image)))
            if len(waiting) > work.ahead:
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())

    def _finished(
        self, index: int, image: bytes, name: str, future: "Future[tuple[Shrunk, str]]"
    ) -> tuple[int, bytes, str]:
        made, fault = future.result()
        self.notes.add(index, image, made.data, name, fault)
        stem, ending = os.path.splitext(name)
        if made.changed and ending.lower() not in (".jpg", ".jpeg"):
            name = f"{stem}.jpg"
        return index, made.data, name

    def _compare(self, file: Path, part: range, sums: list[bytes]) -> None:
        """Read the shard back, as training will, and compare it with what was to be written."""
        extents = Extents()
        found = [hashlib.sha256(image).digest() for image in self._images_of(file, extents)]
        names = list(extents.names)
        labels = [names[token] for token in extents.tokens]
        classes = self._store.classes
        expected = [int(label) for label in self._store.labels[part.start : part.stop]]
        wanted = [classes[label] for label in expected] if self._form == "tfrecord" else expected
        if (found, labels) != (sums, wanted):
            raise OSError(f"{file} reads back otherwise than it was written")

    def _images_of(self, file: Path, extents: Extents) -> Iterator[bytes]:
        """The images in a shard; what its scan says goes to `extents`."""
        SCANS[self._form](file, extents)
        with file.open("rb") as stream:
            for offset, length in zip(extents.offsets, extents.lengths, strict=True):
                image = os.pread(stream.fileno(), abs(length), offset)
                yield image if length >= 0 else join_recordio(image)


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
