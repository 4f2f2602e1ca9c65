"""Files of a run's log: what the disk refuses is kept in memory and written when there is space.

A checkpoint that cannot be written ends the training, since work would be lost. A record of
metrics.jsonl or TensorBoard does not: it waits here, up to KEPT_BYTES, and what is dropped then is
counted.
"""

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from hvd_lbt.errors import UserError

KEPT_BYTES = 64 << 20  # about 100,000 updates of metrics.jsonl


class AppendFile:
    """A file to whose end records are appended, each whole and once, in their order.

    say(text): prints a line for the user. Raises UserError if the file cannot be opened.
    """

    def __init__(self, file: Path, say: Callable[[str], None]):
        self._file, self._say = file, say
        self._records: deque[bytes] = deque()  # the first may be written in part
        self._bytes = self._late = self._lost = 0
        self._begun = False
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists() and not file.is_file():
                raise UserError(f"{file} is not a regular file. Remove it, then start again.")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(file, flags, 0o666)
        except OSError as error:
            raise UserError(
                f"{error.filename or file} cannot be written ({error.strerror}). Free space or "
                "correct it, then start again with --resume."
            ) from error

    def ends_with(self, last: bytes) -> bool:
        """Whether the file is empty or ends so."""
        size = os.fstat(self._descriptor).st_size
        return not size or os.pread(self._descriptor, len(last), size - len(last)) == last

    def append(self, record: bytes) -> None:
        """Note a record; `flush` writes it."""
        self._records.append(record)
        self._bytes += len(record)
        while self._bytes > KEPT_BYTES and len(self._records) > 1 + self._begun:
            dropped = self._records[self._begun]
            del self._records[self._begun]
            self._bytes -= len(dropped)
            self._lost += 1

    def flush(self) -> None:
        """Write what can be written; what cannot is said once, and kept."""
        try:
            while self._records:
                record = self._records[0]
                written = os.write(self._descriptor, record)
                self._bytes -= written
                self._begun = written < len(record)
                if self._begun:
                    self._records[0] = record[written:]
                else:
                    self._records.popleft()
        except OSError as error:
            if not self._late:
                self._say(
                    f"{self._file} cannot be written ({error.strerror}). Training continues, and "
                    "its records are kept in memory until there is space."
                )
            self._late = max(self._late, len(self._records))
            return
        if self._late:
            lost = f", {self._lost:,} were dropped" if self._lost else ""
            self._say(f"{self._file} is written again: {self._late:,} records came late{lost}.")
            self._late = self._lost = 0

    def close(self) -> None:
        """Write what is left; records that are lost by now are counted and said."""
        if self._descriptor < 0:
            return
        self.flush()
        missing = len(self._records) + self._lost
        if missing:
            self._say(f"{self._file} lacks {missing:,} records that could not be written.")
        os.close(self._descriptor)
        self._descriptor = -1
