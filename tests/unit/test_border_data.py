"""Other people's archives and folders: each thing is a sample, is counted and named, or an
error.
"""

import gzip
import io
import os
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from data_sets import Example, encoded, recordio, write_folder, write_shards
from tensorboard.summary.writer.record_writer import RecordWriter

from hvd_lbt.cli import main
from hvd_lbt.data import index as index_module
from hvd_lbt.data.formats import Extents, SplitError
from hvd_lbt.data.formats.webdataset import scan_webdataset
from hvd_lbt.data.identity import identity
from hvd_lbt.data.store import Store, open_splits, open_train_split
from hvd_lbt.errors import UserError

IMAGES = [encoded("PNG", number, size=(8, 8)) for number in range(10)]


def opened(data: Path) -> Store:
    shutil.rmtree(data / ".hvd_lbt", ignore_errors=True)
    return open_train_split(data)


def samples(store: Store) -> list[tuple[bytes, str]]:
    return [(store.read(at), store.classes[store.labels[at]]) for at in range(len(store))]


def refused(data: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        opened(data)


def named(store: Store) -> str:
    return "\n".join(store.index.findings.lines())


def tar_of(members: list[tuple], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, bytes), or (name, type, target of a link)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, *what in members:
            about = tarfile.TarInfo(name)
            if len(what) == 2:
                about.type, about.linkname = what
                archive.addfile(about)
            else:
                about.size = len(what[0])
                archive.addfile(about, io.BytesIO(what[0]))
    return file.getvalue()


def pairs(count: int = 10) -> list[tuple]:
    """Samples 000 … with their labels: 0, 1, 2, 0, …"""
    return [
        member
        for at in range(count)
        for member in ((f"{at:03}.png", IMAGES[at]), (f"{at:03}.cls", b"%d" % (at % 3)))
    ]


EXPECTED = [(IMAGES[at], str(at % 3)) for at in range(10)]


@pytest.fixture
def shard(tmp_path):
    """Writes a shard of the training split; gives the data set's folder."""

    def write(data: bytes, name: str = "a.tar") -> Path:
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(data)
        return tmp_path

    return write


# -------------------------------------------------------------------------------------------- tar


def test_every_bit_of_a_header_is_looked_at(shard):
    whole, refusals = tar_of(pairs()), 0
    for at in range(4 * 1024, 4 * 1024 + 512):  # the third image's header
        for bit in (0, 3, 6, 7):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            folder = shard(bytes(data))
            try:
                scan_webdataset(folder / "train/a.tar", Extents())
            except UserError:  # and nothing else
                refusals += 1
                continue
            assert samples(opened(folder)) == EXPECTED
    assert refusals > 2000
    data = bytearray(whole)
    data[4 * 1024] ^= 1  # the name's first letter
    refused(shard(bytes(data)), r"a\.tar")


def test_a_tar_cut_off_anywhere_is_an_error(shard):
    whole = tar_of(pairs())
    end = 10 * 2 * 1024
    for at in [*range(1, end, 256), end, end + 512, end + 1023]:
        refused(shard(whole[:at]), r"a\.tar (ends at byte|is cut off|has half of|is damaged|is no)")
    assert samples(opened(shard(whole[: end + 1024]))) == EXPECTED


def test_joined_tars_and_erased_blocks_are_errors(shard):
    one, other = tar_of(pairs()[:8]), tar_of(pairs()[8:])
    refused(shard(one + other), r"further data at byte 10,240.*tar -Af A.tar B.tar")
    whole = tar_of(pairs())
    for start in (0, 512, 1024, 2048, 4096):
        for blocks in (1, 2, 4, 8):
            data = bytearray(whole)
            data[start : start + 512 * blocks] = bytes(512 * blocks)
            try:
                store = opened(shard(bytes(data)))
            except UserError:
                continue
            assert len(store) == 10, (start, blocks)
    refused(shard(bytes(len(whole))), r"a.tar is no whole tar")
    store = opened(shard(whole + bytes(10240)))
    assert samples(store) == EXPECTED
    assert "warning: 1 tar with another number of zeros at its end" in named(store)


def test_members_of_a_sample_need_not_be_neighbours(shard):
    images, labels = pairs()[::2], pairs()[1::2]
    for order in (images + labels, labels + images, images[::-1] + labels):
        store = opened(shard(tar_of([(f"./{name}", data) for name, data in order])))
        assert sorted(samples(store)) == sorted(EXPECTED)
        assert store.classes == ("0", "1", "2")


def test_tar_of_a_folder_as_tar_itself_packs_it(tmp_path, shard):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, data in pairs():
        (flat / name).write_bytes(data)
    os.link(flat / "000.png", flat / "010.png")
    (flat / "010.cls").symlink_to("000.cls")
    (flat / "note.txt").write_text("x")
    (tmp_path / "train").mkdir()
    for form in ("gnu", "pax", "ustar", "v7"):
        command = ["tar", f"--format={form}", "-cf", tmp_path / "train/a.tar", "-C", flat, "."]
        subprocess.run(command, check=True)
        store = opened(tmp_path)
        assert sorted(samples(store)) == sorted([*EXPECTED, EXPECTED[0]])
        assert named(store) == "skipped: 1 file that is no image (a.tar:note.txt)"


def test_class_folders_packed_with_a_dot(shard):
    members = [(f"./class {at % 3}/{at}.png", IMAGES[at]) for at in range(10)]
    store = opened(shard(tar_of(members)))
    assert samples(store) == [(IMAGES[at], f"class {at % 3}") for at in range(10)]


def test_links_lead_to_files_of_the_same_tar_or_are_errors(shard):
    link, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    first = [("a/1.png", IMAGES[0]), ("b/1.png", link, "a/1.png"), ("c/2.png", IMAGES[2])]
    store = opened(shard(tar_of([*first, ("d/x.png", symbolic, "../c/2.png")])))
    assert [(image, label) for image, label in samples(store)] == [
        (IMAGES[0], "a"), (IMAGES[0], "b"), (IMAGES[2], "c"), (IMAGES[2], "d")
    ]  # fmt: skip
    for target in ("../c/9.png", "/etc/passwd", "../../../x.png", "x.png"):
        match = r"a.tar has the link 'd/x.png' to .*, which is no file in this tar"
        refused(shard(tar_of([*first, ("d/x.png", symbolic, target)])), match)
    refused(shard(tar_of([*first, ("d", symbolic, "c")])), "has the link 'd' to 'c'")
    store = opened(shard(tar_of([*first, ("d/pipe.png", tarfile.FIFOTYPE, "")])))
    assert "skipped: 1 pipe, socket or device (a.tar:d/pipe.png)" in named(store)


def test_two_images_under_one_key(shard):
    store = opened(shard(tar_of([*pairs(), ("003.seg.png", IMAGES[9])])))
    assert samples(store) == EXPECTED
    assert named(store) == "skipped: 1 further image of a sample (a.tar:003.seg.png)"
    for name in ("003.jpg", "003.png", "./003.png"):
        refused(shard(tar_of([*pairs(), (name, IMAGES[9])])), "has 2 images under one key")
    members = [("a/1.left.png", IMAGES[0]), ("a/1.right.png", IMAGES[1])]
    refused(shard(tar_of(members)), "2 images under one key.*1.left.png, a/1.right.png")


def test_what_else_lies_in_a_tar_is_named(shard):
    more = [
        ("010.cls", b"1"), ("README.md", b"hello"), ("003.json", b"{}"), ("._004.png", b"\0\5"),
        ("__MACOSX/._005.png", b"x"), ("@eaDir/006.png", IMAGES[0]), (".DS_Store", b"x"),
        ("011.gif", b"GIF89a"), ("007.png~", IMAGES[7]),
    ]  # fmt: skip
    data = shard(tar_of([*more, *pairs()]))
    store = opened(data)
    assert samples(store) == EXPECTED
    lines = named(store)
    for line in (
        "skipped: 1 label without an image (a.tar:010.cls)",
        "skipped: 1 file that is no image (a.tar:README.md)",
        "skipped: 4 hidden or system files (a.tar:._004.png, ",
        "skipped: 1 image in a format that is not read (a.tar:011.gif)",
        "skipped: 1 image with an ending that is no image's (a.tar:007.png~)",
    ):
        assert line in lines
    assert named(open_train_split(data)) == lines  # from the index's file


def test_endings_and_content(shard):
    jpeg = encoded("JPEG", 0)
    members = [("a/1.JPE", jpeg), ("a/2.jfif", jpeg), ("a/3", jpeg), ("b/4.Png", IMAGES[0])]
    assert [label for _, label in samples(opened(shard(tar_of(members))))] == list("aaab")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"7\n", "7"),
        (b"\xef\xbb\xbf7\r\n", "7"),
        (b" cat \n", "cat"),
        (b"007", "7"),
        (b"\xc3\xbc", "ü"),
    ],
)
def test_a_cls_file_has_a_number_or_a_name(text, label, shard):
    assert samples(opened(shard(tar_of([("1.png", IMAGES[0]), ("1.cls", text)])))) == [
        (IMAGES[0], label)
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is empty"),
        (b"\n", "it is empty"),
        (b"-1", "no class's number"),
        (b"1.5", "no class's number"),
        (b"nan", "no class's number"),
        (b"9" * 5000, "longer than a name"),
        (b"9" * 500, "it has 500 digits"),
        (b"1\n2", "several lines"),
        (b"\xe9t\xe9", "not UTF-8"),
        (b"a\x1b[31m", "control characters"),
    ],
)
def test_other_cls_files_are_errors(text, why, shard):
    refused(shard(tar_of([("1.png", IMAGES[0]), ("1.cls", text)])), rf"\(1.cls\): .*{why}")


