"""Branches from a checkpoint on real ranks: what they are equal to, and what they leave alone."""

import hashlib
import json
from pathlib import Path

import pytest
from critical_batch_ranks import AFTER, ARGUMENTS
from launching import run_ranks
from trainings import ROUNDING

from hvd_lbt import checkpoint

HERE = Path(__file__).parent


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def by_key(record: dict) -> dict[tuple, dict]:
    return {(one["kept"], one["batch"], one["seed"]): one for one in record["branches"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("critical_batch")
    run, out = folder / "run", folder / "probe"
    text = run_ranks(2, HERE / "critical_batch_ranks.py", run, out)
    assert "lr kept: " in text
    assert "tr(Σ)/|G|² of the checkpoint" in text
    return run, out


def test_the_branch_of_the_plans_batch_is_the_run_itself(folders):
    run, out = folders
    record = read(out / "probe.json")
    own = by_key(record)["noise", 32, 0]
    assert own["updates"] == 6
    assert record["samples"] == 192
    assert not own["diverged"]
    state = checkpoint.load(run / f"checkpoints/update-{AFTER + own['updates']:08}.pt")
    assert own["weights_crc32"] == checkpoint.weights_checksum(state["model"])
    others = [one["weights_crc32"] for key, one in by_key(record).items() if key[1:] != (32, 0)]
    assert own["weights_crc32"] not in others


def test_one_rank_continues_what_two_began_and_finds_the_same(folders, tmp_path):
    """Whatever branch comes first: none leaves anything to the next one, or in the run's folder."""
    run, out = folders
    before, two = digests(run), read(out / "probe.json")
    mine = tmp_path / "probe"
    mine.mkdir()
    some = [one for one in two["branches"] if one["batch"] == 32 and one["seed"] == 0]
    (mine / "probe.json").write_text(json.dumps(two | {"branches": some, "start": None}))
    file = run / f"checkpoints/update-{AFTER:08}.pt"
    text = run_ranks(1, HERE / "smooth.py", "probe", file, "--out", mine, *ARGUMENTS)
    assert "1 branch of it done already" in text
    assert digests(run) == before
    assert "metrics.jsonl" in before
    assert {file.name for file in mine.iterdir()} == {"probe.json", "probe.png", "owner.lock"}
    one = read(mine / "probe.json")
    assert by_key(one).keys() == by_key(two).keys()
    assert len(by_key(two)) == 2 * 3
    for key, branch in by_key(two).items():
        for name in ("loss", "train_loss"):
            assert by_key(one)[key][name] == pytest.approx(branch[name], rel=ROUNDING), key
    assert by_key(one)["noise", 32, 0] == some[0]
    assert one["start"]["loss"] == pytest.approx(two["start"]["loss"], rel=ROUNDING)
    assert one["gradient_noise"] == two["gradient_noise"]
    assert one["gradient_noise"]["noise_scale"] > 0
