"""Write a small file whole or not at all, whoever reads it meanwhile and whenever it is killed."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Give `file` this text, on the disk, at once. Raises OSError; `file` is as before then.

    Several processes may do so at the same time: one of their texts is there.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, file)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
        raise
