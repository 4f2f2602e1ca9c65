"""What real ranks sum in a training: gradients and one small message an update, and no more."""

import json
import re
from pathlib import Path

from trainings import events

COUNTING = Path(__file__).with_name("counting_sums.py")
SETTINGS = (
    *("data.train_samples=1437", "data.cache_on_device=true", "run.noise_every=0"),
    *("schedule.global_batch=240", "schedule.epochs=2", "run.loggers=[]"),
)


def test_each_rank_sums_gradients_and_one_small_message_an_update(ranks, tmp_path):
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    out = tmp_path / "run"
    output = ranks(3, COUNTING, "train", "digits_perceptron", "--out", out, *words)
    made = [json.loads(text) for text in re.findall(r"sums: (\{.*?\})", output)]
    assert len(made) == 3
    assert made[0] == made[1] == made[2]
    updates = len(events(out, "update"))
    assert updates == 12
    often = {name: count for name, count in made[0].items() if count > 1}
    flags = [name for name in often if ".flags." in name]
    assert often == {"gradient.0": updates, flags[0]: updates}
    assert len(flags) == 1
