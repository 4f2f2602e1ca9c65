"""The elastic driver's decisions, on a clock and processes that the test moves."""

import itertools

import pytest

from hvd_lbt.elastic.decisions import Driver, Slot, Worker, world_of


class FakeProcess:
    def __init__(self):
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        if self.code is None:
            self.code = -9


class Stage:
    """A driver, its processes by slot, and what it said."""

    def __init__(self, minimum: int, maximum: int, slots: list[Slot]):
        self.now = 0.0
        self.processes: dict[str, FakeProcess] = {}
        self.told: list[dict] = []
        self.served: dict[str, str] = {}
        self.driver = Driver(
            minimum,
            maximum,
            start=self.start,
            serve=lambda generation, answers, workers: self.served.update(answers),
            say=lambda text, **facts: self.told.append(facts),
            patience=100,
            clock=lambda: self.now,
        )
        self.driver.slots = slots
        self.tick()

    def start(self, slot: Slot, name: str) -> FakeProcess:
        self.processes[name] = FakeProcess()
        return self.processes[name]

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        self.driver.tick()

    def name(self, host: str, slot: int) -> str:
        """The living worker of a slot."""
        return next(n for n, w in self.driver.workers.items() if w.slot == (host, slot))

    def ask(self, name: str, generation: int = 0) -> dict:
        return self.driver.report(name, {"generation": generation})

    def commit(self, name: str, generation: int, update: int) -> dict:
        return self.driver.report(name, {"generation": generation, "update": update})

    def all_ask(self, generation: int = 0) -> dict[Slot, dict]:
        """Everyone asks for a place, the driver ticks, everyone asks again."""
        names = list(self.driver.workers)
        for name in names:
            self.ask(name, generation)
        self.tick()
        slots = {name: w.slot for name, w in self.driver.workers.items()}
        return {slots[name]: self.ask(name, generation) for name in names if name in slots}


HERE = [("here", number) for number in range(3)]


def test_the_first_world_has_all_who_were_found():
    stage = Stage(1, 2, HERE)
    places = stage.all_ask()
    assert sorted(place["rank"] for place in places.values()) == [0, 1]  # MAX is 2
    assert {place["size"] for place in places.values()} == {2}
    assert stage.served["rank_and_size/here:1"] == "1,2,1,2,0,1"


def test_nobody_begins_below_the_minimum_and_patience_ends():
    stage = Stage(2, 3, HERE[:1])
    assert stage.all_ask()["here", 0] == {"wait": True}
    for _ in range(110):  # the worker asks all the time, or it would be taken for dead
        stage.tick(1)
        if stage.driver.workers:
            stage.ask(next(iter(stage.driver.workers)))
    stage.tick()
    assert stage.driver.done()
    assert stage.driver.finished == 1


def test_survivors_go_on_without_waiting_for_the_new_worker():
    stage = Stage(1, 3, HERE)
    stage.all_ask()
    lost, second, third = (stage.name("here", number) for number in range(3))
    stage.commit(second, 1, 7)
    stage.processes[lost].kill()
    stage.tick()
    assert {"lost": "here:0", "code": -9} in stage.told
    assert stage.commit(second, 1, 7)["lost"]  # who waits in a collective is cut off
    assert stage.name("here", 0) != lost  # a new one is loading
    stage.ask(second, 1)
    stage.tick()
    assert stage.ask(second, 1) == {"wait": True}  # the third has not come back yet
    stage.ask(third, 1)
    stage.tick()
    assert [stage.ask(name, 1)["rank"] for name in (second, third)] == [0, 1]
    assert not stage.commit(second, 2, 7)["lost"]
    stage.tick(3)
    stage.commit(second, 2, 8)
    assert stage.told[-1]["again"] == pytest.approx(3.2, abs=0.11)


def test_a_loaded_newcomer_is_let_in_between_two_updates_and_ranks_stay_by_age():
    stage = Stage(1, 3, HERE[:1])
    stage.all_ask()
    first = stage.name("here", 0)
    stage.driver.slots = HERE[:2]
    stage.tick()
    assert not stage.commit(first, 1, 3)["regroup"]  # the second is loading
    second = stage.name("here", 1)
    stage.ask(second)
    stage.tick()
    assert stage.commit(first, 1, 4)["regroup"]
    places = [stage.ask(first, 1), stage.ask(second)]
    stage.tick()
    places = [stage.ask(first, 1), stage.ask(second)]
    assert [place["rank"] for place in places] == [0, 1]
    assert places[0]["generation"] == 2


def test_a_slot_that_is_taken_away_leaves_between_two_updates():
    stage = Stage(1, 3, HERE)
    stage.all_ask()
    names = [stage.name("here", number) for number in range(3)]
    stage.driver.slots = HERE[:1]
    stage.tick()
    assert stage.commit(names[0], 1, 5)["regroup"]
    places = stage.all_ask(1)
    assert places["here", 0]["size"] == 1
    assert places["here", 2] == {"leave": True}
    for name in names[1:]:
        stage.processes[name].code = 0  # leaving with 0 is not the end of the training
    stage.tick()
    assert stage.driver.finished is None


