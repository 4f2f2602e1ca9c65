"""Batches: every sample once, pixels a function of (seed, epoch, position), bad files, stalls."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import encoded, write_folder, write_shards
from PIL import Image

from hvd_lbt.bench.input import reference_evaluation, write_photographs
from hvd_lbt.data import index_store as store_module
from hvd_lbt.data import pipeline
from hvd_lbt.data.permutation import Permutation
from hvd_lbt.data.pipeline import SKIPPED, evaluation_batches, train_batches
from hvd_lbt.data.store import Store, open_splits, open_train_split
from hvd_lbt.errors import ReadError, SampleError
from hvd_lbt.recipe import Recipe, load_recipe
from hvd_lbt.schedule.plan import make_plan, micro_batch_ranges
from hvd_lbt.world import World

CPU = torch.device("cpu")
FORMATS = ("folder", "webdataset", "tfrecord", "recordio")
# Two epochs of 23 samples: updates of 8 and 20, some of which straddle the epochs.
SETTINGS = (
    "schedule.epochs=2",
    "schedule.global_batch=8",
    "schedule.milestones=[{epoch: 0.7, factor: 2.5}]",
    "schedule.max_global_batch=20",
    "layout.micro_batch=8",
    "layout.ghost_batch=4",
    "data.augment=random_resized_crop",
    "data.flip=true",
)


def recipe(*settings: str) -> Recipe:
    return load_recipe("digits", (*SETTINGS, *settings))


def batches(store: Store, its: Recipe, world: World, first_update: int = 0, **options):
    plan = make_plan(its.schedule, len(store))
    updates = [plan.at(index) for index in range(first_update, plan.updates)]
    return train_batches(
        store,
        its.data,
        micro_batch_ranges(updates, world, **its.layout.model_dump()),
        seed=its.run.seed,
        micro_batch=its.layout.micro_batch,
        device=CPU,
        **options,
    )


def stream(store: Store, its: Recipe, size: int = 1, first_update: int = 0, **options):
    """Images and labels of all updates in the global order, whatever the number of workers."""
    plan = make_plan(its.schedule, len(store))
    runs = []
    for rank in range(size):
        world = World(rank=rank, size=size)
        updates = [plan.at(index) for index in range(first_update, plan.updates)]
        ranges = micro_batch_ranges(updates, world, **its.layout.model_dump())
        made = batches(store, its, world, first_update, **options)
        for (first, count, _), batch in zip(ranges, made, strict=True):
            assert batch.images.shape == (count, 3, its.data.image_size, its.data.image_size)
            runs.append((first, batch))
    runs.sort(key=lambda run: run[0])
    return torch.cat([b.images for _, b in runs]), torch.cat([b.labels for _, b in runs])


@pytest.fixture(scope="module")
def own_classes(tmp_path_factory) -> dict[str, Path]:
    """23 images, each in a class of its own, so that a label tells the sample; in every format."""
    root = tmp_path_factory.mktemp("own")
    write_folder(root / "folder", train=23, test=1, classes=23)
    train, _ = open_splits(root / "folder")
    its = [(train.read(index), int(train.labels[index])) for index in range(len(train))]
    for kind in FORMATS[1:]:
        write_shards(kind, root / kind / "train", its, 3)
    return {kind: root / kind for kind in FORMATS}


@pytest.fixture(scope="module")
def alone(own_classes):
    return stream(open_train_split(own_classes["folder"]), recipe())


@pytest.mark.parametrize("kind", FORMATS)
def test_each_sample_once_an_epoch_for_any_format_and_number_of_workers(kind, own_classes, alone):
    store = open_train_split(own_classes[kind])
    assert store.index.kind == kind
    for size in (1, 2, 3, 5):
        images, labels = stream(store, recipe(), size)
        for epoch in (labels[:23], labels[23:]):
            assert sorted(epoch.tolist()) == list(range(23))
        assert not torch.equal(labels[:23], labels[23:])
        assert torch.equal(labels, alone[1])
        assert torch.equal(images, alone[0])  # to the bit


@pytest.mark.parametrize(
    "settings",
    [
        ("layout.micro_batch=4",),
        ("layout.micro_batch=20",),
        ("data.threads=1", "data.prefetch=1", "data.readers=1"),
        ("data.threads=5", "data.prefetch=4", "data.readers=7"),
    ],
)
def test_pixels_do_not_depend_on_micro_batch_threads_or_prefetch(settings, own_classes, alone):
    images, labels = stream(open_train_split(own_classes["folder"]), recipe(*settings), 2)
    assert torch.equal(labels, alone[1])
    assert torch.equal(images, alone[0])


def test_a_resume_in_the_middle_of_an_epoch_goes_on_with_the_same_pixels(own_classes, alone):
    store = open_train_split(own_classes["webdataset"])
    for size in (1, 3):
        images, labels = stream(store, recipe(), size, first_update=2)
        assert torch.equal(labels, alone[1][16:])
        assert torch.equal(images, alone[0][16:])


def test_another_seed_gives_another_order_and_other_pixels(own_classes, alone):
    images, labels = stream(open_train_split(own_classes["folder"]), recipe("run.seed=1"))
    assert not torch.equal(labels, alone[1])
    # the same sample, cut otherwise
    mine, theirs = images[labels == 3][0], alone[0][alone[1] == 3][0]
    assert (mine - theirs).abs().max() > 0.1


def test_batches_of_any_size_need_one_pipeline(own_classes, monkeypatch):
    built = []
    build = pipeline._build
    monkeypatch.setattr(pipeline, "_build", lambda *a: built.append(1) or build(*a))
    stream(open_train_split(own_classes["folder"]), recipe())
    assert len(built) == 1


# ------------------------------------------------------------------------- files as they are met


def grey(**options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40), 200, np.uint8)).save(file, **options)
    return file.getvalue()


def other_mode(mode: str, **options) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded("PNG", 3, (40, 30)))).convert(mode).save(file, **options)
    return file.getvalue()


def rotated() -> bytes:
    """A wide image whose EXIF says: turn me by a quarter."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(encoded("PNG", 3, (40, 30)))).save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


