"""The report: one self-contained file that says what runs did, and what is wrong with a folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from written_runs import write_run

from hvd_lbt import report
from hvd_lbt.cli import main
from hvd_lbt.errors import UserError
from hvd_lbt.report.rank_strip import strip
from hvd_lbt.report.runs import read_run


def test_runs_are_laid_over_each_other_in_one_file(tmp_path, capsys):
    runs = [write_run(tmp_path / f"grow{seed}", seed=seed) for seed in range(3)]
    runs.append(write_run(tmp_path / "decay", policy="digits_decay_lr"))
    out = tmp_path / "out"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "digits (grow_batch): test accuracy 97.10 ± 0.10 %, 426 of 426 updates" in told
    assert "digits_decay_lr (decay_lr): test accuracy 97.00 %, 899 of 899 updates" in told
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 4
    own = html.replace(get_plotlyjs(), "")
    assert "http://" not in own
    assert "https://" not in own
    assert " src=" not in own.replace(' src="data:', "")
    assert "href=" not in own
    assert html.count("5.00 %") == len(runs)  # of the time each waited for data
    assert html.count("1 samples were skipped; RUN/skipped_samples.*.txt lists them.") >= len(runs)
    assert len(list(out.glob("*.png"))) >= 4
    # both groups have the milestones of digits; only the growing one goes beyond N/10
    assert html.count("is above a tenth of the 1,437 training samples") == 1


def test_a_run_that_stopped_and_skipped_is_told_as_it_is(tmp_path, capsys):
    run = write_run(tmp_path / "run", updates=100, nan_at=40)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "100 of 426 updates" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "not JSON\n"])
def test_a_folder_that_is_no_run_is_named(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    words = {"runs": [folder], "out": tmp_path / "out", "published": False}
    arguments = type("Arguments", (), words)
    with pytest.raises(UserError, match=str(folder)):
        report.main(arguments)


def with_ranks(run, *, hosts=("a", "b", "c"), damaged=False):
    """Add to a written run what its ranks took: rank 1 is 1.4 times as slow from update 40."""
    file = run / "metrics.jsonl"
    lines = list(map(json.loads, file.read_text().splitlines()))
    lines[0]["hosts"] = list(hosts)
    for first in range(0, 80, 20):
        slow = 0.14 if first >= 40 else 0.1
        parts = {"compute": [0.1, slow, 0.1], "data": [0.0] * 3, "sums": [0.1] * 3}
        parts["delayed"] = [0.0] * (2 if damaged else 3)
        lines.append({"event": "ranks", "first_update": first, "updates": 20, **parts})
    slow = {"update": 55, "rank": 1, "host": hosts[1], "ratio": 1.4, "cause": "compute"}
    lines.append({"event": "slow_rank", **slow, "excess": 0.04, "ended": False})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_ranks_over_time_are_drawn_and_the_slow_one_is_named(tmp_path, capsys):
    evil = "</script><b>host</b>"
    run = with_ranks(write_run(tmp_path / "run"), hosts=("a", evil, "c"))
    found = strip(read_run(run))
    assert found.labels == ["0 a", f"1 {evil}", "2 c"]
    assert found.edges.tolist() == [0, 20, 40, 60, 80]
    assert np.allclose(found.ratios, [[1, 1, 1, 1], [1, 1, 1.4, 1.4], [1, 1, 1, 1]])
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "rank 1 on </script><b>host</b> from update 55 (1.4 × the others, in forward and " in (
        capsys.readouterr().out
    )
    assert (tmp_path / "out" / "ranks.png").stat().st_size > 5000
    html = (tmp_path / "out" / "report.html").read_text()
    assert 'id="figure-ranks"' in html
    assert evil not in html


def draw_only(monkeypatch, *names):
    """Leave out the other pictures, which tests above draw."""
    drawn = {name: report.PICTURES[name] for name in names}
    monkeypatch.setattr(report, "PICTURES", drawn)


def test_lines_of_ranks_that_do_not_fit_together_are_counted(tmp_path, capsys, monkeypatch):
    draw_only(monkeypatch, "ranks.png")
    run = with_ranks(write_run(tmp_path / "run"), damaged=True)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "4 lines are damaged" in capsys.readouterr().out
    assert not (tmp_path / "out" / "ranks.png").exists()


def test_of_many_ranks_those_that_were_slow_are_shown(tmp_path):
    rows = [1.0] * 1000
    rows[777] = 1.5
    line = {"first_update": 0, "updates": 5, "compute": rows, "data": [0.0] * 1000}
    run = replace(read_run(write_run(tmp_path / "run")), ranks=[line])
    found = strip(run)
    assert "777" in found.labels
    assert (len(found.labels), found.left_out) == (48, 952)


def test_the_estimate_after_a_fifth_of_the_run_is_judged(tmp_path, capsys, monkeypatch):
    draw_only(monkeypatch)
    run = write_run(tmp_path / "run")
    lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    updates = [line for line in lines if line["event"] == "update"]
    for number, line in enumerate(updates, start=1):  # one second each, said to take 1.1
        line |= {"seconds": 1.0 * number, "seconds_left": 1.1 * (len(updates) - number)}
    end = {"reason": "finished", "update": 426, "seconds": 426.0, "peak_memory_bytes": 1}
    lines.append({"event": "end", **end})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "time left after 20% of the run: 340.0 s; predicted 374.0 s (+10.0%), by" in said
