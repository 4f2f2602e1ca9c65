"""What the program writes to a terminal: text that it does not obey, tables of one width."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 140  # columns where the output is not a terminal


def printable(text: object) -> str:
    """`text` with each character that a terminal obeys or hides as an escape: \\x1b, \\n, \\u202e.

    For names, paths and messages that come from files or users: they stay on one line.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def console(*, stderr: bool = False, live: bool | None = None) -> "Console":
    """A rich console that takes text as it is: no markup, no emoji codes.

    live: whether it is a terminal [found out]; without one lines are WIDTH columns wide.
    """
    from rich.console import Console  # not for --help

    if live is None:
        live = (sys.stderr if stderr else sys.stdout).isatty()
    if live:
        return Console(stderr=stderr, markup=False, emoji=False)
    return Console(stderr=stderr, markup=False, emoji=False, width=WIDTH, force_terminal=False)


def say(console: "Console", text: str) -> None:
    """Print a line with names in it, as long as it is."""
    console.print(printable(text), highlight=False, soft_wrap=True)


def description(text: str) -> str:
    """What a progress bar calls its work: its columns read markup whatever the console does."""
    from rich.markup import escape

    return escape(printable(text))


def escape_what_cannot_be_encoded() -> None:
    """Make output in another encoding than the text's an escape, not an exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Send what is still to be written nowhere: its reader, such as `head`, is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
