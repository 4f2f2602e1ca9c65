"""Runs' metrics as training writes them, made without training."""

import json

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
                "skipped_samples": int(index == 3),
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
