"""Predicted hours of a plan, by stage, number of workers and policy; what the plan warns of."""

import re
from dataclasses import replace

import pytest

from hvd_lbt.cli import main
from hvd_lbt.schedule.layout import make_layout
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.plan_time import Cluster, policy_plans, stage_times, total_seconds, work_of
from hvd_lbt.schedule.plan_warnings import plan_warnings, settling_updates
from hvd_lbt.schedule.settings import Cosine, Milestone, Schedule
from hvd_lbt.schedule.speed import Link, SpeedProfile
from hvd_lbt.speed_profile import load_profile, profile_text, shipped_profiles

PROFILE = SpeedProfile(
    name="mine",
    workers_per_node=4,
    update_seconds=0.01,
    sample_seconds={32: 0.001},
    gradient_bytes=10_000_000,
    within_node=Link(bandwidth=1e10),
    between_nodes=Link(bandwidth=1e9),
    input_images_per_second=100_000.0,
)
SCHEDULE = Schedule(
    policy="grow_batch",
    epochs=3,
    lr=0.1,
    momentum=0.9,
    global_batch=64,
    milestones=(Milestone(epoch=1, factor=2), Milestone(epoch=2, factor=2)),
)
CLUSTER = Cluster(workers=8, micro_batch=32, ghost_batch=16, image_size=32)


def test_a_stage_takes_its_updates_and_the_smaller_last_one():
    plan = make_plan(SCHEDULE, 1_000)
    times = stage_times(plan, PROFILE, CLUSTER)
    sums = 2 * 3 / 4 * 1e7 / 1e10 + 2 * 1 / 2 * 1e7 / 1e9
    # 64 samples are 4 ghost batches of 16: 4 of the 8 workers have one, the others none
    assert [time.idle for time in times] == [4, 0, 0]
    first = 0.01 + 16 * 0.001 + sums
    assert times[0].seconds == pytest.approx(15 * first)
    assert times[0].images_per_second == pytest.approx(64 / first)
    assert times[0].efficiency == pytest.approx(64 * 0.001 / (8 * first))
    last = plan.at(plan.updates - 1).global_batch
    assert last < 256
    busiest = max(
        make_layout(last, rank=rank, size=8, micro_batch=32, ghost_batch=16).local_batch
        for rank in range(8)
    )
    whole, rest = (0.01 + samples * 0.001 + sums for samples in (32, busiest))
    assert times[2].seconds == pytest.approx((plan.stages[2].updates - 1) * whole + rest)
    assert total_seconds(times) == pytest.approx(sum(time.seconds for time in times))
    assert total_seconds(stage_times(plan, replace(PROFILE, gradient_bytes=None), CLUSTER)) is None


@pytest.mark.parametrize("samples", [1, 15, 17, 64, 95, 97, 128, 130, 1000, 1023])
def test_the_busiest_worker_is_the_busiest_of_all(samples):
    for workers in (1, 2, 3, 5, 8):
        layouts = [
            make_layout(samples, rank=rank, size=workers, micro_batch=32, ghost_batch=16)
            for rank in range(workers)
        ]
        cluster = replace(CLUSTER, workers=workers)
        work = work_of(samples, cluster, ghost_batch=16, image_size=32)
        assert work.samples == max(layout.local_batch for layout in layouts)
        assert 1 <= work.last_micro_batch <= 33


def test_elastic_stages_use_the_workers_they_ask_for():
    plan = make_plan(SCHEDULE, 1_000)
    times = stage_times(plan, PROFILE, replace(CLUSTER, local_batch=32))
    assert [time.workers for time in times] == [2, 4, 8]


def test_each_policy_has_the_plan_it_would_have_alone():
    plans = policy_plans(SCHEDULE, 1_000)
    assert [plan.updates for plan in plans.values()] == [47, 31, 27]
    cosine = replace(SCHEDULE, milestones=(), cosine=Cosine(batch_factor=4))
    plans = policy_plans(cosine, 1_000)
    assert "hybrid" in plans["hybrid"]  # a text: it shares milestones out
    assert plans["decay_lr"].updates > plans["grow_batch"].updates


