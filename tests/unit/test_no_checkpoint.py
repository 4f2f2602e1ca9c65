"""`evaluate` and `export` of files that are no checkpoints: named, never a traceback or a hang."""

import hashlib
import os

import pytest
import torch

from hvd_lbt.cli import main
from hvd_lbt.models import build_model
from hvd_lbt.recipe import load_recipe

DIGITS = load_recipe("digits")
WHOLE = {
    "version": 1,
    "update": 3,
    "recipe": DIGITS.to_dict(),
    "classes": [str(label) for label in range(10)],
    "model": build_model(DIGITS.model, 10, 16).state_dict(),
}
STATES = {
    "weights": {"a": torch.ones(2)},
    "list": [1, 2],
    "version": {"version": 1},
    "null": None,
    "parts": {**WHOLE, "model": 3, "classes": None},
    "settings": {**WHOLE, "recipe": {"name": "x"}},
    "name": {**WHOLE, "recipe": {**WHOLE["recipe"], "name": "../x"}},
}
OTHER = {**WHOLE, "model": {"a": torch.ones(2)}}


def digest(file):
    file.with_name(f"{file.name}.sha256").write_text(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
    )


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, state in {**STATES, "other": OTHER}.items():
        torch.save(state, tmp_path / f"{name}.pt")
        digest(tmp_path / f"{name}.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pt")
    for name in ("text", "empty"):
        (tmp_path / f"{name}.pt").write_text("no checkpoint\n" * (name == "text"))
    for name in ("code", "text", "empty"):
        digest(tmp_path / f"{name}.pt")
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "fifo.pt.sha256").write_text("0" * 64 + "  fifo.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    return tmp_path


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_what_is_no_checkpoint_is_named(files, command, capsys):
    names = [*STATES, "code", "text", "empty", "fifo", "folder", "loop", "nowhere", "\x1b[31m"]
    if command == "evaluate":
        names.append("other")
    for name in names:
        assert main([command, f"{name}.pt"]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("hvd_lbt: The checkpoint "), name
        assert said.count("\n") == 1, name
        assert said[:-1].isprintable()
    assert not (files.parent / "x.pth").exists()


def test_what_is_missing_is_named(files, capsys):
    assert main(["export", "parts.pt"]) == 2
    assert "has no classes, model: it is not one that" in capsys.readouterr().err
    assert main(["export", "name.pt"]) == 2
    assert "name: '../x' is not allowed" in capsys.readouterr().err
    assert main(["export", "other.pt", "--out", "/dev/null/x"]) == 2
    assert "--out /dev/null/x: it could not be written" in capsys.readouterr().err
