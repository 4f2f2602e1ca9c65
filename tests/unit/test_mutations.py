"""A few seeded cases of the campaign in tests/campaigns, and recipes that hypothesis makes."""

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "campaigns"))

from mutate_recipes import KINDS, campaign

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe, recipe_of

DIGITS = load_recipe("digits").to_dict()
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["grow_batch", "hybrid", "decay_lr", "0", "1e5", "nan"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_input_is_accepted_or_refused_in_one_paragraph(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what is written by mistake
    assert campaign(kind, cases=40, seed=0, limit=100) == []
    assert list(tmp_path.iterdir()) == []


@given(st.data())
@settings(max_examples=150, derandomize=True)
def test_any_value_at_any_place_makes_a_recipe_or_a_user_error(data):
    recipe = {
        key: dict(value) if isinstance(value, dict) else value for key, value in DIGITS.items()
    }
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sorted(recipe)))
        inside = recipe[section]
        if isinstance(inside, dict) and inside and data.draw(st.booleans()):
            inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(VALUES)
        else:
            recipe[section] = data.draw(VALUES)
    try:
        made = recipe_of(recipe, "Recipe x")
    except UserError as error:
        message = str(error)
    else:
        message = ""
        again = yaml.safe_load(yaml.safe_dump(made.to_dict()))
        assert recipe_of(again, "Recipe x") == made
    assert message == "" or message.startswith("Recipe x: ")
