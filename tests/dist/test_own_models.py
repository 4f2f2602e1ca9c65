"""A network of one's own, with dropout, on real ranks: the same on any number of them."""

import json
import shutil

import torch
from own_nets import smooth
from trainings import ROUNDING, difference, events, last_state

from hvd_lbt.checkpoint import checkpoint_files
from hvd_lbt.cli import main

SETTINGS = (
    "model.name=tests.dist.own_nets:smooth",
    "model.arguments={functional: false}",
    "data.image_size=8",  # as the files are, for cache_on_device, which needs no DALI
    "data.cache_on_device=true",
    "schedule.epochs=0.35",  # 11 updates of 32 or 64, and a last one
    "schedule.lr=0.02",
    "schedule.milestones=[{epoch: 0.2, factor: 2}]",
    "wire.form=fp32",
    "run.keep_checkpoints=9",
)


def train(out, *settings, resume=False):
    words = ["-m", "hvd_lbt", "train", "digits", "--out", out]
    words += [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return [*words, "--resume"] if resume else words


def test_dropout_is_the_same_on_any_number_of_ranks_and_after_a_resume(ranks, tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    ranks(1, *train(one))
    ranks(3, *train(three, "layout.micro_batch=16"))
    assert difference(one, three) < ROUNDING
    first, last = checkpoint_files(one / "checkpoints")
    (two / "checkpoints").mkdir(parents=True)
    for file in (first, first.with_name(f"{first.name}.sha256")):
        shutil.copy(file, two / "checkpoints")
    ranks(2, *train(two, resume=True))
    assert events(two, "run")[0]["resumed_at_update"] == int(first.stem[7:])
    assert difference(one, two) < ROUNDING

    # what was trained is evaluated by the same name, and fits the original network
    result = json.loads(ranks(1, "-m", "hvd_lbt", "evaluate", last).splitlines()[-1])
    assert result["top1"] == events(one, "eval")[-1]["top1"]
    assert main(["export", str(last), "--out", str(tmp_path / "weights.pth")]) == 0
    smooth(10).load_state_dict(torch.load(tmp_path / "weights.pth"), strict=True)
    assert last_state(one)["recipe"]["model"]["arguments"] == {"functional": False}
