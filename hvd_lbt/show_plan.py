"""`hvd_lbt plan`: the stages of a recipe, before anything runs; needs neither Horovod nor DALI."""

import argparse
from pathlib import Path

from hvd_lbt import terminal
from hvd_lbt.arguments import count, positive
from hvd_lbt.data.store import open_train_split
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.stage_table import render_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt plan`."""
    parser.add_argument("recipe", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--workers", type=count, default=1, help="show their micro-batches [1]")
    parser.add_argument("--data", type=Path, help="count the training images of this folder")
    parser.add_argument(
        "--images-per-second",
        type=positive,
        help="of all workers together: shows the planned hours",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")


def main(args: argparse.Namespace) -> int:
    """Print the plan of a recipe."""
    recipe = load_recipe(args.recipe, args.set)
    speed = args.images_per_second
    samples = len(open_train_split(args.data)) if args.data else recipe.data.train_samples
    if samples is None:
        raise UserError(
            f"data.train_samples: recipe {recipe.name} does not say how many training images there "
            "are. Give --data DIR to count them, or --set data.train_samples=N."
        )
    console = terminal.console()
    plan = make_plan(recipe.schedule, samples)
    console.print(render_plan(recipe, plan, args.workers))
    if speed:
        hours = plan.samples / speed / 3600
        console.print(f"{hours:,.2f} hours at {speed:,g} images/s, without the evaluations.")
    return 0
