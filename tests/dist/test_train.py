"""Whole runs on real ranks: the update does not know how many there are, and nothing is lost."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from trainings import EXACT, ROUNDING, SMALL, difference, events, last_state, train

from hvd_lbt.data.digits import write_digits
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan


@pytest.fixture(scope="module")
def digits() -> Path:
    return write_digits()


def test_one_two_and_three_ranks_train_the_same_network(ranks, tmp_path):
    # micro-batches of one ghost batch: the noise of the gradient is then told by the same parts,
    # too
    settings = (*EXACT, "layout.micro_batch=16", "run.noise_every=2")
    for number in (1, 2, 3):
        ranks(number, *train(*settings, out=tmp_path / str(number), smooth=True))
    plan = make_plan(load_recipe("digits", SMALL).schedule, 1437)
    for number in (1, 2, 3):
        updates = events(tmp_path / str(number), "update")
        assert [u["update"] for u in updates] == list(range(plan.updates))
        assert [u["global_batch"] for u in updates] == [
            plan.at(index).global_batch for index in range(plan.updates)
        ]
        alone = events(tmp_path / "1", "update")
        for mine, theirs in zip(updates, alone, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=ROUNDING)
            # a difference of squares: the rounding counts some ten times
            for key in ("gradient_variance", "gradient_squared"):
                assert mine[key] == pytest.approx(theirs[key], rel=20 * ROUNDING, abs=1e-3)
        assert sum(u["gradient_noise"] is not None for u in updates) > plan.updates / 2
    assert difference(tmp_path / "1", tmp_path / "2") < ROUNDING
    assert difference(tmp_path / "1", tmp_path / "3") < ROUNDING


def test_stopped_by_a_signal_and_resumed_on_another_number_of_ranks(start, ranks, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks(2, *train(*EXACT, out=whole, smooth=True))

    launch = start(2, *train(*EXACT, out=parts, smooth=True))
    launch.until_logged(parts, '"update", "update": 9,')
    launch.process.send_signal(signal.SIGUSR1)  # mpirun hands it on to the ranks
    ended = launch.wait()
    assert ended.code == 75, ended.output[-4000:]
    done = last_state(parts)["update"]
    assert 10 <= done < 80
    assert f"Stopped after {done} of 80 updates and saved" in ended.output

    ranks(1, *train(*EXACT, out=parts, resume=True, smooth=True))
    assert difference(whole, parts) < ROUNDING
    assert [u["update"] for u in events(parts, "update")] == list(range(80))
    assert [e["reason"] for e in events(parts, "end")] == ["stopped", "finished"]

    ended = start(1, *train(*EXACT, out=parts, resume=True)).wait()
    assert ended.code == 0
    assert f"{parts} is finished: all 80 updates are done." in ended.output


def test_fp16_wire_learns_the_digits_and_evaluate_agrees(ranks, tmp_path):
    run = tmp_path / "run"
    short = ("schedule.epochs=5", "schedule.milestones=[{epoch: 3, factor: 4}]")
    ranks(2, *train(*short, out=run))
    result = events(run, "eval")[-1]
    assert result["samples"] == 360
    assert result["top1"] > 0.95
    file = sorted((run / "checkpoints").glob("*.pt"))[-1]
    for number in (1, 3):
        again = json.loads(ranks(number, "-m", "hvd_lbt", "evaluate", file).splitlines()[-1])
        assert again["samples"] == 360
        assert again["top1"] == result["top1"]
        assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_more_ranks_than_ghost_batches(ranks, tmp_path):
    settings = (*EXACT, "schedule.milestones=[]", "schedule.global_batch=16", "schedule.epochs=0.1")
    ranks(2, *train(*settings, out=tmp_path / "2", smooth=True))
    ranks(1, *train(*settings, out=tmp_path / "1", smooth=True))
    assert difference(tmp_path / "1", tmp_path / "2") < ROUNDING


def test_channels_last_is_only_another_order_of_memory(ranks, tmp_path):
    settings = (*EXACT, "schedule.milestones=[]", "schedule.epochs=0.1")
    ranks(2, *train(*settings, "run.channels_last=true", out=tmp_path / "last", smooth=True))
    ranks(1, *train(*settings, out=tmp_path / "first", smooth=True))
    assert difference(tmp_path / "last", tmp_path / "first") < ROUNDING


def broken_copy(digits: Path, target: Path) -> Path:
    """The digits with one training image cut off; returns that image."""
    shutil.copytree(digits, target)
    image = sorted((target / "train/7").iterdir())[5]
    image.write_bytes(image.read_bytes()[:60])
    return image


def test_an_unreadable_image_is_named_and_ends_all_ranks(start, digits, tmp_path):
    image = broken_copy(digits, tmp_path / "data")
    words = train(*SMALL, data=tmp_path / "data", out=tmp_path / "run")
    ended = start(2, *words, timeout=90).wait()
    assert ended.code == 2
    assert f"hvd_lbt: {image} is no whole image: image file is truncated" in ended.output


def test_bad_samples_are_skipped_alike_on_any_number_of_ranks(ranks, digits, tmp_path):
    data = tmp_path / "data"
    broken = [broken_copy(digits, data), *sorted((data / "train/3").iterdir())[4:6]]
    broken[1].write_bytes(b"")
    broken[2].write_text("no image")
    few = tmp_path / "few"  # two test images, one of them bad
    shutil.copytree(data / "train", few / "train")
    for name in ("3/one.png", "7/two.png"):
        (few / "test" / name).parent.mkdir(parents=True)
        shutil.copy(sorted((digits / "test/3").iterdir())[0], few / "test" / name)
    (few / "test/7/two.png").write_bytes(b"")
    settings = (*EXACT, "schedule.epochs=1", "schedule.milestones=[]", "data.on_bad_sample=skip")
    for number, its_data in ((1, data), (3, few)):
        out = tmp_path / str(number)
        output = ranks(number, *train(*settings, data=its_data, out=out, smooth=True))
        assert sum(update["skipped_samples"] for update in events(out, "update")) == len(broken)
        listed = "".join(file.read_text() for file in out.glob("skipped_samples.*.txt"))
        for file in broken:
            assert listed.count(f"{its_data / file.relative_to(data)} is no whole image") == 1
        assert "samples skipped" in output
    assert difference(tmp_path / "1", tmp_path / "3") < ROUNDING
    assert events(tmp_path / "1", "eval")[-1]["samples"] == 360
    assert events(tmp_path / "3", "eval")[-1]["samples"] == 1  # of two, for three ranks


def test_synthetic_images_train_without_files(ranks, tmp_path):
    settings = (*SMALL, "schedule.epochs=0.2", "schedule.milestones=[]")
    output = ranks(2, *train(*settings, data=Path("synthetic"), out=tmp_path / "run"))
    (end,) = events(tmp_path / "run", "end")
    share = f"{end['data_wait']:.1%} of the training time was spent waiting for data"
    assert share in output


def test_a_resume_with_another_recipe_is_refused_on_all_ranks(start, ranks, tmp_path):
    settings = (*SMALL, "schedule.milestones=[]", "schedule.epochs=0.1")
    out = tmp_path / "run"
    ranks(1, *train(*settings, out=out))
    before = (out / "metrics.jsonl").read_bytes()
    other = train(*settings, "schedule.lr=0.03", out=out, resume=True)
    ended = start(2, *other, timeout=60).wait()
    assert ended.code == 2
    assert f"hvd_lbt: {out} was trained with another recipe: schedule.lr was 0.02, is 0.03." in (
        ended.output
    )
    again = start(1, *train(*settings, out=out)).wait()
    assert again.code == 2
    assert "already holds a run" in again.output
    assert (out / "metrics.jsonl").read_bytes() == before


def test_bad_folders_and_settings_are_one_paragraph(start, digits, tmp_path):
    (tmp_path / "empty/train/a").mkdir(parents=True)
    (tmp_path / "empty/test/a").mkdir(parents=True)
    shutil.copytree(digits, tmp_path / "extra")
    shutil.copytree(digits / "test/0", tmp_path / "extra/test/eleven")
    out = tmp_path / "run"
    cases = [
        (train(data=tmp_path / "nowhere", out=out), "there is no such folder"),
        (train(data=tmp_path / "empty", out=out), "has no images"),
        (train(data=tmp_path / "extra", out=out), "has the class 'eleven'"),
        (train("foo.bar=1", out=out), "foo: there is no such key"),
        (train("schedule.global_batch=0", out=out), "schedule.global_batch: 0 is not allowed"),
        (train("schedule.momentum=1", out=out), "schedule.momentum: 1 is not allowed"),
        (
            train("schedule.milestones=[{epoch: 9, factor: 2}, {epoch: 3, factor: 2}]", out=out),
            "schedule.milestones: their epochs are 9, 3;",
        ),
    ]
    # one on two ranks, the others alone: what differs between them happens before the ranks meet
    for (words, message), number in zip(cases, (2, *[1] * 6), strict=True):
        ended = start(number, *words, timeout=60).wait()
        assert ended.code == 2, ended.output
        told = [line for line in ended.output.splitlines() if line.startswith("hvd_lbt: ")]
        assert len(told) == 1, ended.output
        assert message in told[0]
        assert "Traceback" not in ended.output
    assert [file.name for file in out.iterdir()] == ["owner.lock"]  # nothing of a run


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(ranks, tmp_path):
    out = tmp_path / "run"
    ranks(1, *train(*EXACT, out=out))
    files = sorted((out / "checkpoints").glob("*.pt"))
    assert len(files) >= 2  # after each stage, and after an epoch that was the best so far
    whole = torch.load(files[-1], weights_only=True)["model"]
    files[-1].write_bytes(files[-1].read_bytes()[:-10])
    output = ranks(1, *train(*EXACT, out=out, resume=True))
    assert f"The checkpoint {files[-1]} is damaged" in output
    for name, tensor in last_state(out)["model"].items():
        assert torch.equal(tensor, whole[name]), name
