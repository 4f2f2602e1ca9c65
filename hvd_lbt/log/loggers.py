"""Where a run's scalars go beside metrics.jsonl: TensorBoard, MLflow, W&B, and loggers of your own.

`run.loggers` names them. Only rank 0 logs. A logger is made when the run starts, where whatever is
wrong with it is an error; from then on it works in a thread of its own, and what fails there is
counted and said, and never stops the training.
"""

import importlib
import importlib.util
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hvd_lbt.errors import UserError, one_line
from hvd_lbt.log.run_ids import RunIds
from hvd_lbt.log.tensorboard import EventFile
from hvd_lbt.own import is_object_name, load_object

KEPT = 100_000  # records that wait for a logger that fails; the oldest are dropped beyond that
RETRY_SECONDS = 60.0  # between two tries, at most
CLOSE_SECONDS = 20.0  # for what is left at the end: a preempted job has not much time
# Our own, and the packages that they need; each is also the name of an extra.
BUILT_IN = {
    "mlflow": ("hvd_lbt.log.mlflow_logger:MLflowLogger", ("mlflow", "sqlalchemy", "alembic")),
    "wandb": ("hvd_lbt.log.wandb_logger:WandbLogger", ("wandb",)),
}


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a logger is told of the run when it is made.

    recipe: all settings, as plain dictionaries. run_id: what `begin` gave when an earlier part of
    this run was logged; None for a new run. first_update: the first that is trained now.
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    run_id: str | None
    first_update: int


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """Named numbers of one update. update: from 0; of an evaluation, the updates done before it.

    time: seconds since 1970.
    """

    update: int
    values: Mapping[str, float]
    time: float


class Logger(Protocol):
    """What a class named in `run.loggers` must have. It is called from one thread, on rank 0.

    The constructor is called when the run starts, before any update: it may raise UserError, and
    must not wait for a server. If one of the others raises, the training goes on: `begin` and `log`
    are called again later with the same records and newer ones.
    """

    def __init__(self, run: RunInfo) -> None: ...

    def begin(self) -> str | None:
        """Begin the run, or continue the one of `RunInfo.run_id`; its id, to be kept."""

    def log(self, records: Sequence[Scalars]) -> None:
        """Log all of these."""

    def close(self, reason: str) -> None:
        """End the run: `finished`, `stopped` by a signal (it may be resumed), or `interrupted`
        (this process goes on with it soon, as elastic workers do).
        """


class Output(Protocol):
    """What the run's log writes scalars to."""

    def add(self, record: Scalars) -> None: ...
    def flush(self) -> None: ...
    def close(self, reason: str) -> None: ...


class TensorBoard:
    """RUN/tensorboard. It needs no thread: its file keeps what a full disk refuses."""

    def __init__(self, folder: Path, first_update: int, say: Callable[[str], None]):
        self._file = EventFile(folder / "tensorboard", first_update, say)

    def add(self, record: Scalars) -> None:
        """Note a record."""
        for tag, value in record.values.items():
            self._file.add_scalar(tag, value, record.update)

    def flush(self) -> None:
        """Write what was noted."""
        self._file.flush()

    def close(self, reason: str) -> None:
        """Write what is left."""
        self._file.close()


