"""Run a reader of others' files in a process of its own, which a damaged file may end.

scipy's reader of MATLAB files and Arrow's of Parquet are native code: some damaged files end their
process by a signal (found by flipping random bytes), and no exception can be caught then.
"""

import subprocess
import sys
from pathlib import Path

from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

SECONDS = 600.0  # for all files; a child that takes longer hangs


def run_apart(program: str, data: bytes, file: Path) -> bytes:
    """The standard output of a Python program that gets `data` on its standard input.

    Raises UserError naming `file`, or the last line that the program printed on its standard error,
    if a signal ended the program. Its exceptions are no concern: the caller meets them again.
    """
    command = [sys.executable, "-P", "-c", program]
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{printable(file)} was not read within {SECONDS:g} s.") from error
    if done.returncode < 0:
        lines = [line for line in done.stderr.split(b"\n") if line.startswith(b"FILE ")]
        name = lines[-1][5:].decode("utf-8", "surrogateescape") if lines else file
        raise UserError(
            f"{printable(name)} is damaged: its reader ended with signal {-done.returncode}. "
            "Download it again."
        )
    return done.stdout
