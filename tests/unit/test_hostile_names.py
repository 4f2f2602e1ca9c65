"""Folders, classes and files whose names a terminal would obey or rich would read as markup."""

import subprocess
import sys

import pytest
from data_sets import write_folder

from hvd_lbt.cli import main

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


def shown(said: str, words) -> None:
    assert "Traceback" not in said
    assert said.replace("\n", "").isprintable(), words


def test_names_are_shown_and_not_obeyed(hostile, tmp_path, capfd):
    for words, code in {
        ("data", "check", hostile): 1,
        ("data", "convert", hostile, tmp_path / HOSTILE): None,
        ("plan", "digits", "--data", hostile): 0,
    }.items():
        done = main([*map(str, words)])
        out, err = capfd.readouterr()  # of the descriptors, what native code prints included
        shown(out + err, words)
        assert code is None or done == code, out + err


def test_a_process_shows_them_so_too(tmp_path):
    words = ("plan", "digits", "--data", tmp_path / f"{HOSTILE}nowhere")
    command = [sys.executable, "-m", "hvd_lbt", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    shown(done.stdout + done.stderr, words)
    assert done.returncode == 2