def test_labels_that_are_not_certain(shard):
    refused(shard(tar_of([*pairs(), ("x/011.png", IMAGES[0])])), "'x/011.png' without a label")
    refused(shard(tar_of([("1.png", IMAGES[0]), ("1.fine.cls", b"1")])), "there is '1.fine.cls'")
    refused(shard(tar_of([*pairs(), ("003.cls", b"2")])), "'003.cls' a second time")
    deep = [("a/1.png", IMAGES[0]), ("a/b/2.png", IMAGES[1])]
    refused(shard(tar_of(deep)), "in folders and in folders below these")
    refused(shard(tar_of([("../1.png", IMAGES[0])])), "without a label")
    names = [("1.png", IMAGES[0]), ("1.cls", b"cat"), ("2.png", IMAGES[1]), ("2.cls", b"3")]
    refused(shard(tar_of(names)), "has labels of different kinds")
    shard(tar_of(pairs()))
    refused(shard(tar_of([("0/1.png", IMAGES[0])]), "b.tar"), "has labels of different kinds")
    (shard(b"") / "train/b.tar").unlink()
    assert "1 class for all images (cat)" in named(opened(shard(tar_of(names[:2]))))


def test_long_names_sparse_members_and_sizes_of_other_tars(shard):
    long = "d" * 120 + "/" + "é" * 90
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        store = opened(shard(tar_of([(f"{long}/1.png", IMAGES[0])], form)))
        assert samples(store) == [(IMAGES[0], "é" * 90)]
    whole = bytearray(tar_of(pairs()))
    whole[124:136] = b"\x80" + len(IMAGES[0]).to_bytes(11, "big")  # as GNU tar writes 8 GB and more
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    assert samples(opened(shard(bytes(whole)))) == EXPECTED
    whole[156] = ord("S")
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    refused(shard(bytes(whole)), "has the sparse member '000.png'")


