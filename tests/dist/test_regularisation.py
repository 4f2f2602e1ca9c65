"""Label smoothing, mixup, CutMix, clipping, the average of the weights and two image sizes, all in
one training.
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import torch
from trainings import EXACT, ROUNDING, difference, events, last_state, train

from hvd_lbt import export

ALL = (
    *EXACT,
    "loss={label_smoothing: 0.1, mixup: 0.4, cutmix: 1.0}",
    "ema.decay=0.9",
    "optimizer.clip_norm=0.5",
    "schedule.epochs=0.5",
    "data.image_size=12",
    "schedule.milestones=[{epoch: 0.2, image_size: 16}, {epoch: 0.3, factor: 4}]",
)


def test_they_are_the_same_on_other_ranks_micro_batches_and_after_a_resume(ranks, tmp_path, capsys):
    one, three = tmp_path / "1", tmp_path / "3"
    output = ranks(1, *train(*ALL, out=one, smooth=True))
    assert "averaged weights: top-1" in output
    sizes = [stage["image_size"] for stage in events(one, "run")[0]["plan"]["stages"]]
    assert sizes == [None, 16, 16]
    # the checkpoint after the first stage, resumed on three ranks with another micro-batch
    shutil.copytree(one, three)
    _, *others = sorted((three / "checkpoints").glob("update-*.pt"))
    assert len(others) == 2
    for file in others:
        file.unlink()
    micro = "layout.micro_batch=16"
    ranks(3, *train(*ALL, micro, out=three, resume=True, smooth=True))
    assert difference(one, three) < ROUNDING
    averages = [last_state(run)["ema"]["averages"] for run in (one, three)]
    for name, value in averages[0].items():
        assert torch.allclose(value.float(), averages[1][name].float(), rtol=1e-3, atol=1e-5), name
    result = events(one, "eval")[-1]
    assert result["ema_loss"] != result["loss"]
    assert last_state(one)["best_top1"] == result["ema_top1"]

    file = sorted((one / "checkpoints").glob("update-*.pt"))[-1]
    smooth = Path(__file__).with_name("smooth.py")
    again = json.loads(ranks(1, smooth, "evaluate", file).splitlines()[-1])
    for key in ("top1", "ema_top1"):
        assert abs(again[key] - result[key]) < 0.005  # one or two of 360, where two scores are tied
    for which, wanted in ((None, averages[0]), ("model", last_state(one)["model"])):
        out = tmp_path / f"{which}.pth"
        assert export.main(Namespace(checkpoint=file, out=out, weights=which)) == 0
        assert ("moving average" in capsys.readouterr().out) == (which is None)
        for name, value in torch.load(out, weights_only=True).items():
            assert torch.equal(value, wanted[name]), name
