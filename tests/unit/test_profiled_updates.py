"""run.profile: which updates, which rank, and which are errors. Horovod's part: tests/dist."""

import json

import pytest
import torch

from hvd_lbt.errors import UserError
from hvd_lbt.log.profile import Profile
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.world import World

PLAN = make_plan(load_recipe("digits").schedule, 1437)  # 426 updates


def profile(out, updates, rank=0, *, world=None, first_update=0, said=None, timeline=None):
    timeline = [] if timeline is None else timeline
    return Profile(
        out,
        updates,
        rank,
        world=world or World(),
        plan=PLAN,
        first_update=first_update,
        start_timeline=timeline.append,
        stop_timeline=lambda: timeline.append("stopped"),
        say=(said if said is not None else []).append,
    )


def run(profiled, updates):
    for update in updates:
        profiled.before(update)
        with torch.profiler.record_function(f"update {update}"):
            torch.ones(3).sum()
        profiled.after(update)


def traced(file):
    """The updates in a Chrome trace."""
    names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
    return sorted(int(name[7:]) for name in names if name.startswith("update "))


def test_the_trace_has_the_updates_of_the_range_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_TIMELINE", "DYNAMIC")
    said, timeline = [], []
    run(profile(tmp_path, (3, 5), said=said, timeline=timeline), range(10))
    file = tmp_path / "profile/rank0_updates_3-5.json"
    assert traced(file) == [3, 4, 5]
    assert timeline == [str(tmp_path / "profile/horovod_updates_3-5.json"), "stopped"]
    assert said == [f"Wrote the profile of updates 3 to 5 to {file}"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_rank_is_profiled_on_request(tmp_path, monkeypatch):
    monkeypatch.delenv("HOROVOD_TIMELINE", raising=False)
    world = World(rank=1, size=2)
    run(profile(tmp_path, (1, 1), 0, world=world), range(3))
    assert not list(tmp_path.glob("profile/*"))
    run(profile(tmp_path, (1, 1), 1, world=world), range(3))
    assert traced(tmp_path / "profile/rank1_updates_1-1.json") == [1]


def test_a_resume_within_the_range_profiles_the_rest_and_behind_it_nothing(tmp_path):
    said = []
    run(profile(tmp_path, (3, 5), first_update=4, said=said), range(4, 8))
    assert traced(tmp_path / "profile/rank0_updates_4-5.json") == [4, 5]
    run(profile(tmp_path, (3, 5), first_update=6, said=said), range(6, 8))
    assert said[1:] == ["run.profile: the run resumes at update 6, behind these updates."]
    assert len(list(tmp_path.glob("profile/*"))) == 1


def test_a_run_that_stops_within_the_range_writes_what_there_is(tmp_path):
    profiled = profile(tmp_path, (3, 300))
    run(profiled, range(5))
    profiled.close()
    profiled.close()
    assert traced(tmp_path / "profile/rank0_updates_3-300.json") == [3, 4]


def test_a_profile_that_cannot_be_written_ends_no_training(tmp_path, capsys):
    (tmp_path / "profile").write_text("")
    run(profile(tmp_path, (1, 2)), range(4))
    assert "profile: no profile can be written (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("updates", "rank", "reason"),
    [
        (
            (420, 426),
            0,
            "the plan has 426 updates, counted from 0; the last must be at most 425",
        ),
        ((0, 1), 2, "run.profile_rank: 2: there are 2 ranks, counted from 0; it must be at most 1"),
    ],
)
def test_updates_and_ranks_that_there_are_not_are_errors(tmp_path, updates, rank, reason):
    with pytest.raises(UserError) as raised:
        profile(tmp_path, updates, rank, world=World(rank=0, size=2))
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("run.profile=[3, 2]", "it must be [first update, last update]"),
        ("run.profile=[0, 200]", "of 200 updates at most"),
        ("run.profile=[-1, 2]", "it must be greater than or equal to 0"),
        ("run.profile=[1]", "run.profile[1]: it is missing"),
        ("run.profile=[1, 2, 3]", "run.profile"),
        ("run.profile=3", "it must be a list"),
        ("run.profile=[1.5, 2]", "run.profile[0]: 1.5 is not allowed"),
        ("run.profile_rank=1", "run.profile_rank: 1 has no effect without run.profile"),
    ],
)
def test_impossible_ranges_are_named(setting, reason):
    with pytest.raises(UserError) as raised:
        load_recipe("digits", [setting])
    assert reason in str(raised.value)
