"""Damaged, incomplete and hostile downloads: an error that names the thing, or a finding."""

import functools
import gzip
import io
import os
import pickle
import re
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from data_sets import encoded
from downloads_made import (
    TRAIN,
    VAL,
    WNIDS,
    archives,
    cifar10,
    cifar100,
    devkit,
    hub,
    idx,
    inner_tars,
    kaggle,
    mnist,
    parquet,
    solution,
    tar_of,
    tiny,
    write,
)

from hvd_lbt.cli import main
from hvd_lbt.data import convert as convert_module
from hvd_lbt.data.downloads import imagenet_labels
from hvd_lbt.data.downloads.apart import run_apart
from hvd_lbt.data.store import open_splits
from hvd_lbt.errors import UserError

HTML = b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"
KIT, SET = "ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv"
TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


@pytest.fixture(autouse=True)
def one_process_a_kit(monkeypatch):
    """The readable meta.mat is the same in all tests: it is read apart once."""
    monkeypatch.setattr(
        imagenet_labels, "run_apart", lambda program, data, file: run_once(program, data)
    )


@functools.cache
def run_once(program, data):
    return run_apart(program, data, Path("meta.mat"))


def refused(source, capfd, *words):
    """What `data convert` says of SOURCE, which it must refuse before it writes a shard."""
    out = source.parent / "out"
    assert main(["data", "convert", str(source), str(out), *words]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert not list(out.rglob("*.tar"))
    return said


def taken(source, capfd, *words):
    """What it says of SOURCE that it converts."""
    out = source.parent / "out"
    assert main(["data", "convert", str(source), str(out), *words]) == 0
    return capfd.readouterr().err


def link(name, target):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        about = tarfile.TarInfo(name)
        about.type, about.linkname = tarfile.SYMTYPE, target
        archive.addfile(about)
    return packed.getvalue()


def damaged_inner():
    """The training archive with a flipped byte in a header of the second inner tar."""
    data = bytearray(archives()[TAR])
    at = data.index(b"n01443537_2.JPEG")
    data[at] ^= 1
    return bytes(data)


def cut_inner():
    """A tar of tars whose second tar was cut off before it was packed."""
    inner = inner_tars()
    name = "n01443537.tar"
    return tar_of({**inner, name: inner[name][:1500]})


IMAGENET = {
    "no kit": ({KIT: None}, "ILSVRC2012_img_val.tar.*without their labels.*Needed in .* is the d"),
    "no training images": ({TAR: None}, "has no training images of ImageNet"),
    "kit is a web page": ({KIT: HTML}, f"{KIT} is no whole archive.*a web page"),
    "kit is cut off": ({KIT: devkit()[:-300]}, f"{KIT} is no whole archive"),
    "kit of another year": ({KIT: tar_of({"data/other.mat": b"x"}, "w:gz")}, "has no meta.mat, I"),
    "meta.mat is damaged": (
        {KIT: tar_of({"data/meta.mat": b"MATLAB 5.0 " * 50, TRUTH: b"1\n"}, "w:gz")},
        "meta.mat cannot be read as MATLAB's synsets",
    ),
    "kit is a bomb": ({KIT: gzip.compress(bytes(40 << 20))}, "unpacks to more than 32 MB"),
    "an id of a synset": ({KIT: devkit("1\n1001\n2\n3\n")}, "has '1001' in line 2.*from 1 to 3"),
    "an id of 0": ({KIT: devkit("0\n1\n2\n3\n")}, "has '0' in line 1"),
    "an id that is no number": ({KIT: devkit("1\nn01440764\n2\n3\n")}, "'n01440764' in line 2"),
    "an id of many digits": ({KIT: devkit("1\n" + "9" * 5000 + "\n")}, "in line 2"),
    "fewer labels": ({KIT: devkit("1\n2\n3\n")}, "no label for 1 of 4 images.*00000004"),
    "no labels": ({KIT: devkit(" \n")}, "ground_truth.txt is empty"),
    "val is a web page": ({VAL_TAR: HTML}, f"{VAL_TAR} is no tar archive: it is a web page"),
    "train is a web page": ({TAR: HTML}, f"{TAR} is no tar archive: it is a web page"),
    "train is compressed": ({TAR: gzip.compress(archives()[TAR])}, f"{TAR} is compressed"),
    "train is empty": ({TAR: b""}, f"{TAR} is no tar archive: it is empty"),
    "train is the val archive": ({TAR: archives()[VAL_TAR]}, "ILSVRC2012_val_.*it is another arch"),
    "train is cut off": ({TAR: archives()[TAR][:20000]}, f"{TAR} is cut off"),
    "val is cut off": ({VAL_TAR: archives()[VAL_TAR][:3000]}, f"{VAL_TAR} (is cut off|ends at)"),
    "an inner tar is damaged": ({TAR: damaged_inner()}, "n01443537.tar is damaged.*at byte"),
    "an inner tar is cut off": ({TAR: cut_inner()}, "n01443537.tar (is cut|ends at).*"),
    "an inner tar is a web page": (
        {TAR: tar_of({**inner_tars(), "n01443537.tar": HTML * 20})}, "n01443537.tar is damaged",
    ),
    "another tar in it": (
        {TAR: tar_of({**inner_tars(), "../../evil.tar": b""})}, "has ../../evil.tar at byte",
    ),
    "a class that is no class": (
        {TAR: tar_of({**inner_tars(), "n99999999.tar": tar_of({"a.JPEG": encoded("JPEG")})})},
        "has classes that the labels' 3 do not have: n99999999",
    ),
    "a link": ({VAL_TAR: link("ILSVRC2012_val_00000001.JPEG", "/etc/passwd")}, "has the link"),
    "an image without a label": (
        {VAL_TAR: tar_of({**VAL, "ILSVRC2012_val_00050001.JPEG": encoded("JPEG")})},
        "has no label for 1 of 5 images.*ILSVRC2012_val_00050001",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGENET)
def test_a_damaged_imagenet_is_refused(case, tmp_path, capfd):
    changes, match = IMAGENET[case]
    files = {name: data for name, data in (archives() | changes).items() if data is not None}
    said = refused(write(tmp_path / "in", files), capfd)
    assert re.search(f"(?s){match}", said), said


def test_the_same_member_twice_is_used_once_if_its_bytes_are_the_same(tmp_path, capfd):
    packed, image = io.BytesIO(), encoded("JPEG", 3)
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for data in (image, image):
            about = tarfile.TarInfo("n01443537_1.JPEG")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    files = archives()
    files[TAR] = tar_of({**inner_tars(), "n01443537.tar": packed.getvalue()})
    said = taken(write(tmp_path / "in", files), capfd)
    assert "1 image that is in the archive twice with the same bytes, and used once" in said
    assert len(open_splits(tmp_path / "out")[0]) == 7


def test_a_class_twice_and_an_odd_end_are_named(tmp_path, capfd):
    packed, inner = io.BytesIO(), inner_tars()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("n01443537.tar", "x/n01443537.tar"):
            about = tarfile.TarInfo(name)
            about.size = len(inner["n01443537.tar"])
            archive.addfile(about, io.BytesIO(inner["n01443537.tar"]))
    source = write(tmp_path / "in", archives() | {TAR: packed.getvalue()})
    assert f"{TAR} has n01443537.tar twice, at bytes" in refused(source, capfd)
    (source / TAR).write_bytes(archives()[TAR][:-512])
    assert "1 tar with another number of zeros at its end" in taken(source, capfd)


def test_the_same_member_twice_with_other_bytes_is_refused(tmp_path, capfd):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for data in (b"\xff\xd8\xff1", b"\xff\xd8\xff2"):
            about = tarfile.TarInfo("n01443537_1.JPEG")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    files = archives()
    files[TAR] = tar_of({**inner_tars(), "n01443537.tar": packed.getvalue()})
    said = refused(write(tmp_path / "in", files), capfd)
    assert "n01443537.tar has n01443537_1.JPEG twice with different bytes" in said


def test_names_that_lead_out_of_a_folder_lead_nowhere(tmp_path, capfd):
    inner = inner_tars()
    inner["n01443537.tar"] = tar_of({"/tmp/../../../evil.JPEG": encoded("JPEG", 77)})
    files = archives()
    files[TAR] = tar_of(inner)
    taken(write(tmp_path / "in", files), capfd)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    (shard,) = (tmp_path / "out/train").glob("*.tar")
    with tarfile.open(shard) as archive:
        assert not [name for name in archive.getnames() if "/" in name or ".." in name]
        texts = [archive.extractfile(m).read() for m in archive if m.name.endswith("json")]
    assert b'{"name": "n01443537/evil.JPEG", "class": "n01443537"}' in texts


def test_labels_without_images_and_strangers_are_counted(tmp_path, capfd):
    files = archives()
    files[KIT] = devkit("2\n3\n2\n1\n1\n")
    files[VAL_TAR] = tar_of({**VAL, "._x.JPEG": b"x", "notes.txt": b"x", "a/.DS_Store": b""})
    said = taken(write(tmp_path / "in", files), capfd)
    assert "1 label whose image is not there (ILSVRC2012_val_00000005)" in said
    assert "2 hidden or system files" in said
    assert "1 file that is no image (ILSVRC2012_img_val.tar:notes.txt)" in said


def test_only_the_training_archive(tmp_path, capfd):
    said = taken(write(tmp_path / "in", {TAR: archives()[TAR]}), capfd)
    assert "no test images here: only train is converted" in said
    assert not (tmp_path / "out/test").exists()


def rows(*lines):
    return "\n".join(["ImageId,PredictionString", *lines, ""])


def with_row(number, text):
    lines = solution().splitlines()
    lines[number] = text
    return "\n".join(lines)


CSV = {
    "a web page": (HTML.decode(), "is a web page"),
    "empty": ("", "is empty"),
    "another header": (solution().replace("ImageId,", "Id,"), "begins with 'Id,Pred"),
    "no boxes": (with_row(2, "ILSVRC2012_val_00000003,"), "line 3 ''"),
    "one column": (with_row(2, "ILSVRC2012_val_00000003"), "has in line 3"),
    "cut off": (solution()[:-30], "(line 5|no label for 1 of 4)"),
    "half a box": (with_row(2, "ILSVRC2012_val_00000003,n02105855 1 2 3"), "where boxes belong"),
    "two classes": (
        with_row(2, "ILSVRC2012_val_00000003,n02105855 1 2 3 4 n01440764 1 2 3 4"),
        "boxes of several classes",
    ),
    "two labels": (
        solution() + "ILSVRC2012_val_00000003,n01440764 1 2 3 4\n", "which is n02105855 in an earl",
    ),
    "unknown class": (
        with_row(2, "ILSVRC2012_val_00000003,n99999999 1 2 3 4"), "does not list: n99999999",
    ),
    "an image is missing": (rows(*solution().splitlines()[2:]), "no label for 1 of 4 images"),
    "a quote": (with_row(2, '"ILSVRC2012_val_00000003,n0'), "(no CSV table|has in line)"),
    "zero bytes": (solution() + "\0", "zero bytes"),
    "labels of test": (rows("ILSVRC2012_test_00000001,n01440764 1 2 3 4"), "no label for 4 of 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", CSV)
def test_a_wrong_table_of_kaggles_is_refused(case, tmp_path, capfd):
    text, match = CSV[case]
    said = refused(write(tmp_path / "in", kaggle() | {SET: text}), capfd)
    assert re.search(match, said), said


def test_kaggles_other_files(tmp_path, capfd):
    files = kaggle()
    del files["LOC_synset_mapping.txt"]
    said = taken(write(tmp_path / "in", files), capfd)
    assert "4 here, 50,000" in said
    files = {name: data for name, data in files.items() if name != SET}
    (tmp_path / "in" / SET).unlink()
    assert "Kaggle's LOC_val_solution.csv" in refused_again(tmp_path / "in", capfd)
    doubled = "".join(f"{wnid} x\n" for wnid in (*WNIDS, WNIDS[0]))
    write(tmp_path / "in", kaggle() | {"LOC_synset_mapping.txt": doubled})
    assert f"has {WNIDS[0]} twice, in lines 1 and 4" in refused_again(tmp_path / "in", capfd)
    write(tmp_path / "in", kaggle() | {SET: solution().replace(WNIDS[0], WNIDS[1]), KIT: devkit()})
    assert "give other labels to 1 images" in refused_again(tmp_path / "in", capfd)


def refused_again(source, capfd):
    """As refused, where OUT may hold an earlier conversion."""
    assert main(["data", "convert", str(source), str(source.parent / "out")]) == 2
    return capfd.readouterr().err


TINY = {
    "no annotations": ({"val/val_annotations.txt": None}, "val_annotations.txt is missing"),
    "unknown class": (
        {"val/val_annotations.txt": "val_0.JPEG\tn99999999\t0\t0\t5\t5\n"}, "the class 'n99999999'",
    ),
    "two labels": (
        {"val/val_annotations.txt": tiny()["val/val_annotations.txt"]
         + f"val_0.JPEG\t{WNIDS[0]}\t0\t0\t5\t5\n"}, "a second class for 'val_0.JPEG'",
    ),
    "an image is missing in it": (
        {"val/val_annotations.txt": f"val_0.JPEG\t{WNIDS[0]}\t0\t0\t5\t5\n"}, "no label for 2 of 3",
    ),
    "a web page": ({"val/val_annotations.txt": HTML}, "is a web page"),
    "no columns": ({"val/val_annotations.txt": "val_0.JPEG\n"}, "where FILE, WNID and a box"),
    "a class that is not listed": (
        {"train/n99999999/images/n99999999_0.JPEG": b"x"}, "does not list: n99999999",
    ),
    "an image beside images": ({f"train/{WNIDS[0]}/a.JPEG": b"x"}, "lies beside images/"),
}  # fmt: skip


@pytest.mark.parametrize("case", TINY)
def test_a_wrong_tiny_imagenet_is_refused(case, tmp_path, capfd):
    changes, match = TINY[case]
    files = {name: data for name, data in (tiny() | changes).items() if data is not None}
    assert match in refused(write(tmp_path / "in", files), capfd)


ROW = {"bytes": encoded("JPEG", 1), "path": "a.JPEG"}
PARQUET = {
    "label null": ([(ROW, 0), (ROW, None)], {}, "has no label in 1 of 2 rows (row 1 is the first)"),
    "image null": ([(ROW, 0), (None, 1)], {}, "has no bytes in 1 of 2 rows"),
    "an address in place of bytes": (
        [(ROW, 0), ({"bytes": None, "path": "https://x/a.jpg"}, 1)],
        {},
        "the images lie elsewhere",
    ),
    "some labels of -1": ([(ROW, 0), (ROW, -1)], {}, "1 of 2 labels below 0 (row 1"),
    "all labels of -1": ([(ROW, -1), (ROW, -1)], {}, "has no labels (all are -1)"),
    "a label beyond the names": ([(ROW, 3)], {}, "has the label 3, and its 3 class names"),
    "a name twice": ([(ROW, 0)], {"names": ["a", "a"]}, "has the class name 'a' twice"),
    "no rows": ([], {}, "has no rows"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_wrong_parquet_files_are_refused(case, tmp_path, capfd):
    its, settings, match = PARQUET[case]
    parquet(tmp_path / "in/data/train-00000-of-00001.parquet", its, **settings)
    assert match in refused(tmp_path / "in", capfd)


def test_damaged_and_mixed_parquet_files_are_refused(tmp_path, capfd, monkeypatch):
    first = hub(tmp_path / "in") / "data/train-00000-of-00002.parquet"
    whole = first.read_bytes()
    for data in (whole[:-100], whole[: len(whole) // 2], HTML, b"", b"PAR1" + bytes(50)):
        first.write_bytes(data)
        said = refused(tmp_path / "in", capfd)
        assert "train-00000-of-00002.parquet is no whole Parquet file" in said
    first.write_bytes(b"PAR1" + bytes(len(whole) // 2 - 4) + whole[len(whole) // 2 :])
    assert main(["data", "convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "it is damaged. Download it again" in capfd.readouterr().err
    parquet(first, [(ROW, 0)], ["a", "b", "c"])
    assert "have other class names" in refused_again(tmp_path / "in", capfd)
    parquet(first, [(ROW, 0)], label_type=pyarrow.float64())
    assert "labels of the type double" in refused_again(tmp_path / "in", capfd)
    first.rename(first.with_name("train-00000-of-00003.parquet"))
    assert "the files of two conversions" in refused_again(tmp_path / "in", capfd)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'hvd_lbt[parquet]'" in refused_again(tmp_path / "in", capfd)


def test_a_reader_that_dies_is_an_error_that_names_the_file(tmp_path):
    program = (
        "import os, sys; sys.stderr.write('FILE b.parquet\\n'); sys.stderr.flush(); os.abort()"
    )
    with pytest.raises(UserError, match=r"^b.parquet is damaged: its reader ended with signal 6"):
        run_apart(program, b"", tmp_path)
    program = "import os; os.kill(os.getpid(), 11)"
    with pytest.raises(UserError, match=r"^meta.mat is damaged: .* signal 11"):
        run_apart(program, b"", Path("meta.mat"))
    assert run_apart("import sys; print(sys.stdin.read())", b"x", tmp_path) == b"x\n"


def test_missing_parquet_files_and_names_without_a_split(tmp_path, capfd):
    (hub(tmp_path / "in") / "data/train-00001-of-00002.parquet").unlink()
    assert "1 shard missing by the others' names (00001-of-00002)" in taken(tmp_path / "in", capfd)
    (tmp_path / "in/data/train-00000-of-00002.parquet").rename(tmp_path / "in/data/a.parquet")
    assert "whose names say no split (data/a.parquet)" in refused_again(tmp_path / "in", capfd)


def test_settings_without_effect_are_refused(tmp_path, capfd):
    source = write(tmp_path / "in", tiny())
    assert "--label-column x has no effect" in refused(source, capfd, "--label-column", "x")
    assert "--classes" in refused(source, capfd, "--classes", str(source / "wnids.txt"))
    assert "--quality 80 has no effect" in refused(source, capfd, "--quality", "80")
    assert "101" in refused(source, capfd, "--shorter-side", "8", "--quality", "101")
    hub(tmp_path / "hub")
    said = refused(tmp_path / "hub", capfd, "--label-column", "x")
    assert "--label-column x" in said


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/pickle-was-run",)


class Eval:
    def __reduce__(self):
        return eval, ("1",)


def bombs():
    data = cifar10(False)["data_batch_1"]
    return {
        "a function": (pickle.dumps({b"data": Bomb()}, 2), "instruction|asks for"),
        "eval": (pickle.dumps(Eval(), 0), "asks for __builtin__.eval|asks for builtins.eval"),
        "a class": (pickle.dumps({b"data": np.random.default_rng(0)}, 2), "asks for|instruction"),
        "objects": (pickle.dumps({b"data": np.array([Bomb()], object)}, 2), "asks for|instruction"),
        "a memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "a memo of 2,147,483,647"),
        "a long text": (b"\x80\x02B\xff\xff\xff\x7f.", "not of|no pickle of plain"),
        "persistent": (b"\x80\x02Pabc\n.", "PERSID"),
        "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "cut off": (data[:-200], "no pickle of plain values"),
        "a list": (pickle.dumps([1, 2], 2), "of the type list"),
        "nothing": (b"", "no pickle of plain values"),
        "floats": (pickle.dumps({b"data": np.zeros((3, 3072)), b"labels": [0] * 3}, 2), "uint8"),
        "a shape": (
            pickle.dumps({b"data": np.zeros((3, 3071), np.uint8), b"labels": [0] * 3}, 2), "shape",
        ),
        "a wrong shape": (data.replace(b"K\x03M\x00\x0c", b"K\x04M\x00\x0c"), "data"),
        "a label of 10": (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 2),
            "image 0 the label 10",
        ),
        "a negative label": (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, 2),
            "image 0 the label -1",
        ),
        "a label too few": (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, 2),
            "2 images and 1 labels",
        ),
        "a huge label": (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1 << 80]}, 2),
            "beyond all classes",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", bombs())
def test_a_pickle_that_is_not_cifars_is_refused_and_not_run(case, tmp_path, capfd):
    data, match = bombs()[case]
    source = write(tmp_path / "cifar-10-batches-py", cifar10(False) | {"data_batch_1": data})
    said = refused(source, capfd)
    assert re.search(match, said), said
    assert "data_batch_1" in said
    assert not os.path.exists("/tmp/pickle-was-run")
    with pytest.raises(UserError, match="data_batch_1"):
        open_splits(source)


def test_wrong_cifar_archives_are_refused(tmp_path, capfd):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    files = cifar10(True)
    whole = tar_of({f"cifar-10-batches-bin/{name}": data for name, data in files.items()}, "w:gz")
    for data, match in (
        (whole[:-20], "is no whole archive"),
        (HTML, "a web page, not the file"),
        (tar_of({"data_batch_1.bin": b"x" * 3073}, "w:gz"), "has no data_batch_2.bin"),
        (tar_of({**files, "data_batch_1.bin": b"x" * 3072}, "w:gz"), "no multiple of a record's"),
        (tar_of({**files, "batches.meta.txt": b"a\nb\n"}, "w:gz"), "has 2 class names"),
        (tar_of({**files, "test_batch.bin": b"\x0a" + bytes(3072)}, "w:gz"), "the label 10"),
    ):
        archive.write_bytes(data)
        assert match in refused(archive, capfd)
        with pytest.raises(UserError, match="cifar-10-binary"):
            open_splits(archive)
    write(tmp_path / "both/cifar-10-batches-bin", files)
    write(tmp_path / "both/cifar-100-binary", cifar100(True))
    assert "has several data sets" in refused(tmp_path / "both", capfd)
    (tmp_path / "other.zip").write_bytes(b"PK")
    assert "is a file, and none that is read alone" in refused(tmp_path / "other.zip", capfd)


MNIST = {
    "labels of t10k are missing": ({"t10k-labels-idx1-ubyte.gz": None}, "has no t10k-labels-idx1"),
    "cut off": (
        {"train-images-idx3-ubyte.gz": mnist(True)["train-images-idx3-ubyte.gz"][:-50]},
        "train-images-idx3-ubyte.gz cannot be read",
    ),
    "a web page": ({"train-images-idx3-ubyte.gz": HTML}, "cannot be read"),
    "labels in place of images": (
        {"train-images-idx3-ubyte.gz": mnist(True)["train-labels-idx1-ubyte.gz"]}, "no idx file of",
    ),
    "fewer labels": (
        {"train-labels-idx1-ubyte.gz": gzip.compress(idx(np.zeros(3, np.uint8)))},
        "12 images and 3 labels",
    ),
    "huge sizes": (
        {"train-images-idx3-ubyte.gz": gzip.compress(
            struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1))},
        "after its header, which says 4294967295",
    ),
    "no sizes": ({"train-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x08\x03")}, "no idx file"),
    "floats": (
        {"train-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x0d\x03" + bytes(12))}, "no idx file",
    ),
    "a label beyond the classes": (
        {"t10k-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([0, 1, 2, 3, 77], np.uint8)))},
        "has the label 77 in t10k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MNIST)
def test_wrong_mnist_files_are_refused(case, tmp_path, capfd):
    changes, match = MNIST[case]
    files = {name: data for name, data in (mnist(True) | changes).items() if data is not None}
    assert match in refused(write(tmp_path / "in", files), capfd)
    with pytest.raises(UserError):
        open_splits(tmp_path / "in")


def test_a_source_that_changes_while_it_is_converted_is_named(tmp_path, capfd, monkeypatch):
    source = write(tmp_path / "in", archives())
    fill = convert_module.Shards._fill

    def changing(self, stream, part):
        os.utime(source / KIT)
        return fill(self, stream, part)

    monkeypatch.setattr(convert_module.Shards, "_fill", changing)
    assert main(["data", "convert", str(source), str(tmp_path / "out")]) == 2
    assert "was changed while it was converted" in capfd.readouterr().err


def test_what_is_used_is_used_and_the_rest_is_named(tmp_path, capfd):
    files = archives() | {f"train/{name}": data for name, data in TRAIN.items()}
    said = taken(write(tmp_path / "in", files), capfd)
    assert "ILSVRC2012_img_train.tar: train/ is used" in said
