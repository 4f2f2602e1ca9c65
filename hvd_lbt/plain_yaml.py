"""Read small YAML files that anyone may have written: plain values only, bounded in size and time.

Accepted is what YAML 1.1 and 1.2 read alike: mappings with text keys, lists, text, true and false,
null, and decimal or hexadecimal numbers. Everything else that is not quoted is text (`no`, `1e5`,
`1_000`, `2024-01-31`), and the schema says whether the text is a value of the setting. Anchors,
aliases, merge keys, tags, keys given twice, a second document, more than MAX_BYTES, MAX_DEPTH or
MAX_NODES and integers of more than MAX_DIGITS digits are errors with their line.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hvd_lbt.errors import UserError, did_you_mean

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_NODES = 10_000
MAX_DIGITS = 20

PLAIN_TAGS = ("str", "seq", "map")
CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?")
SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# 017 is 15 in YAML 1.1 and 17 in YAML 1.2.
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


def read_text(file: Path, what: str, limit: int = MAX_BYTES) -> str:
    """The text of a small UTF-8 file; `what` begins each error, such as `Recipe mine.yaml`.

    Raises FileNotFoundError if there is none, UserError for what is not a regular file (it is not
    opened then: a FIFO would wait for its writer), not UTF-8, or larger than `limit` bytes.
    """
    try:
        kind = _kind(os.stat(file).st_mode)
        if kind != "file":
            raise UserError(f"{what}: it is a {kind}, and must be a regular file.")
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            data = stream.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except OSError as error:
        raise UserError(f"{what}: the file cannot be read ({error.strerror}).") from error
    except UserError:
        raise
    except ValueError as error:  # a NUL in the path
        raise UserError(f"{what}: this cannot be the path of a file ({error}).") from error
    if len(data) > limit:
        raise UserError(f"{what}: the file is larger than {limit // 1024} KiB, the limit.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{what}: line {line}: byte {data[error.start]:#04x} is not UTF-8; save it as UTF-8."
        ) from error


def load(file: Path, what: str, kind: str, shipped: Sequence[str]) -> Any:
    """The value of a YAML file that is one of the `shipped` ones of a `kind`, or the user's own.

    Raises UserError, also if there is no such file.
    """
    try:
        return parse(read_text(file, what), what)
    except FileNotFoundError:
        raise UserError(
            f"{what}: there is no shipped {kind} and no file of this "
            f"name.{did_you_mean(str(file), shipped)} Shipped {kind}s: {', '.join(shipped)}."
        ) from None


def parse(text: str, what: str) -> Any:
    """The value of a YAML text: dicts with text keys, lists, text, numbers, booleans, None.

    Raises UserError, one paragraph that begins with `what` and names the line.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{what}: it is longer than {MAX_BYTES // 1024} KiB, the limit.")
    try:
        return _Document(yaml.parse(text, Loader=yaml.SafeLoader)).value()
    except _Refused as error:
        raise UserError(f"{what}: line {error.line}: {error}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{what}: it is not valid YAML: {line}{_short(error.problem)}.") from error
    except yaml.reader.ReaderError as error:
        line = f"line {text.count(chr(10), 0, error.position) + 1}: "
        raise UserError(
            f"{what}: it is not valid YAML: {line}the character U+{ord(text[error.position]):04X} "
            "is not allowed."
        ) from error
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF", or %YAML with 5,000 digits
        raise UserError(f"{what}: it is not valid YAML: a number is too large.") from error


def _short(text: str | None) -> str:
    return (text or "it cannot be read")[:200]


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


class _Refused(Exception):
    """YAML that is valid and not accepted here."""

    def __init__(self, event: yaml.Event, reason: str):
        super().__init__(reason)
        self.line = _line(event)


class _Document:
    """Builds the value of a document from the parser's events, and stops at the first it
    refuses.
    """

    def __init__(self, events: Iterator[yaml.Event]):
        self._events = events
        self._nodes = 0

    def value(self) -> Any:
        """The value of the only document; None for an empty text."""
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._node(next(self._events), depth=0)
        next(self._events)  # the document's end
        if not isinstance(after := next(self._events), yaml.StreamEndEvent):
            raise _Refused(after, "a second document begins here, and only one is allowed")
        return value

    def _node(self, event: yaml.Event, depth: int) -> Any:
        self._check(event, depth)
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                items.append(self._node(inner, depth + 1))
            return items
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            self._check(key, depth + 1)
            if not isinstance(key, yaml.ScalarEvent):
                raise _Refused(key, "a list or a mapping cannot be a key")
            name = key.value
            if name == "<<" and not key.style:
                raise _Refused(key, "merge keys (<<) are not allowed; write the settings out")
            if name in mapping:
                raise _Refused(
                    key, f"the key {name[:60]!r} is given twice, first in line {lines[name]}"
                )
            lines[name] = _line(key)
            mapping[name] = self._node(next(self._events), depth + 1)
        return mapping

    def _check(self, event: yaml.Event, depth: int) -> None:
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(
                event, f"aliases (*{str(event.anchor)[:40]}) are not allowed; write the value out"
            )
        assert isinstance(event, yaml.NodeEvent)
        if event.anchor is not None:
            raise _Refused(event, f"anchors (&{event.anchor[:40]}) are not allowed")
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        tag = event.tag
        if tag not in (None, "!") and tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
            raise _Refused(event, f"the tag {tag[:60]!r} is not allowed; write the plain value")
        if depth > MAX_DEPTH:
            raise _Refused(event, f"it is nested more than {MAX_DEPTH} levels deep, the limit")
        if self._nodes > MAX_NODES:
            raise _Refused(event, f"there are more than {MAX_NODES:,} values, the limit")


def _scalar(event: yaml.ScalarEvent) -> Any:
    text: str = event.value
    if event.style or event.tag is not None:
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text) or HEXADECIMAL.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise _Refused(
                event, f"an integer of {len(text):,} digits, and at most {MAX_DIGITS} are allowed"
            )
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    if LEADING_ZERO.fullmatch(text):
        raise _Refused(
            event, f"{text[:40]} is octal in YAML 1.1 and decimal in YAML 1.2: leave the 0 out"
        )
    return text


def _kind(mode: int) -> str:
    """What a path is, in a word: file, folder, FIFO, socket or device."""
    tests = {
        "file": stat.S_ISREG,
        "folder": stat.S_ISDIR,
        "FIFO": stat.S_ISFIFO,
        "socket": stat.S_ISSOCK,
    }
    return next((kind for kind, is_kind in tests.items() if is_kind(mode)), "device")