def test_large_batches_and_short_stages_are_doubted():
    plan = make_plan(SCHEDULE, 1_000)
    stages = [vars(stage) for stage in plan.stages]
    large, short = plan_warnings(stages, 1_000)
    assert "global batch of stages 2, 3 (up to 256)" in large
    assert "schedule.max_global_batch: 100 keeps to it" in large
    assert "stages 1, 2, 3 have fewer updates than the momentum takes to settle (29" in short
    assert not plan_warnings([vars(s) for s in make_plan(SCHEDULE, 100_000).stages], 100_000)
    assert [settling_updates(m) for m in (0.0, 0.9, 0.98, 1.0)] == [0, 29, 149, 0]


def test_the_demo_is_warned_of(capsys, monkeypatch):
    """512 of 1,437 samples in a batch: a run's begin shows the same table."""
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plan", "digits"]) == 0
    out = capsys.readouterr().out
    assert "Warning: the global batch of stages 3, 4 (up to 512) is above a tenth" in out
    assert "Warning: stages 3, 4 have fewer updates than the momentum takes to settle (29" in out


def test_the_plan_compares_workers_and_policies(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = "imagenet_resnet50 --speed v100_infiniband --workers 64 512 --price 2.5"
    assert main(["plan", *words.split()]) == 0
    out = capsys.readouterr().out
    totals = re.findall(r"│\s+(64|512) │\s+all │.*?([\d.]+) │\s+\$([\d.,]+) │", out)
    assert [workers for workers, *_ in totals] == ["64", "512"]
    for workers, hours, cost in totals:
        # hours have three digits
        assert float(cost) == pytest.approx(int(workers) * float(hours) * 2.5, rel=0.01)
    assert len(re.findall(r"grow_batch \(this recipe\)", out)) == 2
    assert "workers without samples: 256 of 512 in stage 1; 256 of 512 in stage 2." in out
    assert "update_seconds is not measured" in out
    assert "512 workers are 64 nodes: the model was compared" in out
    assert "github.com" in out or "Oneflow-Inc/DLPerf" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--speed", "v100_infinband"], "Did you mean v100_infiniband?"),
        (["--speed", "v100_infiniband", "--images-per-second", "9"], "give one of them"),
        (["--price", "2"], "--price has no effect without --speed"),
        (["--workers", "1", "2"], "--workers 1 2: several numbers"),
        (["--workers", "0"], "0 is not allowed"),
        (["--speed", "v100_infiniband", "--price", "nan"], "nan is not allowed"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(words, message, capsys):
    assert main(["plan", "digits", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_policy_that_cannot_be_has_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    words = ["digits", "--speed", "t4_ethernet", "--set", "schedule.milestones=[]"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "No plan with policy hybrid: schedule.batch_milestones: 1 milestones are to" in out


def test_another_model_and_size_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "mine.yaml"
    file.write_text(profile_text(replace(PROFILE, model="resnet50", between_nodes=None)))
    assert main(["plan", "digits", "--speed", str(file), "--workers", "4", "8"]) == 0
    out = capsys.readouterr().out
    assert "the profile was measured with resnet50, and the recipe trains" in out
    assert "has no time for images of 16 px; that of 32 px is scaled" in out
    assert "Not predicted: the sums between nodes (between_nodes is not measured)." in out
    assert re.search(r"│\s+8 │\s+all │.*\? │", out)


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_name_their_source(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source
    # what is read of a file is written as it was read
    assert f"\n{profile_text(profile)}".endswith(profile_text(load_profile(name)))


def test_there_are_shipped_profiles():
    assert len(shipped_profiles()) >= 3


def test_a_compiled_backward_hides_no_sum(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["plan", "imagenet_resnet50", "--speed", "t4_ethernet", "--workers", "64"]
    shares = []
    for compiled in ("false", "true"):
        assert main([*words, "--set", f"run.compile={compiled}"]) == 0
        shares.append(re.search(r"all │.*?(\d+)% │", capsys.readouterr().out)[1])
    assert int(shares[0]) < int(shares[1])


def test_long_runs_are_told_in_whole_hours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "slow.yaml"
    file.write_text(profile_text(replace(PROFILE, sample_seconds={224: 100.0})))
    assert main(["plan", "imagenet_resnet50", "--speed", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"│\s+1 │\s+all │.*│\s+3,202,\d{3} │", out)  # 90 epochs of 1,281,167 images
    assert "e+" not in out
