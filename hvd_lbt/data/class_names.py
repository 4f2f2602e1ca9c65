"""The classes file: one class name a line, label 0 first, in UTF-8. Other formats are refused.

A line is taken as it is, so that every name round-trips. Whether a file has another format
(numbered lines, CSV, JSON, …) can only be guessed from its text. The guess is not made where
something else proves the names: the class folders or shards have exactly these, or
`hvd_lbt data convert` wrote them (the hash in convert.json).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hvd_lbt.data.formats.side_files import ABOUT_FILE
from hvd_lbt.data.reading import read_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

CLASSES_FILE = "classes.txt"
LARGEST = 16 << 20  # bytes of a classes file: 100,000 classes with names of 160
RIGHT = "It must be UTF-8 text with one class name a line, and nothing else: label 0 first"
ENCODINGS = (  # by byte-order mark; UTF-32's begins as UTF-16's
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
HEADERS = {"class", "classes", "class name", "class names", "class id", "class index", "classname"}
HEADERS |= {"classnames", "label", "labels", "label name", "label id", "name", "names", "id", "idx"}
HEADERS |= {"index", "category", "categories", "category id", "synset", "synsets", "wnid", "wnids"}
HEADERS |= {"wordnet id", "imagenet id", "description"}


def read_classes(
    data: Path, file: str | Path | None, known: Iterable[tuple[int | str, ...]] = ()
) -> tuple[str, ...] | None:
    """The names in `file`, else in DATA/classes.txt, else None.

    known: lists of labels; a file with just the names of one of them has the right format whatever
    they look like. Raises UserError for a file that cannot be read or is no list of class names.
    """
    chosen = Path(file or data / CLASSES_FILE)
    if file is None and not os.path.lexists(chosen):
        return None
    where = f"The classes file {printable(chosen)}"
    try:
        raw = read_regular(chosen, LARGEST)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}). {RIGHT}.") from error
    names = lines_of(raw, where)
    proven = any(set(names) == set(labels) for labels in known) or (
        chosen.parent.resolve() == data.resolve() and hash_of(names) == _converted(data)
    )
    if not proven and (what := _other_format(names)):
        raise UserError(f"{where} {what} {RIGHT}.")
    return names


def lines_of(raw: bytes, where: str) -> tuple[str, ...]:
    """The names in a classes file's bytes; a byte-order mark and Windows' line ends are no part.

    where: begins messages. Raises UserError for what is not one name a line, each once.
    """
    for mark, encoding in ENCODINGS:
        if raw.startswith(mark):
            raise UserError(
                f"{where} is {encoding}. {RIGHT}. Convert it: iconv -f {encoding} -t UTF-8."
            )
    if b"\0" in raw:
        raise UserError(f"{where} has zero bytes: it is binary, or UTF-16. {RIGHT}.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where} is not UTF-8: byte {raw[error.start]:#04x} in line {line:,}. {RIGHT}. "
            "A file in Latin-1 is converted by iconv -f LATIN1 -t UTF-8."
        ) from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if lines == [""]:
        raise UserError(f"{where} is empty. {RIGHT}.")
    seen: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        wrong = ""
        if not name:
            wrong = f"an empty line ({number:,})"
        elif "\r" in name:
            wrong = f"a carriage return within line {number:,}"
        elif seen.setdefault(name, number) != number:
            wrong = f"{name!r} twice (lines {seen[name]:,} and {number:,})"
        if wrong:
            raise UserError(f"{where} has {wrong}. {RIGHT}, each name once.")
    return tuple(lines)


def as_lines(names: tuple[str, ...]) -> bytes:
    """A classes file. Raises UserError for names that would not be read back as they are."""
    try:
        raw = "".join(f"{name}\n" for name in names).encode()
        same = lines_of(raw, "") == names
    except (UnicodeEncodeError, UserError):
        same = False
    if not same:
        bad = next((name for name in names if not _is_line(name)), names[0])
        raise UserError(
            f"The class {bad!r} cannot be a line of {CLASSES_FILE}: it is empty, has a line break "
            "or a zero byte, begins with a byte-order mark, or is not UTF-8. Rename the class."
        )
    return raw


def _is_line(name: str) -> bool:
    """Whether a name can be a line; a file's name need not be UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return bool(name) and not set(name) & {"\n", "\r", "\0"}