class Sender:
    """One logger in a thread of its own.

    say(text): prints a line for the user. keep(run_id): notes the id for a resume.
    """

    def __init__(
        self,
        name: str,
        logger: Logger,
        say: Callable[[str], None],
        keep: Callable[[str], None] = lambda run_id: None,
    ):
        self._name, self._logger, self._say, self._keep = name, logger, say, keep
        self._waiting: list[Scalars] = []
        self._changed = threading.Condition()
        self._begun = self._failing = False
        self._reason = ""  # of the end; empty before it
        self._dropped = self._failures = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"logger {name}")
        self._thread.start()

    def add(self, record: Scalars) -> None:
        """Note a record."""
        with self._changed:
            self._waiting.append(record)
            if len(self._waiting) > KEPT:
                del self._waiting[0]
                self._dropped += 1

    def flush(self) -> None:
        """Let the thread send what was noted; does not wait for it."""
        with self._changed:
            self._changed.notify()

    def close(self, reason: str) -> None:
        """Send what is left, waiting CLOSE_SECONDS at most, and say how much is missing."""
        with self._changed:
            if self._reason:
                return
            self._reason = reason
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        with self._changed:
            missing = len(self._waiting) + self._dropped
        if self._thread.is_alive():
            self._say(
                f"{self._name} is not done after {CLOSE_SECONDS:.0f} s and is left: {missing:,} "
                "records or more are missing there. metrics.jsonl has all."
            )
        elif missing:
            self._say(f"{self._name} lacks {missing:,} records; metrics.jsonl has all.")

    def _run(self) -> None:
        pause = 1.0
        while not self._reason:
            pause = 1.0 if self._try(self._send) else min(2 * pause, RETRY_SECONDS)
            with self._changed:
                if self._failing:
                    self._changed.wait_for(lambda: self._reason, pause)
                else:
                    self._changed.wait_for(lambda: self._reason or self._waiting)
        self._try(self._send)
        if self._begun:
            self._try(lambda: self._logger.close(self._reason))

    def _send(self) -> None:
        """Begin, and send what waits; it is taken out when it is sent."""
        if not self._begun:
            if run_id := self._logger.begin():
                self._keep(run_id)
            self._begun = True
        with self._changed:
            records = list(self._waiting)
            dropped = self._dropped
        if records:
            self._logger.log(records)
            with self._changed:
                gone = self._dropped - dropped  # the oldest, while they were sent
                del self._waiting[: len(records) - gone]
                self._dropped -= gone

    def _try(self, action: Callable[[], None]) -> bool:
        """Whether it went well; the first failure of a row is said, and the end of the row."""
        try:
            action()
        except BaseException as error:  # whatever a logger does, the training goes on
            self._failures += 1
            if not self._failing:
                reason = one_line(error)
                self._say(
                    f"{self._name} failed ({type(error).__name__}: {reason}). Training continues; "
                    "what it did not take is kept and tried again."
                )
            self._failing = True
            return False
        if self._failing:
            self._say(f"{self._name} works again after {self._failures:,} failures.")
        self._failing, self._failures = False, 0
        return True


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError for a logger that is not installed or not there, before anything is made."""
    for name in names:
        if name in BUILT_IN:
            missing = [
                package for package in BUILT_IN[name][1] if not importlib.util.find_spec(package)
            ]
            if missing:
                raise UserError(
                    f"run.loggers: {name} needs packages that are not installed "
                    f"({', '.join(missing)}). pip install 'hvd_lbt[{name}]', or leave it out."
                )
        elif is_object_name(name):
            load_object(name, "run.loggers")


def make_outputs(names: Sequence[str], run: RunInfo, say: Callable[[str], None]) -> list[Output]:
    """The outputs of `run.loggers`; raises UserError for one that cannot be made."""
    check_loggers(names)
    ids = RunIds(run.folder, say)
    outputs: list[Output] = []
    loggers: list[tuple[str, Logger]] = []
    for name in names:
        if name == "tensorboard":
            outputs.append(TensorBoard(run.folder, run.first_update, say))
            continue
        known = RunInfo(
            name=run.name,
            folder=run.folder,
            recipe=run.recipe,
            run_id=ids.of(name),
            first_update=run.first_update,
        )
        loggers.append((name, _make(name, known)))
    for name, logger in loggers:  # threads start when nothing can be wrong any more
        outputs.append(Sender(name, logger, say, partial(ids.keep, name)))
    return outputs


def _make(name: str, run: RunInfo) -> Logger:
    made_by = load_object(BUILT_IN[name][0] if name in BUILT_IN else name, "run.loggers")
    try:
        logger: Logger = made_by(run)
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)
        raise UserError(
            f"run.loggers: {name} cannot be made ({type(error).__name__}: {reason}). It is called "
            "with one argument, the RunInfo of hvd_lbt.log.loggers."
        ) from error
    lacks = [
        method
        for method in ("begin", "log", "close")
        if not callable(getattr(logger, method, None))
    ]
    if lacks:
        raise UserError(
            f"run.loggers: what {name} makes has no {' and no '.join(lacks)}; it must have "
            "begin(), log(records) and close(reason)."
        )
    return logger


def scalars(update: int, values: Mapping[str, float | None]) -> Scalars:
    """A record of the values that there are, with the present time."""
    known = {key: value for key, value in values.items() if value is not None}
    return Scalars(update=update, values=known, time=time.time())
