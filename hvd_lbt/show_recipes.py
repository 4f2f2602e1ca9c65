"""List the shipped recipes, or print one as a whole with all defaults filled in.

`hvd_lbt recipes NAME > mine.yaml` begins a recipe of your own; `base: NAME` in a file changes only
some settings of another.
"""

import argparse
import re

import yaml

from hvd_lbt.recipe import SHIPPED, load_recipe, shipped_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt recipes`."""
    parser.add_argument("recipe", nargs="?", help="print this recipe: a name, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")


def main(args: argparse.Namespace) -> int:
    """Print one line for each shipped recipe, or one recipe as YAML."""
    if args.recipe is not None:
        recipe = load_recipe(args.recipe, args.set)
        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), end="")
        return 0
    names = shipped_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {_about(name)}")
    return 0


def _about(name: str) -> str:
    """What a shipped recipe's head comment begins with, without its asides."""
    lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    words = []
    for line in lines:
        if not line.startswith("#") or line.startswith("# Paper:"):
            break
        words.append(line.removeprefix("#").strip())
    return re.split(r"[.:;]( |$)|,? and what ", " ".join(words))[0]
