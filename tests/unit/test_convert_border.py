"""`data convert` on disks that fill up, beside another convert, and from data that changes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import encoded, write_folder
from small_disk import small_disk

from hvd_lbt import terminal
from hvd_lbt.cli import main
from hvd_lbt.data import convert as convert_module
from hvd_lbt.data.convert import convert
from hvd_lbt.data.store import Store, open_train_split
from hvd_lbt.errors import UserError

SETTINGS = {"form": "webdataset", "samples_per_shard": 5}


@pytest.fixture
def copy(folder, tmp_path):
    """A data set that may be changed."""
    return Path(shutil.copytree(folder, tmp_path / "in"))


HOLD = """
import sys, time
from pathlib import Path
from hvd_lbt.data.index import locked
Path(sys.argv[1]).mkdir()
with locked(Path(sys.argv[1], ".convert.lock"), ValueError):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_second_convert_into_one_folder_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as held:
        try:
            assert held.stdout.readline() == "held\n"
            holder = rf"another .*process {held.pid} on {os.uname().nodename}"
            with pytest.raises(UserError, match=holder):
                convert(folder, out, **SETTINGS)
            assert [file.name for file in out.iterdir()] == [".convert.lock"]
        finally:
            held.kill()
    convert(folder, out, **SETTINGS)  # the lock is released with its holder's end
    assert len(open_train_split(out)) == 23


def test_a_convert_is_locked_while_it_writes(folder, tmp_path, monkeypatch):
    fill, refusals = convert_module.Shards._fill, []

    def second(self, stream, part):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on") as caught:
            convert(folder, tmp_path / "out", **SETTINGS)
        refusals.append(caught)
        return fill(self, stream, part)

    monkeypatch.setattr(convert_module.Shards, "_fill", second)
    convert(folder, tmp_path / "out", **SETTINGS)
    assert len(refusals) == 7


@pytest.mark.parametrize("content", [b"", b"\0" * 80, b"[" * 10**5, b"null", b"[]"])
def test_a_convert_json_that_says_nothing_is_named_with_what_to_do(content, folder, tmp_path):
    (tmp_path / "convert.json").write_bytes(content)
    with pytest.raises(UserError, match=r"convert\.json.*([Ee]mpty the folder|or empty it)"):
        convert(folder, tmp_path, **SETTINGS)
    if not content:
        with pytest.raises(UserError, match="it is empty, as after a power loss"):
            convert(folder, tmp_path, **SETTINGS)
    os.remove(tmp_path / "convert.json")
    os.mkfifo(tmp_path / "convert.json")
    with pytest.raises(UserError, match="no regular file"):
        convert(folder, tmp_path, **SETTINGS)


def test_convert_json_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    replace = os.replace

    def cut(source, target):
        if Path(target).name == "convert.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(UserError, match=r"No space left on device.*convert\.json"):
            convert(folder, tmp_path / "out", **SETTINGS)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".convert.lock"]
    (tmp_path / "out/.convert.json.part").write_bytes(b"{")  # killed while it was written
    convert(folder, tmp_path / "out", **SETTINGS)
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("form", ["webdataset", "tfrecord", "recordio"])
def test_a_full_disk_is_named_and_the_same_command_continues(form, folder, tmp_path, capfd):
    words = ["data", "convert", str(folder), str(tmp_path / "out"), "--format", form]
    words += ["--samples-per-shard", "5", "--jobs", "1"]
    with small_disk(tmp_path / "out", "64k"):
        assert main(words) == 2
        said = capfd.readouterr().err
        assert f"No space left on device: '{tmp_path / 'out'}/" in said
        assert "start the same command again: whole shards are kept" in said
        assert not list((tmp_path / "out").rglob("*.part"))
        kept = len(list((tmp_path / "out/train").glob("train-*")))
        subprocess.run(["mount", "-o", "remount,size=4m", tmp_path / "out"], check=True)
        assert main(words) == 0
        assert f"{5 - kept} shards written" in capfd.readouterr().err
        check = subprocess.run(["sha256sum", "-c", "sha256sums.txt"], cwd=tmp_path / "out/train")
        assert check.returncode == 0
        assert len(open_train_split(tmp_path / "out")) == 23


