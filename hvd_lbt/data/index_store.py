"""Where encoded images and their labels come from: sample index → bytes, label, name.

One store for all formats: the index says where each sample's bytes lie, so that a sample is one
positional read. The bytes are checked before anyone decodes them.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hvd_lbt.data.class_names import CLASSES_FILE
from hvd_lbt.data.formats import join_recordio
from hvd_lbt.data.index import Index
from hvd_lbt.data.labels import Labels
from hvd_lbt.data.pixels import Encoded, encoded
from hvd_lbt.data.reading import open_regular, read_regular
from hvd_lbt.errors import ReadError, SampleError, UserError

OPEN_SHARDS = 128  # kept open at once by a process, of 1,024 that many systems allow it
# What is wrong with one file. Any other failure of a read is the storage's, and is never skipped.
FILES_OWN = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV}


class Store:
    """The samples of one split, in the index's order.

    classes: the names that give labels 0, 1, …; None takes `named`, or else those found here,
    sorted (numbers as numbers). The test split is given the training split's. named: the names in
    the data set's classes file, which shards' numbers stand for. labels: each
    sample's. Raises
    UserError for a class that is not in `classes`.
    """

    contents = ""  # a hash of the samples, where names and sizes do not tell data sets apart

    def __init__(
        self,
        index: Index,
        classes: tuple[str, ...] | None = None,
        named: tuple[str, ...] | None = None,
    ):
        self.index, self._folder = index, os.fsencode(index.root) + b"/"
        found = [_class_name(token, named, index.root) for token in index.token_names]
        if classes is None:
            numbers = all(isinstance(token, int) for token in index.token_names)
            classes = named or tuple(sorted(found, key=int if numbers else os.fsencode))
        self.classes = classes
        label_of = {name: label for label, name in enumerate(classes)}
        unknown = sorted(set(found) - set(label_of))
        if unknown:
            raise UserError(
                f"{index.root} has the class {unknown[0]!r}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
                + f", which is not among the {len(classes)} classes of the training images, "
                f"{', '.join(map(repr, classes[:5]))}{', …' if len(classes) > 5 else ''}. "
                f"Both splits must use the same class names, those of {CLASSES_FILE} where there "
                "is one."
            )
        table = np.array([label_of[name] for name in found], dtype=np.int64)
        self.labels = Labels(table, index.tokens)
        self.place_of: Callable[[int], Path] = self._own_place  # data.stage gives another
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """What errors call sample `index`: its file, or its shard and where it lies there."""
        extents = self.index.extents
        if extents is None:
            return str(self.index.root / self.index.files[index])
        shard, offset, _ = map(int, extents[index])
        file = str(self.index.root / self.index.files[shard])
        if self.index.kind == "webdataset":
            try:  # the member's name is in the block before its bytes
                member = self._shard(shard).read(100, offset - 512).partition(b"\0")[0]
                return f"{file}:{os.fsdecode(member)}"
            except OSError:
                pass
        return f"{file} (sample {index:,}, byte {offset:,})"

    def member(self, index: int) -> str:
        """CLASS/FILE of sample `index`, or where it lies in a shard."""
        return self.name(index).removeprefix(str(self.index.root)).lstrip("/")

    def read(self, index: int) -> bytes:
        """The encoded bytes of sample `index`, as they are.

        Raises SampleError for a file that is there and cannot be read, ReadError if the storage
        fails.
        """
        try:
            if self.index.extents is None:
                return read_regular(self._folder + self.index.files.raw(index))
            shard, offset, length = map(int, self.index.extents[index])
            data = self._shard(shard).read(abs(length), offset)
        except OSError as error:
            raise self._failure(index, error) from error
        if len(data) < abs(length):
            raise ReadError(
                f"{self.name(index)} is not there any more: the shard has become shorter."
            )
        return data if length >= 0 else join_recordio(data)

    def pieces(self, block: range) -> Iterator[tuple[str | bytes | Path, int, int]]:
        """The (file, offset, length) that hold these samples; of a shard one for all of them."""
        extents = self.index.extents
        if extents is None:
            for index in block:
                yield self._folder + self.index.files.raw(index), 0, 0  # 0: to the end
            return
        shards, offsets, lengths = extents[block.start : block.stop].T
        for shard in np.unique(shards):
            here = shards == shard
            start = int(offsets[here].min())
            end = int((offsets[here] + np.abs(lengths[here])).max())
            yield self.place_of(int(shard)), start, end - start

    def image(self, index: int) -> Encoded:
        """The image of sample `index`, or a SampleError if its bytes are no whole image."""
        data = self.read(index)
        try:
            return encoded(data)
        except ValueError as fault:
            raise SampleError(
                f"{self.name(index)} is no whole image: {fault}. Replace or remove it."
            ) from fault

    def _failure(self, index: int, error: OSError) -> SampleError:
        name = self.name(index)
        if error.errno in FILES_OWN:
            return SampleError(f"{name} cannot be read: {error.strerror}.")
        if isinstance(error, FileNotFoundError):
            if os.path.lexists(name):
                return SampleError(f"{name} is a link to a file that is not there.")
            return ReadError(f"{name} has vanished since the data was indexed.")
        return ReadError(f"{name} cannot be read: {error.strerror}.")

    def _own_place(self, shard: int) -> Path:
        return self.index.root / self.index.files[shard]

    def _shard(self, shard: int) -> "_Descriptor":
        with self._lock:
            descriptor = self._open.get(shard)
        if descriptor is None:  # outside of the lock: opening may take long
            descriptor = _Descriptor(self.place_of(shard))
        with self._lock:
            self._open[shard] = descriptor
            self._open.move_to_end(shard)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return descriptor


class _Descriptor:
    """An open file; closed when the last thread that reads it lets go."""

    def __init__(self, file: Path):
        self._number = open_regular(file)

    def read(self, count: int, offset: int) -> bytes:
        return os.pread(self._number, count, offset)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


def _class_name(token: int | str, named: tuple[str, ...] | None, root: Path) -> str:
    """Shards' numbers stand for lines of the classes file, where there is one."""
    if named is None or isinstance(token, str):
        return str(token)
    if token >= len(named):
        raise UserError(
            f"{root} has the label {token}, and the classes file has {len(named)} names, for the "
            f"labels 0 … {len(named) - 1}."
        )
    return named[token]
