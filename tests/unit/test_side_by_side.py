"""Networks trained side by side: each as the fused optimizer trains it alone; cells kept."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt.data.order import SampleStream
from hvd_lbt.errors import UserError
from hvd_lbt.optim import FusedSGD
from hvd_lbt.schedule.plan import PlannedUpdates, make_plan
from hvd_lbt.schedule.settings import Milestone, Schedule
from hvd_lbt.studies.cells import kept_cells, measure_cells
from hvd_lbt.studies.side_by_side import Perceptrons, teacher_task, train_side_by_side

SCHEDULE = Schedule(
    policy="grow_batch",
    epochs=3,
    lr=0.3,
    momentum=0.8,
    global_batch=8,
    milestones=(Milestone(epoch=2, factor=2),),
)
SEEDS = (5, 6)


@pytest.fixture(scope="module")
def task():
    return teacher_task(train_samples=100, test_samples=50, seeds=SEEDS, label_noise=0.3)


def trained_alone(task, place, weight_decay):
    """The network of one seed, in plain modules and with FusedSGD."""
    first = Perceptrons(16, 12, 10, SEEDS).weights
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))
    with torch.no_grad():
        model[0].weight.copy_(first[0][place].T)
        model[2].weight.copy_(first[2][place])
        model[0].bias.zero_()
        model[2].bias.zero_()
    matrices, biases = (
        [p for p in model.parameters() if (p.ndim > 1) is whole] for whole in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": biases}]
    optimizer = FusedSGD(groups, lr=0.3, momentum=0.8)
    stream = SampleStream(100, SEEDS[place])
    for update in PlannedUpdates(make_plan(SCHEDULE, 100)):
        chosen = torch.from_numpy(stream.indices(update.samples_seen, update.global_batch))
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = update.lr, update.momentum
        optimizer.zero_grad()
        F.cross_entropy(model(task.inputs[place, chosen]), task.labels[place, chosen]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("place", [0, 1])
def test_each_is_trained_as_it_is_alone(task, place, weight_decay):
    together = train_side_by_side(
        task,
        make_plan(SCHEDULE, 100),
        width=12,
        seeds=SEEDS,
        weight_decay=lambda update: weight_decay,
    )
    model = trained_alone(task, place, weight_decay)
    with torch.no_grad():
        logits = model(task.test_inputs)
        noisy = model(task.inputs[place])
    accuracy = 100 * (logits.argmax(1) == task.test_labels).float().mean()
    # float32 sums in another order, over 33 updates
    assert together.accuracy[place] == pytest.approx(float(accuracy), abs=1e-3)
    loss = F.cross_entropy(logits, task.test_labels)
    assert together.test_loss[place] == pytest.approx(float(loss), rel=1e-4)
    loss = F.cross_entropy(noisy, task.labels[place])
    assert together.train_loss[place] == pytest.approx(float(loss), rel=1e-4)


def test_a_network_that_diverged_is_no_better_than_chance(task):
    wild = Schedule(policy="decay_lr", epochs=30, lr=1e4, momentum=0.9, global_batch=2)
    outcomes = train_side_by_side(task, make_plan(wild, 100), width=12, seeds=SEEDS)
    assert outcomes.test_loss == pytest.approx([2.302585] * 2)
    assert max(outcomes.accuracy) < 30


def test_seeds_and_data_sets_are_as_many(task):
    with pytest.raises(ValueError, match="1 seeds and a plan for 100 samples; the task has 2"):
        train_side_by_side(task, make_plan(SCHEDULE, 100), width=12, seeds=SEEDS[:1])


def test_a_task_has_its_seeds_data_and_noisy_labels(task):
    again = teacher_task(train_samples=100, test_samples=50, seeds=(6, 5), label_noise=0.0)
    assert torch.equal(again.inputs[1], task.inputs[0])
    assert not torch.equal(again.inputs[0], task.inputs[0])
    assert torch.equal(again.test_labels, task.test_labels)
    changed = (again.labels.flip(0) != task.labels).sum(1)
    # 30 of 100 are drawn anew; one in ten of those keeps its label by chance
    assert all(20 <= count <= 30 for count in changed)


def doubled(cell):
    if cell["x"] < 0:
        raise ValueError
    return {"y": 2 * cell["x"]}


def test_cells_are_measured_once_and_a_cut_line_again(tmp_path, monkeypatch):
    file = tmp_path / "study" / "cells.jsonl"
    file.parent.mkdir()
    file.write_text('[{"x": 1}, {"y": 100}]\n[{"x": 2}, {"y"')
    cells = [{"x": 2}, {"x": 1}]
    found = measure_cells(cells, doubled, file, 1)
    assert found[0].pop("revision")
    assert found == [{"x": 2, "y": 4}, {"x": 1, "y": 100}]
    kept, new = (json.loads(line) for line in file.read_text().splitlines())
    assert kept == [{"x": 1}, {"y": 100}]
    assert new == [{"x": 2}, {"y": 4, "revision": new[1]["revision"]}]
    again = measure_cells(cells, doubled, file, 1)
    assert again[0].pop("revision")
    assert again == found


def test_damaged_cells_are_named(tmp_path):
    (tmp_path / "study").mkdir()
    file = tmp_path / "study" / "cells.jsonl"
    file.write_text('[{"x": 1}, {"y": 100}]\nnonsense\n')
    with pytest.raises(UserError, match=r"cells.jsonl, line 2, is no measured cell"):
        measure_cells([{"x": 1}], doubled, file, 1)


def test_settings_that_json_writes_otherwise_are_the_same(tmp_path):
    cells = [{"x": 1, "falls": ({"epoch": 4},), "lr": 0.1234567}]
    for jobs in (1, 0):
        found = kept_cells(tmp_path, "study", cells, doubled, jobs)
        assert found["cells"][0]["y"] == 2
    assert found["revision"]


def test_numbers_of_other_settings_are_not_drawn(tmp_path):
    (tmp_path / "study.json").write_text('{"cells": [{"x": 1, "y": 2}]}')
    assert kept_cells(tmp_path, "study", [{"x": 1}], doubled, 0)["cells"][0]["y"] == 2
    with pytest.raises(UserError, match="are of other settings"):
        kept_cells(tmp_path, "study", [{"x": 3}], doubled, 0)
