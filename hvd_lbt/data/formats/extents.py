"""Where the samples of one shard lie, and reading a shard in small pieces."""

import codecs
import os
import unicodedata
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from hvd_lbt.data.formats.findings import Findings
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

WINDOW = 4096  # bytes of a shard read at once while scanning: headers, and no more of the image
LONGEST_NAME = 1024  # bytes of a class's name
LARGEST_LABEL = 10**9  # of a class's number


@dataclass
class Extents:
    """Samples of one shard, in order.

    offsets, lengths: of the encoded bytes. A negative length: a RecordIO record in several parts,
    |length| bytes from its first header on. tokens: the labels, each an index into `names`.
    aliases: for a label the same sample's other labels (a number beside a name). labels_from: what
    the labels were taken from. unpadded: whether a tar ends right after its end marker. findings:
    what else lies in the shard.
    """

    offsets: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    tokens: array = field(default_factory=lambda: array("i"))
    names: dict[int | str, int] = field(default_factory=dict)
    aliases: dict[int | str, tuple[int | str | None, ...]] = field(default_factory=dict)
    labels_from: str = ""
    unpadded: bool = False
    findings: Findings = field(default_factory=Findings)

    def add(self, offset: int, length: int, label: int | str) -> None:
        """Note one sample."""
        self.offsets.append(offset)
        self.lengths.append(length)
        self.tokens.append(self.names.setdefault(label, len(self.names)))

    def __len__(self) -> int:
        return len(self.offsets)


class Window:
    """Small positional reads of a file, WINDOW bytes at a time. Raises UserError past its end.

    first, size: of a file within the file, its first byte and its length; `file` is then what
    errors call it.
    """

    def __init__(self, descriptor: int, file: Path, first: int = 0, size: int | None = None):
        self.file, self.descriptor, self._first = file, descriptor, first
        self.size = os.fstat(descriptor).st_size if size is None else size
        self.within = size is not None
        self._start, self._bytes = 0, b""

    def read(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on."""
        place = at - self._start
        if not 0 <= place <= len(self._bytes) - count:
            if at + count > self.size:
                raise self.error(f"is cut off at byte {self.size:,}")
            self._start, place = at, 0
            self._bytes = os.pread(self.descriptor, max(WINDOW, count), self._first + at)
            if len(self._bytes) < count:
                raise self.error(f"is cut off at byte {at + len(self._bytes):,}")
        return self._bytes[place : place + count]

    def error(self, what: str) -> UserError:
        """A UserError that begins with the file's name."""
        return UserError(f"{printable(self.file)} {what}.")


class LabelError(ValueError):
    """What was found in a label's place (`what`) is no label; the message says why."""

    def __init__(self, what: str, why: str):
        super().__init__(why)
        self.what = what


def class_name(raw: bytes) -> str:
    """The name of a class from a shard. Raises LabelError for what is none."""
    if len(raw) > LONGEST_NAME:
        raise LabelError(f"{raw[:20]!r}…", f"it is longer than a name's {LONGEST_NAME:,} bytes")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise LabelError(f"{raw[:40]!r}", "it is not UTF-8") from None
    if not name.strip():
        raise LabelError(f"{name!r}", "it is empty")
    if len(name.splitlines()) > 1:
        raise LabelError(f"{name[:40]!r}", "it has several lines, and one image has one label")
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        raise LabelError(f"{name[:40]!r}", "it has control characters")
    return name


def class_number(value: int | float) -> int:
    """The number of a class from a shard. Raises LabelError for what is none."""
    if not 0 <= value <= LARGEST_LABEL or value != int(value):
        why = f"no class's number, which is whole and from 0 to {LARGEST_LABEL:,}"
        raise LabelError(f"{value}", why)
    return int(value)


def class_label(raw: bytes) -> int | str:
    """A number if the text is one, else a name. Raises LabelError for what is neither."""
    text = class_name(raw.removeprefix(codecs.BOM_UTF8).strip())
    if text.isdecimal():
        if len(text) > 10:
            raise LabelError(f"{text[:20]}…", f"no class's number: it has {len(text):,} digits")
        return class_number(int(text))
    digits = text.lstrip("+-").replace(".", "", 1)
    if digits.isdecimal() or text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise LabelError(text[:20], "no class's number, which is whole and not negative")
    return text
