"""Images in tar archives, and in tars within a tar: where their bytes lie, without unpacking."""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_lbt.data.downloads.common import ODD_NAME, SAME_MEMBER, Samples, raise_all, what_is
from hvd_lbt.data.formats import Extents, Findings, shard_kind
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.extents import Window
from hvd_lbt.data.formats.findings import SUFFIXES, classify, is_litter
from hvd_lbt.data.formats.webdataset import LINKS, Member, members
from hvd_lbt.data.reading import open_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

WNID = re.compile(r"n\d{8}")


@contextmanager
def _opened(file: Path) -> Iterator[Window]:
    """A tar that is one by its first bytes. Raises UserError for what else it is."""
    try:
        kind = shard_kind(file)
        descriptor = open_regular(file)
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read ({error.strerror}).") from error
    try:
        if kind != "webdataset":
            raise UserError(f"{printable(file)} is no tar archive: {what_is(file)}.")
        yield Window(descriptor, file)
    finally:
        os.close(descriptor)


def classes_of_tars(file: Path, findings: Findings) -> list[tuple[str, int, int]]:
    """(WNID, first byte, length) of each tar in a tar of tars. Raises UserError for others."""
    extents = Extents(findings=findings)
    tars: dict[str, tuple[str, int, int]] = {}
    with _opened(file) as source:
        for member in _files(source, extents):
            name = os.path.basename(member.name)
            stem, ending = os.path.splitext(name)
            if is_litter(name):
                findings.add(found.HIDDEN, f"{file.name}:{member.name}")
                continue
            if ending.lower() != ".tar" or not WNID.fullmatch(stem):
                raise UserError(
                    f"{printable(file)} has {printable(member.name)} at byte {member.at:,}, where "
                    "ImageNet's training archive has one tar for each class, n01440764.tar and so "
                    "on: it is another archive."
                )
            if stem in tars:
                raise UserError(
                    f"{printable(file)} has {stem}.tar twice, at bytes {tars[stem][1]:,} and "
                    f"{member.offset:,}: it is damaged, or was added to. Download it again."
                )
            tars[stem] = (stem, member.offset, member.size)
    if not tars:
        raise UserError(f"{printable(file)} is an empty tar archive: download it again.")
    return sorted(tars.values())


def scan_tars(
    file: Path,
    tars: list[tuple[str, int, int]],
    label_of: dict[str, int],
    into: Samples,
    told: Callable[[int], None],
) -> None:
    """The images of each tar in the tar, under the label of its class; told: how many so far.

    Raises UserError that names the inner tar, if one is damaged or cut off.
    """
    errors = []
    with _opened(file) as outer:
        for wnid, first, size in tars:
            inner = Window(outer.descriptor, Path(f"{file}:{wnid}.tar"), first, size)
            try:
                for name, member in _images(inner, into):
                    if WNID.match(name) and not name.startswith(wnid):
                        into.findings.add(ODD_NAME, f"{wnid}/{name}")
                    into.add(label_of[wnid], os.fsencode(name), first + member.offset, member.size)
            except UserError as error:
                errors.append(str(error))
            told(len(into))
    raise_all(errors)


def scan_flat(file: Path) -> tuple[list[tuple[str, int, int]], Samples]:
    """(FILE, first byte, length) of each image of a tar without classes; what else was found."""
    into = Samples()
    with _opened(file) as source:
        images = [(name, its.offset, its.size) for name, its in _images(source, into)]
    return images, into


def _images(source: Window, into: Samples) -> Iterator[tuple[str, Member]]:
    """The images of one tar by FILE, each once; what is none is counted."""
    seen: dict[str, Member] = {}
    extents = Extents()
    for member in _files(source, extents):
        name = os.path.basename(member.name)
        if is_litter(name):
            into.findings.add(found.HIDDEN, f"{source.file.name}:{member.name}")
            continue
        if os.path.splitext(name)[1].lower() not in SUFFIXES:
            reason = classify(name, source.read(member.offset, min(member.size, 32)))
            if reason is not None:
                into.findings.add(reason, f"{source.file.name}:{member.name}")
                continue
        first = seen.setdefault(name, member)
        if first is member:
            yield name, member
        elif _digest(source, first) == _digest(source, member):
            into.findings.add(SAME_MEMBER, f"{source.file.name}:{member.name}")
        else:
            raise source.error(
                f"has {printable(name)} twice with different bytes, at bytes {first.offset:,} and "
                f"{member.offset:,}: which one is meant is not certain"
            )
    into.findings.merge(extents.findings)


def _files(source: Window, extents: Extents) -> Iterator[Member]:
    """The regular files of a tar. Raises UserError for a link: its bytes lie elsewhere."""
    for member in members(source, extents):
        if member.kind == tarfile.REGTYPE:
            yield member
        elif member.kind in LINKS:
            raise source.error(
                f"has the link {printable(member.name)} to {printable(member.link)} at byte "
                f"{member.at:,}, and the original archives have files only: download it again"
            )
        elif member.kind != tarfile.DIRTYPE:
            extents.findings.add(found.SPECIAL, f"{source.file.name}:{member.name}")


def _digest(source: Window, member: Member) -> bytes:
    return hashlib.sha256(source.read(member.offset, member.size)).digest()
