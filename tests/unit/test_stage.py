"""Copies of shards on a node's disk: whole or not there, whoever is killed, made once, reused."""

import hashlib
import os
import random
import shutil
import signal
import struct
import time

import pytest
from data_sets import write_folder
from small_disk import small_disk

from hvd_lbt.cli import main
from hvd_lbt.data import stage as staging
from hvd_lbt.data.convert import convert
from hvd_lbt.data.stage import Stage, own_folder, stage_data
from hvd_lbt.data.store import open_splits
from hvd_lbt.errors import ReadError, UserError
from hvd_lbt.recipe import load_recipe

SETTINGS = load_recipe("digits").data


@pytest.fixture
def shards(tmp_path):
    """DATA of small shards, and an empty folder to stage to."""
    convert(
        write_folder(tmp_path / "folder"), tmp_path / "data", form="tfrecord", samples_per_shard=2
    )
    (tmp_path / "local").mkdir()
    return tmp_path / "data", tmp_path / "local"


def staged(data, local, **options):
    """The stores of DATA, staged."""
    stores = dict(zip(("train", "test"), open_splits(data), strict=True))
    settings = SETTINGS.model_copy(update={"stage": str(local)})
    return stores, stage_data(stores, settings, **{"copies": False} | options)


def stage_of(data, local):
    return Stage(local, open_splits(data)[0].index, "train", 300.0)


def copies(local):
    return sorted(file for file in local.rglob("*.tfrecord") if file.is_file())


def test_all_samples_are_read_from_the_copies(shards):
    data, local = shards
    plain, _ = open_splits(data)
    expected = [plain.read(index) for index in range(len(plain))]
    stores, told = staged(data, local, copies=True)
    assert told.startswith(f"16 shards are read from {local}; ")
    deadline = time.monotonic() + 60
    while len(copies(local)) < 16:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shutil.rmtree(data)  # from here on only the copies are left
    assert [stores["train"].read(index) for index in range(len(plain))] == expected
    assert not list(local.rglob("*.part.*"))


def test_what_is_there_is_reused_and_what_is_not_whole_is_made_again(shards):
    data, local = shards
    one = stage_of(data, local)
    paths = [one.path(shard) for shard in range(len(one))]
    before = [path.stat().st_ino for path in paths]
    again = stage_of(data, local)
    assert again.bytes_missing() == 0
    assert [again.path(shard).stat().st_ino for shard in range(len(one))] == before

    whole = paths[3].read_bytes()
    paths[3].chmod(0o644)
    paths[3].write_bytes(whole[:-1])  # as no copy of ours can be: cut off
    paths[5].unlink()
    assert again.bytes_missing() == len(whole) + (data / "train" / paths[5].name).stat().st_size
    assert again.path(3).read_bytes() == whole
    assert again.path(5).exists()


def slow_copies(monkeypatch):
    """Copy in many small steps, so that a kill falls between two of them."""
    monkeypatch.setattr(staging, "CHUNK", 256)
    sync = os.fsync

    def slow(descriptor):
        time.sleep(random.random() / 500)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)


