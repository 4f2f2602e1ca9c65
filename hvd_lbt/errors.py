"""The errors a user can cause and fix."""


class UserError(ValueError):
    """Bad input: one paragraph that names the setting or the file, and says what would be right."""


class RenamedWarning(FutureWarning):
    """An old name was used, which works for one more release."""


class SampleError(UserError):
    """A sample that cannot be read or decoded; only the rank that met it knows."""


class BadUpdatesError(UserError):
    """Too many updates in a row had gradients that are not finite."""


class ReadError(SampleError):
    """The storage failed, not the sample: never skipped."""


class CheckpointError(UserError):
    """A checkpoint could not be written: the storage is full, or fails."""
