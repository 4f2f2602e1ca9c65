"""Write a file whole or not at all, whoever reads it meanwhile and whenever it is killed."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Give `file` this content (text as UTF-8), on the disk, at once. Raises OSError; `file` is as
    before then.

    Several processes may do so at the same time: the content of one of them is there.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with scratch.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, file)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
        raise
