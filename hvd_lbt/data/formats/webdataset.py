"""WebDataset: samples in tar files. A sample's members share the path up to the name's first dot.

Specifications: POSIX pax and ustar, GNU tar's manual ("Basic Tar Format"), webdataset's README.
The whole shard is read before its members are joined by key, so they need not be neighbours.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.extents import Extents, LabelError, Window, class_label
from hvd_lbt.data.formats.findings import SUFFIXES, classify, is_litter
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

BLOCK = 512
RECORD = 20 * BLOCK  # most writers fill the file up with zeros to a multiple of this
LONGEST_HEADER = 1 << 20  # bytes of an extended header: names
CHUNK = 1 << 20
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
NO_DATA = (*LINKS, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
REPACK = "pack the files anew: `tar cf NEW.tar -C FOLDER .`"


class Member(NamedTuple):
    """An entry of a tar. kind: tar's type, REGTYPE for every regular file. at: of its header."""

    name: str
    kind: bytes
    at: int
    offset: int
    size: int
    link: str = ""


def scan_webdataset(file: Path, extents: Extents) -> None:
    """Samples of a tar file; the label is in KEY.cls, or, if no image has one, the folder's
    name.
    """
    with file.open("rb") as stream:
        source = Window(stream.fileno(), file)
        shard, links = _Shard(source, extents), []
        for member in members(source, extents):
            if member.kind == tarfile.REGTYPE:
                shard.add(member)
            elif member.kind in LINKS:
                links.append(member)
            elif member.kind != tarfile.DIRTYPE:
                extents.findings.add(found.SPECIAL, member.name)
        for member in _resolved(source, [link for link in links if not _is_litter(link.name)]):
            shard.add(member)
        for link in links:
            if _is_litter(link.name):
                extents.findings.add(found.HIDDEN, link.name)
        shard.join(in_order=not links)


