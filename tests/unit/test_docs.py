"""What README and docs say is so: numbers, commands, files, code."""

import json
import re
import statistics
from pathlib import Path

import pytest

from hvd_lbt.cli import COMMANDS, GROUPS
from hvd_lbt.recipe import load_recipe, shipped_recipes
from hvd_lbt.schedule import make_plan

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def study(name):
    return json.loads((ROOT / "docs" / "studies" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_measured_rows_of_the_readme_are_the_committed_numbers():
    arms = {arm["name"]: arm for arm in study("fewer_updates")["arms"]}
    for name in ("decay_lr", "grow_batch", "grow_batch_lr"):
        arm = arms[name]
        mean, spread = statistics.mean(arm["finals"]), statistics.stdev(arm["finals"])
        assert f"| {arm['updates']:,} | {mean:.2f} ± {spread:.2f} %, measured |" in README


def test_the_published_row_of_the_readme_is_the_planned_recipe():
    recipe = load_recipe("imagenet_resnet50")
    plan = make_plan(recipe.schedule, recipe.data.train_samples)
    assert (
        f"| ImageNet, ResNet-50, 8,192 → 16,384 | {plan.updates:,} | 76.1 %, published |" in README
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w./~])(?:launch|tests|hvd_lbt|csrc)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for words in re.findall(
        r"(?:^|[`/ ])hvd_lbt ((?:bench |data )?[a-z][\w-]*)", text, re.MULTILINE
    ):
        known = words in COMMANDS or words in GROUPS
        prose = words.split()[0] not in {*GROUPS, *(name.split()[0] for name in COMMANDS)}
        assert known or prose, f"{page.name} names `hvd_lbt {words}`"
    for recipe in re.findall(r"hvd_lbt (?:train|plan|recipes) (\w+)(?=[ `\n])", text):
        assert recipe in shipped_recipes() or recipe.isupper() or recipe == "mine", recipe
