"""`data convert` and `data check`: the same samples in shards, resumable; bad images listed."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import Example, encoded, write_folder
from nvidia.dali import Pipeline, fn
from nvidia.dali import tfrecord as dali_tfrecord

from hvd_lbt.cli import main
from hvd_lbt.data import convert as convert_module
from hvd_lbt.data.convert import ENDINGS, convert
from hvd_lbt.data.formats import RECORDIO_MAGIC, recordio, tfrecord
from hvd_lbt.data.pipeline import evaluation_batches
from hvd_lbt.data.store import open_splits, open_train_split
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe

FORMS = tuple(ENDINGS)


def same_samples(one: Path, other: Path) -> bool:
    pairs = zip(open_splits(one), open_splits(other), strict=True)
    return all(
        mine.classes == theirs.classes
        and mine.labels.tolist() == theirs.labels.tolist()
        and all(mine.read(index) == theirs.read(index) for index in range(len(mine)))
        for mine, theirs in pairs
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_converted_folder_has_the_same_samples_in_the_same_order(form, folder, tmp_path):
    words = [str(folder), str(tmp_path), "--format", form, "--samples-per-shard", "5"]
    assert main(["data", "convert", *words]) == 0
    assert len(list((tmp_path / "train").glob(f"train-*-of-00005.{ENDINGS[form]}"))) == 5
    assert len(list((tmp_path / "test").glob(f"test-*-of-00002.{ENDINGS[form]}"))) == 2
    assert same_samples(folder, tmp_path)
    for line in (tmp_path / "train/sha256sums.txt").read_text().splitlines():
        digest, name = line.split("  ")
        data = (tmp_path / "train" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest


def test_shards_convert_to_shards(folder, tmp_path):
    for place, (source, form) in enumerate(
        zip((folder, *map(Path, "012")), (*FORMS, "webdataset"), strict=True)
    ):
        source = source if place == 0 else tmp_path / str(source)
        convert(source, tmp_path / str(place), form=form, samples_per_shard=4 + place, jobs=3)
        assert same_samples(folder, tmp_path / str(place))


def test_a_stopped_conversion_goes_on_and_mends_what_is_damaged(folder, tmp_path, monkeypatch):
    write, written = convert_module._writer, []

    def counting(stream, form):
        written.append(Path(stream.name).name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return write(stream, form)

    monkeypatch.setattr(convert_module, "_writer", counting)
    settings = {"form": "tfrecord", "samples_per_shard": 4}
    with pytest.raises(UserError, match=r"No space left on device.* start the same command again"):
        convert(folder, tmp_path, **settings)
    whole = [file.name for file in sorted((tmp_path / "train").glob("*.tfrecord"))]
    assert len(whole) >= 3
    damaged = tmp_path / "train" / whole[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    written[:] = ["no more errors"] * 4
    convert(folder, tmp_path, **settings)
    assert f".{whole[1]}.part" in written
    assert f".{whole[0]}.part" not in written
    assert same_samples(folder, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    written[:] = ["no more errors"] * 4
    convert(folder, tmp_path, **settings)
    assert written == ["no more errors"] * 4


def test_other_data_or_settings_do_not_go_on(folder, tmp_path):
    convert(folder, tmp_path / "out", form="webdataset", samples_per_shard=9)
    with pytest.raises(UserError, match="out holds the conversion of other data or with other"):
        convert(folder, tmp_path / "out", form="webdataset", samples_per_shard=8)
    with pytest.raises(UserError, match="is not empty and holds no conversion"):
        convert(folder, tmp_path, form="webdataset", samples_per_shard=8)


def test_a_shard_that_reads_back_otherwise_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        convert_module, "tfrecord", lambda image, *rest: tfrecord(image[:-1] + b"x", *rest)
    )
    with pytest.raises(UserError, match="reads back otherwise than it was written"):
        convert(folder, tmp_path, form="tfrecord", samples_per_shard=9)
    assert not list(tmp_path.rglob("*.tfrecord"))


def test_dali_reads_the_shards_too(folder, tmp_path):
    train = open_train_split(folder)
    for form in FORMS:
        convert(folder, tmp_path / form, form=form, samples_per_shard=100)
    (tar,) = (tmp_path / "webdataset/train").glob("*.tar")
    (records,) = (tmp_path / "tfrecord/train").glob("*.tfrecord")
    (rec,) = (tmp_path / "recordio/train").glob("*.rec")
    data, at, lines = records.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little") + 16
        lines.append(f"{at} {size}")
        at += size
    (tmp_path / "tfrecord.idx").write_text("\n".join(lines))
    places, at = [], 0
    for index in range(len(train)):
        places.append(f"{index}\t{at}")
        at += len(recordio(train.read(index), 0, index))
    (tmp_path / "rec.idx").write_text("\n".join(places) + "\n")
    pipeline = Pipeline(batch_size=len(train), num_threads=1, device_id=None)
    with pipeline:
        features = {
            "image/encoded": dali_tfrecord.FixedLenFeature((), dali_tfrecord.string, ""),
            "image/class/label": dali_tfrecord.FixedLenFeature([1], dali_tfrecord.int64, -1),
        }
        one = fn.readers.tfrecord(
            path=[str(records)], index_path=[str(tmp_path / "tfrecord.idx")], features=features
        )
        image, label = fn.readers.webdataset(paths=[str(tar)], ext=["jpeg", "cls"])
        other, number = fn.readers.mxnet(path=[str(rec)], index_path=[str(tmp_path / "rec.idx")])
        pipeline.set_outputs(
            one["image/encoded"], one["image/class/label"], image, label, other, number
        )
    outputs = pipeline.run()
    for index in range(len(train)):
        values = [np.array(output[index]) for output in outputs]
        for place in (0, 2, 4):
            assert values[place].tobytes() == train.read(index)
        label = int(train.labels[index])
        assert (int(values[1].item()), values[3].tobytes()) == (label, str(label).encode())
        assert int(values[5].item()) == label


def test_a_record_is_an_example_that_protobuf_reads(folder):
    record = tfrecord(encoded("JPEG"), "class 1/ü.JPEG", 300, "class 1")
    message = Example.FromString(record[12:-4])
    features = {entry.key: entry.value for entry in message.features.feature}
    assert features["image/encoded"].bytes_list.value == [encoded("JPEG")]
    assert features["image/class/label"].int64_list.value == [300]
    assert features["image/filename"].bytes_list.value == ["class 1/ü.JPEG".encode()]
    parts = recordio(bytes(8) + RECORDIO_MAGIC + bytes(5), 1, 2)
    assert parts.count(RECORDIO_MAGIC) == 2  # one a part: the payload's own is left out


def test_a_tar_tells_where_its_images_come_from(folder, tmp_path):
    convert(folder, tmp_path, form="webdataset", samples_per_shard=100)
    (file,) = (tmp_path / "train").glob("*.tar")
    with tarfile.open(file) as archive:
        about = json.load(archive.extractfile("00000022.json"))
    train = open_train_split(folder)
    assert about == {
        "name": train.name(22).removeprefix(f"{folder}/train/"),
        "class": train.classes[train.labels[22]],
    }


def test_check_lists_what_is_bad(tmp_path, capsys):
    data = write_folder(tmp_path)
    assert main(["data", "check", str(data)]) == 0
    assert capsys.readouterr().out == "30 images, 0 bad\n"
    bad = [data / "train/class 1/empty.jpg", data / "test/class 0/text.png"]
    bad[0].write_bytes(b"")
    bad[1].write_text("no image")
    assert main(["data", "check", str(data)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is no whole image: ")[0] for line in lines[:2]] == [str(f) for f in bad]
    assert lines[2] == "32 images, 2 bad"


def test_check_finds_records_that_are_not_as_they_were_written(folder, tmp_path, capsys):
    convert(folder, tmp_path, form="tfrecord", samples_per_shard=10)
    assert main(["data", "check", str(tmp_path)]) == 0
    store = open_train_split(tmp_path)
    for index in (3, 14):
        shard, offset, length = map(int, store.index.extents[index])
        # the last byte of the image's pixels: nothing but the checksum tells
        with (store.index.root / store.index.files[shard]).open("r+b") as stream:
            stream.seek(offset + length - 3)
            byte = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes([byte ^ 1]))
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{store.name(3)} is not as it was written: the record's checksum does not hold.",
        f"{store.name(14)} is not as it was written: the record's checksum does not hold.",
        "30 images, 2 bad",
    ]
    with_faults = load_recipe("digits", ["data.image_size=8"]).data
    (batch,) = evaluation_batches(
        store, with_faults, [(0, 23)], micro_batch=23, device=torch.device("cpu")
    )
    assert batch.images.isfinite().all()  # training does not compare them


def test_shards_of_another_data_set_of_the_same_shape_are_not_kept(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "other/train")
    file = min((tmp_path / "other/train").glob("*/*"))
    file.rename(file.with_name("z.JPEG"))
    shutil.copytree(folder / "test", tmp_path / "other/test")
    convert(folder, tmp_path / "out", form="webdataset", samples_per_shard=9)
    with pytest.raises(UserError, match="out holds the conversion of other data"):
        convert(tmp_path / "other", tmp_path / "out", form="webdataset", samples_per_shard=9)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_damaged_note_of_a_conversion_is_named(content, folder, tmp_path):
    (tmp_path / "convert.json").write_bytes(content)
    with pytest.raises(UserError, match=r"convert.json is damaged .* Empty the folder"):
        convert(folder, tmp_path, form="webdataset", samples_per_shard=9)


@pytest.mark.parametrize("name", [b"a\nb", b"a\rb", b"a\xe9"])
def test_class_names_that_are_no_lines_are_refused(name, tmp_path):
    for place in (b"train/" + name, b"train/plain"):
        file = os.fsencode(tmp_path) + b"/in/" + place + b"/1.png"
        os.makedirs(os.path.dirname(file))
        Path(os.fsdecode(file)).write_bytes(encoded("PNG"))
    with pytest.raises(UserError, match=r"cannot be a line of classes.txt"):
        convert(tmp_path / "in", tmp_path / "out", form="webdataset", samples_per_shard=9)