def hash_of(names: tuple[str, ...]) -> str:
    """SHA-256 (hex) of class names in their order."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _converted(data: Path) -> str:
    """The hash of the class names in DATA's convert.json; "" if there is none."""
    try:
        about = json.loads(read_regular(data / ABOUT_FILE, LARGEST))
        return str(about["data"]["train"]["classes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _other_format(names: tuple[str, ...]) -> str:
    """What a file with these lines is, if it is not one class name a line."""
    first, last = names[0].strip(), names[-1].strip()
    shown = f"({first[:60]!r} is the first line)"
    pair = first[:1] + last[-1:]
    if pair in ("[]", "{}") and (len(names) == 1 or first[-1:] != last[-1:] or pair == "{}"):
        what = "a list" if pair == "[]" else "a dictionary"
        return f"is {what} in JSON or Python {shown}; write its names one a line."
    if re.search(r"[\[({]$", first) and re.match(r"[\])}]", last):
        return f"is a list in a program {shown}; write its names one a line."
    if re.match(r"<(!doctype|html|\?xml)", first, re.I):
        return f"is a web page or XML {shown}; download the file itself."
    if re.match(r"(#|//)\s", first):
        return f"begins with a comment {shown}; remove it."
    if all(re.match(r"-\s+\S", name) for name in names):
        return f"is a YAML list {shown}; remove the dashes: sed 's/^- *//'."
    if all(re.fullmatch(r"""(["']).*\1,?""", name.strip()) for name in names):
        return f"has quotes around its names {shown}; remove them."
    numbered = _numbered(names)
    if numbered:
        return f"{numbered} {shown}."
    if all(re.match(r"n\d{8}[\s,:;|]+\S", name) for name in names):
        return (
            f"has ImageNet's class numbers and names {shown}; keep what the class folders or "
            "labels are called, such as the numbers alone: cut -c1-9."
        )
    return _table(names) or _spaces(names)


def _table(names: tuple[str, ...]) -> str:
    """What a table with several columns, or with a header, is."""
    first = names[0]
    cells = [
        re.sub(r"[\s_-]+", " ", cell.strip(" \"'")).lower() for cell in re.split("[,;\t|]", first)
    ]
    shown = f"({first[:60]!r} is the first line)"
    if len(names) > 1 and all(cells) and set(cells) <= HEADERS:
        return f"is a table with a header {shown}; keep the column of names, without the header."
    if len(cells) > 1 and set(cells) & HEADERS:
        return f"is a table with a header {shown}; keep the column of names, without the header."
    for mark, name in (("\t", "tabs"), (";", "semicolons"), ("|", "bars"), (",", "commas")):
        counts = {line.count(mark) for line in names}
        spaced = mark == "," and any(", " in line for line in names)
        if len(names) > 1 and len(counts) == 1 and counts != {0} and not spaced:
            return f"is a table: {name} part each line {shown}; keep the column of names: cut."
    return ""


def _spaces(names: tuple[str, ...]) -> str:
    """Which line has spaces around its name: they would be part of it."""
    for number, name in enumerate(names, 1):
        if name != name.strip():
            return (
                f"has spaces or tabs around the name in line {number:,}, {name!r}: remove them "
                "(sed 's/^[[:space:]]*//; s/[[:space:]]*$//')."
            )
    return ""


def _numbered(names: tuple[str, ...]) -> str:
    """What lines are that have a label beside each name; "" if they have none.

    Names that differ in nothing but their number, such as `class 1` and `class 2`, are names.
    """
    shapes = (
        (r"\s*[\"']?(\d+)[\"']?\s*[\s:,;|=]\s*(\S.*)", "before", "sed -E 's/^ *[0-9]+[ :,;]+//'"),
        (
            r"\s*[\"']?(\S.*?)[\"']?\s*[\s:,;|=]\s*(\d+),?\s*",
            "after",
            "sed -E 's/[ :,;]+[0-9]+$//'",
        ),
    )
    for pattern, place, command in shapes:
        found = [re.fullmatch(pattern, name) for name in names]
        groups = [match.groups() for match in found if match]
        if len(groups) < len(names):
            continue
        texts, rests = zip(
            *(pair if place == "before" else pair[::-1] for pair in groups), strict=True
        )
        if any(len(text) > 9 for text in texts) or len(set(rests)) < len(names):
            continue
        numbers = list(map(int, texts))
        if sorted(numbers) in (list(range(len(names))), list(range(1, len(names) + 1))):
            order = "" if numbers == sorted(numbers) else "sort the lines by the label, and then "
            return f"has a label {place} each name; {order}remove the labels: {command}"
        if place == "before" and len(names) > 1 and numbers == sorted(set(numbers)):
            return f"has numbers {place} its names; remove them: {command}"
    return ""
