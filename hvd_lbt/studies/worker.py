"""Train a list of recipes one after another in this process, as `hvd_lbt study` asks.

Each is a whole `hvd_lbt train --resume`; only the start of Python, torch and Horovod, which takes
as long as a small training, is shared.
"""

import argparse
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hvd_lbt import comm
from hvd_lbt.errors import UserError
from hvd_lbt.plain_yaml import read_text
from hvd_lbt.recipe import load_recipe
from hvd_lbt.report.runs import read_run
from hvd_lbt.run_lock import own_run
from hvd_lbt.stop import EXIT_STOPPED
from hvd_lbt.train import train

MAX_BYTES = 16 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt study-trainings`."""
    parser.add_argument("tasks", type=Path, help="a JSON list of recipe, overrides, data, out")


def main(args: argparse.Namespace) -> int:
    """Train them all; what each says goes to OUT.log. 75 when a signal stopped one."""
    tasks = _tasks(args.tasks)
    world = comm.init()
    code = 0
    for task in tasks:
        # A signal between two trainings finds nobody: the study takes the list away as well.
        if not comm.broadcast_object(args.tasks.is_file()):
            code = EXIT_STOPPED
            break
        out = Path(task["out"])
        recipe = load_recipe(task["recipe"], task["overrides"])
        said = out.with_name(f"{out.name}.log").open("a", encoding="utf-8")
        with said, redirect_stdout(said), own_run(out, world) as owner:
            data = Path(task["data"])
            code = train(recipe, data=data, out=out, resume=True, world=world, owner=owner)
        if code:
            break
        if world.rank == 0:
            final = read_run(out).final
            accuracy = "not measured" if final is None else f"{final:.2%}"
            print(f"{out.name}: test accuracy {accuracy}", flush=True)
    comm.shutdown()
    return code


def _tasks(file: Path) -> list[dict[str, Any]]:
    """The trainings of a list that `hvd_lbt study` wrote. Raises UserError for any other file."""
    try:
        tasks = json.loads(read_text(file, str(file), MAX_BYTES))
        for task in tasks:
            strings = (task["recipe"], task["data"], task["out"], *task["overrides"])
            if not all(isinstance(value, str) for value in strings):
                raise TypeError("recipe, data, out and overrides must be text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is no list of trainings ({type(error).__name__}: {str(error)[:80]}). "
            "`hvd_lbt study` writes such lists and starts this command itself."
        ) from error
    return tasks
