"""A few small files out of an archive (tar, tar.gz), in memory, and never more than allowed."""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

from hvd_lbt.data.downloads.common import what_is
from hvd_lbt.data.formats.folder import first_bytes
from hvd_lbt.data.reading import open_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable


class _Bounded(io.RawIOBase):
    """A stream that fails after `limit` bytes: headers and members together."""

    def __init__(self, stream: io.BufferedIOBase, limit: int, error: UserError):
        self._stream, self._left, self._error = stream, limit, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        buffer[: len(data)] = data
        return len(data)


def read_packed(archive: Path, wanted: Collection[str], limit: int, what: str) -> dict[str, bytes]:
    """The bytes of the members whose file names are wanted, whatever folder they lie in.

    limit: bytes of the unpacked archive. what: it should be. Raises UserError for an archive that
    is damaged or larger, and for a member that is missing, twice there, or no regular file.
    """
    files: dict[str, bytes] = {}
    larger = UserError(
        f"{printable(archive)} unpacks to more than {limit >> 20:,} MB: it is not {what}."
    )
    try:
        packed = (first_bytes(archive, 2) or b"") == b"\x1f\x8b"
        with open(open_regular(archive), "rb") as file:
            inner = gzip.GzipFile(fileobj=file) if packed else file
            bounded = io.BufferedReader(_Bounded(inner, limit, larger), 1 << 16)
            with tarfile.open(fileobj=bounded, mode="r|") as stream:
                for member in stream:
                    name = os.path.basename(member.name)
                    if name not in wanted or member.isdir():
                        continue
                    if name in files or not member.isreg():
                        how = "twice" if name in files else "as a link or a device"
                        raise UserError(
                            f"{printable(archive)} has {name} {how}: download it again."
                        )
                    data = stream.extractfile(member)
                    assert data is not None
                    files[name] = data.read()
            while bounded.read(1 << 20):  # to the end: gzip's checksum is compared there
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{printable(archive)} is no whole archive ({error}): {what_is(archive)}."
        ) from error
    if missing := [name for name in wanted if name not in files]:
        raise UserError(
            f"{printable(archive)} has no {', '.join(missing)}: it is not {what}, or it is cut "
            "off. Download it again."
        )
    return files
