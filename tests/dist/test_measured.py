"""A batch that grows by measurement: decided once, kept by a resume, replayed on other ranks."""

import json
import shutil
from pathlib import Path

import pytest
from launching import run_ranks
from state_hash import summary
from trainings import ROUNDING, difference, events

from hvd_lbt import checkpoint
from hvd_lbt.growing import FILE

SETTINGS = (
    *("model.width=4", "schedule.epochs=3", "schedule.lr=0.02", "schedule.max_lr=0.08"),
    "schedule.milestones=[{epoch: 1.5, factor: 4}]",
    "schedule.overhead=64",  # so that no time decides
    *("run.keep_checkpoints=99", "wire.form=fp32", "run.eval_every=3"),
)
AFTER_EVERY_UPDATE = ("--set", "run.checkpoint_minutes=0.00001")
PLANNED = ("update", "samples_seen", "global_batch", "lr", "momentum", "noise_scale")


def train(out: Path, *words: str) -> list[str]:
    program = [str(Path(__file__).with_name("smooth.py")), "train", "digits_measured"]
    settings = [word for one in SETTINGS for word in ("--set", one)]
    return [*program, "--out", str(out), *settings, *words]


def planned(out: Path) -> dict[int, list]:
    return {line["update"]: [line[key] for key in PLANNED] for line in events(out, "update")}


def decisions(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("measured")
    run_ranks(2, *train(out, *AFTER_EVERY_UPDATE))
    return out


def test_the_batch_grows_at_the_planned_noise(run):
    head, *made, end = decisions(run)
    assert (head["event"], head["train_samples"], end["reason"]) == ("run", 1437, "finished")
    changes = [one for one in made if one["global_batch"] != one["global_batch_before"]]
    assert len(changes) >= 2
    assert all(one["noise"] is None or one["noise"] > 0 for one in made)
    assert all(one["measurements"] >= 10 for one in made)
    assert all(one["global_batch"] <= 1437 / 10 for one in made)
    seen = 0
    g = 0.02 * 1437 / (32 * 0.1)
    updates = planned(run)
    assert sorted(updates) == list(range(len(updates)))
    for _, after, batch, lr, _, noise_scale in updates.values():
        assert after == seen + batch  # each sample once, in order
        assert noise_scale == pytest.approx(g / (4 if after > 1.5 * 1437 else 1))
        assert lr <= 0.08 * (1 + 1e-6)
        seen = after
    assert seen == 3 * 1437
    batches = [line["global_batch"] for line in events(run, "update")]
    assert [*dict.fromkeys(batches[:-1])] == [32, *(one["global_batch"] for one in changes)]


def test_a_resume_takes_the_decisions_that_were_made(ranks, run, tmp_path):
    changed = [one["update"] for one in decisions(run) if one.get("global_batch", 32) > 32]
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    after = changed[0] + 3  # the second change is still to be decided
    for file in (run / "checkpoints").glob("update-*"):
        if int(file.name[7:15]) <= after:
            shutil.copy(file, out / "checkpoints")
    ranks(2, *train(out, "--resume"))
    assert planned(out) == {at: made for at, made in planned(run).items() if at >= after}
    assert decisions(out)[1:] == decisions(run)[1:]  # the first line has the recipe
    assert summary(out) == summary(run)


def test_a_replay_trains_the_same_updates_to_the_bit_and_on_other_ranks(ranks, run, tmp_path):
    for count in (2, 3, 1):
        out = tmp_path / f"{count}"
        # with other measurements, which decide nothing
        ranks(count, *train(out, "--replay", str(run), "--set", "run.noise_every=7"))
        assert planned(out) == planned(run), count
        assert difference(out, run) < ROUNDING, count
        if count == 2:
            same = ("weights", "momentum", "updates")
            assert {key: summary(out)[key] for key in same} == {
                key: summary(run)[key] for key in same
            }
    replayed = checkpoint.load_newest(tmp_path / "2" / "checkpoints")
    own = checkpoint.load_newest(run / "checkpoints")
    assert replayed["growing"]["decisions"] == own["growing"]["decisions"]
