"""The command line: find the module that owns the command, call it, tell errors in one paragraph."""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from types import ModuleType

from hvd_lbt.errors import SampleError, UserError

# Each module has add_arguments(parser) and main(args); it is imported when its command is called,
# so that `plan` works on a login node where Horovod does not.
COMMANDS = {
    "train": ("hvd_lbt.train", "train a recipe, alone or under horovodrun, mpirun or srun"),
    "elastic": ("hvd_lbt.elastic_driver", "train on workers that may come and go"),
    "plan": ("hvd_lbt.show_plan", "print the stages of a recipe before anything runs"),
    "evaluate": ("hvd_lbt.evaluate", "evaluate a checkpoint on a test split"),
    "export": ("hvd_lbt.checkpoint", "write a checkpoint's weights alone, for other programs"),
    "report": ("hvd_lbt.report", "draw one or more runs as HTML and PNG"),
    "study": ("hvd_lbt.study", "re-make a claim of the papers, and say whether it held"),
    "study trainings": ("hvd_lbt.studies.worker", "train a list of recipes; `study` calls it"),
    "bench update": ("hvd_lbt.bench.update", "the fused update and the wire kernels"),
    "bench step": ("hvd_lbt.bench.step", "communication and update against Horovod's and DDP's"),
    "bench allreduce": ("hvd_lbt.bench.allreduce", "bus bandwidth against message size"),
    "bench checkpoint": ("hvd_lbt.bench.checkpoint", "what a checkpoint costs an update"),
    "bench input": ("hvd_lbt.bench.input", "images a second against DALI's reader and DataLoader"),
    "bench train": ("hvd_lbt.bench.train", "the whole loop against a bare PyTorch loop"),
    "doctor": ("hvd_lbt.doctor", "check the installation and name what mends it"),
    "data check": ("hvd_lbt.data.check", "decode every image and list what is bad"),
    "data convert": (
        "hvd_lbt.data.convert",
        "write a data set as WebDataset, TFRecord or RecordIO shards",
    ),
    "data digits": ("hvd_lbt.data.digits", "write the built-in data set as image files"),
}
EXIT_USER_ERROR = 2
EXIT_FAILED = 1
# A launcher kills all ranks when one fails: the rank that tells the reason must come first.
SECONDS_TO_TELL = 3.0
RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point `hvd_lbt`: the exit code is 0, 2 for a user's error, or the command's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next(
        (n for n in (" ".join(words[:2]), words[0] if words else "") if n in COMMANDS), None
    )
    if name is None:
        stream = sys.stdout if words in ([], ["-h"], ["--help"]) else sys.stderr
        print(
            "usage: hvd_lbt COMMAND …; `hvd_lbt COMMAND --help` tells its arguments\n", file=stream
        )
        for command, (_, what) in COMMANDS.items():
            print(f"  {command:<16} {what}", file=stream)
        if stream is sys.stderr:
            print(f"\nhvd_lbt: there is no command {' '.join(words[:2])!r}", file=stream)
        return 0 if stream is sys.stdout else EXIT_USER_ERROR
    module_name, what = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(prog=f"hvd_lbt {name}", description=module.__doc__ or what)
        module.add_arguments(parser)
        code = module.main(parser.parse_args(words[len(name.split()) :]))
    except UserError as error:
        _tell(error)
        _end_all_ranks(EXIT_USER_ERROR)
        code = EXIT_USER_ERROR
    except Exception as error:  # a fault of the program or of the machine, on this rank alone
        if (comm := _world_is_up()) is None:
            raise
        _tell_failure(error, lost=isinstance(error, comm.WorkerLostError))
        comm.abort(EXIT_FAILED)
        raise
    if getattr(sys.modules.get("hvd_lbt.data.pipeline"), "decoder_failed", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # DALI might hang when it is taken down
    return code


def _tell(error: UserError) -> None:
    """Print the error once: every rank meets the same one, except where a sample is bad."""
    if _rank() > 0 and not isinstance(error, SampleError):
        time.sleep(SECONDS_TO_TELL)
    else:
        print(f"hvd_lbt: {error}", file=sys.stderr, flush=True)


def _tell_failure(error: Exception, *, lost: bool) -> None:
    """Print where this rank failed; what only follows from another rank's failure comes after it."""
    who = f"hvd_lbt: rank {_rank()} on {os.uname().nodename}"
    if lost:
        time.sleep(SECONDS_TO_TELL)
        message = f"{who} ends because another rank failed or is gone: {error}\n"
    else:
        message = f"{who} failed:\n{''.join(traceback.format_exception(error))}"
    print(message, file=sys.stderr, end="", flush=True)


def _rank() -> int:
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def _world_is_up() -> ModuleType | None:
    comm: ModuleType | None = sys.modules.get("hvd_lbt.comm")
    return comm if comm is not None and comm.is_initialized() else None


def _end_all_ranks(code: int) -> None:
    if (comm := _world_is_up()) is not None:
        comm.abort(code)