def test_a_line_of_the_sums_that_a_full_disk_cut_off_is_written_anew(folder, tmp_path):
    convert(folder, tmp_path / "out", **SETTINGS)
    sums = tmp_path / "out/train/sha256sums.txt"
    whole = sums.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"", b"\0" * 60, b"\xff\n" + whole[5:]):
        sums.write_bytes(damaged)
        convert(folder, tmp_path / "out", **SETTINGS)
        assert sorted(sums.read_text().splitlines()) == sorted(whole.decode().splitlines())


def change(monkeypatch, how):
    """Change the data when the third sample is read."""
    read, count = Store.read, [0]

    def reading(self, index):
        count[0] += 1
        if count[0] == 3:
            how()
        return read(self, index)

    monkeypatch.setattr(Store, "read", reading)


def test_a_file_that_changes_while_it_is_converted_is_named(copy, tmp_path, monkeypatch):
    store = open_train_split(copy)
    file, other = Path(store.name(9)), encoded("JPEG", 99)
    whole = file.read_bytes()

    def replaced():
        (copy / "new").write_bytes(other)
        os.rename(copy / "new", file)

    for how in (lambda: file.write_bytes(other), replaced, lambda: file.unlink()):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with monkeypatch.context() as patch:
            change(patch, how)
            with pytest.raises(UserError, match=f"{file.name} (was changed|has vanished)"):
                convert(copy, tmp_path / "out", **SETTINGS)
        file.write_bytes(whole)
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        change(patch, lambda: file.with_name("new.JPEG").write_bytes(other))
        with pytest.raises(UserError, match="train was changed while it was converted: files came"):
            convert(copy, tmp_path / "out", **SETTINGS)


def test_a_source_shard_that_changes_is_named(folder, tmp_path, monkeypatch):
    convert(folder, tmp_path / "shards", form="tfrecord", samples_per_shard=30)
    (shard,) = (tmp_path / "shards/train").glob("*.tfrecord")
    change(monkeypatch, lambda: os.utime(shard))
    with pytest.raises(UserError, match=f"{shard.name} was changed while it was converted"):
        convert(tmp_path / "shards", tmp_path / "out", **SETTINGS)


def test_images_that_changed_before_a_restart_are_not_mixed(copy, tmp_path):
    convert(copy, tmp_path / "out", **SETTINGS)
    file = Path(open_train_split(copy).name(0))
    file.write_bytes(encoded("JPEG", 99))
    with pytest.raises(UserError, match=r"images of train and test were changed since .*Empty"):
        convert(copy, tmp_path / "out", **SETTINGS)
    about = json.loads((tmp_path / "out/convert.json").read_text())
    assert about["samples"] == {"train": 23, "test": 7}


def test_a_conversion_is_not_written_into_the_split_that_is_read(copy):
    with pytest.raises(UserError, match=r"lies in .*train, which is converted"):
        convert(copy, copy / "train/shards", **SETTINGS)
    assert not (copy / "train/shards").exists()


def test_markup_in_names_reaches_a_terminal_as_it_is(tmp_path, capfd, monkeypatch):
    console = terminal.console
    monkeypatch.setattr(terminal, "console", lambda **about: console(**about, live=True))
    monkeypatch.setenv("TERM", "xterm")
    data = write_folder(tmp_path / "a[" / "b]")
    (data / "train/class 0").rename(data / "train/[bold]")
    (data / "test/class 0").rename(data / "test/[bold]")
    convert(data, tmp_path / "out[" / "b]", **SETTINGS)
    assert f"{tmp_path}/out[/b]/train: 23 images" in capfd.readouterr().err
