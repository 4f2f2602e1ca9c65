"""Data sets as they are downloaded are refused with what they are and what to do."""

import io
import tarfile

import pytest
from data_sets import encoded

from hvd_lbt.cli import main
from hvd_lbt.data.store import open_splits
from hvd_lbt.errors import UserError

IMAGE = encoded("JPEG", size=(8, 8))


def tar_of(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        about = tarfile.TarInfo(name)
        about.size = len(data)
        archive.addfile(about, io.BytesIO(data))
    return file.getvalue()


TRAIN = {"train/n01440764/a.JPEG": IMAGE, "train/n01443537/b.JPEG": IMAGE}
TINY = {
    "train/n01443537/images/n01443537_0.JPEG": IMAGE,
    "train/n01629819/images/n01629819_0.JPEG": IMAGE,
    "val/images/val_0.JPEG": IMAGE,
    "val/images/val_1.JPEG": IMAGE,
    "val/val_annotations.txt": b"val_0.JPEG\tn01629819\t0\t0\nval_1.JPEG\tn01443537\t0\t0\n",
    "test/images/test_0.JPEG": IMAGE,
}
RAW = {
    "raw val": (
        {**TRAIN, "val/ILSVRC2012_val_00000001.JPEG": IMAGE}, "without their classes.*data convert"
    ),
    "Kaggle": ({"ILSVRC/Data/CLS-LOC/train/n0/a.JPEG": IMAGE}, "Kaggle's tree.*data convert"),
    "tiny": (TINY, "tiny-imagenet.*data convert"),
    "ImageNet's tars": (
        {"ILSVRC2012_img_train.tar": tar_of("n0.tar", tar_of("a.JPEG", IMAGE)),
         "ILSVRC2012_img_val.tar": tar_of("ILSVRC2012_val_00000001.JPEG", IMAGE)},
        "a tar of tars.*hvd_lbt data convert",
    ),
    "CIFAR-10": ({"cifar-10-batches-py/data_batch_1": b"\x80\x02}q\x01"}, "CIFAR's pickles"),
    "CIFAR in train": ({"train/data_batch_1": b"\x80\x02}q\x01"}, "CIFAR's pickles"),
    "CIFAR binary": ({"data_batch_1.bin": bytes(3073)}, "CIFAR's binary files"),
    "MNIST": ({"train-images-idx3-ubyte": b"\0\0\x08\x03"}, "MNIST's idx files"),
    "MNIST gz": ({"train/train-images-idx3-ubyte.gz": b"\x1f\x8b"}, "MNIST's idx files"),
    "Parquet": ({"data/train-00000-of-00001.parquet": b"PAR1"}, "Parquet files.*data convert"),
    "zip": ({"train.zip": b"PK\x03\x04"}, "unzip -q"),
    "tar.gz": ({"train/a.tar.gz": b"\x1f\x8b"}, "tar xf FILE"),
    "tgz": ({"images.tgz": b"\x1f\x8b"}, "tar xf FILE"),
    "HDF5": ({"train.h5": b"\x89HDF"}, "HDF5 files"),
    "LMDB": ({"train/data.mdb": bytes(64)}, "LMDB"),
    "FFCV": ({"train.beton": bytes(64)}, "FFCV"),
    "MDS": ({"train/shard.00000.mds": bytes(64)}, "MosaicML"),
}  # fmt: skip


def write(data, files):
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)


@pytest.mark.parametrize("case", RAW)
def test_a_raw_layout_is_named_with_what_to_do(case, tmp_path, capsys):
    files, match = RAW[case]
    write(tmp_path, files)
    with pytest.raises(UserError, match=rf"(?s){match}.*train/CLASS/FILE"):
        open_splits(tmp_path)
    assert main(["data", "check", str(tmp_path)]) in (1, 2)
    assert "train/CLASS/FILE" in "".join(capsys.readouterr())


def test_a_good_data_set_is_not_looked_at(tmp_path):
    write(tmp_path, {**TRAIN, "val/n01440764/c.JPEG": IMAGE, "backup.zip": b"PK\x03\x04"})
    assert len(open_splits(tmp_path)[1]) == 1