# ---------------------------------------------------------------------------------- TFRecord


def records(*messages: bytes) -> bytes:
    file = io.BytesIO()
    for message in messages:
        RecordWriter(file).write(message)
    return file.getvalue()


def features(**lists) -> bytes:
    message = Example()
    for key, values in lists.items():
        value = message.features.feature.add(key=key.replace("__", "/")).value
        if not values:
            value.int64_list.SetInParent()
        for each in values:
            (value.bytes_list if isinstance(each, bytes) else value.int64_list).value.append(each)
    return message.SerializeToString()


def test_labels_of_tfrecords(shard):
    image = [IMAGES[0]]
    store = opened(shard(records(features(image=image, label=[7])), "a.tfrecord"))
    assert samples(store) == [(IMAGES[0], "7")]
    for values, why in (
        ([], "has 0 labels for an image"),
        ([-1], "has the label -1 at byte"),
        ([1, 2], "has 2 labels for an image"),
        ([2**40], "no class's number"),
        ([b"\xff\xfe"], "it is not UTF-8"),
        ([b""], "it is empty"),
        ([b"a", b"b"], "has 2 labels"),
        ([b"a\nb"], "several lines"),
    ):
        refused(shard(records(features(image=image, label=values)), "a.tfrecord"), why)
    refused(shard(records(features(image=image)), "a.tfrecord"), r"has the features \['image'\]")
    refused(shard(records(features(image=[], label=[1])), "a.tfrecord"), "has 0 values, not 1")
    refused(shard(records(features(image=image * 2, label=[1])), "a.tfrecord"), "has 2 values")