GOOD = {
    "cmyk.jpg": other_mode("CMYK", format="JPEG", quality=95),
    "grey.JPEG": grey(format="JPEG"),
    "grey.png": grey(format="PNG"),
    "palette.png": other_mode("P", format="PNG"),
    "transparent.png": other_mode("RGBA", format="PNG"),
    "PNG by content.JPEG": encoded("PNG", 3, (40, 30)),
    "turned.jpg": rotated(),
    "wörter mit ☃ und Leerzeichen.jpg": encoded("JPEG", 3, (40, 30), quality=95),
    "one pixel.png": encoded("PNG", 3, (1, 1)),
    "wide.jpg": encoded("JPEG", 3, (20_000, 10)),
    "high.jpg": encoded("JPEG", 3, (10, 20_000)),
    "progressive.jpg": encoded("JPEG", 3, (40, 30), progressive=True, quality=95),
    "webp.webp": encoded("WEBP", 3, (40, 30)),
    "tiff.tif": encoded("TIFF", 3, (40, 30)),
    "bitmap.bmp": encoded("BMP", 3, (40, 30)),
}
BAD = {
    "empty.jpg": (b"", "is no whole image: the file is empty"),
    "text.jpg": (b"no image\n" * 50, "is no whole image: it cannot be identified"),
    "cut.jpg": (encoded("JPEG", 3)[:-300], "is no whole image: the JPEG is cut off"),
    "cut.png": (encoded("PNG", 3)[:-100], "is no whole image: image file is truncated"),
}


def real_life(data: Path) -> Path:
    train = data / "train" / "a class"
    train.mkdir(parents=True)
    for name, content in GOOD.items():
        (train / name).write_bytes(content)
    (data / "elsewhere.jpg").write_bytes(GOOD["grey.JPEG"])
    (train / "link.jpg").symlink_to(data / "elsewhere.jpg")
    (train / "folder.jpg").mkdir()
    return data


def evaluated(store: Store, *settings: str, size: int = 16, **options) -> torch.Tensor:
    its = recipe(f"data.image_size={size}", "data.augment=none", "data.flip=false", *settings)
    made = evaluation_batches(
        store, its.data, [(0, len(store))], micro_batch=64, device=CPU, **options
    )
    (batch,) = made
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (its.data.std, its.data.mean))
    return batch.images * std + mean


