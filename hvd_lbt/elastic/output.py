"""`python output.py PREFIX`: print standard input, PREFIX before each line, until it ends.

A program of its own, on the standard library alone. If nobody reads what it prints any more, it
keeps reading, so that the worker which writes to it is not ended by a broken pipe.
"""

import os
import sys

LONGEST_LINE = 1 << 16


def write(data: bytes) -> None:
    """All of it, or as much as somebody takes."""
    while data:
        try:
            data = data[os.write(1, data) :]
        except OSError:
            return


def main(prefix: bytes) -> None:
    """Whole lines leave at once, so that those of several workers do not mix."""
    rest = b""
    while data := os.read(0, LONGEST_LINE):
        *lines, rest = (rest + data).split(b"\n")
        write(b"".join(prefix + line + b"\n" for line in lines))
        if len(rest) > LONGEST_LINE:
            write(prefix + rest + b"\n")
            rest = b""
    if rest:
        write(prefix + rest + b"\n")


if __name__ == "__main__":
    main(os.fsencode(sys.argv[1]))
