"""The index: built once, trusted while the data is as it was, built anew and said when it
changed.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_sets import encoded, write_folder, write_shards

from hvd_lbt.data import array_file
from hvd_lbt.data import index as index_module
from hvd_lbt.data import source as source_module
from hvd_lbt.data.index import Names, open_index
from hvd_lbt.data.labels import Labels
from hvd_lbt.data.store import open_train_split
from hvd_lbt.errors import ReadError, UserError

ROOT = Path(__file__).parents[2]


def age(data: Path) -> None:
    """As if everything had been written long ago."""
    for path in [*data.rglob("*"), data]:
        os.utime(path, (1e9, 1e9), follow_symlinks=False)


@pytest.fixture
def old(tmp_path) -> Path:
    age(write_folder(tmp_path / "data"))
    return tmp_path / "data"


def test_names_of_any_bytes_come_back():
    names = [b"a", "ü ☃".encode(), b"", b"\xff\xfe not utf-8", b"x" * 300]
    packed = Names.of(names)
    assert len(packed) == 5
    assert [os.fsencode(packed[index]) for index in range(5)] == names


def test_an_index_is_built_once_and_says_where_it_is(old, capfd):
    first = open_train_split(old)
    said = capfd.readouterr().err
    assert f"Indexed {old}/train: 23 images, 4 classes, folder, in" in said
    assert f"kept in {old}/.hvd_lbt/train.index" in said
    second = open_train_split(old)
    assert capfd.readouterr().err == ""
    assert np.array_equal(first.labels, second.labels)
    assert [first.name(index) for index in range(23)] == [second.name(index) for index in range(23)]


def change(data: Path, how: str) -> None:
    classes = sorted((data / "train").iterdir())
    match how:
        case "new file":
            (classes[0] / "new.png").write_bytes(encoded("PNG"))
        case "file gone":
            next(classes[1].iterdir()).unlink()
        case "file renamed":
            file = next(classes[2].iterdir())
            file.rename(file.with_name("0.JPEG"))
        case "new class":
            (data / "train/new").mkdir()
            (data / "train/new/1.png").write_bytes(encoded("PNG"))
        case "class renamed":
            classes[3].rename(data / "train/a class")


@pytest.mark.parametrize(
    "how", ["new file", "file gone", "file renamed", "new class", "class renamed"]
)
def test_a_changed_folder_is_indexed_anew(how, old, capfd):
    open_train_split(old)
    change(old, how)
    capfd.readouterr()
    again = open_train_split(old)
    assert "anew: the data changed since" in capfd.readouterr().err
    found = sorted(str(file) for file in (old / "train").rglob("*.*"))
    assert sorted(again.name(index) for index in range(len(again))) == found


def test_a_changed_shard_is_indexed_anew(tmp_path, capfd):
    images = [(encoded("PNG", number), number % 2) for number in range(6)]
    write_shards("webdataset", tmp_path / "train", images, 2)
    age(tmp_path)
    assert len(open_train_split(tmp_path)) == 6
    write_shards("webdataset", tmp_path / "train", images[:4], 2)
    assert len(open_train_split(tmp_path)) == 4
    assert "anew: the data changed since" in capfd.readouterr().err


def test_data_that_changed_a_moment_before_is_looked_at_once_more(tmp_path, capfd):
    # within one tick of the storage's clock a change leaves no trace
    data = write_folder(tmp_path)
    open_train_split(data)
    open_train_split(data)
    assert "anew: the data changed while" in capfd.readouterr().err


def test_a_damaged_index_is_built_anew(old, capfd):
    open_train_split(old)
    file = old / ".hvd_lbt/train.index"
    whole = file.read_bytes()
    flipped = [bytearray(whole) for _ in range(5)]
    for one, at in zip(flipped, (3, 100, len(whole) // 2, -60, -4), strict=True):
        one[at] ^= 4
    for damaged in (b"", b"nonsense", whole[:-200], whole[200:], whole + b"x", *flipped):
        file.write_bytes(damaged)
        assert len(open_train_split(old)) == 23
        assert "is damaged" in capfd.readouterr().err


def test_data_that_cannot_be_written_is_indexed_in_the_cache_folder(old, tmp_path, monkeypatch):
    # root may write everywhere: the kernel's answer to others is put in its place
    monkeypatch.setattr(index_module.os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_train_split(old)) == 23
    assert not (old / ".hvd_lbt").exists()
    assert len(list((tmp_path / "cache").rglob("train.index"))) == 1


# Four processes at once, forked when all is imported: OUT/NUMBER.1 and .2 are what each prints.
FOUR = """
import os, sys
from pathlib import Path
from hvd_lbt.data.labels import Labels
from hvd_lbt.data.store import open_train_split

