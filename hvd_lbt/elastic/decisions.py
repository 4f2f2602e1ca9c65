"""The driver's decisions: who is started, who is in the world, and when it changes.

Horovod's own elastic driver is not used: docs/elastic.md gives the reasons. The rules here are:

- a new worker joins when its program is loaded, never before: the others do not wait for it;
- workers that have trained stay, in the order of age, so that rank 0 holds the training's state;
- a lost worker costs the others nothing but the update under way;
- changes of the hosts take effect between two updates.
"""

import math
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hvd_lbt.stop import EXIT_STOPPED

SETTLE_SECONDS = 15.0  # a loaded worker waits at most this long for others that are still loading
SILENCE_SECONDS = 60.0  # a worker reports twice a second
# A worker that does not ask for a place is frozen: replaced after this, then after twice as long …
LOADING_SECONDS, LONGEST_LOADING = 100.0, 800.0
LEAVE_SECONDS = 30.0  # for a worker to end after it was asked to leave
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # before a host that fails again and again is tried again
LOSSES_ALLOWED = 5  # in a row, without one committed update in between
EXIT_USER_ERROR = 2

Slot = tuple[str, int]  # host, number on it
Mesh = set[tuple[str, str]]  # a worker's connections: own address, the other's address


class Process(Protocol):
    """What the driver needs of a started worker."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


@dataclass
class Worker:
    """One process. assignment: its place in the present world; None while it is in none."""

    name: str
    slot: Slot
    process: Process
    began: float
    loaded: float | None = None  # when it first asked for a place
    heard: float | None = None
    waits: bool = False  # for a place, right now
    assignment: dict[str, Any] | None = None
    leaving: float | None = None  # since when it has been asked to leave
    given_up: bool = False  # it was killed because nothing was heard of it
    mesh: Mesh | None = None  # its connections in the present world, once it has reported them


def world_of(workers: Sequence[Worker]) -> list[dict[str, int]]:
    """Ranks for these workers, the first is rank 0; a host's ranks are consecutive."""
    hosts: dict[str, list[Worker]] = defaultdict(list)
    for worker in workers:
        hosts[worker.slot[0]].append(worker)
    local_ranks = {
        worker.name: local_rank
        for of_host in hosts.values()
        for local_rank, worker in enumerate(of_host)
    }
    ordered = [worker for of_host in hosts.values() for worker in of_host]
    places: dict[str, dict[str, int]] = {}
    for rank, worker in enumerate(ordered):
        local_rank = local_ranks[worker.name]
        peers = [host for host, of_host in hosts.items() if len(of_host) > local_rank]
        places[worker.name] = {
            "rank": rank,
            "size": len(ordered),
            "local_rank": local_rank,
            "local_size": len(hosts[worker.slot[0]]),
            "cross_rank": peers.index(worker.slot[0]),
            "cross_size": len(peers),
        }
    return [places[worker.name] for worker in workers]


def strangers_in(meshes: Iterable[Mesh]) -> list[str]:
    """The addresses that workers are connected to and that no worker has reported as its own.

    Gloo takes whoever connects first for the rank it expects. A connection between two workers is
    in the reports of both, with the addresses exchanged; one to anybody else is in one report only.
    """
    reported = set[tuple[str, str]]().union(*meshes)
    return sorted(other for own, other in reported if (other, own) not in reported)


