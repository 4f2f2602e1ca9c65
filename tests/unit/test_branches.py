"""Which updates a branch does, which batch loses nothing, and what a probe refuses."""

import json
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from statistics import mean

import pytest

from hvd_lbt.branch_record import branches_of, losses_of, open_record, write_record
from hvd_lbt.branch_table import percent, sentences
from hvd_lbt.branch_training import branch_recipe
from hvd_lbt.errors import UserError
from hvd_lbt.measure.branch_verdict import half_width, judge
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.branches import branch_updates, make_span
from hvd_lbt.schedule.growth import Growth
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Cosine, Milestone, Schedule, WarmUp

N = 10_000
CONSTANT = Schedule(policy="decay_lr", epochs=3, lr=0.1, momentum=0.9, global_batch=64)
STAGES = replace(
    CONSTANT,
    policy="grow_batch",
    max_global_batch=512,
    milestones=(
        Milestone(epoch=1, factor=2),
        Milestone(epoch=2, factor=2, momentum=0.95, ghost_batch=32),
    ),
    momentum_start="corrected",
)
COSINE = replace(CONSTANT, cosine=Cosine(), warm_up=WarmUp(epochs=0.5, first_lr=0.01), momentum=0.0)


@pytest.mark.parametrize(
    ("options", "samples", "batches"),
    [
        ({}, 1024, (64, 128, 256)),  # a tenth of an epoch is less than four updates of 256
        ({"epochs": 1.0}, 2048 * 4, (64, 128, 256, 512, 1024, 2048)),  # N/4
        ({"epochs": 0.1}, 896, (64, 128)),  # four updates in the span, or 2·B
        ({"epochs": 0.1, "largest": 1000}, 512, (64, 128, 256, 512)),
        ({"largest": 8192}, 8192 * 4, (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
        ({"epochs": 0.0128}, 128, (64, 128)),
    ],
)
def test_each_branch_has_whole_updates_of_the_same_samples(options, samples, batches):
    plan = make_plan(CONSTANT, N)
    span = make_span(plan, 10, **options)
    assert (span.first_sample, span.samples, span.batches) == (640, samples, batches)
    for batch in batches:
        for kept in ("noise", "lr"):
            updates = branch_updates(plan, span, batch, kept)
            assert sum(update.global_batch for update in updates) == samples
            assert updates[0].samples_seen == 640


@pytest.mark.parametrize(
    ("schedule", "first"), [(CONSTANT, 7), (STAGES, 150), (STAGES, 200), (COSINE, 20), (COSINE, 99)]
)
def test_the_branch_of_b_is_the_plan_for_as_long_as_its_stage_lasts(schedule, first):
    plan = make_plan(schedule, N)
    span = make_span(plan, first, epochs=0.3)
    stage = plan.stages[plan.at(first).stage]
    updates = branch_updates(plan, span, span.batches[0], "noise")
    assert updates[0].settled > 0
    left = stage.first_update + stage.updates - first
    count = min(left, len(updates))
    assert updates[:count] == [plan.at(first + place) for place in range(count)]
    for update in updates[count:]:  # beyond: the same batch, with the last lr
        assert update.global_batch == stage.global_batch
        assert update.lr == pytest.approx(plan.at(first + count - 1).lr)


def test_the_branch_of_b_has_the_batch_that_was_decided():
    schedule = replace(CONSTANT, policy="measured", max_lr=0.5)
    plan = make_plan(schedule, N, (Growth(samples_seen=6400, global_batch=128),))
    span = make_span(plan, 120)
    assert span.batches[0] == 128
    updates = branch_updates(plan, span, 128, "noise")
    assert updates == [plan.at(120 + place) for place in range(len(updates))]


@pytest.mark.parametrize("schedule", [CONSTANT, STAGES, COSINE])
def test_what_is_kept_is_that_of_the_plan_at_each_sample(schedule):
    plan = make_plan(schedule, N)
    span = make_span(plan, 40, epochs=0.2, largest=1024)
    base = {one.samples_seen: one for one in branch_updates(plan, span, span.batches[0], "noise")}
    for batch in span.batches[1:]:
        for kept in ("noise", "lr"):
            for update in branch_updates(plan, span, batch, kept):
                own, of_base = (
                    (one.noise_scale, one.lr)[["noise", "lr"].index(kept)]
                    for one in (update, base[update.samples_seen])
                )
                assert own == pytest.approx(of_base, rel=1e-12)
                assert update.global_batch == batch


def test_after_the_end_the_samples_go_on_with_the_last_stage():
    plan = make_plan(STAGES, N)
    assert plan.at(plan.updates - 1).global_batch < plan.stages[-1].global_batch  # the rest
    span = make_span(plan, plan.updates, epochs=0.3)
    assert span.first_sample == plan.samples == 3 * N
    updates = branch_updates(plan, span, span.batches[0], "noise")
    assert {(one.global_batch, one.lr, one.ghost_batch) for one in updates} == {
        (plan.stages[-1].global_batch, plan.stages[-1].lr, 32)
    }
    assert updates[0].epoch == 3.0


@pytest.mark.parametrize(
    ("options", "train_samples", "message"),
    [
        ({"largest": 127}, N, r"--largest 127 .* 128 \(twice that\) to 10,000"),
        ({"largest": 10_001}, N, "--largest 10,001"),
        ({"epochs": 0.01}, N, r"--epochs 0.01 is 100 of 10,000 .* at least 0.0128"),
        ({"epochs": 1e8}, N, "at most 1,000,000"),
        ({}, 100, "a global batch of 64, and there are 100 training samples"),
    ],
)
def test_what_cannot_be_branched_is_an_error(options, train_samples, message):
    with pytest.raises(UserError, match=message):
        make_span(make_plan(CONSTANT, train_samples), 1, **options)


def test_the_interval_is_students():
    # t of 2 degrees of freedom at 95 %: 2.91999; the standard deviation of 1, 2, 3 is 1
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.91999 / 3**0.5, rel=1e-5)
    assert half_width([1.0]) == inf


BASE = [1.00, 1.02, 0.98]  # a standard deviation of 0.02


@pytest.mark.parametrize(
    ("others", "outcomes", "critical", "losing"),
    [
        # paired by seed: the same ± 0.001, above it by 0.001 and by 0.05
        ({128: [1.001, 1.022, 0.98], 256: [1.05, 1.071, 1.029]}, "nothing loses", 128, 256),
        ({128: [1.05, 1.07, 1.03], 256: [1.0, 1.02, 0.98]}, "loses nothing", None, 128),
        ({128: [1.1, 0.9, 1.0], 256: [0.9, 0.92, 0.88]}, "cannot nothing", 256, None),
        ({128: [1.1, 0.9, 1.0], 256: [1.2, 1.22, 1.19]}, "cannot loses", None, 256),
        ({128: [15.0, 300.0, 20.0], 256: [1.0, 1.02, 0.98]}, "loses nothing", None, 128),
        ({128: [1.0, inf, 1.0], 256: [nan, nan, nan]}, "loses loses", None, 128),
    ],
)
def test_the_rule(others, outcomes, critical, losing):
    verdict = judge({64: BASE, **others})
    found = [one.outcome.split()[0] for one in verdict.compared]
    assert found == outcomes.split()
    assert (verdict.critical, verdict.losing) == (critical, losing)
    assert verdict.noise == pytest.approx(0.02, rel=0.02)  # of the logarithm, near 1
    json.dumps(verdict.to_dict(), allow_nan=False)


@pytest.mark.parametrize("losses", [{64: [1.0], 128: [0.5]}, {64: [1.0, inf], 128: [1.0, 1.0]}])
def test_nothing_is_told_from_one_seed_or_a_base_that_diverged(losses):
    verdict = judge(losses)
    assert [one.outcome for one in verdict.compared] == ["cannot be told"]
    assert verdict.critical is None
    json.dumps(verdict.to_dict(), allow_nan=False)


def branches(batches: dict[int, list[float]]) -> dict[int, list[dict]]:
    return {
        batch: [
            {"kept": "noise", "batch": batch, "seed": seed, "loss": loss, "diverged": loss == inf}
            | {
                "lr": 1e-6,
                "updates": 640 // batch,
                "momentum": 0.9,
                "bad_updates": 0,
                "skipped_samples": 0,
            }
            for seed, loss in enumerate(losses)
        ]
        for batch, losses in batches.items()
    }


def test_the_verdict_in_words():
    found = branches({64: BASE, 128: [1.1, 0.9, 1.0], 256: [1.2, inf, 1.19]})
    found[128][1]["bad_updates"] = 2
    lines = sentences(found, {"noise": judge(losses_of(found))}, 123.4)
    text = "\n".join(lines)
    assert "g kept: 128 cannot be told" in text
    assert "256 loses." in text
    assert "123.4 samples" in text
    assert "2 updates were dropped" in text
    assert "From B = 128 on, the branches have fewer than 1/(1−m) = 10 updates" in text
    found = branches({64: BASE, 128: [0.9, 0.92, 0.88]})
    text = "\n".join(sentences(found, {"noise": judge(losses_of(found))}, None))
    assert "the largest batch that loses nothing is 128; no batch of this probe loses" in text
    assert "not known" in text
    assert "hardly move" not in text
    found = branches({64: [1.0, 1.0001, 1.0], 128: [1.0, 1.0001, 1.0]})
    assert "hardly move" in "\n".join(sentences(found, {"noise": judge(losses_of(found))}, None))


HEAD = {"checkpoint_sha256": "a", "data": {}, "first_sample": 0, "samples": 64, "buffer": "keep"}


def test_a_record_is_continued_only_with_what_it_is_of(tmp_path):
    record = open_record(tmp_path, HEAD)
    record["branches"] = branches({64: [1.0]})[64]
    write_record(tmp_path, record)
    assert open_record(tmp_path, HEAD) == record
    for key, value, advice in (
        ("checkpoint_sha256", "b", "the same checkpoint"),
        ("samples", 128, "the same --epochs and --largest"),
        ("buffer", "rescale", "the same --buffer"),
        ("data", {"train": {}}, "the same --data"),
    ):
        with pytest.raises(UserError, match=f"{key} differ. Give {advice} to continue"):
            open_record(tmp_path, HEAD | {key: value})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "\xff", '{"branches": 3}', "[" * 10_000]
    + [json.dumps(HEAD | {"version": 1, "start": None, "branches": one}) for one in ([{}], [1])]
    + [json.dumps(HEAD | {"version": 1, "start": 3, "branches": []})],
)
def test_another_file_of_that_name_is_an_error(tmp_path, text):
    (tmp_path / "probe.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"probe\.json"):
        open_record(tmp_path, HEAD)


def test_what_is_of_a_whole_run_is_not_in_a_branch():
    settings = (
        *("ema.decay=0.9", "run.loggers=[tensorboard]", "run.profile=[0, 1]", "run.compile=true"),
        *("run.noise_every=1", "wire.form=fp32", "run.seed=7"),
    )
    recipe = load_recipe("digits", settings)
    branch = branch_recipe(recipe, 8)
    assert branch.ema.decay is None
    assert branch.run.loggers == ()
    assert branch.run.profile is None
    assert not branch.run.compile
    assert (branch.run.seed, branch.run.noise_every) == (8, 0)
    kept = ("data", "model", "schedule", "optimizer", "loss", "layout", "wire")
    assert all(getattr(branch, name) == getattr(recipe, name) for name in kept)


@pytest.mark.parametrize(
    ("out", "refused"),
    [("run", True), ("run/x/y", True), ("run/checkpoints", True), ("link", True), ("other", False)],
)
def test_results_do_not_go_into_the_runs_folder(tmp_path, out, refused):
    critical_batch = pytest.importorskip("hvd_lbt.critical_batch")
    file = tmp_path / "run/checkpoints/update-00000001.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    (file.parent / "best.pt").symlink_to(file.name)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for checkpoint in (file, file.parent / "best.pt"):
        if refused:
            with pytest.raises(UserError, match="in the folder of the run"):
                critical_batch.refuse_run_folder(tmp_path / out, checkpoint)
        else:
            critical_batch.refuse_run_folder(tmp_path / out, checkpoint)


def test_a_checkpoint_without_what_a_training_needs_is_refused(tmp_path):
    critical_batch = pytest.importorskip("hvd_lbt.critical_batch")
    with pytest.raises(UserError, match="is missing"):
        critical_batch.load_state(Path(tmp_path / "update-00000001.pt"))


def test_the_example_of_the_docs_is_its_record():
    docs = Path(__file__).parents[2] / "docs"
    record = json.loads((docs / "critical_batch_digits.json").read_text(encoding="utf-8"))
    page = (docs / "critical_batch.md").read_text(encoding="utf-8")
    for kept, name in (("noise", "g"), ("lr", "lr")):
        found = branches_of(record, kept, record["batches"], record["seeds"])
        verdict = judge(losses_of(found))
        assert verdict.to_dict() == record["verdict"][kept]
        for one in verdict.compared:
            its = found[one.batch]
            train, test = (mean(branch[key] for branch in its) for key in ("train_loss", "loss"))
            row = (
                f"| {name} | {one.batch} | {its[0]['updates']} | {its[0]['lr']:.4g} | {train:.4f} "
                f"| {test:.4f} | {percent(one.above)} | {percent(one.low)} to {percent(one.high)} "
                f"| {one.outcome} |"
            )
            assert row in page, row
        noise = verdict.noise
    assert f"{record['gradient_noise']['noise_scale']:,.4g} samples" in page
    assert f"noise of the seeds was {100 * noise:.1f} %" in page
