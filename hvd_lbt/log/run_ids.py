"""RUN/loggers.json: the id of the run at each logger, so that a resume continues the same run."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

from hvd_lbt.errors import one_line
from hvd_lbt.whole_file import write_whole

FILE = "loggers.json"


class RunIds:
    """The ids that are kept in a run's folder. say(text): prints a line for the user."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._file, self._say, self._lock = folder / FILE, say, threading.Lock()
        self._ids = self._read()

    def of(self, logger: str) -> str | None:
        """The id at this logger; None if this run has not been logged there."""
        return self._ids.get(logger)

    def keep(self, logger: str, run_id: str) -> None:
        """Write the id down, whole or not at all; if that fails it is said."""
        with self._lock:
            if self._ids.get(logger) == run_id:
                return
            self._ids[logger] = run_id
            try:
                write_whole(self._file, json.dumps(self._ids, indent=1))
            except OSError as error:
                self._say(
                    f"{self._file} cannot be written ({error.strerror}): after a resume {logger} "
                    f"will show another run than {run_id}."
                )

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            found, reason = None, one_line(error, 200)
        else:
            reason = "it is no list of names and ids"
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
        self._say(f"{self._file} cannot be used ({reason}): loggers begin new runs.")
        return {}
