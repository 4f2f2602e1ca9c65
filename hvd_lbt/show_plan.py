"""`hvd_lbt plan`: the stages of a recipe, before anything runs; needs neither Horovod nor DALI."""

import argparse
from pathlib import Path

from hvd_lbt import terminal
from hvd_lbt.arguments import count, positive
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.speed_profile import load_profile, shipped_profiles
from hvd_lbt.stage_table import render_plan
from hvd_lbt.time_table import render_times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt plan`."""
    parser.add_argument("recipe", help="a shipped recipe's name, or a YAML file")
    parser.add_argument(
        "--workers",
        type=count,
        nargs="+",
        default=[1],
        help="show their micro-batches [1]; several numbers with --speed",
    )
    parser.add_argument("--data", type=Path, help="count the training images of this folder")
    parser.add_argument(
        "--images-per-second",
        type=positive,
        help="of all workers together, whatever the batch: shows the planned hours",
    )
    parser.add_argument(
        "--speed",
        metavar="NAME|FILE",
        help=f"predict hours by stage with a speed profile: {', '.join(shipped_profiles())}, or "
        "the YAML file of `hvd_lbt bench profile`",
    )
    parser.add_argument("--price", type=positive, help="of a worker-hour, with --speed: shows cost")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")


def main(args: argparse.Namespace) -> int:
    """Print the plan of a recipe."""
    _refuse_what_has_no_effect(args)
    recipe = load_recipe(args.recipe, args.set)
    profile = None if args.speed is None else load_profile(args.speed)
    speed = args.images_per_second
    samples = recipe.data.train_samples
    if args.data:
        from hvd_lbt.data.store import count_train_samples  # half of the time of a plan without it

        samples = count_train_samples(args.data, recipe)
    if samples is None:
        raise UserError(
            f"data.train_samples: recipe {recipe.name} does not say how many training images there "
            "are. Give --data DIR to count them, or --set data.train_samples=N."
        )
    console = terminal.console()
    plan = make_plan(recipe.schedule, samples)
    console.print(render_plan(recipe, plan, args.workers[0]))
    if profile:
        console.print(render_times(recipe, plan, profile, args.workers, args.price))
    if speed:
        hours = plan.samples / speed / 3600
        console.print(
            f"{hours:,.2f} hours at {speed:,g} images/s, without the evaluations. One speed for "
            "all stages cannot see what growing the batch saves: --speed can."
        )
    return 0


def _refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    if args.speed is not None and args.images_per_second is not None:
        raise UserError("--images-per-second and --speed both say how fast; give one of them.")
    if args.speed is None and args.price is not None:
        raise UserError("--price has no effect without --speed, which predicts the hours.")
    if args.speed is None and len(args.workers) > 1:
        raise UserError(
            f"--workers {' '.join(map(str, args.workers))}: several numbers are compared by their "
            "hours, which --speed predicts; give one number, or --speed."
        )
