"""The settings of a schedule, made in Python: what is accepted, and what each mistake is
answered.
"""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from hvd_lbt.recipe import Recipe, load_recipe, shipped_recipes
from hvd_lbt.schedule import (
    Cosine,
    Milestone,
    Polynomial,
    ScaledStart,
    Schedule,
    SettingError,
    WarmUp,
    make_plan,
)

FALL = Milestone(epoch=4, factor=5)
PLAIN = {"policy": "grow_batch", "epochs": 10, "lr": 0.1, "momentum": 0.9, "global_batch": 10}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_and_python_make_the_same_plan(name):
    recipe = load_recipe(name)
    written = recipe.to_dict()["schedule"]
    written["milestones"] = [Milestone(**one) for one in written["milestones"]]
    kinds = {"cosine": Cosine, "polynomial": Polynomial}
    for key, kind in (kinds | {"scaled_start": ScaledStart, "warm_up": WarmUp}).items():
        if written[key] is not None:
            written[key] = kind(**written[key])
    mine = Schedule(**written)
    assert mine == recipe.schedule
    assert make_plan(mine, 5000) == make_plan(recipe.schedule, 5000)
    assert Recipe.model_validate({**recipe.to_dict(), "schedule": mine}) == recipe


def test_numbers_become_those_of_python():
    made = Schedule(**PLAIN | {"lr": np.float32(0.5), "global_batch": np.int64(8), "epochs": 3})
    assert [type(value) for value in (made.lr, made.global_batch, made.epochs)] == [
        float,
        int,
        float,
    ]


def test_settings_are_frozen_values():
    one = Schedule(**PLAIN, milestones=[FALL])  # a list becomes a tuple
    assert one.milestones == (FALL,)
    assert one == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(dataclasses.replace(one))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.lr = 0.2
    with pytest.raises(TypeError):
        Schedule("grow_batch", 10, 0.1, 0.9, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1}, "schedule.lr: -1 is not allowed; it must be greater than 0."),
        ({"lr": "0.1"}, "schedule.lr: '0.1' is not allowed; it must be a number."),
        ({"lr": True}, "schedule.lr: True is not allowed; it must be a number."),
        ({"lr": float("nan")}, "schedule.lr: nan is not allowed; it must be a finite number."),
        ({"lr": None}, "schedule.lr: None is not allowed; it must be a number."),
        ({"momentum": 1}, "schedule.momentum: 1 is not allowed; it must be less than 1."),
        (
            {"momentum": -0.1},
            "schedule.momentum: -0.1 is not allowed; it must be greater than or equal to 0.",
        ),
        ({"global_batch": 32.0}, "schedule.global_batch: 32 is not allowed; it must be a whole"),
        ({"global_batch": 0}, "schedule.global_batch: 0 is not allowed; it must be greater than"),
        (
            {"policy": "grow"},
            (
                "schedule.policy: 'grow' is not allowed; it must be 'decay_lr', 'hybrid', "
                "'grow_batch' or 'measured'."
            ),
        ),
        ({"milestones": FALL}, "schedule.milestones: Milestone(epoch=4.0, factor=5.0"),
        ({"milestones": [{"epoch": 4}]}, "schedule.milestones: [{'epoch': 4}] is not allowed"),
        ({"warm_up": 5}, "schedule.warm_up: 5 is not allowed; it must be a WarmUp."),
        ({"milestones": [FALL, FALL]}, "schedule.milestones: their epochs are 4, 4; each must be"),
        ({"max_global_batch": 9}, "schedule.global_batch: 10 is more than"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(SettingError) as caught:
        Schedule(**PLAIN | changes)
    assert str(caught.value).startswith(message)


def test_all_impossible_values_are_named_at_once():
    with pytest.raises(SettingError, match=r"schedule\.lr: .* schedule\.momentum: "):
        Schedule(**PLAIN | {"lr": 0, "momentum": 2})


def test_parts_name_themselves():
    with pytest.raises(SettingError, match=r"^milestone\.factor: 1 is not allowed; it must be gr"):
        Milestone(epoch=1, factor=1)
    with pytest.raises(SettingError, match=r"^warm_up\.first_lr: 0 is"):
        WarmUp(epochs=1, first_lr=0)
    with pytest.raises(SettingError, match=r"^scaled_start\.lr: 0 is"):
        ScaledStart(lr=0)
