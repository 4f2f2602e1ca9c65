"""Images kept in memory: the same samples, cuts and pixels as DALI makes, and errors that name the
file.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_lbt.data import on_device, pipeline
from hvd_lbt.data.store import open_splits
from hvd_lbt.errors import SampleError, UserError
from hvd_lbt.recipe import DataRecipe, load_recipe

CPU = torch.device("cpu")
SIDE = 20
RANGES = [(0, 7, 7), (7, 16, 8), (23, 1, 1), (24, 30, 30)]  # the last crosses into the second epoch


def recipe(**settings) -> DataRecipe:
    usual = {"image_size": SIDE, "augment": "pad_crop", "pad": 3, "flip": True}
    numbers = {"mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7)}
    return DataRecipe.model_validate(usual | numbers | settings)


def write(folder, suffix: str, side: int = SIDE):
    """40 smooth colour images (noise would be JPEG's worst case, not a photograph)."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for index in range(count):
            small = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            file = folder / split / str(index % 3) / f"{index:02}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(
                file, quality=75
            )
    return folder


def compare(folder, data: DataRecipe) -> tuple[float, float]:
    """Largest and mean difference of pixels from DALI's, in grey levels of 0..255; labels are the
    same.
    """
    train, test = open_splits(folder)
    settings = {"micro_batch": 30, "device": CPU}
    makers = [
        [
            *module.train_batches(train, data, RANGES, seed=5, **settings),
            *module.evaluation_batches(test, data, [(0, 4), (4, 6)], **settings),
        ]
        for module in (pipeline, on_device)
    ]
    differences = []
    for theirs, ours in zip(*makers, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.images.shape == theirs.images.shape
        off = (ours.images - theirs.images) * torch.tensor(data.std).view(1, 3, 1, 1)
        differences.append(off.abs().flatten())
    return float(torch.cat(differences).max()), float(torch.cat(differences).mean())


@pytest.mark.parametrize(
    "settings",
    [{}, {"flip": False, "pad": 1}, {"augment": "none"}, {"augment": "none", "flip": False}],
)
def test_the_pixels_of_png_files_are_dalis(tmp_path, settings):
    largest, _ = compare(write(tmp_path, "png"), recipe(**settings))
    assert largest < 1e-4  # fp32's rounding of 255


def test_the_pixels_of_jpeg_files_are_dalis_but_for_rounding(tmp_path):
    largest, mean = compare(write(tmp_path, "jpg"), recipe())
    assert largest <= 2  # grey levels
    assert mean < 0.1


def test_images_are_decoded_once(tmp_path, monkeypatch):
    train, _ = open_splits(write(tmp_path, "png"))
    read = []
    image = train.image
    monkeypatch.setattr(train, "image", lambda index: read.append(index) or image(index))
    for _ in range(3):
        for _batch in on_device.train_batches(
            train, recipe(), RANGES, seed=0, micro_batch=30, device=CPU
        ):
            pass
    assert sorted(read) == list(range(40))


def test_what_cannot_be_kept_is_named(tmp_path, monkeypatch):
    def first(folder):
        train, _ = open_splits(folder)
        next(on_device.train_batches(train, recipe(), RANGES, seed=0, micro_batch=30, device=CPU))

    write(tmp_path / "large", "png", side=24)
    with pytest.raises(SampleError, match=r"train/0/00.png has 24×24 pixels.* 20×20"):
        first(tmp_path / "large")
    write(tmp_path / "broken", "png")
    broken = tmp_path / "broken/train/1/01.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(SampleError, match=r"train/1/01.png is no whole image"):
        first(tmp_path / "broken")
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    write(tmp_path / "good", "png")
    with pytest.raises(UserError, match=r"data.cache_on_device: all images take"):
        first(tmp_path / "good")


@pytest.mark.parametrize(
    "setting", ["augment=random_resized_crop", "eval_resize=40", "on_bad_sample=skip"]
)
def test_settings_without_effect_are_refused(setting):
    with pytest.raises(UserError, match=rf"data.{setting.split('=')[0]}: .* data.cache_on_device"):
        load_recipe("cifar10_decay_lr", ["data.cache_on_device=true", f"data.{setting}"])