def _is_litter(path: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden or a system's."""
    folder, _, name = path.rpartition("/")
    return is_litter(name) or (folder != "" and _is_litter_folder(folder))


@lru_cache(maxsize=4096)
def _is_litter_folder(folder: str) -> bool:
    return any(map(is_litter, folder.split("/")))


class _Shard:
    """The members of one tar by key."""

    def __init__(self, source: Window, extents: Extents):
        self.source, self.extents = source, extents
        # By key: where the header is, where the bytes are, how many, and the name after the dot.
        self.images: dict[str, tuple[int, int, int, str]] = {}
        self.further: dict[str, list[tuple[int, int, int, str]]] = {}
        self.labels: dict[str, int | str] = {}
        self.without: dict[str, str] = {}  # key to name of files, while it has no image
        self.other_labels = ""

    def add(self, member: Member) -> None:
        """Take in a regular file."""
        path, _, at, offset, size, _ = member
        if _is_litter(path):
            self.extents.findings.add(found.HIDDEN, path)
            return
        folder, slash, name = path.rpartition("/")
        stem, _, suffix = name.partition(".")
        key = f"{folder}{slash}{stem}"
        ending = os.path.splitext(name)[1].lower()
        if suffix.lower() == "cls":
            self._label(key, path, offset, size)
            return
        if ending not in SUFFIXES:
            if ending == ".cls":
                self.other_labels = self.other_labels or path
            reason = classify(name, self.source.read(offset, min(size, 32)))
            if reason is not None:
                self._beside(key, path, reason)
                return
        image = (at, offset, size, suffix)
        if self.images.setdefault(key, image) is not image:
            self.further.setdefault(key, []).append(image)
        if self.without:
            self.without.pop(key, None)

    def _label(self, key: str, path: str, offset: int, size: int) -> None:
        if key in self.labels:
            raise self.error(f"has {path!r} a second time at byte {offset:,}: two labels")
        try:
            self.labels[key] = class_label(self.source.read(offset, min(size, 4000)))
        except LabelError as error:
            raise self.error(
                f"has the label {error.what} at byte {offset:,} ({printable(path)}): {error}"
            ) from None

    def _beside(self, key: str, path: str, reason: found.Reason) -> None:
        if reason is found.NO_IMAGE:
            # the key may get its image later; what stays without one is reported by `join`
            if key in self.images:
                self.extents.findings.add(found.FIELDS, path)
            elif key in self.without:
                self.extents.findings.add(found.NO_IMAGE, path)
            else:
                self.without[key] = path
        else:
            self.extents.findings.add(reason, path)

    def join(self, *, in_order: bool) -> None:
        """Put images and labels together."""
        findings = self.extents.findings
        for path in self.without.values():
            findings.add(found.NO_IMAGE, path)
        for key in self.labels.keys() - self.images.keys() if self.labels else ():
            findings.add(found.ORPHAN, f"{key}.cls")
        for key, others in self.further.items():
            self._choose(key, others)
        items = self.images.items()
        depth = -1
        for key, (_, offset, size, suffix) in (
            items if in_order else sorted(items, key=lambda item: item[1])
        ):
            label = self.labels.get(key)
            if label is None:
                label = self._folder(key, suffix)
                if depth not in (-1, key.count("/")):
                    raise self.error(
                        f"has images in folders and in folders below these ({key}.{suffix}): "
                        "which folder is the class? Give each image a .cls file, or one folder"
                    )
                depth = key.count("/")
            self.extents.add(offset, size, label)
        self.extents.labels_from = "cls files" if self.labels else "folders"

    def _choose(self, key: str, others: list[tuple[int, int, int, str]]) -> None:
        """Of several images the one whose ending follows the first dot, if it is the only one."""
        images = [self.images[key], *others]
        plain = [image for image in images if "." not in image[3]]
        if len(plain) != 1 or len({image[3] for image in images}) < len(images):
            names = ", ".join(f"{key}.{image[3]}" for image in images[:3])
            raise self.error(
                f"has {len(images)} images under one key, which ends at the name's first dot "
                f"({names}, byte {images[1][0]:,}): one sample has one image. Rename them"
            )
        self.images[key] = plain[0]
        for image in images:
            if image is not plain[0]:
                self.extents.findings.add(found.SECOND_IMAGE, f"{key}.{image[3]}")

    def _folder(self, key: str, suffix: str) -> str:
        folder = posixpath.basename(posixpath.dirname(key))
        if folder in ("", "..") or self.labels or self.other_labels:
            where = "its class's folder" if not self.labels else "KEY.cls as its other images have"
            raise self.error(
                f"has the image {printable(f'{key}.{suffix}')!r} without a label"
                + (f" (there is {self.other_labels!r})" if self.other_labels else "")
                + f": WebDataset has it in {printable(key)}.cls; or the image lies in a folder "
                f"with its class's name. Give it {where}; a tar for each class (ImageNet's own) "
                "is to be unpacked into a folder with the class's name"
            )
        return folder

    def error(self, what: str) -> UserError:
        """A UserError that begins with the shard's name."""
        return self.source.error(what)


def members(source: Window, extents: Extents) -> Iterator[Member]:
    """Every member of a tar, to its end marker. Raises UserError for whatever is damaged.

    Plain headers are read here, 5 times as fast as tarfile's TarInfo does it.
    """
    at, name, link, size = 0, "", "", -1  # from extended headers, for the next member
    extended_at = -1
    while True:
        if at + BLOCK > source.size:
            raise source.error(
                f"ends at byte {source.size:,} without tar's end marker, two blocks of zeros: it "
                f"is cut off, or its writer was not closed{_completed(source, 1024)}"
            )
        head = source.read(at, BLOCK)
        member = _plain(head, at) if extended_at < 0 else None
        if member is None:
            if not any(head):
                if extended_at >= 0:
                    raise source.error(f"is damaged: no member after its name at byte {at:,}")
                _end(source, at, extents)
                return
            member = _member(source, head, at)
            if member.kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
                values = _pax(source, member)
                if member.kind != tarfile.XGLTYPE:
                    name = _text(values.get(b"path", b"")) or name
                    link = _text(values.get(b"linkpath", b"")) or link
                    size = int(values.get(b"size", b"-1")) if size < 0 else size
                    extended_at = at
                at = _next(member)
                continue
            if member.kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = _text(_header_data(source, member).partition(b"\0")[0])
                if member.kind == tarfile.GNUTYPE_LONGNAME:
                    name = text
                else:
                    link = text
                extended_at, at = at, _next(member)
                continue
            member = member._replace(
                name=_clean(name) if name else member.name,
                link=link or member.link,
                size=size if size >= 0 and member.kind not in NO_DATA else member.size,
            )
            name, link, size, extended_at = "", "", -1, -1
        if member.offset + member.size > source.size:
            raise source.error(
                f"is cut off: {printable(member.name)!r} at byte {at:,} is not whole"
            )
        yield member
        at = _next(member)


def _plain(head: bytes, at: int) -> Member | None:
    """A regular file with a header that needs no interpretation; None for any other header."""
    if head[156:157] != b"0" or head[257:262] != b"ustar" or not head[124:135].isdigit():
        return None
    try:
        if sum(head[:148]) + sum(head[156:]) + 256 != int(head[148:154], 8):
            return None
        size = int(head[124:135], 8)
    except ValueError:
        return None
    name, prefix = (part.partition(b"\0")[0] for part in (head[:100], head[345:500]))
    if prefix and head[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    if not name or name[-1:] == b"/":
        return None
    text = name.decode("utf-8", "surrogateescape")
    if name[:1] in b"./" or b"/." in name or b"//" in name:
        text = _clean(text)
    return Member(text, tarfile.REGTYPE, at, at + BLOCK, size)


def _member(source: Window, head: bytes, at: int) -> Member:
    """Any other member."""
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise source.error(f"is damaged: no header of a member at byte {at:,} ({error})") from None
    kind = tarfile.REGTYPE if info.type in REGULAR else info.type
    if kind == tarfile.REGTYPE and head[:100].partition(b"\0")[0].endswith(b"/"):
        kind = tarfile.DIRTYPE  # as the oldest tars have them
    known = (
        tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"V", *NO_DATA,
    )  # fmt: skip
    if kind == tarfile.GNUTYPE_SPARSE:
        raise source.error(f"has the sparse member {info.name!r}: {REPACK}, without --sparse")
    if kind not in known or info.size < 0:
        raise source.error(
            f"has a member of the type {kind!r} with {info.size:,} bytes at byte {at:,} "
            f"({printable(info.name)!r}), which is not supported: {REPACK}"
        )
    size = 0 if kind in NO_DATA or kind == b"V" else info.size
    kind = tarfile.DIRTYPE if kind == b"V" else kind  # a volume's label
    return Member(_clean(info.name), kind, at, at + BLOCK, size, info.linkname)


def _next(member: Member) -> int:
    return member.offset + member.size + -member.size % BLOCK


def _header_data(source: Window, member: Member) -> bytes:
    if member.size > LONGEST_HEADER:
        raise source.error(f"is damaged: a header of {member.size:,} bytes at {member.at:,}")
    return source.read(member.offset, member.size)


def _pax(source: Window, member: Member) -> dict[bytes, bytes]:
    """The records of an extended header: `LENGTH KEY=VALUE\\n`."""
    data, values, at = _header_data(source, member), {}, 0
    while at < len(data) and data[at]:
        digits = data[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else -1
        key, equal, value = data[at + len(digits) + 1 : max(end, 0)].partition(b"=")
        if not at < end <= len(data) or not equal or value[-1:] != b"\n":
            raise source.error(f"is damaged: no pax header at byte {member.offset + at:,}")
        values[key], at = value[:-1], end
    if any(key.startswith(b"GNU.sparse") for key in values):
        raise source.error(f"has a sparse member at byte {member.at:,}: {REPACK}, without --sparse")
    if not values.get(b"size", b"0").isdigit() or len(values.get(b"size", b"")) > 18:
        raise source.error(f"is damaged: no size in the pax header at byte {member.offset:,}")
    if member.kind == tarfile.XGLTYPE and values.keys() & {b"path", b"linkpath", b"size"}:
        raise source.error(f"has one name or size for all members at byte {member.at:,}: {REPACK}")
    return values


def _end(source: Window, at: int, extents: Extents) -> None:
    """Compare what follows from the first block of zeros on with an end marker: all is zero.

    It has two blocks, or as many more as make the file a multiple of RECORD.
    """
    if at + 2 * BLOCK > source.size:
        raise source.error(
            f"has half of tar's end marker at byte {at:,}: it is cut off{_completed(source, 512)}"
        )
    place = at
    while place < source.size:
        data = source.read(place, min(CHUNK, source.size - place))
        if data.count(0) < len(data):
            place += len(data) - len(data.lstrip(b"\0"))
            raise source.error(
                f"has zeros at byte {at:,}, where tar ends, and further data at byte {place:,}: it "
                "is damaged, or tar files were joined with cat. Unpack each and "
                f"{REPACK}; tar files are joined with `tar -Af A.tar B.tar`"
            )
        place += len(data)
    zeros = source.size - at
    extents.unpadded = source.size % RECORD != 0
    if zeros > 2 * BLOCK and (source.size % RECORD or zeros > RECORD + BLOCK):
        extents.findings.add(found.ODD_END, f"{source.file.name}, {zeros:,} zeros")


def _completed(source: Window, count: int) -> str:
    """How to add zeros to a tar that is whole but for its end; a tar within a tar cannot grow."""
    if source.within:
        return ": download the archive again"
    return f". If it is whole, add zeros: `head -c {count} /dev/zero >> {source.file.name}`"


def _resolved(source: Window, links: list[Member]) -> Iterator[Member]:
    """The links as if each were a file with its target's bytes, which must lie in the same
    shard.
    """
    targets = {}
    for link in links:
        folder = posixpath.dirname(link.name) if link.kind == tarfile.SYMTYPE else ""
        targets[link.name] = _clean(posixpath.join(folder, link.link))
    wanted = set(targets.values()) - targets.keys()
    files = {}
    if wanted:
        for member in members(source, Extents()):
            if member.name in wanted and member.kind == tarfile.REGTYPE:
                files[member.name] = member
    for link in links:
        name, seen = link.name, set()
        while name in targets and name not in seen:
            seen.add(name)
            name = targets[name]
        if name not in files:
            raise source.error(
                f"has the link {printable(link.name)!r} to {printable(link.link)!r}, which is no "
                f"file in this tar (byte {link.at:,}). Pack the files themselves: `tar chf`"
            )
        yield link._replace(kind=tarfile.REGTYPE, offset=files[name].offset, size=files[name].size)


def _clean(name: str) -> str:
    """The path without `./`, doubled and leading slashes."""
    path = posixpath.normpath(name).lstrip("/")
    return "" if path == "." else path


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