def test_when_all_hosts_are_exchanged_the_old_hand_over_their_state_first():
    stage = Stage(1, 3, [("old", 0)])
    stage.all_ask()
    old = stage.name("old", 0)
    stage.driver.slots = [("new", 0)]
    stage.tick()
    new = stage.name("new", 0)
    stage.ask(new)
    stage.ask(old, 1)
    stage.tick()
    assert stage.ask(old, 1)["rank"] == 0
    assert stage.ask(new)["rank"] == 1
    stage.tick()
    assert stage.commit(old, 2, 9)["regroup"]
    stage.ask(old, 2)
    stage.ask(new, 2)
    stage.tick()
    assert stage.ask(old, 2) == {"leave": True}
    assert stage.ask(new, 2)["size"] == 1


@pytest.mark.parametrize("code", [0, 75])
def test_a_member_that_ends_well_ends_the_training(code):
    stage = Stage(1, 3, HERE)
    stage.all_ask()
    for process in stage.processes.values():
        process.code = code
    stage.tick()
    assert stage.driver.done()
    assert stage.driver.finished == code


def test_a_users_error_ends_all_at_once():
    stage = Stage(1, 3, HERE)
    stage.all_ask()
    stage.processes[stage.name("here", 1)].code = 2
    stage.tick()
    stage.tick()
    assert stage.driver.done()
    assert stage.driver.finished == 2


def test_losses_without_progress_end_the_training():
    stage = Stage(1, 1, HERE)
    stage.driver.patience = 10_000
    for generation in range(20):
        if stage.driver.finished is not None:
            break
        stage.tick(400)  # past the longest pause
        stage.ask(stage.name("here", 0))
        stage.tick()
        assert stage.ask(stage.name("here", 0))["generation"] == generation + 1
        stage.processes[stage.name("here", 0)].code = 1
        stage.tick()
    assert stage.driver.finished == 1
    assert generation == 6


def test_a_failing_host_is_tried_again_after_longer_and_longer_pauses():
    stage = Stage(1, 2, [("good", 0), ("bad", 0)])
    good = stage.name("good", 0)
    started = []
    for _ in range(600):
        stage.ask(good)
        for name, worker in list(stage.driver.workers.items()):
            if worker.slot[0] == "bad":
                started.append(stage.now)
                stage.processes[name].code = 255
        stage.tick(0.5)
    pauses = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > 70
    assert stage.driver.finished is None


def test_a_silent_worker_is_given_up():
    stage = Stage(1, 2, HERE)
    stage.all_ask()
    silent, other = stage.name("here", 0), stage.name("here", 1)
    for update in range(70):
        stage.commit(other, 1, update)
        stage.tick(1)
    assert silent not in stage.driver.workers
    assert other in stage.driver.workers


def test_a_stop_is_told_and_nobody_new_is_started():
    stage = Stage(1, 2, HERE[:1])
    stage.all_ask()
    stage.driver.stop = True
    stage.driver.slots = HERE[:2]
    stage.tick()
    assert len(stage.processes) == 1
    assert stage.commit(stage.name("here", 0), 1, 2)["stop"]


def test_world_of_two_hosts_as_horovod_numbers_it():
    slots = [("a", 3), ("b", 0), ("a", 1)]
    workers = [Worker(str(n), slot, FakeProcess(), 0.0) for n, slot in enumerate(slots)]
    places = world_of(workers)
    assert [place["rank"] for place in places] == [0, 2, 1]
    assert [place["local_rank"] for place in places] == [0, 0, 1]
    assert [place["local_size"] for place in places] == [2, 1, 2]
    assert [place["cross_rank"] for place in places] == [0, 1, 0]
    assert [place["cross_size"] for place in places] == [2, 2, 1]


def meshes(stage: Stage, generation: int, *reports: list[list[str]]) -> list[dict]:
    """All members report their connections, then ask again; the last answers."""
    names = [name for name, w in stage.driver.workers.items() if w.assignment]
    for _ in range(2):
        answers = [
            stage.driver.report(name, {"generation": generation, "connections": report})
            for name, report in zip(names, reports, strict=True)
        ]
    return answers


def test_a_world_trains_when_all_its_connections_are_between_workers():
    stage = Stage(1, 2, HERE)
    stage.all_ask()
    first = stage.name("here", 0)
    report = [["10.0.0.1:1", "10.0.0.2:9"], ["10.0.0.1:2", "10.0.0.2:8"]]
    other = [[there, here] for here, there in report]
    alone = stage.driver.report(first, {"generation": 1, "connections": report})
    assert alone == {"wait": True}  # for the other's report
    assert meshes(stage, 1, report, other) == [{"checked": True}] * 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([["a:1", "b:2"]], [["b:2", "c:3"]]),  # a stranger came first at the second
        ([["a:1", "b:2"], ["a:4", "c:3"]], [["b:2", "a:1"]]),  # and one more
        ([["a:1", "b:2"]], []),  # the second's end is not there
        ([["a:1", "b:2"]], [["a:1", "b:2"]]),  # the same end twice
    ],
)
def test_a_world_with_a_stranger_in_it_is_dissolved(first, second):
    stage = Stage(1, 2, HERE)
    stage.all_ask()
    assert meshes(stage, 1, first, second) == [{"lost": True}] * 2
    places = stage.all_ask(1)
    assert {place["generation"] for place in places.values()} == {2}
    assert meshes(stage, 1, [], []) == [{"lost": True}] * 2  # late, of the world before
    assert meshes(stage, 2, [["a:1", "b:2"]], [["b:2", "a:1"]]) == [{"checked": True}] * 2