def test_real_files_are_decoded_whatever_their_colours_and_sizes(tmp_path):
    store = open_train_split(real_life(tmp_path))
    images = evaluated(store)
    names = [Path(store.name(index)).name for index in range(len(store))]
    assert sorted(names) == sorted([*GOOD, "link.jpg"])
    of = dict(zip(names, images, strict=True))
    for name in ("grey.JPEG", "grey.png", "link.jpg"):
        assert (of[name] - 200).abs().max() <= 1
    # one picture in many forms; JPEG loses little of it, a palette of 256 and CMYK's way more
    same = of["PNG by content.JPEG"]
    lossy = {"cmyk.jpg": 8, "palette.png": 20, "webp.webp": 20}
    others = ("transparent.png", "progressive.jpg", "tiff.tif", "bitmap.bmp")
    for name in (*others, *lossy, "wörter mit ☃ und Leerzeichen.jpg"):
        assert (of[name] - same).abs().mean() < lossy.get(name, 4), name
    # EXIF's rotation is ignored
    assert (of["turned.jpg"] - same).abs().mean() < 4
    for its in (recipe(), recipe("data.augment=pad_crop")):
        made = train_batches(store, its.data, [(0, 64, 4)], seed=0, micro_batch=64, device=CPU)
        assert next(made).images.isfinite().all()


def with_bad(data: Path) -> Path:
    write_folder(data)
    for number, (name, (content, _)) in enumerate(BAD.items()):
        (data / f"train/class {number % 4}/{name}").write_bytes(content)
    os.symlink(data / "nowhere", data / "train/class 0/leads nowhere.jpg")
    return data


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_reason(name, folder, tmp_path):
    (tmp_path / "train/x").mkdir(parents=True)
    (tmp_path / "train/x" / name).write_bytes(BAD[name][0])
    store = open_train_split(tmp_path)
    with pytest.raises(SampleError, match=f"train/x/{name} {BAD[name][1]}"):
        evaluated(store)


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    # root may read everything: the kernel's answer to others is put in its place
    def forbidden(file: bytes) -> bytes:
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(store_module, "read_regular", forbidden)
    with pytest.raises(SampleError, match=r"img-.*JPEG cannot be read: Permission denied\."):
        evaluated(open_train_split(folder))


def test_skip_leaves_bad_samples_out_the_same_on_any_number_of_workers(tmp_path):
    store = open_train_split(with_bad(tmp_path))
    its, found = recipe("data.on_bad_sample=skip"), []
    images, labels = stream(store, its, on_skipped=found.append)
    bad = [*BAD, "leads nowhere.jpg"]
    assert len(store) == 23 + len(bad)
    assert (labels == SKIPPED).sum() == 2 * len(bad)  # two epochs
    told = {str(error) for error in found}
    assert len(told) == len(bad)
    assert all(any(name in line for line in told) for name in bad)
    for size in (2, 3):
        again = stream(store, its, size, on_skipped=found.append)
        assert torch.equal(again[1], labels)
        assert torch.equal(again[0], images)
    assert {str(error) for error in found} == told


def test_the_place_of_a_bad_sample_has_an_image_of_its_ghost_batch_and_no_gradient(
    tmp_path, monkeypatch
):
    (tmp_path / "train/x").mkdir(parents=True)
    for number in range(12):
        (tmp_path / f"train/x/{number:02}.png").write_bytes(encoded("PNG", number))
    for number in (1, 3, 8, 9, 10, 11):
        (tmp_path / f"train/x/{number:02}.png").write_bytes(b"")
    store = open_train_split(tmp_path)
    its = recipe("data.on_bad_sample=skip", "data.augment=none", "data.flip=false", "run.seed=5")
    monkeypatch.setattr(Permutation, "at", lambda self, positions: positions)
    (batch,) = train_batches(
        store,
        its.data,
        [(0, 12, 4)],
        seed=0,
        micro_batch=12,
        device=CPU,
        on_skipped=lambda error: None,
    )
    skipped = (batch.labels == SKIPPED).nonzero().flatten().tolist()
    assert skipped == [1, 3, 8, 9, 10, 11]
    for place, donor in ((1, 2), (3, 0)):
        assert torch.equal(batch.images[place], batch.images[donor])
    assert batch.images[8].std(dim=(1, 2)).max() < 1e-6  # all of its ghost batch is bad: grey
    logits = torch.randn(12, 1, requires_grad=True)
    torch.nn.functional.cross_entropy(
        torch.cat([logits, -logits], 1), batch.labels, reduction="sum"
    ).backward()
    assert (logits.grad[skipped] == 0).all()