def test_two_labels_of_a_tfrecord_must_agree(shard):
    def one(name: bytes, number: int) -> bytes:
        keys = {"image__encoded": [IMAGES[0]], "image__class__synset": [name]}
        return features(**keys, image__class__label=[number])

    fine = [one(b"n1", 1), one(b"n2", 2), one(b"n1", 1)]
    assert [label for _, label in samples(opened(shard(records(*fine), "a.tfrecord")))] == [
        "n1", "n2", "n1"
    ]  # fmt: skip
    refused(shard(records(*fine, one(b"n2", 1)), "a.tfrecord"), r"has the labels \[1\]")
    refused(shard(records(*fine, one(b"n3", 1)), "a.tfrecord"), "for one image")
    shard(records(*fine), "a.tfrecord")
    refused(shard(records(one(b"n1", 2)), "b.tfrecord"), "for one image")


def test_messages_that_are_no_example(shard):
    whole = features(image=[IMAGES[0]], label=[7])
    for message in (
        b"",
        b"\x0a",
        b"\x0a" + b"\xff" * 20,
        whole + b"\x12\x00",  # a SequenceExample
        whole + whole,
        b"\x0b" + whole,
        whole[:-1],
    ):
        refused(shard(records(message), "a.tfrecord"), r"a\.tfrecord has (a|no) ")
    data = records(whole, whole)
    for at in range(12):
        for bit in range(8):
            broken = bytearray(data)
            broken[len(data) // 2 + at] ^= 1 << bit
            refused(shard(bytes(broken), "a.tfrecord"), "is no whole TFRecord file|is cut off")
    refused(shard(gzip.compress(data), "a.tfrecord"), "is compressed")


# ---------------------------------------------------------------------------------- RecordIO


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), -float("inf"), 1e9, 1e30])
def test_labels_of_recordio_are_numbers_of_classes(label, shard):
    for flag in (0, 1):
        payload = struct.pack("<IfQQ", flag, label, 0, 0) + struct.pack("<f", label) * flag
        record = b"\x0a\x23\xd7\xce" + struct.pack("<I", len(payload)) + payload
        refused(shard(record, "a.rec"), r"a\.rec has the label .* at byte 0: no class's number")


