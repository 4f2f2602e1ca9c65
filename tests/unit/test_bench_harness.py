"""The benchmarks' harness: nothing is timed that is not equal, and ratios are those of pairs."""

import json
import os

import pytest
import torch

from hvd_lbt.bench.harness import (
    Lines,
    Subject,
    Times,
    check_equal,
    model_recipe,
    speedup,
    time_interleaved,
)
from hvd_lbt.errors import UserError

ONE = torch.tensor([1.0, -4.0])


def test_equal_tensors_pass_and_the_largest_difference_comes_back():
    off = torch.tensor([1.0, -4.0 + 4 * 2.0**-10])
    assert check_equal("x", [ONE, ONE], [ONE, ONE], tolerance=0.0) == 0
    # as a share of the largest magnitude, 4
    assert check_equal("x", [ONE, off], [ONE, ONE], tolerance=2.0**-9) == 2.0**-10


@pytest.mark.parametrize(
    "ours",
    [
        torch.tensor([1.0, -4.1]),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, float("inf")]),
        torch.tensor([0.0, 0.0]),
    ],
)
def test_a_difference_is_an_error_that_names_the_tensor(ours):
    with pytest.raises(AssertionError, match=r"x: tensor 1 is off by .* Nothing is timed"):
        check_equal("x", [ONE, ours], [ONE, ONE], tolerance=1e-3)


def test_a_peer_that_is_not_finite_is_an_error():
    for value in ("nan", "inf"):
        peer = torch.tensor([1.0, float(value)])
        with pytest.raises(AssertionError, match="tensor 0 is off"):
            check_equal("x", [peer], [peer], tolerance=1.0)


def test_zeros_are_compared_by_their_distance():
    zeros = torch.zeros(3)
    assert check_equal("x", [zeros], [zeros], tolerance=0.0) == 0
    with pytest.raises(AssertionError):
        check_equal("x", [torch.tensor([0.0, 0.0, 1e-3])], [zeros], tolerance=1e-4)


def test_another_number_of_tensors_is_an_error():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        check_equal("x", [ONE], [ONE, ONE], tolerance=1.0)


def test_empty_tensors_are_equal():
    assert check_equal("x", [torch.empty(0)], [torch.empty(0)], tolerance=0.0) == 0


def test_the_ratio_is_the_median_over_pairs():
    ours, peer = Times((1.0, 2.0, 4.0)), Times((3.0, 4.0, 4.0))
    # 3, 2 and 1 times as fast; the medians alone would say 4 / 2
    assert speedup(ours, peer) == {"ratio": 2.0, "ratio_quartiles": [1.5, 2.5]}
    # a machine that is slow for a while slows both sides of a pair
    slowed = [Times((1.0, 2.0, 400.0)), Times((3.0, 4.0, 400.0))]
    assert speedup(*slowed) == speedup(ours, peer)


def test_ratios_need_pairs():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        speedup(Times((1.0,)), Times((1.0, 2.0)))


def test_one_repetition_is_its_own_summary():
    assert speedup(Times((2.0,)), Times((3.0,))) == {"ratio": 1.5, "ratio_quartiles": [1.5, 1.5]}
    assert Times((2.0,)).summary() == {
        "ms": 2000.0,
        "ms_best": 2000.0,
        "ms_quartiles": [2000.0, 2000.0],
        "repetitions": 1,
    }


def test_the_summary_has_the_quartiles():
    summary = Times((5.0, 1.0, 2.0, 3.0, 4.0)).summary()
    assert summary["ms"] == 3000
    assert summary["ms_best"] == 1000
    assert summary["ms_quartiles"] == [2000, 4000]


def test_subjects_take_turns_and_each_goes_first():
    order = []
    subjects = {
        "a": Subject(run=lambda: order.append("a"), prepare=lambda: order.append("prepare")),
        "b": lambda: order.append("b"),
    }
    times = time_interleaved(subjects, repetitions=2, warmups=1)
    runs = [name for name in order if name != "prepare"]
    assert runs == ["b", "a", "a", "b", "b", "a"]
    assert order.count("prepare") == 3
    assert [len(times[name].seconds) for name in "ab"] == [2, 2]


def test_only_the_run_is_timed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    subject = Subject(run=lambda: next(clock), prepare=lambda: [next(clock) for _ in range(10)])
    times = time_interleaved({"a": subject}, repetitions=1, warmups=0)
    assert times["a"].seconds == (2,)


def test_lines_say_what_made_them_and_are_appended(tmp_path, capsys):
    file = tmp_path / "new/folder/lines.jsonl"
    for _ in range(2):
        Lines("x", settings={"a": 1.23456789}, path=file).result(case="c", ms=9.87654321)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["event"] for line in written] == ["bench", "result"] * 2
    assert written[0]["settings"] == {"a": 1.2346}
    assert {"versions", "revision", "machine", "time"} <= set(written[0])
    assert written[0]["time"] > 1e9
    assert written[1] == {"event": "result", "bench": "x", "case": "c", "ms": 9.8765}
    assert capsys.readouterr().out == file.read_text()


def test_other_ranks_write_nothing(tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    Lines("x", settings={}, path=file, speaks=False).result(case="c")
    assert capsys.readouterr().out == ""
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_named_before_anything_is_timed(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "file/x"):
        with pytest.raises(UserError, match=rf"^--out {path}: "):
            Lines("x", settings={}, path=path)


def test_a_network_that_is_none_is_named():
    with pytest.raises(UserError, match="--model resnet5: it must be resnet18, "):
        model_recipe("resnet5")
    assert model_recipe("resnet18").name == "resnet18"
