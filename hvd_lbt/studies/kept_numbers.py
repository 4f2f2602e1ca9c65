"""The numbers of a study that is no set of trainings: kept in a file, and used again if they are
those of the same settings.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvd_lbt.errors import UserError
from hvd_lbt.plain_yaml import read_text
from hvd_lbt.whole_file import write_whole

MAX_BYTES = 16 * 2**20


def kept_or_measured(
    file: Path,
    settings: dict[str, Any],
    measure: Callable[[], dict[str, Any]],
    written: Callable[[dict[str, Any]], str],
    *,
    redraw: bool = False,
) -> dict[str, Any]:
    """What `file` holds, if its `settings` are these; else what `measure` gives, written there.

    measure: its result has `settings`; written: its JSON; redraw: measure nothing. Raises UserError
    for another file, and if there is something to measure with redraw.
    """
    if _settings_in(file) != settings:
        if redraw:
            what = "has numbers of other settings" if file.exists() else "does not exist"
            raise UserError(
                f"--redraw: {file} {what}. Run the study without --redraw, or give another --out."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, written(measure()))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _settings_in(file: Path) -> Any:
    """The settings of earlier numbers, None if there are none."""
    if not file.exists():
        return None
    try:
        return json.loads(read_text(file, str(file), MAX_BYTES))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} does not hold the numbers of this study ({type(error).__name__}: "
            f"{str(error)[:80]}): remove it, or give another --out."
        ) from error
