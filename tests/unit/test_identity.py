"""The same data on all ranks and at a resume: other files of equal count are seen, a move is
not.
"""

import shutil
from pathlib import Path

import pytest
from data_sets import encoded

from hvd_lbt.data.convert import convert
from hvd_lbt.data.identity import compare_copies, identity, same_at_resume
from hvd_lbt.data.store import open_splits
from hvd_lbt.errors import UserError

ORDERED = "the class names or their order"


def splits(data: Path, classes: Path | None = None):
    train, test = open_splits(data, classes)
    return {"train": identity(train), "test": identity(test)}


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/.hvd_lbt", ignore_errors=True)
    return tmp_path / "copy"


def first(data: Path) -> Path:
    return sorted((data / "train").glob("*/*.JPEG"))[0]


def lose_one(data: Path) -> None:
    first(data).unlink()


def move_to_another_class(data: Path) -> None:
    first(data).rename(data / "train/class 3" / first(data).name)


def rename_one(data: Path) -> None:
    first(data).rename(first(data).with_name("another.JPEG"))


def rename_class(data: Path) -> None:
    for split in ("train", "test"):
        (data / split / "class 0").rename(data / split / "class 00")


def change_test(data: Path) -> None:
    (data / "test/class 0/more.png").write_bytes(encoded("PNG"))


CHANGES = {
    lose_one: r"train: the number of images \(23 and 22\)",
    move_to_another_class: "train: the labels",
    rename_one: "train: the files",
    rename_class: f"train: {ORDERED}",
    change_test: r"test: the number of images \(7 and 8\)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_that_differs_is_named_by_rank_and_host(change, folder, copy):
    change(copy)
    good, other = splits(folder), splits(copy)
    views = [("node1", good), ("node1", good), ("node2", other)]
    with pytest.raises(
        UserError, match=rf"rank 2 on node2 differs from rank 0 on node1 in {CHANGES[change]}"
    ):
        compare_copies(views)
    with pytest.raises(UserError, match=r"rank 0 on a, rank 1 on a differ from rank 2 on b"):
        compare_copies([("a", other), ("a", other), ("b", good), ("b", good), ("c", good)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_other_data_says_what_differs(change, folder, copy):
    state = {"data": splits(copy)}
    assert same_at_resume(state, splits(copy), "runs/x") == ""
    change(copy)
    with pytest.raises(UserError, match=rf"runs/x was trained on other data: .*{CHANGES[change]}"):
        same_at_resume({"data": splits(folder)}, splits(copy), "runs/x")


def test_classes_in_another_order_are_seen(copy, tmp_path):
    names = [f"class {label}" for label in (2, 0, 1, 3)]
    (tmp_path / "order.txt").write_text("\n".join(names))
    with pytest.raises(UserError, match=ORDERED):
        same_at_resume({"data": splits(copy)}, splits(copy, tmp_path / "order.txt"), "runs/x")


def test_data_may_move_and_be_converted_by_our_own_command(folder, copy, tmp_path):
    state = {"data": splits(folder)}
    compare_copies([("a", splits(folder)), ("b", splits(copy))])
    assert same_at_resume(state, splits(copy), "runs/x") == ""
    for form in ("webdataset", "tfrecord", "recordio"):
        convert(folder, tmp_path / form, form=form, samples_per_shard=5)
        said = same_at_resume(state, splits(tmp_path / form), "runs/x")
        assert said == f"The data was folder and is {form}: classes and labels agree in order."
    again = tmp_path / "other shards"
    convert(folder, again, form="webdataset", samples_per_shard=9)
    assert same_at_resume({"data": splits(tmp_path / "webdataset")}, splits(again), "runs/x") == ""


def test_other_images_in_shards_of_equal_count_are_seen(folder, copy, tmp_path):
    first(copy).write_bytes(encoded("PNG"))
    for name, data in (("one", folder), ("other", copy)):
        convert(data, tmp_path / name, form="webdataset", samples_per_shard=9)
    with pytest.raises(UserError, match="train: the files"):
        compare_copies([("a", splits(tmp_path / "one")), ("b", splits(tmp_path / "other"))])


def test_a_checkpoint_without_hashes_loads_and_says_so(folder):
    assert "only counts were compared" in same_at_resume({}, splits(folder), "runs/x")
