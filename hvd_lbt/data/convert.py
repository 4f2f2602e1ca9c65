"""`hvd_lbt data convert`: a data set as WebDataset, TFRecord or RecordIO shards, in the same order.

The encoded bytes are copied as they are. Each shard is written aside, read back and compared image
by image with the source, and only then gets its name and a line in sha256sums.txt (as sha256sum -c
reads it). Started again, the command keeps the shards whose checksum still holds and goes on.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
from hvd_lbt.data.source import has_split
from hvd_lbt.data.store import Store, open_test_split, open_train_split
from hvd_lbt.errors import UserError

ABOUT_FILE = "convert.json"
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
    train = open_train_split(data, classes_file)
    stores = {"train": train}
    if has_split(data, "test"):
        stores["test"] = open_test_split(data, train.classes, classes_file)
    about = {
        "format": form,
        "samples_per_shard": samples_per_shard,
        "samples": {split: len(store) for split, store in stores.items()},
        "data": {split: identity(store) for split, store in stores.items()},
    }
    class_lines = as_lines(train.classes)
    if form == "tfrecord":
        _check_labels(train.classes)
    console = terminal.console(stderr=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _begin_or_go_on(out, about)
        (out / CLASSES_FILE).write_bytes(class_lines)
        for split, store in stores.items():
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                task = bar.add_task(
                    terminal.description(f"writing {out / split}"), total=len(store)
                )
                kept = written = 0
                with ThreadPoolExecutor(jobs) as threads:
                    shards = Shards(store, out / split, split, form)
                    cuts = range(0, len(store), samples_per_shard)
                    ranges = [range(at, min(at + samples_per_shard, len(store))) for at in cuts]
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
                f"{out / split}: {len(store):,} images, {written} shards written"
                + (f", {kept} were there" if kept else "")
                + f"; checked against {store.index.root} and listed in {SUMS_FILE}",
            )
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}). Mend it and start the same command again: it goes on "
            "where it stopped."
        ) from error


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


def _begin_or_go_on(out: Path, about: dict) -> None:
    file = out / ABOUT_FILE
    if file.exists():
        try:
            before = json.loads(file.read_text("utf-8"))
        except ValueError as error:  # not UTF-8, or no JSON
            raise UserError(
                f"{file} is damaged ({error}), so what {out} holds is not known. Empty the folder, or "
                "choose another."
            ) from error
        if before != about:
            raise UserError(
                f"{out} holds the conversion of other data or with other settings ({file} is not "
                f"{json.dumps(about)}). Choose another folder, or empty it."
            )
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no conversion. Choose another folder.")
    else:
        file.write_text(json.dumps(about) + "\n", "utf-8")


class Shards:
    """The shards of one split in `folder`."""

    def __init__(self, store: Store, folder: Path, split: str, form: str):
        self._store, self._folder, self._split, self._form = store, folder, split, form
        folder.mkdir(exist_ok=True)
        self._file = folder / SUMS_FILE
        lines = self._file.read_text("utf-8").splitlines() if self._file.exists() else []
        self._sums = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
        self._lock = threading.Lock()

    def write(self, number: int, count: int, part: range) -> tuple[bool, int]:
        """Write shard `number` of `count` with these samples; (whether it was missing, samples)."""
        name = f"{self._split}-{number:05}-of-{count:05}.{ENDINGS[self._form]}"
        file = self._folder / name
        if name in self._sums and file.exists() and _digest(file) == self._sums[name]:
            return False, len(part)
        scratch = self._folder / f".{name}.part"
        with scratch.open("wb") as stream:
            sums = list(self._fill(stream, part))
            stream.flush()
            os.fsync(stream.fileno())
        self._compare(scratch, part, sums)
        digest = _digest(scratch)
        os.replace(scratch, file)
        with self._lock, self._file.open("a", encoding="utf-8") as lines:
            lines.write(f"{digest}  {name}\n")
            lines.flush()
            os.fsync(lines.fileno())
        return True, len(part)

    def _fill(self, stream: BinaryIO, part: range) -> Iterator[bytes]:
        """Write the samples; gives the SHA-256 of each image as it was read."""
        store = self._store
        with _writer(stream, self._form) as write:
            for index in part:
                image, label = store.read(index), int(store.labels[index])
                write(index, image, self._name(index), label, store.classes[label])
                yield hashlib.sha256(image).digest()

    def _name(self, index: int) -> str:
        """CLASS/FILE, or where the sample lay in a shard."""
        root = str(self._store.index.root)
        return self._store.name(index).removeprefix(root).lstrip("/")

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
