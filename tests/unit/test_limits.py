"""Bounds of a recipe: what would overflow or take for ever is refused, with its key."""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.cli import main
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.layout import make_layout
from hvd_lbt.schedule.plan import MAX_UPDATES, make_plan
from hvd_lbt.schedule.settings import MAX_STAGES, Milestone, Schedule
from hvd_lbt.stage_table import _shares

MANY = ", ".join(f"{{epoch: {place / 100}, factor: 1.01}}" for place in range(1, 1001))
STEEP = ", ".join(f"{{epoch: {place}, factor: 1e6}}" for place in (1, 2, 3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.epochs=1e12"], "schedule.epochs: "),
        (["schedule.epochs=1e9"], "schedule.epochs: 1e+09 epochs of 1,437 training samples are "),
        (["schedule.lr=1e-320"], "schedule.lr: "),
        (["schedule.lr=1e300"], "schedule.lr: "),
        (["schedule.scaled_start={lr: 1e-320}"], "schedule.scaled_start.lr: "),
        (["schedule.global_batch=1000000000000000000"], "schedule.global_batch: "),
        (["schedule.max_global_batch=1000000000000000000"], "schedule.max_global_batch: "),
        ([f"schedule.milestones=[{MANY}]"], "schedule.milestones: 1,000 are too many"),
        ([f"schedule.milestones=[{STEEP}]"], "schedule.milestones: their factors together"),
        (["schedule.milestones=[{epoch: 1, factor: 1e300}]"], "schedule.milestones[0].factor: "),
        (
            ["schedule.milestones=[]", "schedule.cosine={batch_factor: 1.0000001}"],
            "schedule.cosine.batch_factor: 1.0000001 makes more than 1,000 stages",
        ),
        (
            [
                "schedule.max_global_batch=1000000000",
                "schedule.milestones=[{epoch: 1, factor: 1000000}]",
                "layout={micro_batch: 1, ghost_batch: 1}",
            ],
            "layout.micro_batch: 1 cuts the largest global batch, ",
        ),
        (["schedule.global_batch=true"], "schedule.global_batch: true is not allowed"),
        (["schedule.milestones=[{epoch: true, factor: 2}]"], "schedule.milestones[0].epoch: true"),
        (["data.pad=false"], "data.pad: false is not allowed"),
        (["model.width=1000000000000"], "model.width: "),
        (["model.name=wide_resnet" + "1" * 5000 + "_4"], "model.name: "),
        (["model.name=wide_resnet10_1000"], "model.name: "),
        (["model.num_classes=1000000000"], "model.num_classes: "),
        (["data.image_size=1000000000"], "data.image_size: "),
        (["data.pad=1000000000"], "data.pad: "),
        (["data.train_samples=99999999999999999999"], "data.train_samples: "),
        (["data.threads=100000"], "data.threads: "),
        (["data.std=[1e-320, 1, 1]"], "data.std: "),
        (["data.mean=[1e300, 1, 1]"], "data.mean[0]: "),
        (["data.timeout=1e300"], "data.timeout: "),
        (['data.classes="a\\0b"'], "data.classes: "),
        (["layout.micro_batch=1000000000000"], "layout.micro_batch: "),
        (["wire.bucket_mb=1e-300"], "wire.bucket_mb: "),
        (["optimizer.weight_decay=1e300"], "optimizer.weight_decay: "),
        (["run.seed=99999999999999999999"], "run.seed: "),
        *((["name=" + name], "name: ") for name in ("..", ".", "a/b", "''", '"a\\nb"', "x" * 201)),
        *(
            (["name=" + name], "name: ")
            for name in ('"\\e[31m"', "[red]", "a b", '"a\\n"', "é" * 101)
        ),
    ],
)
def test_what_no_training_needs_is_refused(overrides, message, capsys):
    began = time.process_time()
    assert main(["plan", "digits", *(f"--set={one}" for one in overrides)]) == 2
    said = capsys.readouterr().err
    assert message in said.partition("Recipe digits: ")[2] or said.startswith(f"hvd_lbt: {message}")
    assert said.count("\n") == 1
    assert len(said) < 400 + len(overrides[0][:60])
    assert time.process_time() - began < 60  # not for ever; how fast is nothing a test can say


def test_the_largest_plans_are_still_made():
    stages = tuple(Milestone(epoch=place / 100, factor=1.01) for place in range(1, MAX_STAGES))
    settings = {"policy": "grow_batch", "lr": 0.1, "momentum": 0.9, "global_batch": 100}
    schedule = Schedule(**settings, epochs=10.0, max_global_batch=10**10, milestones=stages)
    assert len(make_plan(schedule, 10**9).stages) == MAX_STAGES
    with pytest.raises(UserError, match=f"at most {MAX_UPDATES:,} are allowed"):
        make_plan(schedule, 10**10)


def test_a_plan_for_any_number_of_workers(capsys):
    huge = ["--set=schedule.max_global_batch=4000000", "--set=elastic.local_batch=1"]
    assert main(["plan", "digits", "--workers=1000000000", *huge]) == 0
    assert "workers" in capsys.readouterr().out


@given(
    batch=st.integers(1, 200),
    workers=st.integers(1, 40),
    ghost_batch=st.integers(1, 9),
    at_once=st.integers(1, 4),
)
def test_three_workers_tell_what_all_of_them_do(batch, workers, ghost_batch, at_once):
    layout = SimpleNamespace(micro_batch=ghost_batch * at_once, ghost_batch=ghost_batch)
    stage = SimpleNamespace(global_batch=batch, ghost_batch=None)
    shares = _shares(SimpleNamespace(layout=layout), stage, workers)  # type: ignore[arg-type]
    layouts = [
        make_layout(
            batch,
            rank=rank,
            size=workers,
            micro_batch=layout.micro_batch,
            ghost_batch=ghost_batch,
        ).micro_batches
        for rank in range(workers)
    ]
    every = [len(parts) for parts in layouts]
    sizes = [len(part) for parts in layouts for part in parts]
    number = "–".join(f"{count:,}" for count in sorted({min(every), max(every)}))
    size = "–".join(str(one) for one in sorted({min(sizes), max(sizes)}))
    assert shares.text == f"{number} × {size}"
    assert shares.micro_batches == sum(every)
    assert shares.idle == every.count(0)


def test_names_that_folders_can_have():
    for name in ("digits", "a.b-c_1", ".hidden", "Größe", "x" * 200):
        assert load_recipe("digits", [f"name={name}"]).name == name
