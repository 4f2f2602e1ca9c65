"""What a report says first, the colours of its groups, and how many points it draws."""

import json

import numpy as np
from written_runs import write_run

from hvd_lbt.report.colours import FREE, assign
from hvd_lbt.report.curves import AXES, Band, share_from_differences
from hvd_lbt.report.figures import FIGURES, POINTS, _points, gradient_noise
from hvd_lbt.report.pictures import draw_schedule
from hvd_lbt.report.runs import group_runs, read_run
from hvd_lbt.report.summary import duration, summarise


def summary_of(*folders):
    return summarise(group_runs([read_run(folder) for folder in folders]))


def edit(folder, change):
    """Each line of a run's metrics as `change` returns it; None takes it out."""
    file = folder / "metrics.jsonl"
    lines = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    return folder


def twice_as_fast(line):
    return line | {"images_per_second": 1000.0} if line["event"] == "update" else line


def test_two_runs_are_compared_with_the_decaying_lr_whatever_the_order(tmp_path):
    grow = edit(write_run(tmp_path / "grow", seed=1), twice_as_fast)
    decay = write_run(tmp_path / "decay", policy="digits_decay_lr")
    for folders in ((grow, decay), (decay, grow)):
        summary = summary_of(*folders)
        assert summary.sentences == [
            ("digits_decay_lr (decay_lr): 899 updates in 57.5 s, final test accuracy 97.00 %."),
            (
                "digits (grow_batch), against digits_decay_lr (decay_lr): 426 updates instead of "
                "899 (53% fewer); 28.7 s instead of 57.5 s (50% less); final test accuracy "
                "97.10 % instead of 97.00 % (+0.10 points)."
            ),
        ]
        assert any(note.startswith("One run each: ") for note in summary.notes)


def test_seeds_are_averaged_and_a_worse_run_is_called_so(tmp_path):
    grow = [write_run(tmp_path / f"grow{seed}", seed=seed) for seed in range(3)]

    def slower(line):
        return line | {"images_per_second": 250.0} if line["event"] == "update" else line

    grow = [edit(run, slower) for run in grow]
    decay = write_run(tmp_path / "decay", policy="digits_decay_lr", seed=2)
    summary = summary_of(decay, *grow)
    assert "115 s instead of 57.5 s (100% more)" in summary.sentences[1]
    assert "97.10 % (mean of 3 runs) instead of 97.20 % (-0.10 points)" in summary.sentences[1]
    assert not any(note.startswith("One run each: ") for note in summary.notes)


def test_one_run_is_compared_with_the_plan_and_says_that_it_is_planned(tmp_path):
    sentence = summary_of(write_run(tmp_path / "grow")).sentences[1]
    assert "the same schedule has 899 updates" in sentence
    assert "53% fewer (planned, not trained)" in sentence
    assert len(summary_of(write_run(tmp_path / "decay", policy="digits_decay_lr")).sentences) == 1


def test_an_unfinished_run_is_not_compared(tmp_path):
    grow = write_run(tmp_path / "grow", updates=100)
    decay = write_run(tmp_path / "decay", policy="digits_decay_lr")
    assert summary_of(grow).sentences == ["digits (grow_batch): 100 of 426 updates are done."]
    summary = summary_of(grow, decay)
    assert len(summary.sentences) == 1
    assert "digits (grow_batch): no run is finished" in summary.notes[0]


def test_what_else_differs_is_named_and_so_are_updates_without_a_time(tmp_path):
    def elsewhere(line):
        if line["event"] == "run":
            line["recipe"]["run"]["precision"] = "bf16"
            return line | {"world_size": 8}
        return None if line.get("update") in (5, 6) and line["event"] == "update" else line

    grow = edit(write_run(tmp_path / "grow"), elsewhere)
    notes = summary_of(grow, write_run(tmp_path / "decay", policy="digits_decay_lr")).notes
    assert "The groups differ in more than the schedule: run.precision, workers." in notes
    assert "digits (grow_batch): 2 updates have no line, so its time is too short." in notes


def test_a_run_that_was_not_evaluated_has_no_accuracy(tmp_path):
    grow = write_run(tmp_path / "grow")
    edit(grow, lambda line: None if line["event"] == "eval" else line)
    summary = summary_of(grow, write_run(tmp_path / "decay", policy="digits_decay_lr"))
    assert "final test accuracy not evaluated." in summary.sentences[1]


def test_a_policy_has_its_colour_in_any_order():
    assert assign(["grow_batch", "decay_lr"]) == [(1, 0), (0, 0)]
    assert assign(["decay_lr", "hybrid", "grow_batch"]) == [(0, 0), (2, 0), (1, 0)]
    many = assign(["grow_batch"] * 6 + ["decay_lr", "unknown"])
    assert many[0] == (1, 0)
    free = len(FREE)
    assert [place for place, _ in many[1 : 1 + free]] == list(FREE)
    assert many[1 + free] == (FREE[0], 1)
    assert many[6] == (0, 0)
    assert len(set(many)) == len(many)


def test_a_curve_of_very_many_points_is_thinned_and_keeps_its_end():
    values = np.arange(156_250.0)
    band = Band(**dict.fromkeys((*AXES, "mean", "low", "high"), values))
    points = _points(band)
    assert len(points) == POINTS
    assert (points[0], points[-1]) == (0, len(values) - 1)


def test_curves_have_one_x_for_each_axis(tmp_path):
    runs = [read_run(write_run(tmp_path / f"grow{seed}", seed=seed)) for seed in range(2)]
    groups = group_runs(runs)
    figures = [figure for make in FIGURES if (figure := make(groups))]
    assert len(figures) >= 9
    for figure in figures:
        assert figure.traces
        for trace in figure.traces:
            assert list(trace["x"]) == list(AXES)
            assert {len(x) for x in trace["x"].values()} == {len(trace["y"])}


def test_the_share_of_the_noise_that_is_from_differences_is_told(tmp_path):
    folder = write_run(tmp_path / "run", updates=60)  # the noise is measured from update 20 on

    def mark(line):
        source = "differences" if line.get("update", 0) < 30 else "parts"
        return line | {"gradient_noise_from": source} if line["event"] == "update" else line

    edit(folder, mark)
    groups = group_runs([read_run(folder)])
    assert share_from_differences(groups) == 0.25
    assert "25% of it is from differences" in gradient_noise(groups).caption
    draw_schedule(groups)
    assert share_from_differences(group_runs([read_run(write_run(tmp_path / "old"))])) == 0


def test_durations_read_as_people_say_them():
    assert [duration(seconds) for seconds in (0.5, 90, 600, 90_000)] == [
        "0.5 s",
        "90 s",
        "10 minutes",
        "25 hours",
    ]
