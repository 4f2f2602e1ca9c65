"""The command line: find the module that owns the command, call it, print errors in one
paragraph.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

from hvd_lbt import terminal
from hvd_lbt.errors import RenamedWarning, SampleError, UserError, one_line
from hvd_lbt.terminal import printable
from hvd_lbt.world import RANK_VARIABLES

# Each module has add_arguments(parser) and main(args); it is imported when its command is called,
# so that `plan` works on a login node where Horovod does not.
COMMANDS = {
    "train": ("hvd_lbt.train", "train a recipe, alone or under horovodrun, mpirun or srun"),
    "elastic": ("hvd_lbt.elastic.cli", "train on workers that may come and go"),
    "plan": ("hvd_lbt.show_plan", "print the stages of a recipe before anything runs"),
    "recipes": ("hvd_lbt.show_recipes", "list the shipped recipes, or print one as a whole"),
    "evaluate": ("hvd_lbt.evaluate", "evaluate a checkpoint on a test split"),
    "probe": (
        "hvd_lbt.critical_batch",
        "measure the critical batch at a checkpoint, by branching with larger ones",
    ),
    "export": ("hvd_lbt.export", "write a checkpoint's weights alone, for other programs"),
    "report": ("hvd_lbt.report", "draw one or more runs as HTML and PNG"),
    "study": ("hvd_lbt.study", "re-make a claim of the papers, and say whether it held"),
    "bench optimizer": ("hvd_lbt.bench.optimizer", "the fused update and the wire kernels"),
    "bench allreduce_step": (
        "hvd_lbt.bench.allreduce_step",
        "communication and update against Horovod's and DDP's",
    ),
    "bench allreduce": ("hvd_lbt.bench.allreduce", "bus bandwidth against message size"),
    "bench checkpoint": ("hvd_lbt.bench.checkpoint", "what a checkpoint costs an update"),
    "bench input": ("hvd_lbt.bench.input", "images a second against DALI's reader and DataLoader"),
    "bench order": ("hvd_lbt.bench.order", "an epoch's order without an array against a sort"),
    "bench index": ("hvd_lbt.bench.index", "the index of many samples: time, memory of a node"),
    "bench reads": ("hvd_lbt.bench.reads", "cold reads in sequence, in blocks and at random"),
    "bench train": ("hvd_lbt.bench.train", "the whole loop against a bare PyTorch loop"),
    "bench profile": ("hvd_lbt.bench.profile", "how fast this cluster is, for `plan --speed`"),
    "doctor": ("hvd_lbt.doctor", "check the installation and print the fix for what fails"),
    "data check": ("hvd_lbt.data.check", "decode every image and list what is bad"),
    "data convert": (
        "hvd_lbt.data.convert",
        "write a data set as WebDataset, TFRecord or RecordIO shards",
    ),
    "data unstage": ("hvd_lbt.data.unstage", "remove the copies that data.stage has made"),
    "data digits": ("hvd_lbt.data.digits", "write the built-in data set as image files"),
}
GROUPS = {
    "bench": "measure speed, each part against its peers",
    "data": "check, convert or write a data set",
}
# Commands that were renamed in 0.2; the old name works until 0.3, with a warning.
RENAMED = {("bench", "update"): "optimizer", ("bench", "step"): "allreduce_step"}
STUDY_WORKER = "study-trainings"  # a study's own worker processes: not listed
HIDDEN = {STUDY_WORKER: ("hvd_lbt.studies.worker", "train a list of recipes one after another")}
EXIT_USER_ERROR = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# A launcher kills all ranks when one fails: the rank that tells the reason must come first.
SECONDS_TO_TELL = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point `hvd_lbt`: the exit code is 0, 2 for a user's error, or the command's own."""
    terminal.escape_what_cannot_be_encoded()
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        warnings.simplefilter("always", RenamedWarning)
        return _run(argv)


