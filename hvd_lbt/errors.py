"""The errors a user can cause and fix, and how they show values and names."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_SHOWN = 60  # characters


class UserError(ValueError):
    """Bad input: one paragraph that names the setting or the file, and says what would be right."""


class RenamedWarning(FutureWarning):
    """An old name was used, which works for one more release."""


class SampleError(UserError):
    """A sample that cannot be read or decoded; only the rank that met it knows."""


class BadUpdatesError(UserError):
    """Too many updates in a row had gradients that are not finite."""


class OutOfMemoryError(UserError):
    """A rank ran out of memory, and all ranks dropped the same update or evaluation.

    ranks: where each of these ranks ran out of memory, by rank. who: the first of them in words.
    own: the error that this rank met, in one line; "" on the others.
    """

    def __init__(self, ranks: Mapping[int, str], message: str, own: str = ""):
        self.ranks, self.own = dict(ranks), own
        shown = [f"rank {rank} in {place}" for rank, place in [*ranks.items()][:4]]
        more = f" and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
        self.who = f"Out of memory: {', '.join(shown)}{more}"
        super().__init__(f"{self.who}. {message}")


class ReadError(SampleError):
    """The storage failed, not the sample: never skipped."""


class CheckpointError(UserError):
    """A checkpoint could not be written: the storage is full, or fails."""


def shortened(text: str) -> str:
    """`text`, its end left out if it is long."""
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def shown(value: Any) -> str:
    """A value as Python writes it, shortened."""
    return shortened(repr(value))


def one_line(error: BaseException, longest: int = 300) -> str:
    """What an error says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:longest]


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` Did you mean NAME?` if one of the allowed names is much like `word`, else nothing."""
    close = difflib.get_close_matches(word[:LONGEST_SHOWN], list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""
