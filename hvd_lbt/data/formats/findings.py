"""What lies in a split beside its samples: counted by reason, with a few names, and never
unsaid.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

# Endings of files that are taken for images unopened.
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".bmp", ".dib"}
SUFFIXES |= {".webp", ".tif", ".tiff"}
EXAMPLES = 5  # names kept of each kind of finding
# Folders and files that operating systems and storage servers leave behind (in lower case).
LITTER = {"__macosx", "@eadir", "@tmp", "@recycle", "@sharebin", "lost+found", "#recycle"}
LITTER |= {"#snapshot", "$recycle.bin", "system volume information", "recycler", "thumbs.db"}
LITTER |= {"ehthumbs.db", "desktop.ini", "__pycache__", "aquota.user", "aquota.group"}


class Reason(NamedTuple):
    """Why something is no sample: one such thing, several; and how a line about it begins.

    heading: `skipped` (not part of the data), `warning` (the data may not be what was meant) or
    `unused` (part of a sample or a shard that training does not need; nothing is wrong).
    """

    one: str
    many: str
    heading: str = "skipped"


NO_IMAGE = Reason("file that is no image", "files that are no images")
NO_SHARD = Reason("file that is no shard", "files that are no shards")
HIDDEN = Reason("hidden or system file", "hidden or system files")
SPECIAL = Reason("pipe, socket or device", "pipes, sockets or devices")
OTHER_FORMAT = Reason("image in a format that is not read", "images in formats that are not read")
OTHER_ENDING = Reason(
    "image with an ending that is no image's", "images with endings that are no image's"
)
UNREADABLE = Reason("file that must not be read", "files that must not be read")
FOLDERS = Reason("folder without images in a class", "folders without images in classes")
ORPHAN = Reason("label without an image", "labels without images")
SECOND_IMAGE = Reason("further image of a sample", "further images of samples")
FIELDS = Reason("file beside an image", "files beside images", "unused")
SIDE_FILES = Reason("file about the shards", "files about the shards", "unused")
EMPTY_CLASS = Reason(
    "class folder without images, which keeps its label",
    "class folders without images, which keep their labels",
    "warning",
)
ONE_CLASS = Reason("class for all images", "classes for all images", "warning")
NOT_USED = Reason("thing that belongs to no split", "things that belong to no split", "warning")
MISSING = Reason(
    "shard missing by the others' names", "shards missing by the others' names", "warning"
)
ODD_END = Reason(
    "tar with another number of zeros at its end than tar writes: a part may be lost",
    "tars with another number of zeros at their ends than tar writes: parts may be lost",
    "warning",
)
SAME_FILE = Reason(
    "shard that is another under a second name: its samples count twice",
    "shards that are others under a second name: their samples count twice",
    "warning",
)
NOT_LISTED = Reason(
    "shard with records that its .idx does not list",
    "shards with records that their .idx does not list",
    "warning",
)


@dataclass
class Findings:
    """Counts and first names by reason, and what is wrong, one message for each class or shard."""

    counts: dict[Reason, int] = field(default_factory=dict)
    names: dict[Reason, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, reason: Reason, name: str, count: int = 1) -> None:
        """Count something that is no sample."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.names.setdefault(reason, [])
        if len(kept) < EXAMPLES:
            kept.append(name)

    def merge(self, other: "Findings", prefix: str = "") -> None:
        """Add another's; `prefix` goes before its names."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            kept = self.names.setdefault(reason, [])
            kept += [prefix + name for name in other.names[reason]][: EXAMPLES - len(kept)]
        self.errors += other.errors

    def lines(self) -> list[str]:
        """One line for each reason: `skipped: 3 files that are no images (x, y, …)`."""
        return [
            f"{reason.heading}: {count:,} {reason.one if count == 1 else reason.many} "
            f"({', '.join(map(printable, self.names[reason]))}"
            f"{', …' if count > len(self.names[reason]) else ''})"
            for reason, count in self.counts.items()
        ]

    def questionable(self) -> bool:
        """Whether there is anything that is not plainly in order."""
        return bool(self.errors) or any(r.heading != "unused" for r in self.counts)

    def as_json(self) -> list[Any]:
        """For the index's file."""
        return [[*reason, count, self.names[reason]] for reason, count in self.counts.items()]

    @classmethod
    def of_json(cls, stored: Iterable[Any]) -> "Findings":
        """What `as_json` gave."""
        found = cls()
        for one, many, heading, count, names in stored:
            reason = Reason(one, many, heading)
            found.counts[reason], found.names[reason] = count, names
        return found


class SplitError(UserError):
    """A split with something damaged or ambiguous in it; `findings` has all that was found."""

    def __init__(self, findings: Findings, data: str):
        self.findings = findings
        first, *more = findings.errors
        text = (
            f" ({len(more):,} more errors: `hvd_lbt data check {data}` lists them)" if more else ""
        )
        super().__init__(first + text)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system."""
    return (name[:1] == "." and name != "..") or name.lower() in LITTER


def picture_of(head: bytes) -> str:
    """The image format that these first 32 bytes of a file show, "" for none."""
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    for magic, at, name in OTHER_PICTURES:
        if head[at : at + len(magic)] == magic:
            return name
    return ""


BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}
READ = {"JPEG", "PNG", "WEBP", "BMP"}  # of a file with another ending; a TIFF may be a raw photo
OTHER_PICTURES = (
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"GIF8", 0, "GIF"),
    (b"ftypavif", 4, "AVIF"),
    (b"ftyphei", 4, "HEIC"),
    (b"ftypmif1", 4, "HEIC"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"\0\0\0\x0cJXL ", 0, "JPEG XL"),
    (b"\0\0\0\x0cjP  ", 0, "JPEG 2000"),
    (b"8BPS", 0, "PSD"),
)


def classify(name: str, head: bytes) -> Reason | None:
    """None if a file with an ending that is not in SUFFIXES is a sample by its content, else why
    not.

    Only a file without an ending is one: `1.jpg~` and `1.jpg.part` are copies of others.
    """
    picture = picture_of(head)
    if picture in READ:
        return OTHER_ENDING if os.path.splitext(name)[1] or name.endswith("~") else None
    return OTHER_FORMAT if picture else NO_IMAGE
