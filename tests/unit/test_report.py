"""The report: one self-contained file that says what runs did, and what is wrong with a folder."""

import json

import pytest

from hvd_lbt import report
from hvd_lbt.cli import main
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan


def write_run(folder, *, seed=0, policy="digits", updates=None, nan_at=None):
    """A run's metrics as training writes them, with losses that fall."""
    recipe = load_recipe(policy, [f"run.seed={seed}"])
    plan = make_plan(recipe.schedule, 1437)
    stages = [stage.__dict__ for stage in plan.stages]
    events = [
        {
            "event": "run",
            "name": recipe.name,
            "recipe": recipe.to_dict(),
            "plan": {"train_samples": 1437, "updates": plan.updates, "stages": stages},
            "world_size": 2,
            "versions": {"torch": "2.13.0"},
            "revision": "abc1234",
            "resumed_at_update": 0,
        }
    ]
    last = plan.updates if updates is None else updates
    for index in range(last):
        update = plan.at(index)
        seen = update.samples_seen + update.global_batch
        events.append(
            {
                "event": "update",
                "update": index,
                "epoch": seen / 1437,
                "samples_seen": seen,
                "stage": update.stage,
                "global_batch": update.global_batch,
                "lr": update.lr,
                "momentum": update.momentum,
                "noise_scale": update.noise_scale,
                "gradient_noise": None if index < 20 else 100.0 + index,
                "loss": None if index == nan_at else 2.0 / (1 + index),
                "accuracy": 0.9,
                "images_per_second": 500.0,
                "data_wait": 0.05,
                "left_out": int(index == 3),
                "wire_scale": 1024.0,
                "overflows": 0,
                "skipped": int(nan_at is not None and index >= nan_at),
            }
        )
        if index % 50 == 49 or index + 1 == last:
            result = {"loss": 0.1, "top1": 0.97 + 0.001 * seed, "top5": 1.0, "samples": 360}
            events.append(
                {"event": "eval", "update": index + 1, "epoch": seen / 1437, "samples_seen": seen}
                | result
            )
    folder.mkdir()
    lines = "".join(json.dumps(event | {"time": 1.0 * n}) + "\n" for n, event in enumerate(events))
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_runs_are_laid_over_each_other_in_one_file(tmp_path, capsys):
    runs = [write_run(tmp_path / f"grow{seed}", seed=seed) for seed in range(3)]
    runs.append(write_run(tmp_path / "decay", policy="digits_decay_lr"))
    out = tmp_path / "out"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "digits (grow_batch): test accuracy 97.10 ± 0.10 %, 426 of 426 updates" in told
    assert "digits_decay_lr (decay_lr): test accuracy 97.00 %, 899 of 899 updates" in told
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 4
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    assert html.count("5.00 %") == len(runs)  # of the time each waited for data
    assert html.count("1 samples were left out; they are listed in left_out.*.txt.") >= len(runs)
    assert len(list(out.glob("*.png"))) >= 4


def test_a_run_that_stopped_and_skipped_is_told_as_it_is(tmp_path, capsys):
    run = write_run(tmp_path / "run", updates=100, nan_at=40)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "100 of 426 updates" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "not JSON\n"])
def test_a_folder_that_is_no_run_is_named(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    arguments = type("Arguments", (), {"runs": [folder], "out": tmp_path / "out"})
    with pytest.raises(UserError, match=str(folder)):
        report.main(arguments)
