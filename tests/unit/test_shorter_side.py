"""`data convert --shorter-side`: pixels, sizes, what is copied, and what is another data set."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from data_sets import encoded
from PIL import Image

from hvd_lbt.bench.input import reference_evaluation
from hvd_lbt.cli import main
from hvd_lbt.data.convert import convert
from hvd_lbt.data.identity import identity, same_at_resume
from hvd_lbt.data.shrink import Shrink
from hvd_lbt.data.store import open_splits, open_train_split
from hvd_lbt.errors import UserError

SETTINGS = {"form": "webdataset", "samples_per_shard": 4}


def smooth(number, size, form="JPEG", mode="RGB", **options):
    """A picture without noise, which JPEG keeps nearly as it is."""
    with Image.open(io.BytesIO(encoded("PNG", number, size))) as image:
        file = io.BytesIO()
        image.convert(mode).save(file, form, **options)
    return file.getvalue()


IMAGES = {
    "a/0 wide.JPEG": smooth(0, (300, 120), quality=95),
    "a/1 high.jpg": smooth(1, (80, 200), quality=95),
    "a/2 small.jpg": smooth(2, (64, 900)),
    "a/3 rotated.jpg": smooth(3, (200, 100), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0"
                              b"\0\x01\0\x06\0\0\0\0\0\0"),
    "b/4.png": smooth(4, (130, 140), "PNG"),
    "b/5 grey.jpg": smooth(5, (130, 140), mode="L"),
    "b/6 cmyk.jpg": smooth(6, (130, 140), mode="CMYK"),
    "b/7 broken.jpg": smooth(7, (130, 140))[:900],
    "b/8 clear.png": smooth(8, (130, 140), "PNG", mode="RGBA"),
    "b/9 tiny.png": smooth(9, (20, 20), "PNG"),
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    for name, image in IMAGES.items():
        for split in ("train", "test"):
            file = tmp_path / "in" / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
    return tmp_path / "in"


def pixels(image):
    with Image.open(io.BytesIO(image)) as file:
        return np.asarray(file.convert("RGB"), np.int16)


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_images_are_made_smaller_once(data, tmp_path, capfd, jobs):
    words = ["--shorter-side", "64", "--jobs", jobs, "--samples-per-shard", "4"]
    assert main(["data", "convert", str(data), str(tmp_path / "out"), *words]) == 0
    before, after = open_train_split(data), open_train_split(tmp_path / "out")
    assert after.labels.tolist() == before.labels.tolist()
    assert after.classes == before.classes
    kept = {"2 small", "7 broken", "9 tiny"}
    for at, (name, image) in enumerate(IMAGES.items()):
        stored = after.read(at)
        if any(one in name for one in kept):
            assert stored == image
            continue
        with Image.open(io.BytesIO(stored)) as file:
            assert (file.format, min(file.size)) == ("JPEG", 64)
            assert not file.getexif()
            assert file.mode == ("L" if "grey" in name else "RGB")
            side = max(file.size)
        height, width = pixels(image).shape[:2]
        assert side == int(64 * max(height, width) / min(height, width))
        crop = reference_evaluation(image, resize=64, size=64).permute(1, 2, 0).numpy()
        again = reference_evaluation(stored, resize=64, size=64).permute(1, 2, 0).numpy()
        assert np.abs(crop - again).mean() < 3, name
    said = capfd.readouterr().err
    assert "train: 7 of 10 images made smaller, to a shorter side of 64 pixels, JPEG of qua" in said
    assert "warning: 1 image that is not whole" in said
    assert "1 JPEG in CMYK" in said
    assert "a pixel differs by" in said
    with tarfile.open(tmp_path / "out/train/train-00001-of-00003.tar") as archive:
        names = [name for name in archive.getnames() if not name.endswith((".cls", ".json"))]
        assert names[0] == "00000004.jpg"  # it was a PNG
        about = json.load(archive.extractfile("00000004.json"))
    assert about["name"] == "b/4.jpg"


def test_quality_changes_bytes_and_is_recorded(data, tmp_path):
    sizes = {}
    for quality in (50, 90):
        shrink = Shrink(shorter_side=64, quality=quality)
        convert(data, tmp_path / str(quality), **SETTINGS, shrink=shrink)
        store = open_train_split(tmp_path / str(quality))
        sizes[quality] = sum(len(store.read(at)) for at in range(len(store)))
        about = json.loads((tmp_path / str(quality) / "convert.json").read_text())
        assert about["shrink"]["quality"] == quality
        assert about["shrink"]["shorter_side"] == 64
    assert sizes[50] < sizes[90]


def test_other_sizes_do_not_continue_a_conversion(data, tmp_path):
    convert(data, tmp_path / "out", **SETTINGS, shrink=Shrink(shorter_side=64))
    convert(data, tmp_path / "out", **SETTINGS, shrink=Shrink(shorter_side=64))
    for other in (None, Shrink(shorter_side=63), Shrink(shorter_side=64, quality=91)):
        with pytest.raises(UserError, match=r"with other settings \(.*: shrink\)"):
            convert(data, tmp_path / "out", **SETTINGS, shrink=other)
    shutil.rmtree(tmp_path / "out")
    convert(data, tmp_path / "out", **SETTINGS)
    with pytest.raises(UserError, match=r"with other settings \(.*: shrink\)"):
        convert(data, tmp_path / "out", **SETTINGS, shrink=Shrink(shorter_side=64))


def test_a_run_does_not_resume_on_images_that_were_made_smaller(data, tmp_path):
    convert(data, tmp_path / "same", **SETTINGS)
    convert(data, tmp_path / "small", **SETTINGS, shrink=Shrink(shorter_side=64))
    convert(tmp_path / "small", tmp_path / "again", **{**SETTINGS, "form": "tfrecord"})
    smaller = {**SETTINGS, "shrink": Shrink(shorter_side=50)}
    convert(tmp_path / "small", tmp_path / "smaller", **smaller)
    folder, same, small, again, smallest = (
        {
            split: identity(store)
            for split, store in zip(("train", "test"), open_splits(place), strict=True)
        }
        for place in (
            data,
            tmp_path / "same",
            tmp_path / "small",
            tmp_path / "again",
            tmp_path / "smaller",
        )
    )
    same_at_resume({"data": folder}, same, "runs/a")
    same_at_resume({"data": small}, small, "runs/a")
    same_at_resume({"data": small}, again, "runs/a")
    for before, now in (
        (folder, small),
        (same, small),
        (small, folder),
        (small, same),
        (small, smallest),
    ):
        with pytest.raises(UserError, match="the size of the stored images"):
            same_at_resume({"data": before}, now, "runs/a")


def test_a_side_that_no_image_exceeds_is_said(data, tmp_path, capfd):
    convert(data, tmp_path / "out", **SETTINGS, shrink=Shrink(shorter_side=130))
    assert "train: warning: no image is larger than --shorter-side 130" in capfd.readouterr().err
