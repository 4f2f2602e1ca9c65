"""The classes file: one name a line in UTF-8; other formats are named, and nothing hangs."""

import json
import os
import re

import numpy as np
import pytest
from data_sets import encoded

from hvd_lbt.cli import main
from hvd_lbt.data.class_names import LARGEST, as_lines, read_classes
from hvd_lbt.data.convert import ENDINGS, convert
from hvd_lbt.data.store import open_splits, open_train_split
from hvd_lbt.errors import UserError

NAMES = ("tench", "goldfish", "great white shark")


def data_of(tmp_path, names=NAMES, splits=("train",)):
    """A folder with two images of each class."""
    for split in splits:
        for label, name in enumerate(names):
            for number in range(2):
                file = tmp_path / "in" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded("PNG", 2 * label + number, size=(8, 8)))
    return tmp_path / "in"


ACCEPTED = {
    "plain": b"tench\ngoldfish\ngreat white shark\n",
    "no line end at the end": b"tench\ngoldfish\ngreat white shark",
    "byte-order mark": b"\xef\xbb\xbftench\ngoldfish\ngreat white shark\n",
    "Windows": b"tench\r\ngoldfish\r\ngreat white shark\r\n",
    "Windows with a mark": b"\xef\xbb\xbftench\r\ngoldfish\r\ngreat white shark",
}


@pytest.mark.parametrize("raw", ACCEPTED.values(), ids=ACCEPTED)
def test_marks_and_line_ends_of_editors_are_no_part_of_a_name(tmp_path, raw):
    (tmp_path / "classes.txt").write_bytes(raw)
    assert read_classes(tmp_path, None) == NAMES


@pytest.mark.parametrize(
    "lines",
    [
        ["class 0", "class 1", "class 2"],  # they differ in nothing but the number
        ["0", "1", "2"],
        ["001.Black_footed_Albatross", "002.Laysan_Albatross"],
        ["n01440764", "n01443537"],
        ["tench, Tinca tinca", "goldfish, Carassius auratus", "shark, white shark, man-eater"],
        ["707-320", "727-200"],
        ["[b]", "[/b]"],
        ["a\u2028b", "c\x0bd"],
        ["one class"],
        ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"],
        ["name"],
    ],
)
def test_names_that_only_look_odd_are_names(tmp_path, lines):
    (tmp_path / "classes.txt").write_text("\n".join(lines) + "\n", "utf-8", newline="")
    assert read_classes(tmp_path, None) == tuple(lines)


REFUSED = {
    "0 tench\n1 goldfish\n2 shark\n": r"a label before each name.*sed -E",
    "1: tench\n2: goldfish\n3: shark\n": r"a label before each name.*sed -E",
    "0,tench\n1,goldfish\n": r"a label before each name",
    "0\ttench\n1\tgoldfish\n": r"a label before each name",
    "1 001.Albatross\n2 002.Auklet\n": r"a label before each name",
    "2 shark\n0 tench\n1 goldfish\n": r"a label before each name; sort the lines by the label",
    "1 person\n2 bicycle\n13 stop sign\n": r"numbers before its names",
    "/a/airfield 0\n/a/cabin 1\n": r"a label after each name.*sed -E",
    "tench,0\ngoldfish,1\n": r"a label after each name",
    "tench: 0,\ngoldfish: 1,\n": r"a label after each name",
    "n01440764 tench, Tinca tinca\nn01443537 goldfish\n": r"ImageNet's class numbers.*cut -c1-9",
    "n01440764\ttench\nn01443537\tgoldfish\n": r"ImageNet's class numbers",
    json.dumps(["tench", "goldfish"]): r"is a list in JSON",
    json.dumps(["tench", "goldfish"], indent=1): r"is a list in JSON",
    json.dumps({"0": ["n01440764", "tench"]}): r"is a dictionary in JSON",
    '{"label": 0}\n{"label": 1}\n': r"is a dictionary in JSON",
    "{0: 'tench, Tinca tinca',\n 1: 'goldfish'}": r"is a dictionary in JSON or Python",
    "classes = [\n'tench',\n'goldfish',\n]\n": r"is a list in a program",
    "class\ntench\ngoldfish\n": r"is a table with a header \('class' is the first line\)",
    "Class Name\ntench\ngoldfish\n": r"is a table with a header",
    "label,class_name\n0,tench\n1,goldfish\n": r"is a table with a header",
    "wnid;words\na;b\n": r"is a table with a header",
    "tench,fish\ngoldfish,fish\n": r"is a table: commas part each line",
    "tench\tfish\ngoldfish\tfish\n": r"is a table: tabs part each line",
    '"tench"\n"goldfish"\n': r"quotes around its names",
    "'tench',\n'goldfish'\n": r"quotes around its names",
    "- tench\n- goldfish\n": r"is a YAML list",
    "# classes\ntench\n": r"begins with a comment",
    "<!DOCTYPE html>\n<title>Sign in</title>\n": r"is a web page",
    "tench \ngoldfish\n": r"spaces or tabs around the name in line 1, 'tench '",
    "tench\n\tgoldfish\n": r"spaces or tabs around the name in line 2, '\\tgoldfish'",
    "tench\n\ngoldfish\n": r"an empty line \(2\)",
    "tench\ngoldfish\n\n": r"an empty line \(3\)",
    "tench\rgoldfish\r": r"a carriage return within line 1",
    "crane\nmaillot\ncrane\n": r"'crane' twice \(lines 1 and 3\)",
    "": r"is empty",
    "\n": r"is empty",
    "\ufeff": r"is empty",
}


