"""The shipped scripts as they come from a fresh clone, where nothing but launch/setup has been
called.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import ROOT, Slurm, until

LONG = ("model.width=4", "schedule.epochs=10", "schedule.milestones=[]", "run.eval_every=99")
SETTINGS = [word for one in LONG for word in ("--set", one)]
ONE = ("--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files that a clone of this working tree has, for a cluster without GPUs; set up."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    clone = tmp_path / "clone"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # not what is deleted and not committed
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    for script in clone.glob("launch/slurm/*.sbatch"):
        lines = script.read_text().splitlines(keepends=True)
        script.write_text("".join(line for line in lines if "#SBATCH --gpus" not in line))
    (clone / ".venv").symlink_to(ROOT / ".venv")
    return clone


def submit(slurm: Slurm, clone: Path, script: str, *words: str, options=(), **variables) -> str:
    command = ["sbatch", "--parsable", *ONE, *options, f"launch/slurm/{script}", *words]
    return slurm.run(*command, cwd=clone, **variables).strip()


def events(run: Path, kind: str) -> list[dict]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("out", [["--out", "mine"], ["--out=mine"]])
def test_train_logs_and_trains_into_the_folder_of_its_command_line(slurm, clone, out):
    resume = ["--resume"] if len(out) == 2 else []
    job = submit(slurm, clone, "train.sbatch", "digits", *SETTINGS, *out, *resume)
    until(lambda: len(events(clone / "mine", "update")) > 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    ended = slurm.wait(job)
    log = (clone / f"slurm-{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert [end["reason"] for end in events(clone / "mine", "end")] == ["stopped", "finished"]
    assert not (clone / "runs").exists()


def test_of_an_array_only_the_stopped_task_starts_again(slurm, clone):
    """Also where it is the last one, whose SLURM_JOB_ID is the array's: 0 finished, 1 running, 2
    stopped.
    """
    names = {"POLICIES": "decay_lr", "SEEDS": "0 1 2", "RECIPE": "digits"}
    job = submit(slurm, clone, "sweep.sbatch", *SETTINGS, options=["--array=0-2%1"], **names)
    assert slurm.wait(f"{job}_0")["JobState"] == "COMPLETED"
    slurm.run("scontrol", "update", f"JobId={job}_2", "ArrayTaskThrottle=3")
    runs = clone / f"runs/sweep-{job}"
    until(lambda: all(len(events(runs / f"decay_lr-{seed}", "update")) > 1 for seed in (1, 2)))
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    until(lambda: slurm.job(f"{job}_2")["Restarts"] == "1")
    ended = [slurm.wait(f"{job}_{task}") for task in range(3)]
    assert [one["JobState"] for one in ended] == ["COMPLETED"] * 3
    assert [one["Restarts"] for one in ended] == ["0", "0", "1"]
    for seed, reasons in enumerate((["finished"], ["finished"], ["stopped", "finished"])):
        assert [end["reason"] for end in events(runs / f"decay_lr-{seed}", "end")] == reasons
    assert sorted(log.name for log in clone.glob("slurm-*.out")) == [
        f"slurm-{job}_{task}.out" for task in range(3)
    ]


def test_what_is_wrong_stands_last_in_the_log_and_is_not_requeued(slurm, clone):
    bad = submit(
        slurm, clone, "train.sbatch", "digtis", options=["--ntasks=2", "--ntasks-per-node=2"]
    )
    bad_elastic = submit(slurm, clone, "elastic.sbatch", "digtis", INTERFACE="lo")
    nothing = submit(slurm, clone, "train.sbatch")
    names = {"POLICIES": "decay_lr", "SEEDS": "0", "RECIPE": "digits"}
    array = ["--array=0-0"]
    out = submit(slurm, clone, "sweep.sbatch", "--out", "mine", options=array, **names)
    logs = {
        bad: "Did you mean digits?",
        bad_elastic: "Did you mean digits?",
        nothing: "RECIPE [ARGUMENTS] are needed",
        out: "each of the runs has a folder of its own",
    }
    for job, reason in logs.items():
        ended = slurm.wait(job)
        (log,) = clone.glob(f"slurm-{job}*.out")
        found = (ended["JobState"], ended["ExitCode"], ended["Restarts"])
        assert found == ("FAILED", "2:0", "0"), log.read_text()
        assert reason in log.read_text().splitlines()[-1], log.read_text()


def test_not_set_up_and_not_the_repository(slurm, clone, tmp_path):
    (clone / ".venv").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = clone / "launch/slurm/train.sbatch"
    jobs = {
        submit(slurm, clone, "train.sbatch", "digits"): (clone, "Run launch/setup first."),
        slurm.run("sbatch", "--parsable", *ONE, script, "digits", cwd=elsewhere).strip(): (
            elsewhere,
            "is not the repository of hvd_lbt: submit it from there",
        ),
    }
    for job, (folder, reason) in jobs.items():
        assert slurm.wait(job)["ExitCode"] == "2:0"
        assert reason in (folder / f"slurm-{job}.out").read_text().splitlines()[-1]


def test_run_in_an_allocation_shows_the_reason_last(slurm, clone):
    words = ["salloc", "--quiet", "--ntasks=2", "launch/slurm/run", "train", "digtis"]
    ended = subprocess.run(
        words, cwd=clone, env=slurm.environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 2, ended.stderr
    assert "Did you mean digits?" in ended.stderr.splitlines()[-1]
    assert ended.stderr.count("digtis") == 1
