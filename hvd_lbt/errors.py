"""The errors a user can cause and fix."""

from collections.abc import Mapping


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