data, out = map(Path, sys.argv[1:])
for number in range(4):
    if os.fork():
        continue
    try:
        for descriptor in (1, 2):
            os.dup2(os.open(out / f"{number}.{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        print(len(open_train_split(data)), flush=True)
    finally:
        os._exit(0)
for _ in range(4):
    os.wait()
"""


def open_in_four(data: Path, out: Path) -> list[str]:
    """What each of four processes says on stderr that open the data at once."""
    out.mkdir()
    subprocess.run([sys.executable, "-c", FOUR, data, out], cwd=ROOT, check=True, timeout=120)
    assert [(out / f"{number}.1").read_text() for number in range(4)] == ["23\n"] * 4
    return [(out / f"{number}.2").read_text() for number in range(4)]


def test_of_many_processes_one_builds(tmp_path):
    data = write_folder(tmp_path / "data")
    said = open_in_four(data, tmp_path / "new")  # a later process would not trust an index made now
    # those that had not begun to wait when it was ready look once more, for the data is new
    assert all(err == "" or "Indexed" in err for err in said)
    assert any(said)
    age(data)
    (data / ".hvd_lbt/train.index").unlink()
    assert sum("Indexed" in err for err in open_in_four(data, tmp_path / "old")) == 1


def test_a_builder_that_died_is_replaced_and_one_that_stands_still_is_named(old, monkeypatch):
    # holds the lock, as a builder does, and moves on no more
    hold = (
        "import sys, time; from pathlib import Path; from hvd_lbt.data.index import _lock\n"
        "with _lock(Path(sys.argv[1]), 1): print('held', flush=True); time.sleep(1000)"
    )
    file = old / ".hvd_lbt/train.index"
    command = [sys.executable, "-c", hold, str(file)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    match = rf"train.index is being made by process {holder.pid} on .*, which has not moved on"
    with pytest.raises(ReadError, match=match):
        open_index(old, "train", timeout=0.3)
    holder.kill()
    holder.wait()
    assert len(open_index(old, "train", timeout=30)) == 23
    holder.stdout.close()


@pytest.mark.parametrize("stalled", ["", "/train", "/test"])
def test_a_listing_that_gives_no_answer_is_named_in_time(stalled, old, monkeypatch):
    list_folder, answer = os.scandir, threading.Event()

    def stalls(folder):
        if str(folder) == f"{old}{stalled}":
            answer.wait(60)
        return list_folder(folder)

    monkeypatch.setattr(index_module.os, "scandir", stalls)
    if not stalled:  # shards in DATA itself
        (old / "train").rename(old / "elsewhere")
    match = rf"^{old}{stalled}: the storage gave nothing for 0.3 s \(data.timeout\)"
    try:
        with pytest.raises(ReadError, match=match):
            open_index(old, "test" if stalled == "/test" else "train", timeout=0.3)
    finally:
        answer.set()


def test_a_slow_listing_that_moves_on_is_waited_for(old, monkeypatch):
    kind = source_module.shard_kind
    shutil.rmtree(old / "train")
    images = [(encoded("PNG", number), number % 2) for number in range(6)]
    write_shards("webdataset", old / "train", images, 6)

    def slow(file: Path) -> str:
        time.sleep(0.4)
        return kind(file)

    monkeypatch.setattr(source_module, "shard_kind", slow)
    assert len(open_index(old, "train", timeout=1)) == 6


def test_a_folder_that_gives_no_answer_is_named_in_time(old, monkeypatch):
    scan = index_module.scan_class

    def stalls(folder: Path, into) -> None:
        if folder.name == "class 2":
            time.sleep(5)
        scan(folder, into)

    monkeypatch.setattr(index_module, "scan_class", stalls)
    match = r"train/class 2: the storage gave nothing for 0.6 s \(data.timeout\)"
    with pytest.raises(ReadError, match=match):
        open_index(old, "train", timeout=0.6)


def test_what_cannot_be_listed_is_an_error(old, monkeypatch):
    def forbidden(folder: Path, into) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(index_module, "scan_class", forbidden)
    with pytest.raises(UserError, match=r"Permission denied: '.*train/class"):
        open_index(old, "train", timeout=5)


def test_an_index_of_before_is_built_anew_and_removed(old, capfd):
    before = old / ".hvd_lbt/train.npz"
    before.parent.mkdir(exist_ok=True)
    before.write_bytes(b"PK")
    open_train_split(old)
    assert "Indexed" in capfd.readouterr().err
    assert not before.exists()


def test_ranks_share_one_index_and_keep_it_when_it_is_replaced(old):
    stores = [open_train_split(old) for _ in range(2)]
    for store in stores:
        for array in (store.index.tokens, store.index.files.blob, store.index.files.ends):
            assert not array.flags.writeable
    assert Path("/proc/self/maps").read_text().count(f"{old}/.hvd_lbt/train.index\n") >= 2
    names, labels = stores[0].name(7), stores[0].labels.tolist()
    file = old / ".hvd_lbt/train.index"
    inode = file.stat().st_ino
    next((old / "train/class 0").iterdir()).unlink()
    age(old)
    assert len(open_train_split(old)) == 22
    assert file.stat().st_ino != inode
    assert file.with_name(".train.index.before").stat().st_ino == inode  # for other nodes' maps
    assert (stores[1].name(7), stores[1].labels.tolist()) == (names, labels)


def test_where_files_cannot_be_mapped_the_index_is_read(old, monkeypatch):
    mapped = open_train_split(old)
    monkeypatch.setattr(array_file.mmap, "mmap", fails)
    read = open_train_split(old)
    assert read.labels.tolist() == mapped.labels.tolist()
    assert [read.name(at) for at in range(23)] == [mapped.name(at) for at in range(23)]


def fails(*arguments, **settings):
    raise OSError(19, "No such device")


def test_labels_are_read_as_an_array():
    labels = Labels(np.array([5, 3], np.int64), np.array([0, 1, 1, 0], np.int32))
    assert len(labels) == 4
    assert (labels[1], labels[1:].tolist(), labels[[3, 0]].tolist()) == (3, [3, 3, 5], [5, 5])
    assert labels[np.array([True, False, False, True])].tolist() == [5, 5]
    assert list(labels) == labels.tolist() == [5, 3, 3, 5]
    assert np.array_equal(labels, [5, 3, 3, 5])
    assert np.asarray(labels, np.int32).dtype == np.int32
