"""A small study end to end: real trainings in real workers, resumed, not trained twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_lbt.errors import UserError
from hvd_lbt.studies.imagenet_schedules import GROWN
from hvd_lbt.studies.pictures import draw_curves
from hvd_lbt.studies.published import STUDIES, judge_fewer_updates
from hvd_lbt.studies.trainings import Arm, Digits, Study, run_study

SHORT = ("schedule.epochs=2", "run.eval_every=1", "data.train_samples=500")


def arm(name: str, *overrides: str) -> Arm:
    return Arm(
        name=name,
        label=name,
        recipe="digits_perceptron",
        overrides=(*SHORT, *overrides),
        data=Digits(train_samples=500),
    )


STUDY = Study(
    name="small",
    scale="laptop",
    title="A small study",
    claim="Larger batches have fewer updates.",
    setting="Nothing.",
    arms=(arm("small_batch"), arm("large_batch", "schedule.global_batch=32")),
    seeds=(0, 1),
    draw=draw_curves,
    judge=judge_fewer_updates,
)


def metrics(out: Path) -> dict[str, bytes]:
    return {
        file.parent.name: file.read_bytes() for file in sorted(out.glob("small/*/metrics.jsonl"))
    }


def test_a_study_trains_what_is_missing_and_makes_one_report(tmp_path, capfd):
    sentence = run_study(STUDY, tmp_path, data=None, jobs=2, launcher=[])
    told = capfd.readouterr().out
    assert "small: 4 trainings, 0 of them are done." in told
    assert len(re.findall(r"^(small|large)_batch-[01]: test accuracy \d", told, re.M)) == 4
    found = json.loads((tmp_path / "small.json").read_text())
    assert [arm["updates"] for arm in found["arms"]] == [63, 32]
    assert [len(arm["finals"]) for arm in found["arms"]] == [2, 2]
    assert all(accuracy > 60 for arm in found["arms"] for accuracy in arm["finals"])
    assert "small_batch 63 (" in sentence
    page = (tmp_path / "small.md").read_text()
    assert sentence.partition(". ")[2] in page
    assert (tmp_path / "small.png").stat().st_size > 10_000

    # One run lost, one cut short: the others are left as they are.
    before = metrics(tmp_path)
    shutil.rmtree(tmp_path / "small/small_batch-0")
    cut = tmp_path / "small/large_batch-1/metrics.jsonl"
    cut.write_bytes(b"".join(cut.read_bytes().splitlines(keepends=True)[:-1]))
    shutil.rmtree(tmp_path / "small/large_batch-1/checkpoints")
    again = run_study(STUDY, tmp_path, data=None, jobs=1, launcher=[])
    assert "4 trainings, 2 of them are done." in capfd.readouterr().out
    after = metrics(tmp_path)
    assert {name for name in before if before[name] == after[name]} == {
        "small_batch-1",
        "large_batch-0",
    }
    assert again == sentence  # the same numbers from the same seeds

    other = replace(STUDY, arms=(arm("small_batch", "schedule.lr=0.3"), STUDY.arms[1]))
    with pytest.raises(
        UserError, match=r"small_batch-0 was trained with other settings: schedule.lr"
    ):
        run_study(other, tmp_path, data=None, jobs=1, launcher=[])


def test_a_signal_stops_the_study_and_the_trainings_are_saved(tmp_path):
    words = [sys.executable, "-m", "hvd_lbt", "study", "fewer_updates", "--out", str(tmp_path)]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    process = subprocess.Popen(
        [*words, "--jobs", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    signal.signal(signal.SIGINT, ignored)
    run = tmp_path / "fewer_updates/decay_lr-0"
    deadline = time.monotonic() + 100
    while not (
        (run / "metrics.jsonl").is_file()
        and '"event": "update"' in (run / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "Stopped. The same command continues from here." in told
    assert list((run / "checkpoints").glob("*.pt"))
    assert '"reason": "stopped"' in (run / "metrics.jsonl").read_text()


def test_imagenets_schedules_run_in_small(tmp_path):
    """Every schedule and every batch of imagenet_schedules, on the data that a network labels."""
    full = STUDIES["imagenet_schedules"]["smoke"]
    names = ("decay_lr", "warm_up", "constant", *GROWN, "g1-b8192", "g1-b640583")
    few = replace(full, arms=tuple(arm for arm in full.arms if arm.name in names))
    sentence = run_study(few, tmp_path, data=None, jobs=2, launcher=[])
    assert sentence.startswith("The claim is undecided.")  # one seed cannot decide
    found = json.loads((tmp_path / "imagenet_schedules_smoke.json").read_text())
    finals = {arm["name"]: arm["finals"][0] for arm in found["arms"]}
    assert finals["decay_lr"] > finals["constant"] + 3
    assert finals["g1-b8192"] > finals["g1-b640583"] + 10
    page = (tmp_path / "imagenet_schedules_smoke.md").read_text()
    assert "`hvd_lbt study imagenet_schedules --scale smoke`." in page
