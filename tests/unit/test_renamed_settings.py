"""Settings that got another name keep the old one for one release, with a warning."""

import pytest

from hvd_lbt.cli import main
from hvd_lbt.errors import RenamedWarning, UserError
from hvd_lbt.recipe import RENAMED, Recipe, load_recipe


def with_old_names(recipe):
    settings = recipe.to_dict()
    for (section, old), new in RENAMED.items():
        settings[section][old] = settings[section].pop(new)
    return settings


def test_an_override_with_an_old_name_works_and_warns():
    with pytest.warns(RenamedWarning, match=r"schedule\.raised is called schedule\.scaled_start"):
        old = load_recipe("cifar10_grow_batch_lr", ["schedule.raised.lr=0.4"])
    assert old == load_recipe("cifar10_grow_batch_lr", ["schedule.scaled_start.lr=0.4"])
    assert old.schedule.first_lr == 0.4


def test_a_file_with_an_old_name_changes_its_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: cifar10_decay_lr\nname: mine\nschedule: {policy: grow_batch, raised: {lr: 0.4}}\n"
    )
    with pytest.warns(RenamedWarning, match="raised"):
        assert load_recipe(file).schedule.first_lr == 0.4


def test_both_names_at_once_are_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\ndata: {resident: true, cache_on_device: false}\n")
    with pytest.raises(UserError, match=r"data\.resident is the old name .* both are set"):
        load_recipe(file)


def test_a_checkpoint_of_the_release_before_resumes():
    recipe = load_recipe("cifar10_grow_batch_lr")
    old = with_old_names(recipe)
    with pytest.warns(RenamedWarning) as warned:
        assert recipe.changes_since(old) == ""
    assert len(warned) == len(RENAMED)
    with pytest.warns(RenamedWarning):
        read = Recipe.model_validate(old)
    assert read == recipe


def test_a_setting_that_an_old_recipe_lacks_counts_with_its_default():
    recipe = load_recipe("digits")
    old = recipe.to_dict()
    del old["schedule"]["batch_multiple"]
    assert recipe.changes_since(old) == ""
    other = load_recipe("digits", ["schedule.batch_multiple=16"])
    assert other.changes_since(old) == "schedule.batch_multiple was 1, is 16"


def test_the_command_line_says_it_in_one_line(capsys):
    assert main(["plan", "digits", "--set", "data.resident=true"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        (
            "hvd_lbt: data.resident is called data.cache_on_device now; the old name works until "
            "hvd_lbt 0.3."
        )
    ]


@pytest.mark.parametrize(("old", "new"), [("update", "optimizer"), ("step", "allreduce_step")])
def test_a_renamed_command_works_and_warns(capsys, old, new):
    assert main(["bench", old, "--help"]) == 0
    said = capsys.readouterr()
    assert f"usage: hvd_lbt bench {new}" in said.out
    assert f"`hvd_lbt bench {old}` is called `hvd_lbt bench {new}` now" in said.err
