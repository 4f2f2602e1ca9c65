"""`package.module:name` finds an object of the user's own, or says what is wrong in one line."""

import sys

import pytest

from hvd_lbt.errors import UserError
from hvd_lbt.own import is_object_name, load_object


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_name_beside_the_current_directory_is_found(here):
    (here / "mine_a").mkdir()
    (here / "mine_a" / "nets.py").write_text("class Net:\n    made = staticmethod(lambda: 7)\n")
    assert load_object("mine_a.nets:Net.made", "model.name")() == 7


@pytest.mark.parametrize(
    "text", ["a.b", "a:b:c", "a b:c", ":c", "a:", "a/b.py:c", "a..b:c", "1a:b"]
)
def test_what_is_no_such_name_is_refused(text):
    assert not is_object_name(text)
    with pytest.raises(UserError, match=r"loss\.name: .*must read package.module:name"):
        load_object(text, "loss.name")


@pytest.mark.parametrize("text", ["os:system", "subprocess:run", "torch.hub:load"])
def test_what_runs_commands_or_fetches_code_is_refused(text):
    with pytest.raises(UserError, match=f"model.name: '{text}' is not of your own"):
        load_object(text, "model.name")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "there is no module 'mine_b'"),
        ("import gone_package", "No module named 'gone_package'"),
        ("def net(: pass", "SyntaxError"),
        ("raise KeyError('x')", r"KeyError: 'x'\), .*mine_b.py:1"),
        ("other = 1", "mine_b has no 'net'.* It has: other"),
    ],
)
def test_what_cannot_be_imported_is_named(here, source, reason):
    if source is not None:
        (here / "mine_b.py").write_text(source)
    with pytest.raises(UserError, match=rf"model.name: 'mine_b:net': .*{reason}"):
        load_object("mine_b:net", "model.name")