def undecodable() -> bytes:
    """A PNG whose checksums hold and whose pixels are no zlib stream: only decoding tells."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", 48, 48, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", b"nonsense" * 20) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_an_image_whose_pixels_are_nonsense_is_named(tmp_path):
    data = write_folder(tmp_path, classes=2)
    (data / "train/class 1/img-5.png").write_bytes(undecodable())
    with pytest.raises(SampleError, match=r"img-5.png is no whole image: "):
        stream(open_train_split(data), recipe())


# What passes the check of the bytes and fails in DALI, which may spoil the end of the process.
DALI_REFUSES = """
import sys
from pathlib import Path
from hvd_lbt.cli import main
from hvd_lbt.data import index_store as store
from hvd_lbt.data.pixels import Encoded
import numpy as np
check = store.encoded
raw = lambda data: Encoded(np.frombuffer(data, np.uint8), 48, 48)
store.encoded = lambda data: raw(data) if b"nonsense" in data else check(data)
main(["data", "check", sys.argv[1]])
raise SystemExit("not reached")
"""


def test_what_dali_refuses_is_found_and_the_process_ends(tmp_path):
    data = write_folder(tmp_path, classes=2)
    bad = data / "train/class 1/img-5.png"
    bad.write_bytes(undecodable())
    done = subprocess.run(
        [sys.executable, "-c", DALI_REFUSES, str(data)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr[-2000:]
    assert lines[0].startswith(f"{bad} cannot be decoded as an image (")
    assert lines[1] == "31 images, 1 bad"


# ---------------------------------------------------------------------------- storage that fails


def test_a_file_that_vanishes_ends_even_a_run_that_skips(tmp_path):
    store = open_train_split(write_folder(tmp_path))
    Path(store.name(11)).unlink()
    with pytest.raises(ReadError, match=r"has vanished since the data was indexed"):
        stream(store, recipe("data.on_bad_sample=skip"), on_skipped=lambda error: None)


def test_a_read_that_gets_no_answer_is_named_in_time(tmp_path, monkeypatch):
    data = write_folder(tmp_path)
    stalled, answer = next((data / "train/class 2").iterdir()), threading.Event()
    read_file = store_module.read_regular

    def stalls(file: bytes) -> bytes:
        if file == os.fsencode(stalled):
            answer.wait(600)
        return read_file(file)

    monkeypatch.setattr(store_module, "read_regular", stalls)
    match = rf"{stalled.name} was not read within 0.3 s \(data.timeout\)"
    with pytest.raises(ReadError, match=match):
        stream(open_train_split(data), recipe("data.timeout=0.3"))
    answer.set()


def test_a_reader_that_dies_ends_the_run(own_classes, monkeypatch):
    def dies(self, index):
        raise MemoryError("no memory for the reader")

    monkeypatch.setattr(Store, "read", dies)
    with pytest.raises(MemoryError, match="for the reader"):
        stream(open_train_split(own_classes["folder"]), recipe())


def test_no_reader_is_left_when_a_run_ends(own_classes):
    before = threading.active_count()
    stream(open_train_split(own_classes["folder"]), recipe())
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------ evaluation against references


def test_evaluation_images_are_those_of_pil_and_torchvision(tmp_path):
    store = open_train_split(write_photographs(tmp_path, 14))
    ours = evaluated(store, "data.eval_resize=256", size=224)
    for index, image in enumerate(ours):
        theirs = reference_evaluation(store.read(index), resize=256, size=224)
        difference = (image - theirs).abs().mean(dim=(1, 2))
        # The same triangle filter; PIL rounds to 8 bits between its two passes too. A centre that
        # lies one pixel aside, or no filter, gives 3 and more.
        assert difference.max() < 0.5, (store.name(index), difference)