def test_lengths_and_kinds_of_records(shard):
    whole = b"".join(recordio(IMAGES[at], at % 3, at) for at in range(10))
    second = len(recordio(IMAGES[0], 0, 0))
    for at in range(8):
        for bit in range(8):
            data = bytearray(whole)
            data[second + at] ^= 1 << bit
            try:
                store = opened(shard(bytes(data), "a.rec"))
            except UserError:
                continue
            # zeros that fill the record up to four bytes may have become the image's
            assert [(image.rstrip(b"\0"), label) for image, label in samples(store)] == [
                (image.rstrip(b"\0"), label) for image, label in EXPECTED
            ]
    for at in (second - 1, second + 3, second + 30):
        refused(shard(whole[:at], "a.rec"), "is cut off|is no whole RecordIO")
    short = b"\x0a\x23\xd7\xce" + struct.pack("<I", 8) + bytes(8)
    refused(shard(whole + short, "a.rec"), "a record of 8 bytes at byte")


def test_a_record_that_swallowed_the_next_is_found_by_check(shard, capsys):
    image = IMAGES[0] + bytes(-len(IMAGES[0]) % 4)
    record = recordio(image, 1, 0)
    merged = bytearray(record * 2)
    merged[4:8] = struct.pack("<I", 2 * len(record) - 8)
    data = shard(recordio(image, 0, 0) + bytes(merged), "a.rec")
    assert main(["data", "check", str(data)]) == 1
    assert "holds the beginning of another record" in capsys.readouterr().out


def test_the_header_of_a_record_may_be_cut_itself(shard):
    number = int.from_bytes(b"\x0a\x23\xd7\xce", "little")  # an id that is the magic number
    store = opened(shard(recordio(IMAGES[0], 5, number), "a.rec"))
    assert samples(store) == [(IMAGES[0], "5")]


def test_an_idx_file_shows_that_a_shard_is_cut_between_records(shard):
    each = [recordio(IMAGES[at], at % 3, at) for at in range(10)]
    starts = [sum(map(len, each[:at])) for at in range(10)]
    data = shard(b"".join(each), "a.rec")
    (data / "train/a.idx").write_text("".join(f"{n}\t{at}\n" for n, at in enumerate(starts)))
    assert samples(opened(data)) == EXPECTED
    refused(shard(b"".join(each[:7]), "a.rec"), r"a.rec has no record at byte .*a.idx has one \(3")
    data = shard(b"".join(each), "a.rec")
    (data / "train/a.idx").write_text("0\t0\n")
    assert "a.rec: 10 records, 1 listed" in named(opened(data))


# ---------------------------------------------------------------------------------- shards


