"""Four formats, one order: what is found in each, and what is refused by name."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_sets import encoded, recordio, write_folder, write_shards

from hvd_lbt.data.formats import RECORDIO_MAGIC, Extents
from hvd_lbt.data.formats.extents import Window
from hvd_lbt.data.formats.webdataset import members
from hvd_lbt.data.store import Store, open_splits, open_train_split
from hvd_lbt.errors import ReadError, UserError

SHARDED = ("webdataset", "tfrecord", "recordio")


def samples(store: Store) -> list[tuple[bytes, int]]:
    return [(store.read(index), int(store.labels[index])) for index in range(len(store))]


def test_a_folder_is_sorted_by_class_then_file(folder):
    train, test = open_splits(folder)
    names = [Path(train.name(index)).relative_to(folder / "train") for index in range(len(train))]
    assert len(names) == 23
    assert names == sorted(names, key=lambda name: name.parts)
    assert [train.classes[label] for label in train.labels] == [name.parts[0] for name in names]
    assert test.classes == train.classes


@pytest.mark.parametrize("kind", SHARDED)
def test_every_format_keeps_the_order_of_the_folder(kind, folder, tmp_path):
    originals = [samples(store) for store in open_splits(folder)]
    for split, its, shards in zip(("train", "test"), originals, (3, 1), strict=True):
        write_shards(kind, tmp_path / split, its, shards)
    stores = open_splits(tmp_path)
    assert [samples(store) for store in stores] == originals
    assert stores[0].classes == ("0", "1", "2", "3")
    assert stores[0].index.kind == kind
    (tmp_path / "classes.txt").write_text("".join(f"class {n}\n" for n in range(4)))
    assert open_train_split(tmp_path).classes == open_train_split(folder).classes


@pytest.mark.parametrize("kind", SHARDED)
def test_shards_of_both_splits_may_lie_in_one_folder(kind, folder, tmp_path):
    originals = [samples(store) for store in open_splits(folder)]
    for split, its in zip(("train", "val"), originals, strict=True):
        write_shards(kind, tmp_path / "parts" / split, its, 2)
        for file in (tmp_path / "parts" / split).iterdir():
            file.rename(tmp_path / f"imagenet-{split}-{file.name}")
    (tmp_path / "parts" / "train").rmdir()
    assert [samples(store) for store in open_splits(tmp_path)] == originals


def test_a_plain_tar_of_class_folders_is_a_data_set(folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in sorted((folder / "train").rglob("*.JPEG")):
            archive.add(name, name.relative_to(folder / "train"))
    train = open_train_split(tmp_path)
    assert samples(train) == samples(open_train_split(folder))
    assert train.name(0).startswith(f"{tmp_path}/train.tar:class 0/img-")


def test_numbers_of_classes_are_sorted_as_numbers_and_may_begin_at_one(tmp_path):
    images = [(encoded("PNG", number), number % 11 + 1) for number in range(22)]
    write_shards("tfrecord", tmp_path / "train", images, 2)
    write_shards("tfrecord", tmp_path / "test", images[8:10], 1)
    train, test = open_splits(tmp_path)
    assert train.classes == tuple(str(number) for number in range(1, 12))
    assert train.labels.tolist() == [number % 11 for number in range(22)]
    assert test.labels.tolist() == [8, 9]


def test_a_record_with_the_magic_number_in_it_comes_back_whole(tmp_path):
    image = encoded("PNG")
    images = [
        image + bytes(-len(image) % 4) + RECORDIO_MAGIC * 2 + b"tail" + RECORDIO_MAGIC + b"x",
        RECORDIO_MAGIC,
        image,
    ]
    (tmp_path / "train").mkdir()
    records = [recordio(image, 0, number) for number, image in enumerate(images)]
    (tmp_path / "train/a.rec").write_bytes(b"".join(records))
    assert [image for image, _ in samples(open_train_split(tmp_path))] == images


def test_a_classes_file_gives_the_labels(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("class 3\nclass 1\nunseen\nclass 0\nclass 2\n")
    train, test = open_splits(folder, names)
    assert train.classes == test.classes == ("class 3", "class 1", "unseen", "class 0", "class 2")
    assert {train.classes[label] for label in train.labels} == {f"class {n}" for n in range(4)}
    assert train.labels[0] == 3
    names.write_text("class 3\nclass 3\n")
    with pytest.raises(UserError, match=r"names.txt has 'class 3' twice"):
        open_train_split(folder, names)
    names.write_text("class 0\nclass 1\n")
    with pytest.raises(UserError, match="has the class 'class 2' and 1 more, which is not among"):
        open_train_split(folder, names)
    write_shards("recordio", tmp_path / "train", [(b"", 2)], 1)
    with pytest.raises(UserError, match="has the label 2, and the classes file has 2 names"):
        open_train_split(tmp_path, names)


def refused(data: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        open_train_split(data)


def test_two_formats_in_one_place_are_ambiguous(tmp_path):
    write_folder(tmp_path)
    write_shards("recordio", tmp_path / "train", [(b"", 0)], 1)
    refused(tmp_path, r"train is ambiguous, it has folder \(class 0\), recordio \(part0.rec\)")


def test_no_format_and_compressed_shards_are_told(tmp_path):
    (tmp_path / "train").mkdir()
    refused(tmp_path, r"train has no images\. A split is CLASS/FILE, or shards")
    (tmp_path / "train/readme.txt").write_text("nothing " * 200)
    (tmp_path / "train/empty").write_bytes(b"")
    refused(tmp_path, "among 2 files there is none of these")
    with tarfile.open(tmp_path / "train/a.tar.gz", "w:gz"):
        pass
    refused(tmp_path, r"a.tar.gz is compressed; samples are read by position: unpack it first")


def test_many_threads_read_more_shards_than_are_kept_open(folder, tmp_path, monkeypatch):
    originals = samples(open_train_split(folder))
    write_shards("webdataset", tmp_path / "train", originals, 20)
    monkeypatch.setattr("hvd_lbt.data.index_store.OPEN_SHARDS", 1)
    train = open_train_split(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(16) as threads:
        for _ in range(20):
            assert list(threads.map(train.read, range(23))) == [image for image, _ in originals]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_shard_that_is_cut_off_is_named(kind, keep, folder, tmp_path):
    write_shards(kind, tmp_path / "train", samples(open_train_split(folder)), 1)
    (file,) = (f for f in (tmp_path / "train").iterdir() if f.suffix != ".idx")
    data = file.read_bytes()
    # within an image, whichever: 10 KB are three of them
    file.write_bytes(data[: int(len(data) * keep) - 700])
    refused(tmp_path, rf"{file.name} is (cut off|no whole (tar|TFRecord|RecordIO) file)")


@pytest.mark.parametrize("kind", SHARDED)
def test_a_shard_that_shrinks_or_vanishes_during_a_run_is_named(kind, folder, tmp_path):
    write_shards(kind, tmp_path / "train", samples(open_train_split(folder)), 2)
    train = open_train_split(tmp_path)
    shards = sorted(f for f in (tmp_path / "train").iterdir() if f.suffix != ".idx")
    with shards[0].open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ReadError, match=rf"{shards[0].name}.* is not there any more: the shard"):
        train.read(5)
    shards[1].unlink()
    with pytest.raises(ReadError, match=rf"{shards[1].name}.* has vanished"):
        train.read(20)


def test_shards_without_what_is_needed_are_told(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train/a.tar", "w") as archive:
        member = tarfile.TarInfo("000.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    refused(tmp_path, r"a.tar has the image '000.jpg' without a label: WebDataset has it in")
    (tmp_path / "train/a.tar").unlink()
    record = bytearray(recordio(b"abc", 0, 0))
    record[12:16] = np.float32(0.5).tobytes()
    (tmp_path / "train/a.rec").write_bytes(record)
    refused(tmp_path, r"a.rec has the label 0.5 at byte 0: no class's number")
    (tmp_path / "train/a.rec").unlink()
    write_shards("tfrecord", tmp_path / "train", [(b"abc", 0)], 1)
    (file,) = (tmp_path / "train").iterdir()
    # a key of another name, of the same length
    file.write_bytes(file.read_bytes().replace(b"image/encoded", b"image/decoded"))
    refused(
        tmp_path, "has the features .*'image/decoded'.*; an image needs image/encoded or image,"
    )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_any_tar_are_those_that_tarfile_finds(form, tmp_path):
    file = tmp_path / "a.tar"
    rng = np.random.default_rng(form)
    long = "" if form == tarfile.USTAR_FORMAT else "x" * 160
    names = ["a/1.jpg", f"{'d' * 90}/{'e' * 60}/2.jpg", f"ü/{long}3.jpg", "4.jpg", "a/5.jpg"]
    with tarfile.open(file, "w", format=form) as archive:
        archive.add(tmp_path, "a", recursive=False)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = int(rng.integers(0, 2000))
            archive.addfile(member, io.BytesIO(rng.bytes(member.size)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "4.jpg"
        archive.addfile(link)
    with tarfile.open(file) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    with file.open("rb") as stream:
        every = list(members(Window(stream.fileno(), file), Extents()))
    found = [(m.name, m.offset, m.size) for m in every if m.kind == tarfile.REGTYPE]
    assert found == expected
    assert [name for name, _, _ in expected] == names
