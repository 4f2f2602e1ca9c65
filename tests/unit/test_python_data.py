"""A Python data set: its pixels are those of files to the bit, and each fault names its item."""

import io
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import write_folder
from PIL import Image

from hvd_lbt.cli import main
from hvd_lbt.data import on_device, pipeline
from hvd_lbt.data.identity import identity, same_at_resume
from hvd_lbt.data.own_data import OwnData, own_splits
from hvd_lbt.data.store import open_data, open_splits
from hvd_lbt.errors import ReadError, SampleError, UserError
from hvd_lbt.recipe import DataRecipe, load_recipe

DATA = DataRecipe(
    image_size=32, augment="random_resized_crop", flip=True, mean=(0, 0, 0), std=(1, 1, 1)
)
RANGES = [(0, 5, 5), (5, 8, 8), (13, 20, 20), (33, 3, 3)]  # over the end of the first epoch


class Items:
    """The items of a list, and what `changes` says of some."""

    def __init__(self, items, classes=("a", "b"), changes=None):
        self.items, self.classes, self.changes = list(items), classes, changes or {}

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        change = self.changes.get(index)
        return self.items[index] if change is None else change()


def pixels(number, shape=(8, 8, 3)):
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def items(count=40):
    return [(pixels(number), number % 2) for number in range(count)]


def batches(store, data=DATA, ranges=RANGES, maker=pipeline, **options):
    options = {"seed": 3, "micro_batch": 20, "device": torch.device("cpu")} | options
    return list(maker.train_batches(store, data, ranges, **options))


@pytest.mark.parametrize("form", ["bytes", "array", "PIL"])
def test_the_batches_are_those_of_the_same_files_in_a_folder(tmp_path, form):
    store, _ = open_splits(write_folder(tmp_path))

    def item(index):
        data = store.read(index)
        image = Image.open(io.BytesIO(data))
        made = {"bytes": lambda: data, "PIL": lambda: image, "array": lambda: np.array(image)}
        return made[form](), torch.tensor(store.labels[index])  # a label as data sets give it

    lazy = {index: (lambda index=index: item(index)) for index in range(len(store))}
    own = OwnData(Items([None] * len(store), store.classes, lazy), "--data x:y, train")
    for theirs, mine in zip(batches(store), batches(own), strict=True):
        assert torch.equal(theirs.labels, mine.labels)
        if form == "bytes":  # decoded by the same decoder
            assert torch.equal(theirs.images, mine.images)
        else:  # PIL's pixels of a JPEG against DALI's: rounded otherwise here and there
            assert (theirs.images - mine.images).abs().mean() < 1


def test_grey_and_cached_images_are_what_pil_says():
    grey = [(pixels(n, (8, 8) if n % 2 else (8, 8, 1)), 0) for n in range(4)]
    own = OwnData(Items(grey), "own")
    data = DataRecipe(
        image_size=8, augment="none", mean=(0, 0, 0), std=(1, 1, 1), cache_on_device=True
    )
    (batch,) = batches(own, data, [(0, 4, 4)], on_device)
    order = pipeline.TrainSamples(own, 3, load_recipe("digits").data).indices(0, 4)
    for place, index in enumerate(order):
        expected = torch.from_numpy(grey[index][0].reshape(8, 8)).float()
        assert torch.equal(batch.images[place], expected.expand(3, 8, 8))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (lambda: 1 / 0, r"own\[7\]: ZeroDivisionError: division by zero, .*test_python_data.py:"),
        (lambda: pixels(0), r"own\[7\] is a numpy.ndarray; it must be \(image, label\)"),
        (lambda: (pixels(0), 0, 1), r"own\[7\] is a tuple of 3 parts; it must be"),
        (lambda: {"image": 1, "label": 2}, r"own\[7\] is a dict of 2 parts; it must be"),
        (lambda: (torch.zeros(3, 8, 8), 0), r"own\[7\]: the image is a torch.Tensor; it must be"),
        (lambda: ("a.jpg", 0), r"own\[7\]: the image is a str; it must be the bytes"),
        (lambda: (pixels(0) / 255, 0), r"own\[7\]: the array is of float64; it must be of uint8"),
        (lambda: (pixels(0, (3, 8, 8)), 0), r"own\[7\]: the array has the shape \(3, 8, 8\)"),
        (lambda: (pixels(0, (0, 8, 3)), 0), r"own\[7\]: the array has the shape \(0, 8, 3\)"),
        (lambda: (pixels(0), 2), r"own\[7\]: the label is 2; there are 2 classes"),
        (lambda: (pixels(0), -1), r"own\[7\]: the label is -1; there are 2 classes"),
        (lambda: (pixels(0), 1.0), r"own\[7\]: the label is 1.0 \(float\); it must be a whole"),
        (lambda: (pixels(0), True), r"own\[7\]: the label is True \(bool\); it must be a whole"),
        (lambda: (pixels(0), "cat"), r"own\[7\]: the label is 'cat' \(str\)"),
        (lambda: (pixels(0), None), r"own\[7\]: the label is None"),
    ],
)
def test_a_bad_item_is_named_and_never_skipped(item, said):
    own = OwnData(Items(items(), changes={7: item}), "own")
    skipping = DATA.model_copy(update={"on_bad_sample": "skip"})
    with pytest.raises(ReadError, match=said):
        batches(own, skipping, on_skipped=pytest.fail)


