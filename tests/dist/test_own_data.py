"""Copies of the data on two nodes that differ end the run at once; a resume on other data too."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from trainings import last_state

from hvd_lbt.data.convert import convert

OWN_DATA = Path(__file__).with_name("own_data.py")
TINY = ("model.width=4", "schedule.epochs=1", "schedule.milestones=[]", "layout.micro_batch=8")
TINY += ("schedule.global_batch=8", "layout.ghost_batch=4", "run.noise_every=0")


def write(data: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for number in range(count):
            file = data / split / f"class {number % 2}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return data


def test_other_copies_of_the_data_are_refused_by_name(start, tmp_path):
    for rank in range(2):
        write(tmp_path / str(rank))
    words = ["train", "digits", "--data", tmp_path, "--out", tmp_path / "run"]
    words += [word for setting in TINY for word in ("--set", setting)]
    assert (done := start(2, OWN_DATA, *words).wait()).code == 0, done.output

    moved = tmp_path / "1/train/class 0/00.png"
    moved.rename(tmp_path / "1/train/class 1/00.png")
    words[words.index("--out") + 1] = tmp_path / "other run"
    ended = start(2, OWN_DATA, *words).wait()
    assert ended.code != 0
    assert "--data is not the same on all ranks: rank 1 on " in ended.output
    assert "in train: the labels, the files. Copy the data again" in ended.output
    assert not (tmp_path / "other run/metrics.jsonl").exists()

    words[words.index("--out") + 1] = tmp_path / "run"
    words[words.index("--data") + 1] = tmp_path / "1"
    ended = start(1, "-m", "hvd_lbt", *words, "--resume").wait()
    assert ended.code != 0
    assert (
        "was trained on other data: train: the labels, the files are not the same" in ended.output
    )


def test_a_python_data_set_and_staged_shards_train_as_their_files_do(start, tmp_path, monkeypatch):
    """On two ranks to the bit; ranks with other items are refused by name."""
    monkeypatch.chdir(OWN_DATA.parent)
    data, shards, local = tmp_path / "data", tmp_path / "shards", tmp_path / "local"
    monkeypatch.setenv("FOLDER", str(write(data)))
    convert(data, shards, form="webdataset", samples_per_shard=3)
    local.mkdir()
    words = ["-m", "hvd_lbt", "train", "digits"]
    words += [word for setting in TINY for word in ("--set", setting)]
    states = []
    for given in (
        ["--data", data],
        ["--data", "python_data:load"],
        ["--data", shards, "--set", f"data.stage={local}"],
    ):
        out = tmp_path / f"runs/{len(states)}"
        ended = start(2, *words, *given, "--out", out).wait()
        assert ended.code == 0, ended.output
        states.append(last_state(out)["model"])
    for state in states[1:]:
        for name, weights in states[0].items():
            assert torch.equal(weights, state[name]), name
    told = f"8 shards are read from {local}; 0.1 MiB are copied there now.".replace(" ", "")
    assert "".join(ended.output.split()).count(told) == 1  # lines are as wide as the terminal
    assert len(list(local.glob("*/*/t*/*.tar"))) == 8

    monkeypatch.setenv("MIXED", "1")
    out = tmp_path / "runs/mixed"
    ended = start(2, *words, "--data", "python_data:load", "--out", out).wait()
    assert ended.code != 0
    assert "--data is not the same on all ranks: rank 1 on " in ended.output
    assert "in train: the files" in ended.output
