"""Checkpoints: whole or not there, the newest and the best kept, and what goes wrong is told."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from hvd_lbt import checkpoint
from hvd_lbt.checkpoint import (
    Checkpoints,
    DamagedError,
    checkpoint_files,
    load,
    load_newest,
    open_run,
)
from hvd_lbt.cli import main
from hvd_lbt.data.order import ORDER_VERSION
from hvd_lbt.errors import UserError
from hvd_lbt.models import build_model
from hvd_lbt.recipe import RunRecipe, load_recipe
from hvd_lbt.world import World

GOLDEN = Path(__file__).parents[1] / "golden"


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    settings = RunRecipe(keep_checkpoints=keep)
    return Checkpoints(folder, settings, World(), lambda value: [value])


def state(value: float) -> dict:
    return {"update": int(value), "model": {"weight": torch.full((1000,), value)}}


def names(folder: Path) -> list[str]:
    return [file.name for file in checkpoint_files(folder)]


def test_the_newest_and_the_best_are_kept(tmp_path):
    saved = checkpoints(tmp_path, keep=2)
    for update, top1 in enumerate((0.2, 0.9, 0.8, 0.9, 0.7), start=1):
        saved.save(update, state(update), best=saved.better(top1))
    saved.wait()
    assert names(tmp_path) == [f"update-{update:08}.pt" for update in (2, 4, 5)]
    assert (tmp_path / "best.pt").resolve().name == "update-00000002.pt"
    assert load(tmp_path / "best.pt")["update"] == 2
    assert load_newest(tmp_path)["best_top1"] == 0.9
    assert {file.name for file in tmp_path.iterdir()} == {
        "best.pt",
        *names(tmp_path),
        *(f"{name}.sha256" for name in names(tmp_path)),
    }
    listed = subprocess.run(
        ["sha256sum", "-c", "--quiet", "update-00000005.pt.sha256"], cwd=tmp_path
    )
    assert listed.returncode == 0


def test_what_is_written_is_the_state_of_the_call(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (may_write.wait(20), write(*args)))
    saved, live = checkpoints(tmp_path), state(1.0)
    saved.save(1, live)  # returns though nothing can be written
    assert names(tmp_path) == []
    live["model"]["weight"].add_(1.0)  # training goes on
    may_write.set()
    saved.wait()
    assert torch.equal(load(tmp_path / "update-00000001.pt")["model"]["weight"], torch.ones(1000))


def test_a_damaged_newest_falls_back_and_says_so(tmp_path, capsys):
    saved = checkpoints(tmp_path, keep=3)
    for update in (1, 2, 3):
        saved.save(update, state(update))
    saved.wait()
    newest, middle = checkpoint_files(tmp_path)[:0:-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    middle.with_suffix(".pt.sha256").unlink()
    assert load_newest(tmp_path)["update"] == 1
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert f"{newest} is damaged" in told[0]
    assert f"{middle} cannot be checked: {middle}.sha256 is missing. Copy it along" in told[1]
    checkpoint_files(tmp_path)[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"All 3 checkpoints in .* are damaged"):
        load_newest(tmp_path)


@pytest.mark.parametrize("version", [None, 99])
def test_another_version_is_refused_not_passed_over(tmp_path, monkeypatch, version):
    saved = checkpoints(tmp_path)
    saved.save(1, state(1))
    saved.save(2, {**state(2), "version": version})
    saved.wait()
    with pytest.raises(
        UserError, match=f"is of version {version}, and this program reads version 1"
    ):
        load_newest(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    file = tmp_path / "update-00000001.pt"
    torch.save({"version": 1, "model": Evil()}, file)
    file.with_suffix(".pt.sha256").write_text(f"{checkpoint._digest(file)}  {file.name}\n")
    with pytest.raises(DamagedError, match="cannot be read"):
        load(file)
    assert not (tmp_path / "run").exists()


def test_ranks_that_differ_write_nothing(tmp_path):
    saved = checkpoints(tmp_path)
    saved._allgather = lambda value: [value, (value[0], value[1] ^ 1)]
    with pytest.raises(RuntimeError, match="weights differ after 7 updates"):
        saved.save(7, state(7))
    assert names(tmp_path) == []


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {mounted.stderr.strip()}")
    try:
        saved = checkpoints(tmp_path)
        saved.save(1, state(1))
        saved.save(2, {**state(2), "big": torch.zeros(1 << 20)})
        told = (
            r"update-00000002.pt could not be written \(No space left on device\)"
            r".*good one: update-00000001.pt"
        )
        with pytest.raises(UserError, match=told):
            saved.save(3, state(3))
        assert load_newest(tmp_path)["update"] == 1
        assert len(list(tmp_path.iterdir())) == 2  # no half file, no orphan
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_export_gives_what_torchvisions_resnet50_loads(tmp_path, capsys):
    recipe = load_recipe("imagenet_resnet50")
    model = build_model(recipe.model, 1000, 32)
    saved = checkpoints(tmp_path)
    names = [str(number) for number in sorted(range(1000), key=str)]  # 0, 1, 10, 100, …
    state = {"update": 9, "recipe": recipe.to_dict(), "model": model.state_dict()}
    saved.save(9, state | {"classes": names})
    saved.wait()
    out = tmp_path / "weights.pth"
    assert main(["export", str(tmp_path / "update-00000009.pt"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: the weights after 9 updates" in said
    assert "weights.classes.txt: the class of each output, one a line: 0 0, 1 1, 2 10, " in said
    assert (tmp_path / "weights.classes.txt").read_text().splitlines() == names
    weights = torch.load(out, weights_only=True)
    found = [" ".join([name, *map(str, tensor.shape)]) for name, tensor in weights.items()]
    assert found == (GOLDEN / "torchvision_resnet50.txt").read_text().splitlines()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize(("version", "named"), [(None, "version 1"), (1, "version 1"), (9, "9")])
def test_a_run_in_another_order_of_samples_is_not_resumed(tmp_path, version, named):
    recipe = load_recipe("digits")
    its = {**state(1.0), "recipe": recipe.to_dict(), "train_samples": 10}
    saved = checkpoints(tmp_path / "checkpoints")
    saved.save(1, its | ({} if version is None else {"order_version": version}))
    saved.wait()
    with pytest.raises(UserError, match=rf"{named} of the samples' order.*model\.pretrained="):
        open_run(tmp_path, recipe, {"train": {"count": "10"}}, resume=True)
    saved.save(2, its | {"update": 2, "order_version": ORDER_VERSION})
    saved.wait()
    assert open_run(tmp_path, recipe, {"train": {"count": "10"}}, resume=True)["update"] == 2