def test_shards_that_are_none(shard):
    data = shard(tar_of(pairs()))
    for name, content, why in (
        ("b.tar", b"", "b.tar is empty: it is damaged"),
        ("b.tar", bytes(10240), "b.tar is no whole tar"),
        ("b.tar", tar_of([("x.txt", b"x")]), "b.tar is a shard without images"),
        ("b.tar", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("b.tar", b"<!DOCTYPE html>", "a web page"),
        ("b.rec", b"\x0b\x23\xd7\xce" * 5, "b.rec is no whole tar, TFRecord or RecordIO file"),
        ("part-00001-of-00002", b"nonsense" * 10, "is no whole tar"),
        ("b.tar.xz", b"\xfd7zXZ\0", "is compressed"),
        ("b.parquet", b"PAR1....", "Parquet"),
    ):
        refused(shard(content, name), why)
        (data / "train" / name).unlink()
    (data / "train/b.tar").symlink_to("nowhere")
    refused(data, "b.tar is a link to 'nowhere', which is not there")
    (data / "train/b.tar").unlink()
    (data / "train/b.tar").symlink_to("a.tar")
    line = "1 shard that is another under a second name: its samples count twice (b.tar is a.tar)"
    assert line in named(opened(data))
    (data / "train/b.tar").unlink()
    os.mkfifo(data / "train/b.tar")
    assert "skipped: 1 pipe, socket or device (b.tar)" in named(opened(data))


def test_shards_that_are_missing_or_there_twice(shard):
    data = shard(tar_of(pairs()), "train-00000-of-00003.tar")
    line = "warning: 2 shards missing by the others' names (train-00001-of-00003.tar, …)"
    assert line in named(opened(data))
    refused(shard(tar_of(pairs()), "train-00000-of-00001.tar"), "the shards of two conversions")


def test_names_of_shards_choose_the_split(tmp_path):
    def put(name: str, numbers: range) -> None:
        members = [member for at in numbers for member in pairs()[2 * at : 2 * at + 2]]
        (tmp_path / name).write_bytes(tar_of(members))

    put("train-0.tar", range(10))
    put("val-0.tar", range(3))
    assert len(open_splits(tmp_path)[1]) == 3
    put("test-0.tar", range(5))
    put("extra-0.tar", range(1))
    shutil.rmtree(tmp_path / ".hvd_lbt")
    train, test = open_splits(tmp_path)
    assert len(test) == 5
    assert "val-0.tar: the shards of test are used" in named(test)
    assert "extra-0.tar: its name says no split" in named(train)
    put("train_val-0.tar", range(2))
    refused(tmp_path, "train_val-0.tar is called after train and val")
    (tmp_path / "train_val-0.tar").unlink()
    (tmp_path / "train").mkdir()
    (tmp_path / "val-0.tar").rename(tmp_path / "train/val-0.tar")
    refused(tmp_path, "val-0.tar is called after val, and it would be taken for train")


# ---------------------------------------------------------------------------------- folders


@pytest.fixture
def classes(tmp_path) -> Path:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(IMAGES[0])
    return tmp_path


def test_what_systems_leave_behind_moves_no_label(classes):
    for name in ("@eaDir/1.png", "lost+found/x", "__MACOSX/cat/._1.png", ".git/1.png",
                 "cat/._1.png", "cat/@eaDir/1.png", "cat/.DS_Store", "cat/Thumbs.db"):  # fmt: skip
        file = classes / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(IMAGES[1])
    store = opened(classes)
    assert store.classes == ("cat", "dog")
    assert samples(store) == [(IMAGES[0], "cat"), (IMAGES[0], "cat"), (IMAGES[0], "dog")]
    assert named(store).startswith("skipped: 8 hidden or system files (cat/")


def test_images_below_or_beside_class_folders_are_errors(classes):
    (classes / "train/cat/sub/deep").mkdir(parents=True)
    assert "skipped: 2 folders without images in classes (cat/sub, cat/sub/deep)" in named(
        opened(classes)
    )
    (classes / "train/cat/sub/deep/9.png").write_bytes(IMAGES[9])
    with pytest.raises(UserError, match=r"sub/deep/9\.png lies in a folder below a class"):
        open_train_split(classes)  # the index that is there does not hide it
    shutil.rmtree(classes / "train/cat/sub")
    (classes / "train/cat/all").symlink_to("..")
    refused(classes, "cat/all is a link to a folder below a class folder")
    (classes / "train/cat/all").unlink()
    (classes / "train/9.png").write_bytes(IMAGES[9])
    refused(classes, r"has 1 images beside its class folders \(9.png\)")


def test_classes_that_are_links(classes):
    (classes / "elsewhere").mkdir()
    (classes / "elsewhere/1.png").write_bytes(IMAGES[1])
    (classes / "train/emu").symlink_to("../elsewhere")
    assert samples(opened(classes))[3] == (IMAGES[1], "emu")
    (classes / "train/fox").symlink_to("nowhere")
    refused(classes, "train/fox is a link to 'nowhere', which is not there")
    (classes / "train/fox").unlink()
    (classes / "train/fox").symlink_to("cat")
    refused(classes, "fox and cat are one folder under two names")
    (classes / "train/fox").unlink()
    (classes / "train/fox").symlink_to(".")
    refused(classes, "lies in a folder below a class folder")


def test_odd_entries_of_a_class_folder(classes):
    cat = classes / "train/cat"
    (cat / "3.jfif").write_bytes(encoded("JPEG"))
    (cat / "4").write_bytes(IMAGES[4])
    (cat / "5.gif").write_bytes(b"GIF89a")
    (cat / "6.png.bak").write_bytes(IMAGES[6])
    (cat / "notes.txt").write_text("x")
    os.mkfifo(cat / "7.png")
    os.mkfifo(cat / "8")
    (cat / "new\nline.png").write_bytes(IMAGES[7])
    Path(os.fsdecode(os.fsencode(cat) + b"/\xff.png")).write_bytes(IMAGES[8])
    Path(os.fsdecode(os.fsencode(cat) + b"/\xff\x1b.txt")).write_bytes(b"")
    (classes / "train/empty").mkdir()
    store = opened(classes)
    assert len(store) == 7
    assert store.classes == ("cat", "dog", "empty")
    lines = named(store)
    assert "2 files that are no images (cat/" in lines
    assert "2 pipes, sockets or devices (cat/" in lines
    assert "1 image with an ending that is no image's (cat/6.png.bak)" in lines
    assert "1 image in a format that is not read (cat/5.gif)" in lines
    assert "1 class folder without images, which keeps its label (empty)" in lines
    assert lines.isprintable() or lines.replace("\n", "").isprintable()
    assert named(open_train_split(classes)) == lines


def test_a_flat_test_folder_does_not_hide_val(classes):
    (classes / "test").mkdir()
    (classes / "test/1.png").write_bytes(IMAGES[0])
    with pytest.raises(UserError, match=r"test has no images with a class: 1 lie directly in it"):
        open_splits(classes)
    shutil.copytree(classes / "train", classes / "val")
    test = open_splits(classes)[1]
    assert test.index.root.name == "val"
    assert "test/ (no class folders and no shards): val/ is used" in named(test)
    (classes / "test/cat").mkdir()
    (classes / "test/1.png").rename(classes / "test/cat/1.png")
    test = open_splits(classes)[1]
    assert test.index.root.name == "test"
    assert "val/: test/ is used" in named(test)


def test_a_split_by_its_own_path_names_the_level_that_is_wanted(classes, shard):
    refused(classes / "train", f"Give the folder above it: --data {classes}")
    (classes / "train").rename(classes / "pictures")
    refused(classes / "pictures", "Put them into a folder train")


# ------------------------------------------------------------------------ staleness and check


def age(data: Path) -> None:
    for path in [*data.rglob("*"), data]:
        os.utime(path, (1e9, 1e9), follow_symlinks=False)


@pytest.mark.parametrize("how", ["tar", "rename", "replaced"])
def test_files_that_came_while_the_folder_kept_its_time_are_seen(how, classes):
    age(classes)
    assert len(open_train_split(classes)) == 3
    cat = classes / "train/cat"
    if how == "tar":  # two archives unpacked one after the other
        about = tarfile.TarInfo("cat")
        about.type, about.mtime, about.mode = tarfile.DIRTYPE, 10**9, 0o755
        with tarfile.open(classes / "x.tar", "w") as archive:
            archive.addfile(about)
            archive.add(cat / "1.png", "cat/9.png")
        subprocess.run(["tar", "xf", classes / "x.tar", "-C", classes / "train"], check=True)
    elif how == "rename":
        (cat / "1.png").rename(cat / "9.png")
    else:
        (cat / "1.png").unlink()
        (cat / "9.png").write_bytes(IMAGES[1])
    os.utime(cat, (1e9, 1e9))
    assert cat.stat().st_mtime == 1e9
    store = open_train_split(classes)
    assert any(store.name(at).endswith("9.png") for at in range(len(store)))


def test_a_shard_replaced_with_its_size_and_time_is_seen(shard):
    data = shard(tar_of(pairs()))
    age(data)
    assert open_train_split(data).labels[0] == 0
    changed = [("000.png", IMAGES[0]), ("000.cls", b"2"), *pairs()[2:]]
    shard(tar_of(changed))
    age(data)
    assert open_train_split(data).labels[0] == 2


def test_folders_with_young_ctimes_are_listed_again_once(classes, monkeypatch):
    age(classes)  # the mtimes are old, the ctimes are not
    open_train_split(classes)
    listed = []
    scan = index_module.scan_class
    monkeypatch.setattr(
        index_module, "scan_class", lambda folder, into: listed.append(folder) or scan(folder, into)
    )
    monkeypatch.setattr(index_module, "TICK", 1e9)  # still young
    for count in (2, 4):
        open_train_split(classes)
        assert len(listed) == count
    monkeypatch.setattr(index_module, "TICK", 0.0)
    file = classes / ".hvd_lbt/train.index"
    os.utime(file, (1e9, 1e9))  # as if the index had been made before the ctimes
    for _ in range(2):
        open_train_split(classes)
        assert len(listed) == 6


def test_a_chmod_alone_costs_an_index_and_changes_nothing(classes):
    age(classes)
    first = identity(open_train_split(classes))
    (classes / "train/cat").chmod(0o700)
    assert identity(open_train_split(classes)) == first


def test_check_says_all_of_it_and_exits_1(classes, capsys):
    write_folder(classes / "fine")
    assert main(["data", "check", str(classes / "fine")]) == 0
    capsys.readouterr()
    (classes / "train/cat/notes.txt").write_text("x")
    assert main(["data", "check", str(classes)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == ["train: skipped: 1 file that is no image (cat/notes.txt)", "3 images, 0 bad"]


def test_check_lists_every_damaged_shard(shard, capsys):
    for name in ("a.tar", "b.tar", "c.tar"):
        data = shard(tar_of(pairs()), name)
    for name in ("a.tar", "c.tar"):
        shard(tar_of(pairs())[:5000], name)
    with pytest.raises(SplitError, match=r"train/a.tar .*\(1 more errors: `hvd_lbt data check"):
        opened(data)
    write_shards("webdataset", data / "test", [(image, 0) for image in IMAGES], 1)
    assert main(["data", "check", str(data)]) == 1
    out = capsys.readouterr().out
    assert f"{data}/train/a.tar " in out
    assert f"{data}/train/c.tar " in out


def test_check_compares_the_checksums_of_a_conversion(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "convert", str(classes), str(out), "--format", "webdataset"]) == 0
    assert main(["data", "check", str(out)]) == 0
    file = next((out / "train").glob("*.tar"))
    data = bytearray(file.read_bytes())
    at = data.index(b"00000000.cls") + 512
    data[at] ^= 1  # another label: nothing in a tar shows that
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["data", "check", str(out)]) == 1
    assert f"{file} is not as sha256sums.txt has it" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["webdataset", "tfrecord", "recordio"])
def test_a_conversion_that_lost_samples_is_an_error_when_it_is_indexed(form, tmp_path):
    data, out = write_folder(tmp_path / "data"), tmp_path / "out"
    command = ["data", "convert", str(data), str(out), "--format", form]
    assert main([*command, "--samples-per-shard", "10"]) == 0
    assert len(opened(out)) == 23
    sorted((out / "train").glob("train-*"))[1].unlink()
    refused(out, r"train has 13 samples, and .*convert.json says 23")


def test_shards_of_tensorflow_datasets_are_counted(shard):
    whole = records(*(features(image=[IMAGES[at]], label=[at]) for at in range(5)))
    data = shard(whole, "x-train.tfrecord-00000-of-00001")
    about = data / "train/dataset_info.json"
    about.write_text('{"splits": [{"name": "train", "shardLengths": ["5"]}]}')
    assert len(opened(data)) == 5
    about.write_text('{"splits": [{"name": "train", "shardLengths": ["5", "2"]}]}')
    refused(data, "train has 5 samples, and .*dataset_info.json says 7")
