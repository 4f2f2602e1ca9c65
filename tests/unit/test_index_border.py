"""The index of folders dated in the future, and files that dead processes left beside it."""

import dataclasses
import os
import shutil
import socket
import time

import pytest

from hvd_lbt.data import index as index_module
from hvd_lbt.data.store import open_train_split


@pytest.fixture
def data(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "TICK", 0.0)
    shutil.copytree(folder, tmp_path / "in", ignore=shutil.ignore_patterns(".hvd_lbt"))
    return tmp_path / "in"


def test_a_folder_dated_in_the_future_is_indexed_once(data, capsys):
    os.utime(data / "train/class 0", (time.time() + 10**7,) * 2)
    before = open_train_split(data)
    assert "Indexed" in capsys.readouterr().err
    assert len(open_train_split(data)) == len(before) == 23
    assert capsys.readouterr().err == ""
    next((data / "train/class 0").iterdir()).unlink()
    os.utime(data / "train/class 0", (time.time() + 10**7,) * 2)
    assert len(open_train_split(data)) == 22


def test_storage_whose_clock_is_in_the_future_keeps_its_index(data, capsys, monkeypatch):
    find = index_module.find_source

    def ahead(*arguments):
        source = find(*arguments)
        stats = tuple((size, m + 10**15, c + 10**15) for size, m, c in source.stats)
        return dataclasses.replace(source, stats=stats)

    monkeypatch.setattr(index_module, "find_source", ahead)
    open_train_split(data)
    capsys.readouterr()
    open_train_split(data)
    assert capsys.readouterr().err == ""
    next((data / "train/class 0").iterdir()).unlink()
    assert len(open_train_split(data)) == 22


def test_what_dead_processes_left_beside_the_index_is_removed(data):
    place = data / ".hvd_lbt"
    place.mkdir()
    dead, own, other = (
        place / f".train.index.{host}.{pid}"
        for host, pid in (
            (socket.gethostname(), 2**22 + 1),
            (socket.gethostname(), os.getppid()),
            ("another-host", 2**22 + 1),
        )
    )
    for file in (dead, own, other):
        file.write_bytes(b"part")
    open_train_split(data)
    assert [file.exists() for file in (dead, own, other)] == [False, True, True]
