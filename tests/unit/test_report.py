"""The report: one self-contained file that says what runs did, and what is wrong with a folder."""

import pytest
from plotly.offline import get_plotlyjs
from written_runs import write_run

from hvd_lbt import report
from hvd_lbt.cli import main
from hvd_lbt.errors import UserError


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
