"""The data set that a fixed network labels, and labels of which a share is random."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_lbt.data import on_device, pipeline
from hvd_lbt.data.identity import identity
from hvd_lbt.data.label_noise import noisy_labels
from hvd_lbt.data.store import count_train_samples, open_data, open_test_data
from hvd_lbt.data.teacher import TEACHER, TeacherStore
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe

# A checkpoint of a study must find them again: they never change.
LITERAL_PIXELS = [[140, 254, 77], [204, 12, 76], [41, 94, 179], [31, 42, 196]]
LITERAL_NOISY = [2, 5, 9, 11, 12]  # of all samples with label 0, those with another
LITERAL_LABELS = [2, 2, 3, 9, 6, 6, 7, 7, 1, 2, 3, 5, 9, 5, 9, 0, 5, 7, 5, 3]


def recipe_of(*overrides):
    return load_recipe("imagenet_teacher", ("data.train_samples=3000", *overrides))


@pytest.fixture(scope="module")
def splits():
    return open_data(TEACHER, recipe_of())


def test_the_samples_are_literal(splits):
    train, test = splits
    assert (len(train), len(test)) == (3000, 50_000)
    assert np.asarray(next(train.pixels()))[0, 0].tolist() == LITERAL_PIXELS
    assert train.labels[:20].tolist() == LITERAL_LABELS
    assert len(train.classes) == 10
    shares = np.bincount(test.labels, minlength=10) / len(test)
    assert shares.min() > 0.03
    assert shares.max() < 0.3


def test_a_sample_is_the_same_in_a_larger_set_and_none_is_twice(splits):
    larger = TeacherStore("train", 70_000, 4, 10)  # more than are made at once
    assert np.array_equal(larger.labels[:3000], splits[0].labels)
    pixels = np.concatenate(list(larger.pixels())).reshape(70_000, -1)
    assert np.array_equal(pixels[:3000], next(splits[0].pixels()).reshape(3000, -1))
    assert len(np.unique(pixels, axis=0)) == 70_000
    with Image.open(io.BytesIO(larger.image(66_000).data.tobytes())) as image:
        assert np.array_equal(np.asarray(image).reshape(-1), pixels[66_000])


def test_dali_and_the_device_give_the_same_batches(splits):
    recipe = recipe_of("data.label_noise=0.5")
    options = {"seed": 3, "micro_batch": 50, "device": torch.device("cpu")}
    ranges = [(2980, 50, 1), (3030, 7, 1)]
    data = recipe.data
    kept = list(on_device.train_batches(splits[0], data, ranges, **options))
    uncached = data.model_copy(update={"cache_on_device": False, "threads": 1})
    decoded = list(pipeline.train_batches(splits[0], uncached, ranges, **options))
    for one, other in zip(kept, decoded, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.allclose(one.images, other.images, atol=1e-5)
    clean = recipe_of("data.label_noise=0").data
    labels = next(on_device.train_batches(splits[0], clean, ranges, **options)).labels
    assert 0.2 < (labels != kept[0].labels).float().mean() < 0.7
    # test labels have none
    test = next(on_device.evaluation_batches(splits[1], data, [(0, 50)], **options_of_test()))
    assert np.array_equal(test.labels.numpy(), splits[1].labels[:50])


def options_of_test():
    return {"micro_batch": 50, "device": torch.device("cpu")}


def test_noisy_labels_depend_on_the_sample_alone():
    indices = np.array([5, 2**40, 7, 5])
    labels = np.array([1, 2, -100, 1])
    always = noisy_labels(labels, indices, 10, 0.999999)
    assert always[2] == -100
    assert always[0] == always[3]
    assert np.array_equal(always[1:3], noisy_labels(labels[1:3], indices[1:3], 10, 0.999999))
    many = np.arange(100_000)
    found = noisy_labels(np.zeros(100_000, np.int64), many, 10, 0.3)
    # of 30 % drawn from ten classes, a tenth stays right: 27 % ± 4 standard errors
    assert abs((found != 0).mean() - 0.27) < 4 * np.sqrt(0.27 * 0.73 / 100_000)
    assert np.flatnonzero(found)[:5].tolist() == LITERAL_NOISY
    counts = np.bincount(found, minlength=10)[1:]
    assert ((counts - 3000) ** 2 / 3000).sum() < 27  # chi-square of 9, 99.9 %
    assert np.array_equal(noisy_labels(found, many, 10, 0.0), found)


def test_what_has_no_effect_or_does_not_fit_is_refused(splits):
    with pytest.raises(UserError, match="at most 32"):
        open_data(TEACHER, recipe_of("data.image_size=64"))
    with pytest.raises(UserError, match="trained on others"):
        open_test_data(TEACHER, ("a", "b"), recipe_of())
    with pytest.raises(UserError, match="label_noise"):
        open_data(Path("synthetic"), load_recipe("imagenet_resnet50", ["data.label_noise=0.1"]))
    assert count_train_samples(TEACHER, recipe_of()) == 3000
    assert identity(splits[0])["kind"] == "teacher"
    assert identity(splits[0])["samples"] != identity(splits[1])["samples"]
