"""Measure the cells of a study in several processes; what was measured is kept over a stop.

A cell is a dictionary of all settings that its numbers depend on, plain enough for JSON: cells of
other settings are measured anew. Its numbers are written, one line a cell,
as soon as they are known.
"""

import json
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from hvd_lbt.errors import UserError
from hvd_lbt.log.provenance import revision, versions
from hvd_lbt.plain_yaml import read_text
from hvd_lbt.studies.trainings import Stopped, compact_json
from hvd_lbt.whole_file import write_whole

Cell = dict[str, Any]
MAX_BYTES = 256 * 2**20  # of the file with what was measured


def kept_cells(
    out: Path,
    name: str,
    cells: Sequence[Cell] | None,
    measure: Callable[[Cell], dict[str, Any]],
    jobs: int,
) -> dict[str, Any]:
    """What OUT/NAME.json says after the missing cells were measured and it was written.

    jobs: see `measure_cells`; with 0 the file is read as it is. cells: None only then, where they
    follow from data that is not at hand. Raises UserError, Stopped.
    """
    file = out / f"{name}.json"
    if jobs and cells is not None:
        measured = measure_cells(cells, measure, out / name / "cells.jsonl", jobs)
        revisions = dict.fromkeys(cell.pop("revision", "unknown") for cell in measured)
        about = {"versions": versions(), "revision": ", ".join(revisions)}
        write_whole(file, compact_json({"cells": measured, **about}))
    what = f"{file}, the numbers of an earlier run,"
    if not file.exists():
        raise UserError(f"{file} is not there: run the study without --redraw.")
    try:
        found: dict[str, Any] = json.loads(read_text(file, what, MAX_BYTES))
        written = json.loads(compact_json({"cells": list(cells or [])}))["cells"]  # as JSON has it
        of_these = (
            cells is None
            or [
                {key: cell[key] for key in wanted}
                for cell, wanted in zip(found["cells"], written, strict=True)
            ]
            == written
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{what} cannot be read ({type(error).__name__}): train anew.") from error
    if not of_these:
        raise UserError(f"{what} are of other settings: run the study without --redraw.")
    return found


def find_cell(found: dict[str, Any], wanted: Cell) -> Cell:
    """The first cell of a study's numbers that has these settings."""
    cell: Cell = next(cell for cell in found["cells"] if wanted.items() <= cell.items())
    return cell


def measure_cells(
    cells: Sequence[Cell], measure: Callable[[Cell], dict[str, Any]], file: Path, jobs: int
) -> list[Cell]:
    """Each cell with its numbers, in order; `file` (JSON lines) keeps them as they come.

    measure: a function of a module, called in one of `jobs` processes of one thread each. Raises
    UserError if `file` cannot be read or written, Stopped after a signal.
    """
    known = _known(file)
    missing = [cell for cell in cells if _key(cell) not in known]
    print(f"{file.parent.name}: {len(cells)} cells, {len(cells) - len(missing)} of them are done.")
    if missing:
        _measure(missing, measure, file, jobs, known)
    return [{**cell, **known[_key(cell)]} for cell in cells]


def _measure(
    cells: Sequence[Cell],
    measure: Callable[[Cell], dict[str, Any]],
    file: Path,
    jobs: int,
    known: dict[str, dict[str, Any]],
) -> None:
    """Measure them all into `known` and `file`."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(min(jobs, len(cells)), context, _begin_process)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            tasks = {pool.submit(measure, cell): cell for cell in cells}
            for done, task in enumerate(as_completed(tasks), 1):
                key = _key(tasks[task])
                known[key] = {**task.result(), "revision": revision()}
                lines.write(json.dumps([json.loads(key), known[key]]) + "\n")
                lines.flush()
                print(f"{done} of {len(cells)}", end="\r", flush=True)
    except KeyboardInterrupt:
        raise Stopped from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Give --out a folder for results.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    """One thread a process; a signal stops the study, which lets each cell end."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _known(file: Path) -> dict[str, dict[str, Any]]:
    """What an earlier start measured; the last line may have been cut off by its end."""
    if not file.exists():
        return {}
    lines = read_text(file, str(file), MAX_BYTES).split("\n")
    found = {}
    for number, line in enumerate(lines[:-1], 1):
        try:
            cell, numbers = json.loads(line)
            found[_key(cell)] = dict(numbers)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}, is no measured cell ({type(error).__name__}). Remove the "
                "file, or give another --out."
            ) from error
    if lines[-1]:  # so that the next line begins at a line's start
        write_whole(file, "".join(f"{line}\n" for line in lines[:-1]))
    return found


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