class Driver:
    """Decides who is started, who is in the world, and when it changes. Call `tick` periodically.

    start(slot, name) starts a worker; serve(generation, answers, workers) begins the rendezvous of
    a world; say(text, **facts) reports what happened. `slots` is set from outside, by discovery.
    finished is the exit code, once it is known.
    """

    def __init__(
        self,
        minimum: int,
        maximum: int,
        *,
        start: Callable[[Slot, str], Process],
        serve: Callable[[int, dict[str, str], int], None],
        say: Callable[..., None],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.minimum, self.maximum, self.patience = minimum, maximum, patience
        self.slots: list[Slot] = []
        self.finished: int | None = None
        self.stop = False
        self.workers: dict[str, Worker] = {}
        self._start, self._serve, self._say, self._clock = start, serve, say, clock
        self._lock = threading.Lock()
        self._generation = 0
        self._regroup = False
        self._broken = False  # the present world has lost someone
        self._lost_at: float | None = None  # when it did, until an update is committed again
        self._losses = 0  # in a row, without a committed update
        self._update = -1
        self._failures: Counter[str] = Counter()  # of a host, in a row
        self._frozen: Counter[str] = Counter()  # workers of a host that never asked for a place
        self._not_before: dict[str, float] = {}
        self._short_since: float | None = None
        self._ended_at: float | None = None

    # -- what workers report --------------------------------------------------------------------

    def report(self, name: str, message: dict[str, Any]) -> dict[str, Any]:
        """Answer a worker: its place or "wait" if it asks for one, else what is wanted of it."""
        with self._lock:
            worker = self.workers.get(name)
            if worker is None or worker.leaving is not None:
                return {"leave": True}
            worker.heard = self._clock()
            if "restarts" in message:
                return self._restart(worker, message["generation"])
            if "update" in message:
                return self._note(int(message["generation"]), int(message["update"]))
            if "connections" in message:
                return self._check_mesh(worker, message["generation"], message["connections"])
            if worker.loaded is None:
                worker.loaded = self._clock()
                self._frozen[worker.slot[0]] = 0
            if worker.assignment and worker.assignment["generation"] > message["generation"]:
                return worker.assignment
            worker.waits = True
            return {"wait": True}

    def _restart(self, worker: Worker, generation: int) -> dict[str, Any]:
        """It loads its program again, with its state, as it could not connect to the others."""
        now = self._clock()
        worker.began, worker.heard, worker.waits = now, None, False
        where = f"{worker.slot[0]}:{worker.slot[1]}"
        self._say(f"{where} restarts: a worker was lost while they connected", restarts=where)
        if generation == self._generation:
            self._count_loss(1, now)
        return {}

    def known(self) -> set[str]:
        """The names of the workers that are started and have not ended."""
        with self._lock:
            return set(self.workers)

    def _check_mesh(
        self, worker: Worker, generation: int, connections: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """Whether all connections of this world are between its members, once all have reported."""
        if generation != self._generation or self._broken:
            return {"lost": True}
        worker.mesh = {(str(own), str(other)) for own, other in connections}
        meshes = [member.mesh for member in self._members()]
        reported = [mesh for mesh in meshes if mesh is not None]
        if len(reported) < len(meshes):
            return {"wait": True}
        strangers = strangers_in(reported)
        if not strangers:
            return {"checked": True}
        self._say(
            f"world {generation} is dissolved: {', '.join(strangers[:5])} connected to a worker "
            "and is none of this run"
        )
        self._count_loss(1, self._clock())
        return {"lost": True}

    def _note(self, generation: int, update: int) -> dict[str, Any]:
        present = generation == self._generation
        if present and update > self._update:
            self._update = update
            if not self._broken:
                self._progress()
        lost = present and self._broken
        return {"regroup": present and self._regroup, "stop": self.stop, "lost": lost}

    def _progress(self) -> None:
        if self._lost_at is not None:
            seconds = self._clock() - self._lost_at
            self._say(f"training again {seconds:.1f} s after the loss", again=seconds)
        self._lost_at, self._losses = None, 0
        for member in self._members():
            self._failures[member.slot[0]] = 0

    # -- what happens by itself -----------------------------------------------------------------

    def tick(self) -> None:
        """Look at everything once, and do what is due."""
        with self._lock:
            now = self._clock()
            for worker in list(self.workers.values()):
                self._give_up_if_silent(worker, now)
                code = worker.process.poll()
                if code is not None:
                    del self.workers[worker.name]
                    self._ended(worker, code, now)
            if self.finished is not None:
                self._clear_away(now)
                return
            wanted = self._wanted()
            self._release(wanted, now)
            if not self.stop:
                self._begin(wanted, now)
            self._form(wanted, now)

    def _give_up_if_silent(self, worker: Worker, now: float) -> None:
        """Kill a worker that is frozen, or whose host is gone and only the remote shell is left."""
        where = f"{worker.slot[0]}:{worker.slot[1]}"
        if worker.given_up:
            return
        if worker.heard is not None:
            if now > worker.heard + SILENCE_SECONDS:
                self._say(f"{where} has been silent for {SILENCE_SECONDS:g} s: replaced")
                worker.given_up = True
                worker.process.kill()
            return
        allowed = min(LONGEST_LOADING, LOADING_SECONDS * 2 ** self._frozen[worker.slot[0]])
        if now > worker.began + allowed:
            self._say(f"{where} has not asked for a place in {allowed:g} s: replaced")
            worker.given_up = True
            self._frozen[worker.slot[0]] += 1
            worker.process.kill()

    def done(self) -> bool:
        """Whether the exit code is known and no worker is left."""
        return self.finished is not None and not self.workers

    def kill(self) -> None:
        """End everything at once; without the lock, since a signal's handler may call it."""
        for worker in list(self.workers.values()):
            worker.process.kill()

    def _wanted(self) -> list[Slot]:
        return self.slots[: self.maximum]

    def _members(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.assignment]

    def _ended(self, worker: Worker, code: int, now: float) -> None:
        where = f"{worker.slot[0]}:{worker.slot[1]}"
        if worker.leaving is not None:
            self._say(f"{where} has left", left=where)
            return
        if code == EXIT_USER_ERROR or (code in (0, EXIT_STOPPED) and worker.assignment):
            if self.finished is None:
                self.finished, self._ended_at = code, now
            return
        if self.finished is not None:
            return
        self._say(f"lost {where} (exit code {code})", lost=where, code=code)
        self._count_failure(worker.slot[0], now)
        if worker.assignment:
            self._count_loss(code if code > 0 else 1, now)

    def _count_failure(self, host: str, now: float) -> None:
        """Let a host rest that fails again and again."""
        self._failures[host] += 1
        again = min(self._failures[host], 20)
        pause = 0.0 if again == 1 else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (again - 2))
        self._not_before[host] = now + pause

    def _count_loss(self, code: int, now: float) -> None:
        """The present world is over; after some in a row the run is too, with this exit code."""
        self._losses += not self._broken
        self._broken = True
        if self._lost_at is None:
            self._lost_at = now
        if self._losses > LOSSES_ALLOWED:
            self._say(f"{self._losses} losses in a row without one update: giving up")
            self.finished, self._ended_at = code, now

    def _clear_away(self, now: float) -> None:
        """Members end by themselves, unless one met an error that the others did not."""
        patient = self.finished != EXIT_USER_ERROR and now < (self._ended_at or 0) + LEAVE_SECONDS
        for worker in self.workers.values():
            if not (worker.assignment and patient):
                worker.process.kill()

    def _release(self, wanted: Sequence[Slot], now: float) -> None:
        """Ask workers to leave that are in no world and on no wanted slot."""
        for worker in self.workers.values():
            if worker.leaving is not None:
                if now > worker.leaving + LEAVE_SECONDS:
                    worker.process.kill()
            elif worker.assignment is None and (worker.slot not in wanted or self.stop):
                worker.leaving = now
                if worker.loaded is None:
                    worker.process.kill()

    def _begin(self, wanted: Sequence[Slot], now: float) -> None:
        taken = {worker.slot for worker in self.workers.values()}
        for slot in wanted:
            if slot not in taken and now >= self._not_before.get(slot[0], 0.0):
                name = f"{slot[0]}.{slot[1]}.{secrets.token_hex(8)}"
                try:
                    self.workers[name] = Worker(name, slot, self._start(slot, name), now)
                except OSError as error:  # no such remote shell, no process or memory left
                    self._say(f"{slot[0]}:{slot[1]} cannot be started: {error}")
                    self._count_failure(slot[0], now)

    def _form(self, wanted: Sequence[Slot], now: float) -> None:
        """Ask the world to meet if it should change; if nobody trains, make the next one."""
        members = self._members()
        newcomers = [
            w for w in self.workers.values() if w.waits and not w.assignment and w.leaving is None
        ]
        loading = [w for w in self.workers.values() if w.loaded is None and w.leaving is None]
        settled = not loading or any(now > (w.loaded or now) + SETTLE_SECONDS for w in newcomers)
        if any(not member.waits for member in members):
            grows = bool(newcomers) and settled
            self._regroup = not self.stop and (
                grows or any(member.slot not in wanted for member in members)
            )
            return
        # Nobody trains: at the start, after a loss, or because the world is to change.
        staying = [member for member in members if member.slot in wanted]
        # State must not be lost where all hosts are exchanged at once: the old hand it over, then
        # go.
        chosen = (staying or members) + [w for w in newcomers if w.slot in wanted]
        if self.stop and not members:
            self.finished, self._ended_at = EXIT_STOPPED, now
            return
        enough = len(chosen) >= self.minimum or (self.stop and members)
        if not enough or not (members or settled):
            self._short_since = self._short_since or now
            if now > self._short_since + self.patience:
                self._say(f"fewer than {self.minimum} workers for {self.patience:g} s: giving up")
                if members:  # they hold updates that no checkpoint has: they save, and end
                    self.stop = True
                else:
                    self.finished, self._ended_at = 1, now
            return
        self._short_since = None
        self._next_world(chosen, members, now)

    def _next_world(self, chosen: Sequence[Worker], members: Sequence[Worker], now: float) -> None:
        self._generation += 1
        self._regroup = self._broken = False
        if not members:  # they begin from the newest checkpoint
            self._update = -1
        for member in members:
            if member not in chosen:
                member.assignment, member.leaving = None, now
        # members come first, in the order of their ranks; the dict is in the order of starting
        ordered = sorted(chosen, key=lambda w: w.assignment["rank"] if w.assignment else math.inf)
        answers = {}
        for worker, place in zip(ordered, world_of(ordered), strict=True):
            host, slot = worker.slot
            worker.assignment = {
                "generation": self._generation,
                "host": host,
                "slot": slot,
                **place,
            }
            worker.waits, worker.mesh = False, None
            answers[f"rank_and_size/{host}:{place['local_rank']}"] = ",".join(
                map(str, place.values())
            )
        self._serve(self._generation, answers, len(ordered))
        names = " ".join(f"{w.slot[0]}:{w.slot[1]}" for w in ordered)
        self._say(f"world {self._generation}: {len(ordered)} workers: {names}", world=len(ordered))
