"""Types of command-line arguments, which name what would be right, and what commands share."""

from argparse import ArgumentParser, ArgumentTypeError
from math import inf

LARGEST = 10**9
MOST_THREADS = 1024


def count(text: str) -> int:
    """A whole number from 1 to LARGEST."""
    return _whole(text, 1)


def threads(text: str) -> int:
    """A number of threads or processes: from 1 to MOST_THREADS."""
    value = _whole(text, 1)
    if value > MOST_THREADS:
        raise ArgumentTypeError(f"{text} is not allowed; it must be at most {MOST_THREADS}")
    return value


def count_or_zero(text: str) -> int:
    """A whole number from 0 to LARGEST."""
    return _whole(text, 0)


def positive(text: str) -> float:
    """A number above 0, at most LARGEST."""
    try:
        value = float(text)
    except ValueError:
        value = -inf
    if not 0 < value <= LARGEST:
        raise ArgumentTypeError(f"{text[:40]} is not allowed; it must be a number above 0")
    return value


def add_take_over(parser: ArgumentParser) -> None:
    """Of a command that owns its --out (`run_lock`)."""
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take --out from an owner that cannot be proven gone, because you know that it is",
    )


def _whole(text: str, smallest: int) -> int:
    try:
        value = int(text) if len(text) < 40 else -1
    except ValueError:
        value = -1
    if not smallest <= value <= LARGEST:
        raise ArgumentTypeError(
            f"{text[:40]} is not allowed; it must be a whole number of at least {smallest}"
        )
    return value