def begin(work):
    """Do it in a child process; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        random.seed(os.getpid())
        work()
        code = 0
    finally:
        os._exit(code)


def test_killed_at_any_moment_no_half_copy_has_a_name(shards, monkeypatch):
    data, local = shards
    slow_copies(monkeypatch)
    index = open_splits(data)[0].index
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).digest()
        for file in (data / "train").glob("*.tfrecord")
    }

    def copy_all():
        Stage(local, index, "train", 300.0).copy_all()

    kills, unfinished = 0, 0
    generator = random.Random(0)
    for _ in range(40):
        child = begin(copy_all)
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        unfinished += any(local.rglob("*.part.*"))
        for copy in copies(local):
            assert hashlib.sha256(copy.read_bytes()).digest() == digests[copy.name]
        if len(copies(local)) == len(digests):
            shutil.rmtree(own_folder(local))
    assert kills > 10
    assert unfinished > 3  # else no kill fell into a copy
    copy_all()
    assert {copy.name for copy in copies(local)} == set(digests)
    assert not list(local.rglob("*.part.*"))


def test_two_jobs_copy_each_shard_once(shards, monkeypatch):
    data, local = shards
    slow_copies(monkeypatch)
    index = open_splits(data)[0].index
    made = local / "made"
    make = Stage._make

    def counted(self, copy, shard, beat):
        with made.open("a") as file:
            file.write(f"{shard}\n")
        make(self, copy, shard, beat)

    monkeypatch.setattr(Stage, "_make", counted)

    def job():
        one = Stage(local, index, "train", 300.0)
        for shard in random.sample(range(len(one)), len(one)):
            source = index.root / index.files[shard]
            assert one.path(shard).read_bytes() == source.read_bytes()

    jobs = [begin(job) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in jobs] == [0] * 4
    assert sorted(map(int, made.read_text().split())) == list(range(len(index.files)))


def test_a_source_that_changes_is_never_a_copy(shards):
    data, local = shards
    one = stage_of(data, local)
    first, second = sorted((data / "train").glob("*.tfrecord"))[:2]
    about = first.stat()
    changed = bytearray(first.read_bytes())
    changed[-1] ^= 1
    first.write_bytes(changed)
    os.utime(first, ns=(about.st_atime_ns, about.st_mtime_ns))  # unnoticed but for its checksum
    with pytest.raises(ReadError, match=r"is not as sha256sums\.txt has it"):
        one.path(0)
    second.write_bytes(second.read_bytes() + b"x")
    with pytest.raises(ReadError, match="was changed after the start"):
        one.path(1)
    assert copies(local) == []
    assert not list(local.rglob("*.part.*"))


def test_a_disk_that_gives_other_bytes_back_is_named(shards, monkeypatch):
    data, local = shards
    monkeypatch.setattr(staging, "_digest", lambda descriptor, beat: "0" * 64)
    with pytest.raises(ReadError, match="the copy is not what was written to it"):
        stage_of(data, local).path(0)
    assert copies(local) == []


def test_space_is_looked_at_before_anything_is_copied(shards):
    data, local = shards
    with small_disk(local / "disk", "64k"):
        with pytest.raises(UserError, match=r"disk has 0\.\d MiB free, and 0\.\d MiB of shards"):
            staged(data, local / "disk", copies=True)
        assert copies(local / "disk") == []
        (local / "disk/other").write_bytes(bytes(55_000))
        one = stage_of(data, local / "disk")  # another program fills the disk meanwhile
        one.copy_all()
        with pytest.raises(ReadError, match="has no space left"):
            one.path(len(one) - 1)
        assert not list((local / "disk").rglob("*.part.*"))


def test_what_cannot_be_staged_is_an_error(shards, tmp_path):
    data, local = shards
    with pytest.raises(UserError, match="this data set is no shards"):
        staged(tmp_path / "folder", local)
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 2051, 10, 2, 2) + bytes(40)
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, 10) + bytes(range(10))
    (tmp_path / "mnist").mkdir()
    for name, text in files.items():
        (tmp_path / "mnist" / name).write_bytes(text)
    with pytest.raises(UserError, match="are in memory from the start"):
        staged(tmp_path / "mnist", local)
    with pytest.raises(UserError, match=r"data\.stage: .*nowhere is no folder on "):
        staged(data, tmp_path / "nowhere")
    own_folder(local).symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not a folder of this user"):
        staged(data, local)


def test_copies_are_removed_on_request_unless_they_are_read(shards, tmp_path, capsys):
    data, local = shards
    other = tmp_path / "other"
    shutil.copytree(data, other)
    running = stage_of(data, local)
    running.path(0)
    child = begin(lambda: stage_of(other, local).path(0))  # a job that has ended
    assert os.waitpid(child, 0)[1] == 0
    assert main(["data", "unstage", str(local)]) == 2
    assert f"the staged copies of {data}/train (" in capsys.readouterr().err
    assert main(["data", "unstage", str(local), "--data", str(other)]) == 0
    assert f"{local}: copies of 1 split removed, " in capsys.readouterr().out
    assert len(copies(local)) == 1
    assert main(["data", "unstage", str(local), "--data", str(other)]) == 2
    assert f"--data {other}: there are no copies of it in {local}" in capsys.readouterr().err
    del running
    assert main(["data", "unstage", str(local)]) == 0
    assert list(local.iterdir()) == []
    assert main(["data", "unstage", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("value", ["[1]", "''", "1"])
def test_a_folder_that_is_no_text_is_an_error(value, capsys):
    assert main(["plan", "digits", "--set", f"data.stage={value}"]) == 2
    assert "data.stage" in capsys.readouterr().err