def _show_warning(usual: Callable[..., None], message: Any, kind: Any, *place: Any) -> None:
    """What a user can change about a recipe in one line, once for all ranks."""
    if not issubclass(kind, RenamedWarning):
        usual(message, kind, *place)
    elif _rank() == 0:
        print(f"hvd_lbt: {printable(message)}", file=sys.stderr, flush=True)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = make_parser().parse_args(_with_new_names(sys.argv[1:] if argv is None else argv))
        command = args.__dict__.pop("_command")
        code: int = command(args)
        sys.stdout.flush()
    except SystemExit as end:  # of argparse: --help, --version, or words it does not know
        return end.code if isinstance(end.code, int) else EXIT_USER_ERROR
    except UserError as error:
        _tell(error)
        _end_all_ranks(EXIT_USER_ERROR)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        if (comm := _world_is_up()) is not None:
            comm.abort(EXIT_INTERRUPTED)
        code = EXIT_INTERRUPTED
    except Exception as error:  # a fault of the program or of the machine, on this rank alone
        comm, reason = _world_is_up(), _reason_of_the_machine(error)
        if comm is None and isinstance(error, BrokenPipeError):
            terminal.drop_output()
            return EXIT_FAILED
        if reason and (comm is None or not isinstance(error, OSError)):
            _tell(SampleError(reason))  # whichever rank it is
            _end_all_ranks(EXIT_USER_ERROR)
            return EXIT_USER_ERROR
        if comm is None:
            raise
        _tell_failure(error, lost=isinstance(error, comm.WorkerLostError))
        comm.abort(EXIT_FAILED)
        raise
    if getattr(sys.modules.get("hvd_lbt.data.pipeline"), "decoder_failed", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # DALI might hang when it is taken down
    return code


def _with_new_names(words: Sequence[str]) -> list[str]:
    for (group, old), new in RENAMED.items():
        if [*words[:2]] == [group, old]:
            warnings.warn(
                f"`hvd_lbt {group} {old}` is called `hvd_lbt {group} {new}` now; the old name "
                "works until hvd_lbt 0.3.",
                RenamedWarning,
                stacklevel=2,
            )
            return [group, new, *words[2:]]
    return [*words]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps paragraphs as they are written, and gives options a column of their own."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)


class _Parser(argparse.ArgumentParser):
    """Ends with one paragraph on the standard error, and guesses nothing from first letters.

    module_name: of a command, whose arguments are added when the command is called.
    """

    module_name = ""

    def __init__(self, **settings: Any):
        super().__init__(
            **settings,
            allow_abbrev=False,
            formatter_class=_Help,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(
            EXIT_USER_ERROR,
            f"{self.prog}: {printable(message)[:1000]}. `{self.prog} --help` prints the "
            "arguments.\n",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is not known is named by the command that was given it."""
        if self.module_name:
            self._take_arguments_of(self.module_name)
            self._refuse_unknown_options(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        return found, unknown

    def _refuse_unknown_options(self, words: Sequence[str]) -> None:
        """argparse takes `--x={a: 1}` for a folder's name, since it has a space."""
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            return  # another command's words follow
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if " " in word and word.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown arguments: {word}")

    def _take_arguments_of(self, module_name: str) -> None:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(
                f"{self.prog} needs what cannot be imported here ({error}): run launch/setup; "
                "`hvd_lbt doctor` checks each part."
            ) from error
        self.description, _, self.epilog = (module.__doc__ or "").strip().partition("\n\n")
        module.add_arguments(self)
        self.set_defaults(_command=module.main)


class _Version(argparse.Action):
    """Prints the version; the package's metadata is read only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        version = importlib.import_module("importlib.metadata").version("hvd_lbt")
        print(f"hvd_lbt {version}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it imports no command's module."""
    top = _Parser(
        prog="hvd_lbt",
        description="Large-batch training with PyTorch and Horovod: the batch grows, the learning "
        "rate does not decay.",
        epilog="`hvd_lbt COMMAND --help` prints a command's arguments.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version")
    top.set_defaults(_command=lambda _: print(top.format_help()) or 0)
    groups = {"": _subcommands(top, required=False)}
    for name, (module_name, what) in {**COMMANDS, **HIDDEN}.items():
        group, _, own = name.rpartition(" ")
        if group not in groups:
            about = GROUPS[group]
            parent = groups[""].add_parser(group, help=about, description=about)
            groups[group] = _subcommands(parent, required=True)
        listed = {} if name in HIDDEN else {"help": what}
        groups[group].add_parser(own, **listed).module_name = module_name
    return top


def _subcommands(parser: argparse.ArgumentParser, *, required: bool) -> Any:
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=required)


def _reason_of_the_machine(error: Exception) -> str | None:
    """What a user can change about an error of files or memory; None for a fault of the program."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return (
            f"{where}{error.strerror}. It is needed for this command: check path, rights and space."
        )
    out_of_memory = "can't allocate memory" in str(error) or "out of memory" in str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return (
            "there is not enough memory for this: a smaller layout.micro_batch, data.image_size or "
            f"model needs less ({one_line(error, 200) or 'MemoryError'})."
        )
    return None


def _tell(error: UserError) -> None:
    """Print the error once: every rank meets the same one, except where a sample is bad.

    If rank 0 meets it, it ends all ranks meanwhile; a rank that is still there has met it alone,
    such as a node on which a module or a file is missing.
    """
    who = "hvd_lbt"
    if _rank() > 0 and not isinstance(error, SampleError):
        time.sleep(SECONDS_TO_TELL)
        if _world_is_up() is None:
            return
        who = f"hvd_lbt: rank {_rank()} on {os.uname().nodename} alone"
    print(f"{who}: {printable(error)}", file=sys.stderr, flush=True)


def _tell_failure(error: Exception, *, lost: bool) -> None:
    """Print where this rank failed; what only follows from another rank's failure comes after
    it.
    """
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
