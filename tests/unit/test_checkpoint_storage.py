"""Checkpoints on storage that fails: killed writers, damaged files, file systems that lack
things.
"""

import errno
import itertools
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

from hvd_lbt import checkpoint
from hvd_lbt.checkpoint import (
    BEST,
    Checkpoints,
    DamagedError,
    checkpoint_files,
    load,
    load_newest,
    newest_good,
    open_run,
)
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import RunRecipe, load_recipe
from hvd_lbt.world import World


class Killed(BaseException):
    """No cleanup of the writer runs, as if the process had been killed."""


@pytest.fixture(autouse=True)
def _announce_anew(monkeypatch):
    monkeypatch.setattr(checkpoint, "_announced", set())


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, RunRecipe(keep_checkpoints=keep), World(), lambda value: [value])


def state(update: int, value: float = 0.0) -> dict:
    return {"update": update, "model": {"weight": torch.full((100,), value)}}


def save(folder: Path, update: int, value: float = 0.0, *, best: bool = False, keep: int = 2):
    saved = checkpoints(folder, keep)
    saved.save(update, state(update, value), best=best)
    saved.wait()


def killed_at(call: int, monkeypatch) -> list[str]:
    """Let the writer be killed before its CALLth change of the disk; what it did before."""
    done: list[str] = []

    def counted(module, name: str) -> None:
        change = getattr(module, name)

        def killing(*args, **options):
            if len(done) == call:
                raise Killed
            done.append(name)
            return change(*args, **options)

        monkeypatch.setattr(module, name, killing)

    for name in ("fsync", "replace", "symlink", "unlink"):
        counted(os, name)
    counted(Path, "open")
    return done


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_a_writer_killed_anywhere_leaves_the_old_checkpoint_or_the_new(
    tmp_path, monkeypatch, again, links
):
    """again: a checkpoint of the same name is written anew, as after a resume."""
    writes = checkpoint.Checkpoints._write
    if not links:
        refuse = OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(Path, "symlink_to", lambda *args: (_ for _ in ()).throw(refuse))
    found, old = set(), 5 if again else 4
    for call in itertools.count():
        folder = tmp_path / str(call)
        save(folder, old, 1.0, best=True)
        new = {"version": checkpoint.VERSION, **state(5, 2.0)}
        with monkeypatch.context() as patch:
            done = killed_at(call, patch)
            try:
                writes(checkpoints(folder), 5, new, True)
                ended = True
            except Killed:
                ended = False
        for path in (folder, folder / BEST):
            loaded = load_newest(folder) if path == folder else load(path)
            value = float(loaded["model"]["weight"][0])
            assert (loaded["update"], value) in ((old, 1.0), (5, 2.0)), done
        found.add(value)
        checkpoint._finish_interrupted(folder)
        assert not list(folder.glob("*.part")), done
        assert float(load_newest(folder)["model"]["weight"][0]) in (1.0, 2.0), done
        save(folder, 6, 3.0)
        assert load_newest(folder)["update"] == 6
        if ended:
            break
    assert found == {1.0, 2.0}
    assert call > 8


def test_any_damage_of_a_digest_or_a_header_makes_the_one_before_count(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "update-00000002.pt"
    digest_file = tmp_path / "update-00000002.pt.sha256"
    good = {file: file.read_bytes() for file in (newest, digest_file)}
    flips = [(digest_file, bit) for bit in range(8 * len(good[digest_file]))]
    flips += [(newest, bit) for bit in range(8 * 64)]
    chance = random.Random(0)
    flips += [(newest, chance.randrange(8 * len(good[newest]))) for _ in range(200)]
    fallen_back = 0
    for file, bit in flips:
        content = bytearray(good[file])
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        update = load_newest(tmp_path)["update"]
        # the name behind the digest is for sha256sum
        assert update == 1 or (file == digest_file and bit >= 8 * 65), (file, bit)
        fallen_back += update == 1
        file.write_bytes(good[file])
    assert fallen_back >= 8 * 65 + 8 * 64 + 200 - 8
    contents = (b"", b"\n", b"\xff" * 64, b"0" * 64, b"SHA256 (x) = 00", b"f" * 63, b" " * 70)
    for content in contents:
        digest_file.write_bytes(content)
        assert load_newest(tmp_path)["update"] == 1
    capsys.readouterr()


def test_a_folder_or_no_checkpoint_in_the_place_of_one(tmp_path, capsys):
    save(tmp_path, 1)
    for number, make in enumerate((Path.mkdir, Path.touch), start=2):
        make(tmp_path / f"update-{number:08}.pt")
        make(tmp_path / f"update-{number:08}.pt.sha256")
    (tmp_path / "update-mine.pt").touch()  # a user's
    text = tmp_path / "update-00000004.pt"
    text.write_text("no checkpoint")
    (tmp_path / "update-00000004.pt.sha256").write_text(f"{checkpoint._digest(text)}  x\n")
    assert load_newest(tmp_path)["update"] == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split(" ")[2][-11:] for line in said] == [
        f"0000000{number}.pt" for number in (4, 3, 2)
    ]
    assert "is not a regular file" in said[2]
    assert newest_good(tmp_path).name == "update-00000004.pt"  # as far as its digest goes


