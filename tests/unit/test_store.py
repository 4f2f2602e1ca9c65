"""The image folder and the built-in digits: what is found, and what is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvd_lbt.data.digits import write_digits
from hvd_lbt.data.store import open_splits, open_train_split
from hvd_lbt.errors import ReadError, SampleError, UserError


def write_image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def data(tmp_path):
    for name in ("train/cat/1.png", "train/cat/2.JPEG", "train/a dog/ü.png", "test/cat/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/folder.jpg").mkdir()
    return tmp_path


def test_order_and_labels_follow_the_names(data):
    train, test = open_splits(data)
    assert train.classes == ("a dog", "cat")
    files = ["a dog/ü.png", "cat/1.png", "cat/2.JPEG"]
    assert [train.name(index) for index in range(3)] == [str(data / "train" / f) for f in files]
    assert train.labels.tolist() == [0, 1, 1]
    assert (test.classes, test.labels.tolist()) == (train.classes, [1])
    assert train.read(1) == (data / "train/cat/1.png").read_bytes()


def test_val_serves_as_test(data):
    (data / "test").rename(data / "val")
    assert len(open_splits(data)[1]) == 1


def test_missing_folder_is_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"--data .*images.zip: it is a file, and no data set"):
        open_splits(tmp_path / "images.zip")
    with pytest.raises(UserError, match=r"--data .*nowhere: there is no such folder"):
        open_splits(tmp_path / "nowhere")


def test_folder_without_images_is_named(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(UserError, match="train has no images: 1 class folders"):
        open_splits(tmp_path)


def test_class_that_training_lacks_is_named(data):
    write_image(data / "test/wolf/1.png")
    with pytest.raises(
        UserError, match="test has the class 'wolf', which is not among the 2 classes"
    ):
        open_splits(data)


def test_vanished_and_empty_files_are_named(data):
    train, file = open_train_split(data), data / "train/cat/1.png"
    file.write_bytes(b"")
    with pytest.raises(SampleError, match=r"cat/1.png is no whole image: the file is empty"):
        train.image(1)
    file.unlink()
    with pytest.raises(ReadError, match=r"cat/1.png has vanished since the data was indexed"):
        train.image(1)


def test_digits_are_written_once_and_whole(tmp_path):
    folder = write_digits(tmp_path / "digits")
    train, test = open_splits(folder)
    assert (len(train), len(test), len(train.classes)) == (1437, 360, 10)
    before = Path(train.name(0)).stat().st_mtime_ns
    assert write_digits(folder) == folder
    assert Path(train.name(0)).stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]
