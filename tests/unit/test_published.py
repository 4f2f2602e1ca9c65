"""A run among the published points: what it reached, and which runs are no such run."""

import json

import pytest
from written_runs import write_run

from hvd_lbt.errors import UserError
from hvd_lbt.report import write_report
from hvd_lbt.report.published import published_lines, published_points, updates_to
from hvd_lbt.report.runs import read_run


@pytest.fixture
def imagenet_run(tmp_path):
    """A run of the digits, with the network and the number of images of another."""

    def make(name, top1):
        folder = tmp_path / name
        write_run(folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[0]["recipe"]["model"]["name"] = "resnet50"
        lines[0]["plan"]["train_samples"] = 1_281_167
        for place, event in enumerate(e for e in lines if e["event"] == "eval"):
            event["top1"] = top1[min(place, len(top1) - 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_every_point_has_a_source_and_the_numbers_of_the_issue():
    points = published_points()
    assert len(points) == 13
    assert all(point.source and point.reached and point.updates > 1000 for point in points)
    by_batch = {(p.optimizer, p.global_batch): p.updates for p in points}
    assert by_batch["LARS", 65_536] == 1652
    assert by_batch["Nesterov", 32_768] == 2512


def test_a_run_is_drawn_among_them_by_its_first_evaluation_that_reached_the_target(
    imagenet_run, tmp_path
):
    folders = [imagenet_run("good", [0.5, 0.758, 0.7591, 0.77]), imagenet_run("low", [0.5, 0.7])]
    runs = [read_run(folder) for folder in folders]
    assert [updates_to(run) for run in runs] == [150, None]
    _, groups = write_report(folders, tmp_path / "out", published=True)
    assert (tmp_path / "out/published.png").read_bytes()[:4] == b"\x89PNG"
    lines = published_lines(groups)
    assert f"{folders[0]}: 150 updates to top-1 75.9% (measured)" in lines
    assert f"{folders[1]}: top-1 75.9% not reached; best 70.00%" in lines
    assert sum(line.startswith("published: ") for line in lines) == 13


def test_another_network_or_data_set_is_refused(tmp_path):
    write_run(tmp_path / "digits")
    with pytest.raises(UserError, match="trained resnet18 on 1,437 images, and the published poin"):
        write_report([tmp_path / "digits"], tmp_path / "out", published=True)
    assert not (tmp_path / "out").exists()
