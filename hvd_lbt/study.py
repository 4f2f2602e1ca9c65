"""`hvd_lbt study`: re-make a claim of the papers: train, measure, draw, and say whether it held.

Trainings are real `hvd_lbt train` runs, one rank each. The same command continues where it stopped:
finished runs are kept, unfinished ones resumed.
"""

import argparse
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from hvd_lbt.arguments import count
from hvd_lbt.data.store import open_train_split
from hvd_lbt.errors import UserError
from hvd_lbt.stop import EXIT_STOPPED
from hvd_lbt.studies import (
    bayesian_evidence,
    linear_scaling,
    noise_formula,
    optimum_batch,
    published,
    stage_noise,
    weight_decay,
)
from hvd_lbt.studies.trainings import Stopped, redraw, run_study, shortened

SCALES = ("laptop", "smoke", "cifar10", "gpu", "cluster")

MEASURED = {one.NAME: one.study for one in (bayesian_evidence, noise_formula)}
# Studies of many small networks, trained at once in each process.
SIDE_BY_SIDE = {one.NAME: one.study for one in (optimum_batch, linear_scaling, stage_noise)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt study`."""
    names = [*published.STUDIES, *SIDE_BY_SIDE, weight_decay.NAME, *MEASURED]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="[laptop]")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="[runs/studies]")
    parser.add_argument("--data", type=Path, help="the images of the other scales than laptop")
    parser.add_argument(
        "--jobs", type=count, help="trainings at a time [cores; 1 above laptop scale]"
    )
    parser.add_argument(
        "--updates",
        type=count,
        metavar="K",
        help="a dry run on the images of --data: about K updates of each training, one seed",
    )
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="train nothing: figure, page and verdict from OUT/NAME.json alone",
    )
    parser.add_argument(
        "--launcher",
        default="",
        metavar="WORDS",
        help="what begins each training's command, such as 'srun --mpi=pmix' or 'horovodrun -np 8'",
    )


def main(args: argparse.Namespace) -> int:
    """Run one study; writes OUT/NAME.{md,png,json} and prints the sentence that sums it up."""
    if args.name in (*SIDE_BY_SIDE, weight_decay.NAME):
        return _side_by_side(args)
    if args.name in MEASURED:
        return _measure(args)
    scales = published.STUDIES[args.name]
    if args.scale not in scales:
        raise UserError(f"--scale {args.scale}: {args.name} has {', '.join(scales)}.")
    study = scales[args.scale]
    if args.updates is not None:
        if args.data is None:
            raise UserError("--updates K: a dry run needs --data FOLDER, the images to train on.")
        study = shortened(study, args.updates, len(open_train_split(args.data)))
    if args.redraw:
        print(redraw(study, args.out))
        return 0
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if args.scale in ("laptop", "smoke") else 1)
    _catch_signals()
    try:
        print(
            run_study(
                study,
                args.out,
                data=args.data,
                jobs=jobs,
                launcher=_words(args.launcher),
            )
        )
    except Stopped:
        print("Stopped. The same command continues from here.")
        return EXIT_STOPPED
    return 0


def _measure(args: argparse.Namespace) -> int:
    """A study that is no set of trainings of `hvd_lbt train`: it has no data and no jobs."""
    unused = ("data", "jobs", "updates", "launcher")
    _check_unused(args, unused, "trains nothing with `hvd_lbt train`")
    resumes = "continues from the last part that was finished"
    return _make(
        args,
        lambda: MEASURED[args.name](args.out, redraw=args.redraw),
        resumes if args.name == noise_formula.NAME else "begins anew",
    )


def _side_by_side(args: argparse.Namespace) -> int:
    """A study whose networks are trained at once, without Horovod and on data of its own."""
    own = args.name in SIDE_BY_SIDE
    _check_unused(
        args,
        ("data", "updates", "launcher") if own else ("updates", "launcher"),
        f"trains its networks in its own processes{', on data that it makes' * own}",
    )
    if not own and (args.data is None) is not args.redraw:
        raise UserError(
            f"--data {args.data} has no effect with --redraw, which trains nothing."
            if args.redraw
            else f"--data: {args.name} needs images: give the folder that has train/CLASS/FILE."
        )
    if args.redraw and args.jobs:
        raise UserError(f"--jobs {args.jobs} has no effect with --redraw, which trains nothing.")
    jobs = 0 if args.redraw else args.jobs or len(os.sched_getaffinity(0))
    if own:
        return _make(args, lambda: SIDE_BY_SIDE[args.name](args.out, jobs))
    return _make(args, lambda: weight_decay.study(args.out, jobs, args.data))


def _check_unused(args: argparse.Namespace, unused: Sequence[str], why: str) -> None:
    """Raise UserError for another scale than laptop, and for an argument that is not used."""
    if args.scale != "laptop":
        raise UserError(f"--scale {args.scale}: {args.name} has only the scale laptop.")
    for name in unused:
        if value := getattr(args, name):
            raise UserError(
                f"--{name} {value} has no effect on {args.name}, which {why}; leave it out."
            )


def _make(
    args: argparse.Namespace, study: Callable[[], str], resumes: str = "continues from here"
) -> int:
    """Print what a study gives; resumes: what the same command does after a signal."""
    _catch_signals()
    try:
        print(study())
    except OSError as error:
        raise UserError(
            f"--out {args.out}: the study cannot be written there ({error.strerror})."
        ) from error
    except (KeyboardInterrupt, Stopped):
        print(f"Stopped. The same command {resumes}.")
        return EXIT_STOPPED
    return 0


def _words(launcher: str) -> list[str]:
    """The words of --launcher, whose first is a program that can be found."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher!r}: {error}.") from error
    if words and shutil.which(words[0]) is None:
        raise UserError(f"--launcher {launcher!r}: there is no program {words[0]!r}.")
    return words


def _catch_signals() -> None:
    """Every training saves and ends. A shell's background job ignores SIGINT from its start."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
