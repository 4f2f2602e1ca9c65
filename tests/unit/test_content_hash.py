"""The hash of an index: equal for equal copies wherever they lie, another for any other samples."""

import shutil

import pytest
from data_sets import encoded, write_folder, write_shards

from hvd_lbt.data.index import open_index


def content_hash(data) -> str:
    shutil.rmtree(data / ".hvd_lbt", ignore_errors=True)
    return open_index(data, "train", timeout=30).content_hash()


def test_copies_have_one_hash_and_every_change_another(tmp_path):
    data = write_folder(tmp_path / "a")
    first = content_hash(data)
    copy = shutil.copytree(data, tmp_path / "elsewhere", ignore=lambda *_: {".hvd_lbt"})
    assert content_hash(copy) == first
    file = next((copy / "train/class 1").iterdir())
    seen = {first}
    for change in (
        lambda: file.rename(file.with_name("renamed.jpg")),
        lambda: (copy / "train/class 1").rename(copy / "train/class 9"),
        lambda: shutil.copy(copy / "train/class 9/renamed.jpg", copy / "train/class 2/renamed.jpg"),
        lambda: (copy / "train/class 9/renamed.jpg").unlink(),
    ):
        change()
        seen.add(content_hash(copy))
    assert len(seen) == 5


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord", "recordio"])
def test_shards_differ_by_label_length_and_order(kind, tmp_path):
    images = [(encoded("PNG", number), number % 3) for number in range(6)]
    other_label = [*images[:5], (images[5][0], 0)]
    other_image = [*images[:5], (images[5][0] + b"more", 2)]
    other_order = [*images[:4], images[5], images[4]]
    found = []
    for number, samples in enumerate((images, images, other_label, other_image, other_order)):
        write_shards(kind, tmp_path / str(number) / "train", samples, 2)
        found.append(content_hash(tmp_path / str(number)))
    assert found[0] == found[1]
    assert len(set(found)) == 4