def test_bytes_that_are_no_image_are_skipped_as_a_file_is():
    own = OwnData(Items(items(), changes={7: lambda: (b"no image", 1)}), "own")
    with pytest.raises(SampleError, match=r"own\[7\] is no whole image: it cannot be identified"):
        batches(own)
    skipping, skipped = DATA.model_copy(update={"on_bad_sample": "skip"}), []
    found = batches(own, skipping, on_skipped=lambda error: skipped.append(str(error)))
    labels = torch.cat([batch.labels for batch in found])
    assert [str(error).split(" is ")[0] for error in skipped] == ["own[7]"]
    assert (labels == pipeline.SKIPPED).sum() == 1


def test_a_data_set_that_changes_is_an_error():
    data = Items(items())
    own = OwnData(data, "own")
    own.image(7)
    data.changes[7] = lambda: (pixels(7), 0)
    with pytest.raises(ReadError, match=r"own\[7\]: the label was 1 and is 0 now"):
        own.image(7)
    data.items.append(data.items[0])
    with pytest.raises(ReadError, match="own: it had 40 items at the start and has 41 now"):
        own.image(0)
    rng = np.random.default_rng()
    random_transform = {0: lambda: (rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 0)}
    with pytest.raises(ReadError, match=r"own\[0\] is another image each time it is read"):
        OwnData(Items(items(), changes=random_transform), "own")


def test_one_thread_at_a_time_asks_unless_the_data_set_allows_more():
    class Counting(Items):
        inside = most = 0
        lock = threading.Lock()

        def __getitem__(self, index):
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            threading.Event().wait(0.001)
            with self.lock:
                self.inside -= 1
            return self.items[index]

    for safe in (False, True):
        data = Counting(items())
        data.thread_safe = safe
        batches(OwnData(data, "own"), DATA.model_copy(update={"readers": 4}))
        assert (data.most > 1) == safe


def test_ranks_with_other_items_have_another_identity():
    first = identity(OwnData(Items(items()), "own"))
    read = OwnData(Items(items()), "own")
    batches(read)  # labels that are known by now are no part of it
    assert identity(read) == first
    shuffled = [items()[number] for number in np.random.default_rng(0).permutation(40)]
    other = identity(OwnData(Items(shuffled), "own"))
    assert other != first
    with pytest.raises(UserError, match="was trained on other data: train: the files"):
        same_at_resume({"data": {"train": first}}, {"train": other}, "runs/x")


MODULE = """
import numpy as np
class Data:
    classes = ["even", "odd"]
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        return np.full((4, 4, 3), i, dtype=np.uint8), i % 2
class Nameless(Data): classes = None
class Twice(Data): classes = ["a", "a"]
class Other(Data): classes = ["odd", "even"]
def load(): return Data(12), Data(4)
def nameless(): return Nameless(12), Nameless(4)
def twice(): return Twice(12), Twice(4)
def swapped(): return Data(12), Other(4)
def empty(): return Data(0), Data(4)
def one(): return Data(12)
def stream(): return iter([1]), Data(4)
def fails(): raise OSError("the server is away")
NUMBER = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nameless", "how many classes there are is not known"),
        ("twice", "`classes` has 'a' twice"),
        ("swapped", "the test data set has other classes"),
        ("empty", "train: the data set is empty"),
        ("one", "the function returned a "),
        ("stream", "a list_iterator has no __len__"),
        ("fails", "the function failed: OSError: the server is away, "),
        ("NUMBER", "it is a int; it must be a function"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_a_function_that_gives_no_data_is_an_error(module, function, said, capsys):
    assert main(["plan", "digits", "--data", f"{module}:{function}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"hvd_lbt: --data: '{module}" if function == "nothing" else "hvd_lbt: --data "
    )
    assert said in line


def test_the_splits_are_found_by_name_and_counted(module, tmp_path, capsys):
    train, test = open_data(Path(f"{module}:load"), load_recipe("digits"))
    assert (len(train), len(test), train.classes) == (12, 4, ("even", "odd"))
    assert own_splits(f"{module}:nameless", 3)[0].classes == ("0", "1", "2")
    with pytest.raises(UserError, match=r"data\.classes: names\.txt has no effect"):
        own_splits(f"{module}:load", None, "names.txt")
    assert main(["plan", "digits", "--data", f"{module}:load"]) == 0
    assert "12" in capsys.readouterr().out
