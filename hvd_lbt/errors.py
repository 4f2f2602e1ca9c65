"""The one kind of error a user can cause and mend."""


class UserError(ValueError):
    """Bad input: one paragraph that names the setting or the file, and says what would be right."""
