"""Recipes are text that anyone may have written: what is refused, in one paragraph with its
line.
"""

import pytest
from odd_files import make_fifo, make_folder, make_socket

from hvd_lbt import plain_yaml
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe

NESTED = "name: " + "[" * 30_000
ALIASES = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, r"line 1: anchors \(&a\) are not allowed"),
        ("a: 1\nb: *a", r"line 2: aliases \(\*a\) are not allowed"),
        ("a: 1\n<<: {b: 2}", r"line 2: merge keys \(<<\) are not allowed"),
        (NESTED, "line 1: it is nested more than 16 levels deep"),
        ("- " * 30_000, "line 1: it is nested more than 16 levels deep"),
        ("a: [" + "1," * 30_000 + "]", "line 1: there are more than 10,000 values"),
        ("#" * 70_000, "it is longer than 64 KiB"),
        ("a: !!python/object/apply:os.system [id]", "line 1: the tag .* is not allowed"),
        ("a: !!binary aGVsbG8=", "line 1: the tag .*binary' is not allowed"),
        ("a: !!timestamp 2024-13-45", "line 1: the tag .*timestamp' is not allowed"),
        ("%TAG ! tag:x,2000:\n---\na: !foo 1", "line 3: the tag 'tag:x,2000:foo' is not allowed"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice, first in line 1"),
        ("1: 1\n1: 2", "line 2: the key '1' is given twice"),
        ("[1]: 2", "line 1: a list or a mapping cannot be a key"),
        ("? {a: 1}\n: 2", "line 1: a list or a mapping cannot be a key"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins here"),
        ("a: " + "9" * 5000, "line 1: an integer of 5,000 digits, and at most 20"),
        ("a:\n  - 017", "line 2: 017 is octal in YAML 1.1 and decimal in YAML 1.2"),
        ("a:\n\tb: 1", r"it is not valid YAML: line 2: found character '\\t'"),
        ("a: 1\nb: \0", r"it is not valid YAML: line 2: the character U\+0000"),
        ("a: \ud800", r"it is not valid YAML: line 1: the character U\+D800"),
        ('a: "\\UFFFFFFFF"', "it is not valid YAML: a number is too large"),
        ("%YAML 1." + "1" * 5000 + "\n---\na: 1", "it is not valid YAML: a number is too large"),
        ("a: [1", "it is not valid YAML: line 1: "),
    ],
)
def test_what_is_refused_is_named_with_its_line(text, message):
    with pytest.raises(UserError, match=rf"^Recipe x: {message}") as caught:
        plain_yaml.parse(text, "Recipe x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("~", None),
        ("[true, False, null, ]", [True, False, None]),
        ("[1, -2, +3, 0, 0x1F]", [1, -2, 3, 0, 31]),
        ("[1.5, .5, 1., 1.0e5, -1.0E-3]", [1.5, 0.5, 1.0, 1e5, -1e-3]),
        # text for YAML 1.2, something else for YAML 1.1: the schema says what it may be
        ("[no, on, y, 1_000, 1:30, 0o17, 1e5]", ["no", "on", "y", "1_000", "1:30", "0o17", "1e5"]),
        ("[2024-01-31, 2024-13-45]", ["2024-01-31", "2024-13-45"]),
        ("['1', \"true\", !!str 12, ! 12]", ["1", "true", "12", "12"]),
        ("{a: {b: [{c: 1}]}}", {"a": {"b": [{"c": 1}]}}),
        ("{a, 1: 2}", {"a": None, "1": 2}),
    ],
)
def test_plain_values(text, value):
    assert plain_yaml.parse(text, "x") == value


def test_infinite_numbers_reach_the_schema():
    with pytest.raises(UserError, match=r"schedule\.lr: inf is not allowed"):
        load_recipe("digits", ["schedule.lr=.inf"])


@pytest.mark.parametrize(
    ("override", "attribute"),
    [
        ("data.flip=no", False),
        ("data.flip=on", True),
        ("data.train_samples=1_000", 1000),
        ("schedule.lr=5e-2", 0.05),
    ],
)
def test_other_spellings_mean_what_they_meant(override, attribute):
    recipe = load_recipe("digits", [override])
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(recipe, section), key) == attribute


@pytest.mark.parametrize("override", ["schedule.epochs=1:30", "schedule.global_batch=0o17"])
def test_numbers_that_yaml_versions_read_differently_are_refused(override):
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"{key}: '{value}' is not allowed"):
        load_recipe("digits", [override])


def _device(path):
    path.symlink_to("/dev/zero")


def _large(path):
    path.write_bytes(b"#" * 70_000)


def _latin(path):
    path.write_bytes(b"# first\nname: caf\xe9\n")


def _utf16(path):
    path.write_text("name: x", encoding="utf-16")


def _loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("as_base", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_fifo, "it is a FIFO, and must be a regular file"),
        (make_folder, "it is a folder, and must be a regular file"),
        (make_socket, "it is a socket, and must be a regular file"),
        (_device, "it is a device, and must be a regular file"),
        (_large, "the file is larger than 64 KiB"),
        (_latin, "line 2: byte 0xe9 is not UTF-8"),
        (_utf16, "line 1: byte 0xff is not UTF-8"),
        (_loop, "the file cannot be read"),
    ],
)
def test_paths_that_are_no_small_text_file(tmp_path, monkeypatch, make, message, as_base):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    file = tmp_path / "x"
    if as_base:
        file = tmp_path / "mine.yaml"
        file.write_text("base: x\nname: mine\n")
    with pytest.raises(UserError, match=message):
        load_recipe(file)


@pytest.mark.parametrize("base", ['"a\\0b"', "x" * 5000, '""', "..", "/proc/self/mem", "/dev/null"])
def test_a_base_that_cannot_be_a_file(tmp_path, base):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {base}\nname: mine\n")
    with pytest.raises(UserError, match=r"^Recipe "):
        load_recipe(file)


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbfbase: digits\r\nname: mine\r\n")
    assert load_recipe(file).name == "mine"


def test_bases_that_lead_to_each_other(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\nname: a\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\n")
    with pytest.raises(UserError, match=r"b.yaml: base: 'a.yaml' is not allowed"):
        load_recipe(tmp_path / "a.yaml")


def test_only_the_first_of_very_many_errors_are_written_out(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\n" + "".join(f"k{number}: 1\n" for number in range(1000)))
    with pytest.raises(UserError, match=r"k0: there is no such key.* 992 more errors\.$"):
        load_recipe(file)


def test_a_key_of_very_many_parts_is_refused():
    with pytest.raises(UserError, match=r"it must read section\.key=value"):
        load_recipe("digits", [".".join(["a"] * 50_000) + "=1"])