@pytest.mark.parametrize("text", REFUSED)
def test_another_format_is_named_with_what_would_be_right(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text, "utf-8", newline="")
    with pytest.raises(UserError, match=REFUSED[text]) as caught:
        read_classes(tmp_path, None)
    assert "one class name a line" in str(caught.value)
    assert "label 0 first" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("tench\n".encode("utf-16"), "is UTF-16.*iconv -f UTF-16"),
        ("tench\n".encode("utf-16-be"), "zero bytes"),
        (b"\xfe\xff" + "tench\n".encode("utf-16-be"), "is UTF-16"),
        ("tench\n".encode("utf-32"), "is UTF-32"),
        ("Zürich\nGenève\n".encode("latin-1"), r"byte 0xfc in line 1.*iconv -f LATIN1"),
        (b"tench\n\x80\x04\x95", "byte 0x80 in line 2"),
        (bytes(100), "zero bytes"),
    ],
)
def test_other_encodings_are_named(tmp_path, raw, match):
    (tmp_path / "names").write_bytes(raw)
    with pytest.raises(UserError, match=match):
        read_classes(tmp_path, tmp_path / "names")


def test_what_is_no_file_is_an_error_at_once(tmp_path):
    chosen = tmp_path / "classes.txt"
    os.mkfifo(chosen)
    with pytest.raises(UserError, match="no regular file"):
        read_classes(tmp_path, None)
    for file in ("/dev/zero", "/dev/stdin", tmp_path):
        with pytest.raises(UserError, match="no regular file"):
            read_classes(tmp_path, file)
    chosen.unlink()
    chosen.symlink_to("nowhere")  # a link to nothing is not "no classes file"
    with pytest.raises(UserError, match=r"cannot be read.*No such file"):
        read_classes(tmp_path, None)
    chosen.unlink()
    assert read_classes(tmp_path, None) is None
    with chosen.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match=r"it has 16,777,217 bytes, and 16,777,216 are allowed"):
        read_classes(tmp_path, None)


def test_a_refused_file_ends_a_command_in_one_paragraph(tmp_path, capsys):
    data = data_of(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "json").write_text('["tench"]')
    for file in ("fifo", "json"):
        assert main(["data", "check", str(data), "--classes", str(tmp_path / file)]) == 2
        said = capsys.readouterr().err
        assert f"The classes file {tmp_path / file}" in said.replace("\n", " ")
        assert "Traceback" not in said


ODD = (" leading", "trailing ", "\ttab", "tab\t", "in\tside", "0 zero", "1 one", "[bold]", "[b]x")
ODD += ("'q'", '"q"', "- dash", "# hash", "class", "a\u2028b", "a\x85b", "\u00a0", "ü", "  ", "1,2")

PLAIN = (" leading", "trailing ", "[b]", "'q'", "a, b", "ü")


@pytest.mark.parametrize("form", ENDINGS)
@pytest.mark.parametrize(
    "names", [ODD, PLAIN, ("0 tench", "1 goldfish"), ("a\tb", "c\td"), ("[a", "b]")]
)
def test_odd_names_of_classes_round_trip(tmp_path, form, names):
    data = data_of(tmp_path, names, ("train", "test"))
    out = tmp_path / "out"
    bad = [name for name in names if set(name) & {"\t", "\x85", "\u2028"} or not name.strip()]
    if form == "tfrecord" and bad:
        with pytest.raises(UserError, match=r"cannot be a label in TFRecord: it .*webdataset"):
            convert(data, out, form=form, samples_per_shard=5)
        assert not out.exists()
        return
    convert(data, out, form=form, samples_per_shard=5)
    for before, after in zip(open_splits(data), open_splits(out), strict=True):
        assert after.classes == before.classes == tuple(sorted(names, key=os.fsencode))
        assert np.array_equal(after.labels, before.labels)
    convert(out, tmp_path / "again", form="webdataset", samples_per_shard=7)
    assert open_train_split(tmp_path / "again").classes == open_train_split(data).classes


def test_names_of_folders_prove_the_format(tmp_path):
    data = data_of(tmp_path, ("0 tench", "1 goldfish"))
    (data / "classes.txt").write_text("1 goldfish\n0 tench\n")
    assert open_train_split(data).classes == ("1 goldfish", "0 tench")


def test_a_header_does_not_move_the_labels_of_numbered_shards(tmp_path):
    convert(data_of(tmp_path), tmp_path / "out", form="recordio", samples_per_shard=9)
    (tmp_path / "out/classes.txt").write_text("name\ngoldfish\ngreat white shark\ntench\n")
    with pytest.raises(UserError, match="table with a header"):
        open_train_split(tmp_path / "out")


@pytest.mark.parametrize("names", [("a\nb",), ("a\r",), ("",), ("\ufeffa", "b"), ("a\udce9",)])
def test_names_that_are_no_lines_are_refused(names):
    with pytest.raises(UserError, match=re.escape(repr(names[0]))):
        as_lines(names)


def test_the_command_says_the_first_classes_with_quotes(tmp_path, capsys):
    data = data_of(tmp_path)
    (data / "classes.txt").write_text("tench\ngoldfish\n")
    assert main(["data", "check", str(data)]) == 2
    assert "great white shark" in capsys.readouterr().err
