"""The doctor: what is broken is named with its fix, and the exit code tells."""

import argparse
import json
import sys

import pytest
import torch

from hvd_lbt import doctor


@pytest.mark.parametrize("part", ["Python", "torch", "mpi4py", "DALI", "extension", "threads"])
def test_a_part_that_works_has_no_fix(part):
    finding = doctor.examine(part)
    assert finding.fix == "", finding


def test_a_part_that_does_not_import_is_named_with_its_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    finding = doctor.examine("mpi4py")
    assert finding.seen.startswith("FAILED: ")
    assert "apt-get install libopenmpi-dev" in finding.fix


def test_an_unsupported_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert "2.11 to 2.13 is supported" in doctor.examine("torch").fix


def test_the_exit_code_tells(monkeypatch, capsys):
    good = doctor.Finding(part="a", seen="1")
    bad = doctor.Finding(part="b", seen="FAILED: no b", fix="get b")
    arguments = argparse.Namespace(json=True)
    monkeypatch.setattr(doctor, "CHECKS", {"a": (lambda: good, "")})
    assert doctor.main(arguments) == 0
    capsys.readouterr()
    monkeypatch.setattr(doctor, "CHECKS", {"a": (lambda: good, ""), "b": (lambda: bad, "")})
    assert doctor.main(arguments) == 1
    assert [finding["fix"] for finding in json.loads(capsys.readouterr().out)] == ["", "get b"]
