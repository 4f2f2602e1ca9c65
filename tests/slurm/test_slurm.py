"""Under a real Slurm: every launcher trains the same network, and no signal costs an update."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cluster import ROOT, Slurm, until

from hvd_lbt import checkpoint

# Some ten seconds on two quiet cores: a signal must find it at work.
SETTINGS = (
    *("model.width=4", "schedule.epochs=10", "schedule.milestones=[{epoch: 8, factor: 4}]"),
    *("run.eval_every=99", "run.checkpoint_minutes=0.01"),
)
RANKS = ("--nodes=1", "--ntasks=2", "--ntasks-per-node=2", "--cpus-per-task=1")


def train(*settings: str) -> list[str]:
    return ["digits", *(word for one in (*SETTINGS, *settings) for word in ("--set", one))]


def submit(slurm: Slurm, out: Path, *options: str, settings: tuple[str, ...] = ()) -> str:
    """Submit the shipped script; the number of its job."""
    words = ["sbatch", "--parsable", f"--output={out}.log", *RANKS, *options]
    return slurm.run(*words, slurm.script("train.sbatch"), *train(*settings), OUT=str(out)).strip()


def events(out: Path, kind: str) -> list[dict]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def weights(out: Path) -> int:
    """The CRC-32 of the weights of a run that is finished."""
    state = checkpoint.load_newest(out / "checkpoints")
    assert state["update"] == events(out, "run")[0]["plan"]["updates"]
    return checkpoint.weights_checksum(state["model"])


@pytest.fixture(scope="module")
def unbroken(slurm, tmp_path_factory) -> int:
    """The weights of the run that nothing stops, by srun --mpi=pmix in an allocation."""
    out = tmp_path_factory.mktemp("srun") / "run"
    words = ["launch/slurm/run", "train", *train(), "--out", out]
    output = slurm.run("salloc", "--ntasks=2", *words, OMP_NUM_THREADS="1")
    assert output.count("2 workers · 1,437 training images") == 1
    assert events(out, "run")[0]["slurm_job"]["restarts"] == "0"
    return weights(out)


@pytest.mark.parametrize("launcher", ["launch/mpi", "launch/local"])
def test_mpirun_and_horovodrun_in_an_allocation(slurm, unbroken, tmp_path, launcher):
    words = [launcher, "2", "train", *train(), "--out", tmp_path / "run"]
    output = slurm.run("salloc", "--ntasks=2", *words, OMP_NUM_THREADS="1")
    assert output.count("2 workers · 1,437 training images") == 1
    assert weights(tmp_path / "run") == unbroken


def test_usr1_saves_requeues_and_ends_as_if_nothing_had_been(slurm, unbroken, tmp_path):
    out = tmp_path / "run"
    job = submit(slurm, out)
    until(lambda: len(events(out, "update")) > 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    ended = slurm.wait(job)
    log = Path(f"{out}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert [end["reason"] for end in events(out, "end")] == ["stopped", "finished"]
    stopped = events(out, "end")[0]["update"]
    assert f"Slurm job {job}, restart 1 · going on after {stopped} updates" in log
    assert [update["update"] for update in events(out, "update")] == list(
        range(events(out, "end")[1]["update"])
    )
    assert weights(out) == unbroken

    slurm.run("scontrol", "requeue", job)  # by hand, though it is finished
    until(lambda: slurm.job(job)["Restarts"] == "2")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2")
    assert f"{out} is finished" in Path(f"{out}.log").read_text()


@pytest.mark.skipif(
    "HVD_LBT_TEST_LONG" not in os.environ, reason="takes 3 min: set HVD_LBT_TEST_LONG=1"
)
def test_a_time_limit_costs_no_bit(slurm, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    longer = ("schedule.epochs=100",)
    slurm.wait(submit(slurm, whole, settings=longer))
    # Slurm looks once in 30 s, and tells up to 60 s earlier than it is asked to
    ended = slurm.wait(submit(slurm, parts, "--time=1", "--signal=B:USR1@5", settings=longer))
    assert ended["JobState"] == "COMPLETED", Path(f"{parts}.log").read_text()
    assert int(ended["Restarts"]) >= 1
    assert {end["reason"] for end in events(parts, "end")} == {"stopped", "finished"}
    stops = [end["update"] for end in events(parts, "end")]
    print(f"restarts {ended['Restarts']}, ends after updates {stops}")
    assert weights(parts) == weights(whole)


def test_a_job_of_higher_priority_preempts(slurm, unbroken, tmp_path):
    out = tmp_path / "run"
    job = submit(slurm, out, "--exclusive")  # all CPUs of the only node
    until(lambda: len(events(out, "update")) > 3)
    urgent = slurm.run(
        *("sbatch", "--parsable", "--partition=high", "--ntasks=4", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    ).strip()
    assert slurm.wait(urgent)["JobState"] == "COMPLETED"
    ended = slurm.wait(job)
    log = Path(f"{out}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert events(out, "run")[-1]["resumed_at_update"] > 0
    assert weights(out) == unbroken


def test_an_error_is_not_requeued(slurm, tmp_path):
    out = tmp_path / "run"
    words = ["sbatch", "--parsable", f"--output={out}.log", *RANKS]
    job = slurm.run(*words, slurm.script("train.sbatch"), "digtis", OUT=str(out)).strip()
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "Did you mean digits?" in Path(f"{out}.log").read_text()


def test_a_sweep_is_an_array_of_policies_and_seeds(slurm, tmp_path):
    words = ["sbatch", "--parsable", "--array=0-1", f"--output={tmp_path}/%a.log", *RANKS]
    # every policy and seed has a folder of its own below runs/ of the repository
    short = ("--set", "schedule.epochs=1", "--set", "schedule.milestones=[]")
    words += ["--ntasks=1", "--ntasks-per-node=1", slurm.script("sweep.sbatch"), *train()[1:]]
    job = slurm.run(
        *words, *short, RECIPE="digits", POLICIES="decay_lr grow_batch", SEEDS="3"
    ).strip()
    runs = ROOT / f"runs/sweep-{job}"
    try:
        for task, policy in enumerate(("decay_lr", "grow_batch")):
            assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED"
            recipe = events(runs / f"{policy}-3", "run")[0]["recipe"]
            assert (recipe["schedule"]["policy"], recipe["run"]["seed"]) == (policy, 3)
    finally:
        shutil.rmtree(runs, ignore_errors=True)


def test_preemption_of_an_elastic_job_costs_no_update(slurm, tmp_path):
    """SIGTERM to every process and the trap's SIGUSR1 within milliseconds are one request to
    stop.
    """
    out = tmp_path / "run"
    words = ["sbatch", "--parsable", "--exclusive", f"--output={out}.log"]
    words += [slurm.script("elastic.sbatch"), "digits"]
    stages = (
        *("model.width=4", "schedule.epochs=10", "run.eval_every=99"),
        *("schedule.milestones=[]", "run.checkpoint_minutes=60"),
    )
    job = slurm.run(
        *(*words, *(word for one in stages for word in ("--set", one))),
        INTERFACE="lo",
        OUT=str(out),
        OMP_NUM_THREADS="1",
        SLOTS="2",
        MAX_NODES="1",
    ).strip()
    until(lambda: len(events(out, "update")) > 10)
    urgent = slurm.run(
        *("sbatch", "--parsable", "--partition=high", "--ntasks=4", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    ).strip()
    assert slurm.wait(urgent)["JobState"] == "COMPLETED"
    ended = slurm.wait(job)
    log = Path(f"{out}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    stopped, finished = events(out, "end")
    assert (stopped["reason"], finished["reason"]) == ("stopped", "finished")
    assert "saved: use --resume" in log  # the workers' last words came through
    assert events(out, "run")[-1]["resumed_at_update"] == stopped["update"] > 10
    done = [update["update"] for update in events(out, "update")]
    assert done == list(range(finished["update"]))  # none was done twice


def test_helper_jobs_lend_nodes_as_the_batch_grows_and_leave(slurm, tmp_path):
    out = tmp_path / "run"
    stages = (
        *("model.width=4", "schedule.epochs=2", "run.eval_every=99", "elastic.local_batch=32"),
        "schedule.milestones=[{epoch: 1, factor: 2}]",
    )
    words = ["sbatch", "--parsable", "--partition=both", f"--output={out}.log"]
    words += [slurm.script("elastic.sbatch"), "digits"]
    job = slurm.run(
        *(*words, *(word for one in stages for word in ("--set", one))),
        INTERFACE="lo",
        OUT=str(out),
        OMP_NUM_THREADS="1",
        SBATCH_PARTITION="both",
        PYTHONPATH=str(Path(__file__).with_name("patient")),
    ).strip()
    ended = slurm.wait(job)
    log = Path(f"{out}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), log
    listed = slurm.run("squeue", "--noheader", "--states=all", "--name=hvd_lbt_helper", "-o%i %N")
    ((helper, node),) = (line.split() for line in listed.splitlines())
    assert node != ended["NodeList"]
    assert slurm.wait(helper)["JobState"] == "COMPLETED"

    plan = events(out, "run")[0]["plan"]
    second = plan["stages"][1]["first_update"]
    worlds = [(run["world_size"], run["resumed_at_update"]) for run in events(out, "run")]
    assert worlds[0] == (1, 0)
    assert worlds[1:] == [(2, second + 1)]  # the first update of the stage is done before it knows
    assert [update["update"] for update in events(out, "update")] == list(range(plan["updates"]))
    assert weights(out)
