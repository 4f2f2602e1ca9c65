"""A rest of one sample, where the feature map is 1×1, on one and two ranks."""

from pathlib import Path

from trainings import ROUNDING, difference, events

SMOOTH = Path(__file__).with_name("smooth.py")


def test_a_rest_of_one_trains_the_same_network_on_any_number_of_ranks(ranks, tmp_path):
    settings = {
        "data.train_samples": 1437,
        # 4 updates of 65 (ghost batches of 32 and 33), and one sample: it joins the last update
        "schedule.epochs": 261 / 1437,
        "schedule.lr": 0.02,
        "schedule.milestones": [],
        "schedule.global_batch": 65,
        "layout.micro_batch": 32,
        "layout.ghost_batch": 32,
        "wire.form": "fp32",
    }
    words = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    for number in (1, 2):
        ranks(number, SMOOTH, "train", "digits_4px", *words, "--out", tmp_path / str(number))
        batches = [e["global_batch"] for e in events(tmp_path / str(number), "update")]
        assert batches == [65, 65, 65, 66]
    assert difference(tmp_path / "1", tmp_path / "2") < ROUNDING
