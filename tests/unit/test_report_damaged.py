"""A report of a damaged or hostile metrics.jsonl: what cannot be used is counted and named."""

import contextlib
import json
import os
import random

import pytest
from odd_files import make_fifo, make_folder, make_socket
from plotly.offline import get_plotlyjs
from written_runs import write_run

from hvd_lbt.cli import main
from hvd_lbt.errors import UserError
from hvd_lbt.report.runs import read_run

HOSTILE = "\x1b]0;x\x07<script>alert(1)</script>\"'[/b]$x_{$\u202e\udcff"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", updates=60)


def append(run, *lines):
    with (run / "metrics.jsonl").open("ab") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")


def changed(run, event, **values):
    """The last line of an event with other values; a value of ... takes the key out."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    record = [line for line in lines if line["event"] == event][-1] | values
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def notes(run):
    return " ".join(read_run(run).notes)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe\x00binary", "it is not UTF-8"),
        ("not JSON", "it is not JSON"),
        ("[" * 1_000_000, "it is not JSON"),
        ('{"a":' * 200_000, "it is not JSON"),
        ("[" * 900 + "]" * 900, "it has no event that a report knows"),
        ("3", "it has no event that a report knows"),
        ("null", "it has no event that a report knows"),
        ('"event"', "it has no event that a report knows"),
        ("[]", "it has no event that a report knows"),
        ("{}", "it has no event that a report knows"),
        ('{"event": 3}', "it has no event that a report knows"),
        ('{"event": ["update"]}', "it has no event that a report knows"),
        ('{"event": "another"}', "it has no event that a report knows"),
        ('{"event": "update", "loss": NaN}', "it is not JSON"),
        ('{"event": "update", "loss": -Infinity}', "it is not JSON"),
        ('{"event": "update", "update": ' + "9" * 5000 + "}", "it is not JSON"),
        ("x" * 2_000_000, "it is longer than 1,048,576 bytes"),
        ('{"event": "update"}', "update: update is missing"),
        ('{"event": "run"}', "run: name is missing"),
    ],
)
def test_lines_that_are_no_event_are_named(run, line, reason):
    before = read_run(run)
    append(run, line)
    after = read_run(run)
    assert after.done == before.done
    assert f"1 line is damaged and left out, wholly or in part (line 64: {reason}" in notes(run)


@pytest.mark.parametrize(
    ("event", "values", "reason"),
    [
        ("update", {"update": -1}, "update: update is -1"),
        ("update", {"update": 1e30}, "update: update is 1e+30"),
        ("update", {"update": 10**30}, "update: update is 1000"),
        ("update", {"update": True}, "update: update is true"),
        ("update", {"update": "3"}, 'update: update is "3"'),
        ("update", {"update": None}, "update: update is null"),
        ("update", {"update": [3]}, "update: update is incomplete"),
        ("update", {"update": 426}, "update 426 after "),
        ("update", {"samples_seen": 10**9}, "update 59 after 1,000,000,000 samples is none of"),
        ("update", {"samples_seen": 1}, "update 59 after 1 samples is none of a plan"),
        ("update", {"samples_seen": 0}, "update: samples_seen is 0"),
        ("update", {"loss": "low"}, 'update: loss is "low"'),
        ("update", {"loss": 1e300}, "update: loss is 1e+300"),
        ("update", {"lr": ...}, "update: lr is missing"),
        ("update", {"lr": -1}, "update: lr is -1"),
        ("update", {"images_per_second": 0}, "update: images_per_second is 0"),
        ("update", {"data_wait": 1.5}, "update: data_wait is 1.5"),
        ("update", {"gradient_noise": "?"}, 'update: gradient_noise is "?"'),
        ("update", {"gradient_noise_from": 3}, "update: gradient_noise_from is 3"),
        ("update", {"skipped_samples": -1}, "update: skipped_samples is -1"),
        ("update", {"time": "now"}, 'update: time is "now"'),
        ("eval", {"top1": 3}, "eval: top1 is 3"),
        ("eval", {"top1": {}}, "eval: top1 is incomplete"),
        ("eval", {"update": 427}, "an evaluation after 427 updates of 426"),
        ("run", {"name": 3}, "run: name is 3"),
        ("run", {"recipe": []}, "run: recipe is incomplete"),
        ("run", {"recipe": {"run": {"seed": "1"}, "schedule": {}}}, "run: recipe is incomplete"),
        ("run", {"plan": {"updates": 3}}, "run: plan is incomplete"),
        ("run", {"plan": {"updates": 3, "train_samples": 1, "stages": []}}, "run: plan is incom"),
        ("run", {"plan": {"updates": 3, "train_samples": 1, "stages": [3]}}, "run: plan is incom"),
        ("run", {"world_size": 0}, "run: world_size is 0"),
        ("run", {"versions": {"torch": 2}}, "run: versions is incomplete"),
        ("run", {"resumed_at_update": "0"}, 'run: resumed_at_update is "0"'),
    ],
)
def test_values_that_cannot_be_are_named(run, event, values, reason):
    append(run, changed(run, event, **values))
    assert f"(line 64: {reason}" in notes(run)


def test_a_recipe_of_very_many_levels_is_incomplete(run):
    deep = {"run": {"seed": 1}, "schedule": {"policy": "x"}}
    for _ in range(500):
        deep = {"a": deep, "run": {"seed": 1}, "schedule": {"policy": "x"}}
    append(run, changed(run, "run", recipe=deep))
    assert "(line 64: run: recipe is incomplete" in notes(run)


def test_only_the_first_of_many_are_named_and_all_are_counted(run):
    append(run, *["?"] * 2000)
    said = notes(run)
    assert "2,000 lines are damaged" in said
    assert "line 68: it is not JSON, …)" in said
    assert "line 69" not in said


def test_half_a_line_before_a_whole_one_is_named_and_the_whole_one_counts(run):
    append(run, '{"event": "update", "upd' + changed(run, "update", update=60, samples_seen=1952))
    assert read_run(run).done == 61
    assert "(line 64: half a line stands before its event)" in notes(run)


def test_the_unfinished_last_line_is_named(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "upd')
    assert "(line 64: it is unfinished)" in notes(run)


def test_updates_with_several_lines_are_counted(run):
    append(run, changed(run, "update"), changed(run, "update"))
    assert "2 updates have several lines" in notes(run)


def _loop(path):
    path.symlink_to(path)


def _gone(path):
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [make_fifo, make_folder, make_socket, _loop, _gone])
def test_what_is_no_file_is_named(tmp_path, monkeypatch, make, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    make(tmp_path / "run/metrics.jsonl")
    with pytest.raises(
        UserError, match=r"run/metrics\.jsonl (is not a regular file|cannot be read)"
    ):
        read_run(tmp_path / "run")
    assert main(["report", "run"]) == 2


def test_the_same_run_twice_is_named(run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(run)
    assert main(["report", str(run), str(tmp_path / "link"), "--out", str(tmp_path / "out")]) == 2
    assert "is the same run as" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/x", "/proc/x"])
def test_a_report_that_cannot_be_written_is_named(run, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["report", "run", "--out", out]) == 2
    assert f"--out {out}: the report can't be written there (" in capsys.readouterr().err


def test_the_files_of_a_report_are_replaced_whatever_they_were(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "loss.png")
    os.mkfifo(out / "report.html")
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*"))


def test_names_are_text_on_the_terminal_and_on_the_page(tmp_path, capsys):
    folder = tmp_path / "\x1b[2J<script>'[b]"
    write_run(folder, updates=60)
    record = json.loads(changed(folder, "run"))
    record |= {"name": HOSTILE, "versions": {HOSTILE: HOSTILE}, "revision": HOSTILE}
    record["recipe"]["schedule"]["policy"] = HOSTILE
    lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]
    end = json.dumps(
        {"event": "end", "reason": HOSTILE, "update": 60, "seconds": 1, "peak_memory_bytes": 1}
    )
    text = "\n".join([json.dumps(record), *lines, end, ""])
    (folder / "metrics.jsonl").write_text(text)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable()
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert page.count("<script") == 3  # the data, Plotly, and what draws the figures
    assert page.count("</script") == 3
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.replace("\n", "").isprintable()


def test_any_name_can_be_drawn(tmp_path):
    folders = []
    for place, name in enumerate(["_hidden", "$", "$\\frac{$", "字", "x" * 100_000, "", "{0}%s"]):
        folder = write_run(tmp_path / f"run{place}", updates=2)
        record = json.loads(changed(folder, "run")) | {"name": name}
        lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]
        (folder / "metrics.jsonl").write_text("\n".join([json.dumps(record), *lines, ""]))
        folders.append(str(folder))
    assert main(["report", *folders, "--out", str(tmp_path / "out")]) == 0


def test_a_file_with_any_byte_changed_is_read_or_refused(run):
    good = (run / "metrics.jsonl").read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 5, 100))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (run / "metrics.jsonl").write_bytes(
            data[: rng.choice((len(data), rng.randrange(1, len(data))))]
        )
        with contextlib.suppress(UserError):
            read_run(run)
