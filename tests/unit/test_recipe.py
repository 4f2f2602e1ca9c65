"""Recipes: what is accepted, and what each mistake is told."""

from dataclasses import FrozenInstanceError

import pytest
import yaml

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_come_back_from_plain_data(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    again = Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
    assert again == recipe


# the wrong setting, and what the message must say: the key, the value, what is allowed
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "schedule.lrr=3",
            "schedule.lrr: there is no such key. Did you mean lr? Allowed: policy, ",
        ),
        ("shedule.lr=3", "shedule: there is no such key. Did you mean schedule? Allowed: name, "),
        (
            "schedule.global_batch=0",
            "schedule.global_batch: 0 is not allowed; it must be greater than or equal to 1.",
        ),
        ("schedule.momentum=1", "schedule.momentum: 1 is not allowed; it must be less than 1."),
        ("schedule.lr=-0.1", "schedule.lr: -0.1 is not allowed; it must be greater than 0."),
        ("schedule.lr=.nan", "schedule.lr: nan is not allowed; it must be a finite number."),
        ("schedule.lr=", "schedule.lr: None is not allowed; it must be a valid number."),
        (
            "schedule.milestones=[{epoch: 9, factor: 2}, {epoch: 3, factor: 2}]",
            (
                "schedule.milestones: their epochs are 9, 3; each must be later than the one "
                "before it."
            ),
        ),
        (
            "schedule.milestones=[{epoch: 20, factor: 2}]",
            (
                "schedule.milestones: the last is at epoch 20; it must be before the end, "
                "schedule.epochs = 20."
            ),
        ),
        (
            "schedule.milestones=[{epoch: 9, factor: 1}]",
            "schedule.milestones[0].factor: 1 is not allowed; it must be greater than 1.",
        ),
        (
            "schedule.milestones=[{epoch: 9, factr: 2}]",
            "schedule.milestones[0].factr: there is no such key. Did you mean factor?",
        ),
        (
            "schedule.scaled_start.lrr=3",
            "schedule.scaled_start.lrr: there is no such key. Did you mean lr?",
        ),
        (
            "schedule.scaled_start.lr=1000",
            (
                "schedule.scaled_start: with lr 1000 and momentum 0.9 the noise scale is kept by "
                "a first global batch of 320000; it must be from 1 to schedule.max_global_batch = "
                "512."
            ),
        ),
        (
            "schedule.global_batch=513",
            "schedule.global_batch: 513 is more than schedule.max_global_batch = 512",
        ),
        (
            "schedule.batch_milestones=1",
            "schedule.batch_milestones: 1 has no effect with policy grow_batch",
        ),
        (
            "schedule={policy: hybrid, epochs: 3, lr: 1, momentum: 0, global_batch: 8}",
            (
                "schedule.batch_milestones: 1 milestones are to raise the batch, and "
                "schedule.milestones has 0"
            ),
        ),
        (
            "schedule.policy=grow",
            (
                "schedule.policy: 'grow' is not allowed; it must be 'decay_lr', 'hybrid', "
                "'grow_batch' or 'measured'."
            ),
        ),
        ("schedule=3", "schedule: 3 is no section; allowed keys: policy, epochs, "),
        (
            "layout.micro_batch=40",
            "layout.micro_batch: 40 is no multiple of layout.ghost_batch = 16",
        ),
        ("layout={ghost_batch: 16}", "layout.micro_batch: it is missing and must be given."),
        ("model.name=resnet19", "model.name: 'resnet19' is not allowed; it must be resnet18, "),
        ("model.name=wide_resnet15_4", "model.name: 'wide_resnet15_4' is not allowed"),
        ("data.std=[1, 0, 1]", "data.std: [1, 0, 1] is not allowed; each of the three must be"),
        ("data.eval_resize=8", "data.eval_resize: 8 is smaller than data.image_size (16)"),
        ("wire.form=int8", "wire.form: 'int8' is not allowed; it must be 'fp16' or 'fp32'"),
        ("run.seed=-1", "run.seed: -1 is not allowed"),
    ],
)
def test_impossible_settings_are_named(override, message):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [override])
    assert f"Recipe digits: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.lr", "it must read section.key=value"),
        ("=3", "it must read section.key=value"),
        ("schedule..lr=3", "it must read section.key=value"),
        ("schedule.lr=[", "it is not valid YAML: line 1: "),
        ("schedule.lr.x=3", "schedule.lr is 0.1, which has no keys of its own"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [override])
    assert str(caught.value).startswith(f"--set {override}: {message}")


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError, match=r"schedule\.lr: .*layout\.ghost_batch: "):
        load_recipe("digits", ["schedule.lr=0", "layout.ghost_batch=0"])


def test_overrides_of_every_kind():
    recipe = load_recipe(
        "digits",
        [
            "schedule.lr=5e-2",
            "schedule.scaled_start.momentum=0.95",
            "schedule.milestones=[{epoch: 3, factor: 2.5}]",
            "run.channels_last=true",
            "data.eval_resize=null",
            "name=mine",
        ],
    )
    assert recipe.name == "mine"
    assert recipe.schedule.lr == 0.05
    assert recipe.schedule.first_global_batch == 64  # 32 · (1 − 0.9) / (1 − 0.95)
    assert recipe.schedule.milestones[0].factor == 2.5
    assert recipe.run.channels_last


def test_what_changes_the_training_is_named_at_a_resume():
    plain = load_recipe("digits").to_dict()
    for free in ("data.threads=7", "name=x", "layout.micro_batch=32", "run.eval_every=5"):
        assert load_recipe("digits", [free]).changes_since(plain) == ""
    for bound in ("run.seed=1", "schedule.lr=0.06", "layout.ghost_batch=8", "data.pad=2"):
        assert load_recipe("digits", [bound]).changes_since(plain).startswith(bound.split("=")[0])


def test_a_recipe_is_frozen():
    recipe = load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"
    with pytest.raises(FrozenInstanceError):
        recipe.schedule.lr = 3


def test_a_file_of_ones_own_with_a_base(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: digits\nname: mine\nschedule: {lr: 0.1}\n")
    recipe = load_recipe(mine)
    assert recipe == load_recipe("digits", ["name=mine", "schedule.lr=0.1"])
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("base: mine.yaml\nname: theirs\n")
    with pytest.raises(UserError, match=r"mine.yaml: base: 'digits' is not allowed"):
        load_recipe(str(theirs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds None"),
        ("- 1", r"must hold sections of settings \(name, data, "),
        ("a: [", "not valid YAML"),
        ("name: a\nname: b", "the key 'name' is given twice"),
        ("base: 3", "base: 3 is not allowed"),
        ("base: nowhere", "there is no shipped recipe and no file of this name"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(file)


def test_an_unknown_name_is_answered_with_the_shipped_ones():
    with pytest.raises(UserError, match=r"Recipe digit: .*Did you mean digits\? Shipped recipes: "):
        load_recipe("digit")
