"""The files of a run on disks that are full, or in whose place something else lies."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from small_disk import small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_lbt import append_file
from hvd_lbt.append_file import AppendFile
from hvd_lbt.checkpoint import open_run
from hvd_lbt.errors import SampleError, UserError
from hvd_lbt.log.run_log import RunLog
from hvd_lbt.log.tensorboard import EventFile
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.world import World

RECIPE = load_recipe("digits")


def grow(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def log_of(out: Path) -> RunLog:
    return RunLog(out, World(), make_plan(RECIPE.schedule, 1000), 0)


def train(log: RunLog, updates: range) -> None:
    noise = torch.ones(2)
    reducer = {"wire_scale": 1.0, "underflow": 0.0, "overflows": 0, "skipped": 0}
    for number in updates:
        update = log.plan.at(number)
        values = {"reducer": reducer, "noise": noise, "times": torch.ones(1, 4)}
        log.update(update, torch.ones(3), data_wait=0.0, **values)
        log.flush()


@pytest.mark.parametrize("source", ["parts", "differences"])
def test_how_the_gradients_noise_was_measured_is_marked(tmp_path, source, monkeypatch):
    scalars = []
    monkeypatch.setattr(RunLog, "_log", lambda self, update, values: scalars.append(values))
    log = log_of(tmp_path / "run")
    values = {
        "reducer": {"wire_scale": 1.0, "underflow": 0.0, "overflows": 0, "skipped": 0},
        "times": torch.ones(1, 4),
        "noise_from": source,
        "data_wait": 0.0,
    }
    for number, noise in enumerate(([float("nan")] * 2, [6.0, 2.0])):
        log.update(log.plan.at(number), torch.ones(3), noise=torch.tensor(noise), **values)
    log.flush()
    log.close()
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    told = [(line["gradient_noise"], line["gradient_noise_from"]) for line in lines]
    assert told == [(None, None), (3.0, source)]
    tag = "plan/gradient_noise" + ("_differences" if source == "differences" else "")
    assert scalars[1][tag] == 3.0
    assert len([key for key in scalars[1] if "gradient_noise" in key]) == 1


def test_a_full_log_disk_ends_no_training_and_loses_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    with small_disk(out, "32k"):
        log = log_of(out)
        train(log, range(60))  # about 500 bytes each, and as much for TensorBoard
        said = capsys.readouterr().out
        for name in ("metrics.jsonl", "events.out"):
            (line,) = [line for line in said.splitlines() if name in line]
            assert "cannot be written (No space left on device). Training continues" in line
        grow(out, "4m")
        train(log, range(60, 62))
        log.close()
        said = capsys.readouterr().out
        assert "metrics.jsonl is written again: " in said
        assert "dropped" not in said
        lines = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
        assert [line["update"] for line in lines] == [*range(62)]
        board = EventAccumulator(str(out / "tensorboard"))
        board.Reload()
        assert [event.step for event in board.Scalars("train/loss")] == [*range(62)]


def test_a_disk_that_stays_full_is_said_with_the_number_of_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(append_file, "KEPT_BYTES", 4096)
    out = tmp_path / "run"
    with small_disk(out, "8k"):
        file = AppendFile(out / "log", print)
        for number in range(3000):
            file.append(f"{number}\n".encode())
            file.flush()
        on_disk = (out / "log").read_bytes()
        assert len(on_disk) <= 8192
        file.close()
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 2
        missing = 3000 - on_disk.count(b"\n")
        assert said[1] == f"{out}/log lacks {missing:,} records that could not be written."


def test_records_stay_whole_where_a_write_is_cut_short(tmp_path, monkeypatch, capsys):
    write, calls = os.write, 0

    def short(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", short)
    monkeypatch.setattr(append_file, "KEPT_BYTES", 200)
    file = AppendFile(tmp_path / "log", print)
    records = [f"record {number:04}\n".encode() for number in range(100)]
    for record in records:
        file.append(record)
        file.flush()
    monkeypatch.undo()
    file.flush()
    written = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    assert set(written) < set(records)
    assert written == sorted(written)
    assert f"{100 - len(written):,} were dropped" in capsys.readouterr().out
    file.close()


def test_tensorboard_reads_our_events_as_those_of_a_resumed_run(tmp_path):
    first = EventFile(tmp_path, 0, print)
    for step in range(5):
        first.add_scalar("train/loss", step / 2, step)
    first.close()
    second = EventFile(tmp_path, 3, print)
    second.add_scalar("train/loss", 9.0, 3)
    second.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (0, 0.0),
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


def test_half_a_line_of_a_killed_run_is_ended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "upd')
    log = log_of(tmp_path)
    log.event("eval")
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"event": "upd\n{"event": "eval"')


def begin(out: Path) -> RunLog:
    open_run(out, RECIPE, {}, resume=True)
    return log_of(out)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", Path.mkdir),
        ("metrics.jsonl", os.mkfifo),
        ("recipe.yaml", Path.mkdir),
        ("checkpoints", Path.touch),
        ("checkpoints", os.mkfifo),
        ("tensorboard", Path.touch),
        ("tensorboard", os.mkfifo),
    ],
)
def test_something_else_in_the_place_of_a_file_is_named_before_any_work(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError) as refused:
        begin(tmp_path)
    assert f"{tmp_path / name} " in str(refused.value)
    assert "start again" in str(refused.value)


def test_a_sample_that_cannot_be_listed_is_printed(tmp_path, capsys):
    log = log_of(tmp_path)
    (tmp_path / "skipped_samples.0.txt").mkdir()
    for _ in range(2):
        log.skipped_sample(SampleError("image 7 is broken"))
    assert capsys.readouterr().out.count("(Is a directory): image 7 is broken") == 1
    log.close()


def test_an_output_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, capsys):
    log = log_of(tmp_path)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log.progress.console, "print", full)
    train(log, range(2))
    log.end("finished", 2)
    assert capsys.readouterr().err.count("standard output cannot be written (No space left") == 1
    assert '"event": "end"' in (tmp_path / "metrics.jsonl").read_text()
