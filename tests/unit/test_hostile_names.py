"""Folders, classes and files whose names a terminal would obey or rich would read as markup."""

import subprocess
import sys

import pytest
from data_sets import write_folder

HOSTILE = "w[/b]\x1b[31m\u202e"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    data = write_folder(tmp_path_factory.mktemp("data") / HOSTILE)
    for split in ("train", "test"):
        first = min((data / split).iterdir())
        (next(first.iterdir())).rename(first / "[x\x1b]0;y\x07.png")
        first.rename(first.with_name("0[bold]\x1b[2J"))
    (data / "train" / "0[bold]\x1b[2J" / "[bad\x1b\nname.png").write_bytes(b"not an image")
    return data


def run(*words):
    """`hvd_lbt WORDS` as a process of its own: what it prints there is what a terminal gets."""
    return subprocess.run(
        [sys.executable, "-m", "hvd_lbt", *map(str, words)], capture_output=True, text=True
    )


def test_names_are_shown_and_not_obeyed(hostile, tmp_path):
    for words, code in {
        ("data", "check", hostile): 1,
        ("data", "convert", hostile, tmp_path / HOSTILE): None,
        ("plan", "digits", "--data", hostile): 0,
        ("plan", "digits", "--data", tmp_path / f"{HOSTILE}nowhere"): 2,
    }.items():
        done = run(*words)
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        assert said.replace("\n", "").isprintable(), words
        assert code is None or done.returncode == code, said