def test_strangers_that_come_again_and_again_end_the_run():
    stage = Stage(1, 2, HERE)
    stage.all_ask()
    for generation in range(1, 20):
        if stage.driver.finished is not None:
            break
        meshes(stage, generation, [["a:1", "x:2"]], [["b:2", "a:1"]])
        stage.all_ask(generation)
    assert stage.driver.finished == 1


def test_a_worker_that_is_lost_while_others_report_their_connections_is_met():
    stage = Stage(1, 2, HERE)
    stage.all_ask()
    first, second = stage.name("here", 0), stage.name("here", 1)
    assert stage.driver.report(first, {"generation": 1, "connections": [["a:1", "b:2"]]})["wait"]
    stage.processes[second].kill()
    stage.tick()
    assert stage.driver.report(first, {"generation": 1, "connections": [["a:1", "b:2"]]})["lost"]


def test_a_worker_frozen_while_it_loads_is_replaced_then_given_more_time():
    stage = Stage(1, 2, HERE)
    frozen, other = stage.name("here", 0), stage.name("here", 1)
    allowed = []
    for _ in range(4):
        began = stage.now
        while frozen in stage.driver.workers:
            stage.ask(other)
            stage.tick(1)
        allowed.append(stage.now - began)
        while not any(w.slot == ("here", 0) for w in stage.driver.workers.values()):
            stage.ask(other)
            stage.tick(1)
        frozen = stage.name("here", 0)
    assert allowed == pytest.approx([100, 200, 400, 800], abs=3)
    assert stage.driver.finished is None


def test_a_worker_that_loads_slowly_is_not_killed_once_it_has_asked():
    stage = Stage(1, 1, HERE)
    slow = stage.name("here", 0)
    stage.tick(99)
    stage.ask(slow)
    stage.tick(5)
    stage.ask(slow)
    assert slow in stage.driver.workers


def test_a_worker_that_cannot_be_started_is_tried_again_later():
    stage = Stage(1, 1, [])
    tries = []

    def fails(slot: Slot, name: str) -> FakeProcess:
        tries.append(stage.now)
        raise FileNotFoundError(2, "No such file", "nosuchshell")

    stage.driver._start = fails
    stage.driver.slots = HERE[:1]
    for _ in range(600):
        stage.tick(0.1)
    assert 3 < len(tries) < 8


def test_a_worker_that_restarts_is_no_loss_of_its_own_and_the_others_wait_for_it():
    stage = Stage(1, 3, HERE[:2])
    stage.all_ask()
    first, second = (stage.name("here", number) for number in range(2))
    stage.processes[second].code = -9  # while both connect
    stage.tick()
    assert stage.commit(first, 1, -1)["lost"]
    assert stage.driver.report(first, {"generation": 1, "restarts": True}) == {}
    stage.tick(80)  # longer than a worker may be silent: it is loading
    third = stage.name("here", 1)
    stage.ask(third)
    stage.tick()
    assert stage.ask(third) == {"wait": True}  # the state is with the first
    stage.ask(first, 1)
    stage.tick()
    assert stage.ask(first, 1)["rank"] == 0
    assert not stage.commit(first, 2, -1)["lost"]


def test_a_restart_that_the_driver_did_not_expect_ends_the_world_of_the_others():
    stage = Stage(1, 3, HERE[:2])
    stage.all_ask()
    first, second = (stage.name("here", number) for number in range(2))
    assert not stage.commit(second, 1, -1)["lost"]
    stage.driver.report(first, {"generation": 1, "restarts": True})
    assert stage.commit(second, 1, -1)["lost"]
    for generation in (1, 2):  # an older world's restart says nothing of the present one
        for name in (first, second):
            stage.ask(name, 1)
        stage.tick()
        stage.driver.report(second, {"generation": 0, "restarts": True})
        assert not stage.commit(first, 2, -1)["lost"], generation


def test_what_workers_bring_into_a_world_is_no_progress():
    stage = Stage(1, 3, HERE[:1])
    stage.all_ask()
    name = stage.name("here", 0)
    stage.processes[name].code = -9
    stage.tick()
    stage.all_ask()
    name = stage.name("here", 0)
    stage.commit(name, 2, -1)
    assert not any("again" in event for event in stage.told)
    stage.commit(name, 2, 1)
    assert "again" in stage.told[-1]
