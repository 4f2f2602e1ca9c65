"""An image folder: one class folder with image files in it. No file with an image's ending is
opened.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.findings import SUFFIXES, Findings, Reason, classify, is_litter
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

MOST_FOLDERS = 1000  # below one class folder; more is no class but a link into a whole disk


@dataclass
class ClassFiles:
    """What one class folder holds.

    names: of its images, sorted. nested: the folders below it, in which there are no images.
    """

    names: list[bytes] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def __len__(self) -> int:
        return len(self.names)


def scan_class(folder: Path, into: ClassFiles) -> None:
    """The images of a class folder. A link that leads nowhere is one: reading it tells.

    Raises UserError for images in folders below it.
    """
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if os.path.splitext(name)[1].lower() in SUFFIXES and name[0] != "." and _is_file(entry):
                names.append(os.fsencode(name))
                continue
            reason = _reason(entry)
            if reason is None:
                names.append(os.fsencode(name))
            elif reason is not found.FOLDERS:
                into.findings.add(reason, name)
            elif entry.is_symlink():
                raise UserError(
                    f"{printable(entry.path)} is a link to a folder below a class folder: a split "
                    "is CLASS/FILE. Make it a class folder of its own, or remove it."
                )
            else:
                _walk(Path(entry.path), folder, into)
    into.names += sorted(names)


def _walk(folder: Path, top: Path, into: ClassFiles) -> None:
    """Look for images in a folder below a class folder; there should be none."""
    todo = [folder]
    while todo:
        folder = todo.pop()
        into.nested.append(str(folder.relative_to(top)))
        into.findings.add(found.FOLDERS, into.nested[-1])
        if len(into.nested) > MOST_FOLDERS:
            raise UserError(
                f"{printable(top)} has more than {MOST_FOLDERS:,} folders below it: it is no "
                "class folder. A split is CLASS/FILE."
            )
        with os.scandir(folder) as entries:
            for entry in entries:
                ending = os.path.splitext(entry.name)[1].lower()
                image = ending in SUFFIXES and entry.name[0] != "." and _is_file(entry)
                reason = None if image else _reason(entry)
                if reason is None or entry.is_symlink():
                    raise UserError(
                        f"{printable(entry.path)} lies in a folder below a class folder: a split "
                        f"is CLASS/FILE, so its class is not certain. Move it to {printable(top)}, "
                        "or make its folder a class."
                    )
                if reason is found.FOLDERS:
                    todo.append(Path(entry.path))
                else:
                    into.findings.add(reason, str(Path(entry.path).relative_to(top)))


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry with an image's ending is a file, or a broken link to one."""
    try:
        if entry.is_file():
            return True
    except OSError:  # a circle of links
        return True
    return entry.is_symlink() and not os.path.exists(entry.path)


def _reason(entry: os.DirEntry[str]) -> Reason | None:
    """Why an entry without an image's ending is no sample; None if it is one by its content."""
    name = entry.name
    if is_litter(name):
        return found.HIDDEN
    try:
        if entry.is_dir():
            return found.FOLDERS
        if not entry.is_file():
            broken = entry.is_symlink() and not os.path.exists(entry.path)
            return found.UNREADABLE if broken else found.SPECIAL
    except OSError:
        return found.UNREADABLE
    head = first_bytes(entry.path, 32)
    return found.UNREADABLE if head is None else classify(name, head)


def first_bytes(file: str | Path, count: int) -> bytes | None:
    """Up to `count` bytes of a regular file; None if it is none or must not be read. Never
    waits.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        return None
    try:
        return os.read(descriptor, count) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)
