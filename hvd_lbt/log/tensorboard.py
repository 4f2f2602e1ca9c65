"""RUN/tensorboard: the scalars of a run as TensorBoard reads them."""

import io
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from hvd_lbt.append_file import AppendFile


class EventFile:
    """TensorBoard's scalars, as SummaryWriter writes them, in a file that outlasts a full disk.

    SummaryWriter's own thread ends with a traceback when the disk is full, and then the training.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        self._file = AppendFile(folder / name, say)
        self._add(Event(file_version="brain.Event:2"))
        # what an earlier part of the run wrote for these steps is hidden
        self._add(Event(step=purge_step, file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._file.flush()
        self.flush, self.close = self._file.flush, self._file.close

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Note a value; `flush` writes it."""
        self._add(Event(step=step, summary=scalar(tag, value)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.append(framed.getvalue())
