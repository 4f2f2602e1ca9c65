"""Data sets as they are downloaded: each form gives the samples that class folders have."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pytest
import torch
from data_sets import encoded
from downloads_made import (
    CLASS_NAMES,
    TRAIN,
    TRUTH,
    VAL,
    WNIDS,
    archives,
    cifar10,
    cifar100,
    cifar_pixels,
    class_folders,
    hub,
    inner_tars,
    kaggle,
    mnist,
    parquet,
    tar_of,
    tiny,
    write,
)
from PIL import Image

from hvd_lbt.cli import main
from hvd_lbt.data import convert as convert_module
from hvd_lbt.data import on_device, pipeline
from hvd_lbt.data.convert import convert
from hvd_lbt.data.downloads import find_tree
from hvd_lbt.data.downloads.cifar import VERSIONS
from hvd_lbt.data.identity import identity
from hvd_lbt.data.store import open_splits
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe

SETTINGS = {"form": "webdataset", "samples_per_shard": 4}


def converted(source, out, **settings):
    """What OUT has of each split: (image, class, CLASS/FILE) in order."""
    convert(source, out, **{**SETTINGS, **settings})
    its = []
    for store in open_splits(out):
        names = []
        for file in sorted(store.index.root.glob("*.tar")):
            with tarfile.open(file) as archive:
                members = [m for m in archive if m.name.endswith(".json")]
                names += [json.load(archive.extractfile(member))["name"] for member in members]
        classes = [store.classes[label] for label in store.labels]
        images = map(store.read, range(len(store)))
        its.append(list(zip(images, classes, names, strict=True)))
    return its


def shards(out):
    return {file.relative_to(out): file.read_bytes() for file in sorted(out.glob("*/*.tar"))}


@pytest.fixture(scope="module")
def of_folders(tmp_path_factory):
    """The conversion of the images as class folders."""
    place = tmp_path_factory.mktemp("imagenet")
    converted(write(place / "in", class_folders()), place / "out")
    return place / "out"


@pytest.mark.parametrize("form", ["archives", "kit unpacked", "folder and val tar", "flat val"])
def test_imagenets_archives_are_the_class_folders(form, tmp_path, of_folders, capfd):
    files = archives()
    if form != "archives":
        kit = files.pop("ILSVRC2012_devkit_t12.tar.gz")
        (tmp_path / "kit.tar.gz").write_bytes(kit)
        with tarfile.open(tmp_path / "kit.tar.gz") as packed:
            packed.extractall(tmp_path / "in", filter="data")
    if form in ("folder and val tar", "flat val"):
        del files["ILSVRC2012_img_train.tar"]
        files |= {f"train/{name}": data for name, data in TRAIN.items()}
    if form == "flat val":
        del files["ILSVRC2012_img_val.tar"]
        files |= {f"val/{name}": data for name, data in VAL.items()}
    words = ["data", "convert", write(tmp_path / "in", files), tmp_path / "out"]
    assert main([*map(str, words), "--samples-per-shard", "4"]) == 0
    assert shards(tmp_path / "out") == shards(of_folders)
    train, test = open_splits(tmp_path / "out")
    assert train.classes == WNIDS
    assert [WNIDS[label] for label in test.labels] == sorted(TRUTH)
    said = capfd.readouterr().err
    assert "9 here, 1,281,167 published for training" in said
    assert "4 here, 50,000 published for validation" in said


def test_kaggles_tree_is_the_class_folders(tmp_path, of_folders, capfd):
    for place in ("", "ILSVRC", "ILSVRC/Data/CLS-LOC"):
        out = tmp_path / f"out{len(place)}"
        convert(write(tmp_path / "in", kaggle()) / place, out, **SETTINGS)
        assert shards(out) == shards(of_folders)
        assert "part without labels, which is not used (test/)" in capfd.readouterr().err


def test_a_class_without_images_keeps_its_label(tmp_path, capfd):
    files = archives()
    kept = {name: data for name, data in TRAIN.items() if not name.startswith(WNIDS[0])}
    files["ILSVRC2012_img_train.tar"] = tar_of(inner_tars(kept))
    train, _ = converted(write(tmp_path / "in", files), tmp_path / "out")
    assert open_splits(tmp_path / "out")[0].classes == WNIDS
    assert {name for _, name, _ in train} == set(WNIDS[1:])
    assert f"1 class without images, which keeps its label ({WNIDS[0]})" in capfd.readouterr().err


def test_tiny_imagenet(tmp_path, capfd):
    files = tiny()
    train, test = converted(write(tmp_path / "in", files), tmp_path / "out")
    assert [name for _, name, _ in train] == [wnid for wnid in WNIDS for _ in range(2)]
    assert train[0][::2] == (files[f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"],
                             f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG")  # fmt: skip
    assert [(name, image) for image, name, _ in test] == [
        (WNIDS[2 - at], files[f"val/images/val_{at}.JPEG"]) for at in (2, 1, 0)
    ]
    said = capfd.readouterr().err
    assert "part without labels, which is not used (test/)" in said
    assert "6 here, 100,000 published" in said


def test_parquet_keeps_rows_and_class_names(tmp_path, capfd):
    train, test = converted(hub(tmp_path / "in"), tmp_path / "out", jobs=3)
    names = dict(zip(WNIDS, CLASS_NAMES, strict=True))
    assert train == [
        (data, names[name[:9]], f"{names[name[:9]]}/{name[10:]}") for name, data in TRAIN.items()
    ]
    assert open_splits(tmp_path / "out")[0].classes == tuple(CLASS_NAMES)
    assert [(image, name) for image, name, _ in test] == [
        (data, names[wnid]) for data, wnid in zip(VAL.values(), TRUTH, strict=True)
    ]
    assert "test: all labels are -1" in capfd.readouterr().err


def test_parquet_without_metadata_and_with_text_labels(tmp_path):
    rows = [({"bytes": encoded("PNG", at), "path": None}, f"b{at % 2}") for at in range(4)]
    parquet(tmp_path / "in/train/0000.parquet", rows, None, label_type=pyarrow.string())
    convert(tmp_path / "in", tmp_path / "out", **SETTINGS)
    (file,) = (tmp_path / "out/train").glob("*.tar")
    with tarfile.open(file) as archive:
        assert archive.getnames()[0] == "00000000.png"
    assert (tmp_path / "out/classes.txt").read_text() == "b0\nb1\n"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("make", [cifar10, cifar100])
def test_cifars_own_files_are_read_as_they_are(make, binary, packed, tmp_path):
    files, ten = make(binary), make is cifar10
    (version,) = (its for its in VERSIONS if (its.binary, its.fine) == (binary, not ten))
    if packed:
        data = tmp_path / version.archive
        inside = {f"{version.folder}/{name}": its for name, its in files.items()}
        data.write_bytes(tar_of(inside, "w:gz"))
    else:
        data = write(tmp_path / version.folder, files)
    train, test = open_splits(data)
    assert len(train.classes) == (10 if ten else 100)
    assert train.labels.tolist() == ([(3 * b + a) % 10 for b in range(5) for a in range(3)] if ten
                                     else [0, 7, 14, 21])  # fmt: skip
    seeds = range(5) if ten else [20]
    planes = np.concatenate([cifar_pixels(3 if ten else 4, seed) for seed in seeds])
    pixels = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    recipe = load_recipe("digits", ["data.image_size=32", "data.mean=[0,0,0]", "data.std=[1,1,1]"])
    for module in (on_device, pipeline):
        (batch,) = module.evaluation_batches(
            train, recipe.data, [(0, len(train))], micro_batch=32, device=torch.device("cpu")
        )
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels)
        assert batch.labels.tolist() == train.labels.tolist()
    convert(data, tmp_path / "out", **SETTINGS)
    for store, its in zip((train, test), open_splits(tmp_path / "out"), strict=True):
        assert (its.classes, its.labels.tolist()) == (store.classes, store.labels.tolist())
        for at in range(len(its)):
            wanted = store.image(at)
            assert np.array_equal(its.image(at).data, wanted.data)


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnists_own_files_are_read_as_they_are(packed, place, tmp_path, capfd):
    write(tmp_path / "in" / place, mnist(packed))
    train, test = open_splits(tmp_path / "in")
    assert "12 here, 60,000 published for training" in capfd.readouterr().err
    assert (len(train), len(test), train.classes[9]) == (12, 5, "9")
    assert train.labels.tolist() == [*range(10), 0, 1]
    convert(tmp_path / "in", tmp_path / "out", **SETTINGS)
    again, _ = open_splits(tmp_path / "out")
    assert all(np.array_equal(again.image(at).data, train.image(at).data) for at in range(12))
    random = np.random.default_rng(12).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    grey = train.image(11).data[-28 * 28 * 3 :].reshape(28, 28, 3)
    assert np.array_equal(grey, np.repeat(random[11][..., None], 3, 2))


def test_arrays_of_other_pixels_are_another_data_set(tmp_path):
    one, _ = open_splits(write(tmp_path / "cifar-10-batches-bin", cifar10(True)))
    files = cifar10(True)
    name = "data_batch_3.bin"
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    other, _ = open_splits(write(tmp_path / "cifar-10-batches-bin", files))
    assert identity(one) != identity(other)


def test_a_stopped_conversion_of_archives_continues(tmp_path, of_folders, monkeypatch, capfd):
    source = write(tmp_path / "in", archives())
    write_one, count = convert_module._writer, [0]

    def failing(*args):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        return write_one(*args)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_writer", failing)
        with pytest.raises(UserError, match="No space left"):
            convert(source, tmp_path / "out", **SETTINGS)
    convert(source, tmp_path / "out", **SETTINGS)
    assert shards(tmp_path / "out") == shards(of_folders)
    assert "2 were there" in capfd.readouterr().err
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="devkit"):
        convert(source, tmp_path / "out", **SETTINGS)


def test_class_folders_are_no_download(tmp_path):
    write(tmp_path, class_folders())
    assert find_tree(tmp_path) is None


def test_odd_images_and_duplicates_are_counted_and_named(tmp_path, capfd):
    files = archives()
    cmyk, png = io.BytesIO(), encoded("PNG", 5, (30, 24))
    Image.new("CMYK", (30, 24), (1, 2, 3, 4)).save(cmyk, "JPEG")
    odd = {
        "n02105855/n02105855_9.JPEG": png,
        "n01443537/n01443537_9.JPEG": cmyk.getvalue(),
        "n01443537/n01440764_7.JPEG": next(iter(VAL.values())),
        "n01443537/n01443537_8.JPEG": TRAIN["n01443537/n01443537_1.JPEG"],
        "n02105855/n02105855_8.JPEG": TRAIN["n01440764/n01440764_1.JPEG"],
        "n02105855/n02105855_7.JPEG": TRAIN["n01440764/n01440764_2.JPEG"][:400],
    }
    files["ILSVRC2012_img_train.tar"] = tar_of(inner_tars({**TRAIN, **odd}))
    convert(write(tmp_path / "in", files), tmp_path / "out", **SETTINGS)
    said = capfd.readouterr().err
    for line in (
        "note: 1 image in another format than its ending says (n02105855/n02105855_9.JPEG is PNG)",
        "note: 1 JPEG in CMYK, which PIL decodes (n01443537/n01443537_9.JPEG)",
        "warning: 1 image whose name begins with another class's id (n01443537/n01440764_7.JPEG)",
        "note: 1 image with the same bytes as another of its class",
        "warning: 1 image with the same bytes as one of another class",
        "warning: 1 image that is not whole",
        "test: warning: 1 test image with the same bytes as a training image",
    ):
        assert line in said
    assert len(open_splits(tmp_path / "out")[0]) == 15


def test_a_pickle_of_python_2_is_read(tmp_path):
    """As the published files were written: byte strings, no names of Python 3's."""
    planes = cifar_pixels(3, 1)
    raw = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05"
        b"(K\x06K\x09K\x04eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray"
        b"\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K"
        b"\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + (3 * 3072).to_bytes(4, "little") + planes.tobytes() + b"tbu."
    )  # fmt: skip
    folder = write(tmp_path / "cifar-10-batches-py", cifar10(False) | {"data_batch_1": raw})
    train, _ = open_splits(folder)
    assert train.labels.tolist()[:3] == [6, 9, 4]
    pixels = planes.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(train.image(2).data[-3072:].reshape(32, 32, 3), pixels[2])