def test_which_of_the_two_files_is_missing_is_said(tmp_path):
    save(tmp_path / "run", 1, best=True)
    alone = tmp_path / "best.pt"
    with pytest.raises(DamagedError, match=r"The checkpoint .*/best.pt is missing\.$"):
        load(alone)
    alone.write_bytes((tmp_path / "run" / BEST).read_bytes())
    with pytest.raises(DamagedError, match=r"best.pt.sha256 is missing. Copy it along") as error:
        load(alone)
    command = str(error.value).rpartition("whole: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert load(alone)["update"] == 1
    alone.unlink()
    with pytest.raises(DamagedError, match=r"The checkpoint .*/best.pt is missing\.$"):
        load(alone)


def test_damaged_files_neither_push_out_new_ones_nor_count_as_good(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    for update in (1, 2, 3, 4, 5):
        save(folder, update, keep=9)
    for update in (4, 5):
        (folder / f"update-{update:08}.pt").write_bytes(b"")
    assert "The last good checkpoint is " in checkpoints(folder).last_good()
    assert "update-00000003.pt" in checkpoints(folder).last_good()
    again = checkpoints(folder, keep=2)  # of a program that did not set them aside
    again.save(2, state(2))
    again.wait()
    assert newest_good(folder) == folder / "update-00000002.pt"
    save(folder, 3, keep=3)
    assert load_newest(folder, set_aside=True)["update"] == 3
    assert f"It is {folder}/update-00000005.pt.damaged now." in capsys.readouterr().out
    for update in (6, 7, 8):
        save(folder, update, keep=2)
    assert [file.name for file in checkpoint_files(folder)] == [
        "update-00000007.pt",
        "update-00000008.pt",
    ]
    assert len(list(folder.glob("*.damaged"))) == 2


def test_a_run_of_checkpoints_alone_is_not_begun_anew(tmp_path):
    save(tmp_path / "checkpoints", 1)
    with pytest.raises(UserError, match="already holds a run"):
        open_run(tmp_path, load_recipe("digits"), {}, resume=False)


@pytest.mark.parametrize("number", sorted({errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL}))
def test_storage_without_links_and_folder_fsync_is_used_and_said_once(
    tmp_path, monkeypatch, capsys, number
):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    fsync = os.fsync
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(
        os, "fsync", lambda fd: refuse() if os.path.isdir(f"/proc/self/fd/{fd}") else fsync(fd)
    )
    saved = checkpoints(tmp_path, keep=1)
    for update, top1 in enumerate((0.2, 0.9, 0.8), start=1):
        saved.save(update, state(update), best=saved.better(top1))
    saved.wait()
    assert load(tmp_path / BEST)["update"] == 2  # a copy, though the one it was made of is gone
    assert [file.name for file in checkpoint_files(tmp_path)] == ["update-00000003.pt"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert f"no symbolic links here ({os.strerror(number)}); best.pt is a copy" in said[1]
    monkeypatch.undo()
    save(tmp_path, 4, best=True)
    assert (tmp_path / BEST).is_symlink()
    assert load(tmp_path / BEST)["update"] == 4


def test_storage_that_fails_is_not_taken_for_storage_that_lacks_something(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"could not be written \(Input/output error\)"):
        save(tmp_path, 1)


def test_a_run_on_vfat(tmp_path, capsys):
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 8 << 20)
    made = (
        subprocess.run(["mkfs.vfat", image], capture_output=True, text=True)
        if any(
            os.access(Path(folder) / "mkfs.vfat", os.X_OK)
            for folder in ("/sbin", "/usr/sbin", *os.get_exec_path())
        )
        else None
    )
    if made is None or made.returncode:
        pytest.skip("mkfs.vfat of dosfstools is not installed")
    there = subprocess.run(
        ["mount", "-t", "vfat", "-o", "loop", image, mounted], capture_output=True, text=True
    )
    if there.returncode:
        pytest.skip(f"no vfat can be mounted here: {there.stderr.strip()}")
    try:
        saved = checkpoints(mounted / "checkpoints", keep=1)
        for update, top1 in enumerate((0.2, 0.9, 0.8, 0.7), start=1):
            saved.save(update, state(update), best=saved.better(top1))
        saved.wait()
        assert load(mounted / "checkpoints" / BEST)["update"] == 2
        assert load_newest(mounted / "checkpoints")["update"] == 4
        assert capsys.readouterr().out.count("best.pt is a copy") == 1
    finally:
        subprocess.run(["umount", mounted], check=True)
