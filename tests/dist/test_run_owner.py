"""A second training in the folder of a running one ends before any work, whatever began it."""

from pathlib import Path


def train(out: Path, epochs: int) -> list[str]:
    settings = ("model.width=4", f"schedule.epochs={epochs}", "schedule.milestones=[]")
    words = ["-m", "hvd_lbt", "train", "digits", "--out", str(out), "--resume"]
    return words + [word for setting in settings for word in ("--set", setting)]


def test_a_second_training_is_refused_until_the_first_is_gone(start, tmp_path):
    first = start(2, *train(tmp_path, epochs=900))
    first.until_logged(tmp_path, '"event": "update"')
    metrics = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        ended = start(number, *train(tmp_path, epochs=900)).wait()
        assert ended.code == 2, ended.output
        (line,) = [line for line in ended.output.splitlines() if line.startswith("hvd_lbt: ")]
        assert f"--out {tmp_path}: the run is owned by training, pid " in line
        assert "(its lock is held)" in line
    assert metrics.read_text().count('"event": "run"') == 1
    first.kill()
    first.wait()
    after = start(1, *train(tmp_path, epochs=900))
    after.until(lambda: metrics.read_text().count('"event": "run"') == 2)
    after.kill()
    assert f"{tmp_path}: taken over from training, pid " in after.wait().output
