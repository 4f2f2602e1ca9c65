"""`hvd_lbt elastic`: keep MIN to MAX workers training while hosts come, go and fail.

It starts the workers, tells them who is in the world, and serves the rendezvous of Horovod's elastic
mode (Gloo). Horovod's own elastic driver is not used: docs/elastic.md tells why. The rules here are:

- a new worker is let in when its program is loaded, never before: the others do not wait for it;
- who has trained stays, in the order of age, so that rank 0 holds the training's state;
- a worker that is lost costs the others nothing but the update under way;
- hosts that change are met between two updates.
"""

import argparse
import fcntl
import json
import math
import os
import secrets
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from hvd_lbt.errors import UserError
from hvd_lbt.stop import EXIT_STOPPED, SIGNALS

WISH = (
    "wished_workers"  # the file in the run's folder that says how many workers the stage is worth
)
TICK_SECONDS = 0.1
DISCOVERY_SECONDS = 1.0
SETTLE_SECONDS = 15.0  # so long a loaded worker waits for others that are still loading
# A worker that has no connection to the lost one notices only by this; in Horovod all ranks talk to
# each other many times a second, whatever the training does.
GLOO_SECONDS = "20"
SILENCE_SECONDS = 60.0  # a worker reports twice a second
LEAVE_SECONDS = 30.0  # for a worker to go when it was told to
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # before a host that fails again and again is tried again
LOSSES_ALLOWED = 5  # in a row, without one committed update in between
EXIT_USER_ERROR = 2
# What a worker on another host is given of this environment.
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED")
EXPORTED_BEGINNINGS = ("HVD_LBT_", "HOROVOD_", "NCCL_", "OMP_", "CUDA_")

Slot = tuple[str, int]  # host, number on it


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
    leaving: float | None = None  # since when it has been told to go


def world_of(workers: Sequence[Worker]) -> list[dict[str, int]]:
    """Ranks for these workers, the first is rank 0; a host's ranks are consecutive, as Horovod likes."""
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


class Driver:
    """Decides who is started, who is in the world, and when it changes. Call `tick` again and again.

    start(slot, name) begins a worker; serve(mapping) puts answers of the rendezvous; say(text, **facts) tells
    what happened. `slots` is set from outside, by discovery. finished is the exit code, once known.
    """

    def __init__(
        self,
        minimum: int,
        maximum: int,
        *,
        start: Callable[[Slot, str], Process],
        serve: Callable[[dict[str, str]], None],
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
        self._not_before: dict[str, float] = {}
        self._short_since: float | None = None
        self._ended_at: float | None = None

    # -- what workers say ---------------------------------------------------------------------------

    def report(self, name: str, message: dict[str, Any]) -> dict[str, Any]:
        """Answer a worker: its place or "wait" if it asks for one, else what is wanted of it."""
        with self._lock:
            worker = self.workers.get(name)
            if worker is None or worker.leaving is not None:
                return {"leave": True}
            worker.heard = self._clock()
            if "update" in message:
                return self._note(worker, message["generation"], message["update"])
            worker.loaded = worker.loaded or self._clock()
            if worker.assignment and worker.assignment["generation"] > message["generation"]:
                return worker.assignment
            worker.waits = True
            return {"wait": True}

    def _note(self, worker: Worker, generation: int, update: int) -> dict[str, Any]:
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

    # -- what happens by itself ---------------------------------------------------------------------

    def tick(self) -> None:
        """Look at everything once, and do what is due."""
        with self._lock:
            now = self._clock()
            for worker in list(self.workers.values()):
                if worker.heard is not None and now > worker.heard + SILENCE_SECONDS:
                    worker.process.kill()  # or its host is gone, and only the remote shell is left
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
        host = worker.slot[0]
        self._failures[host] += 1
        again = self._failures[host]
        pause = 0.0 if again == 1 else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (again - 2))
        self._not_before[host] = now + pause
        if worker.assignment:
            self._losses += not self._broken
            self._broken = True
            if self._lost_at is None:
                self._lost_at = now
            if self._losses > LOSSES_ALLOWED:
                self._say(f"{self._losses} losses in a row without one update: giving up")
                self.finished, self._ended_at = code if code > 0 else 1, now

    def _clear_away(self, now: float) -> None:
        """Those who are in the world end by themselves, unless one met an error that the others did not."""
        patient = self.finished != EXIT_USER_ERROR and now < (self._ended_at or 0) + LEAVE_SECONDS
        for worker in self.workers.values():
            if not (worker.assignment and patient):
                worker.process.kill()

    def _release(self, wanted: Sequence[Slot], now: float) -> None:
        """Send home who is not wanted and not in the world."""
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
                self.workers[name] = Worker(name, slot, self._start(slot, name), now)

    def _form(self, wanted: Sequence[Slot], now: float) -> None:
        """Ask the world to come together if it should change; if nobody trains, make the next one."""
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
        # State must not be lost where all hosts are exchanged at once: the old hand it over, then go.
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
            worker.waits = False
            answers[f"rank_and_size/{host}:{place['local_rank']}"] = ",".join(
                map(str, place.values())
            )
        self._serve(answers)
        names = " ".join(f"{w.slot[0]}:{w.slot[1]}" for w in ordered)
        self._say(f"world {self._generation}: {len(ordered)} workers: {names}", world=len(ordered))


def find_slots(lines: Iterable[str]) -> list[Slot]:
    """The slots that lines `host:count` offer, a host's in a row; UserError if a line is something else."""
    counts: dict[str, int] = {}
    for line in filter(None, map(str.strip, lines)):
        host, colon, count = line.partition(":")
        if line.startswith("#"):
            continue
        if not host or (colon and not count.isdecimal()):
            raise UserError(f"host discovery: {line!r} is no HOST:SLOTS, such as node1:8.")
        counts[host] = counts.get(host, 0) + (int(count) if colon else 1)
    return [(host, number) for host, count in counts.items() for number in range(count)]


def read_wish(file: Path) -> int | None:
    """How many workers the run wishes for; None while it has not said."""
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


class _Handler(BaseHTTPRequestHandler):
    """The rendezvous store that Horovod's Gloo asks (GET, PUT, DELETE), and the workers' reports (POST)."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        value = self.server.store.get(self.path.strip("/"))
        self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        self.server.store[self.path.strip("/")] = self._body()
        self._answer(200)

    def do_DELETE(
        self,
    ) -> None:  # Horovod's word that a rank has read all; the next world clears the store
        self._answer(200)

    def do_POST(self) -> None:
        answer = self.server.driver.report(self.path.strip("/"), json.loads(self._body()))
        self._answer(200, json.dumps(answer).encode())

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, code: int, value: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    driver: Driver

    def __init__(self, address: str):
        self.store: dict[str, bytes] = {}
        super().__init__((address, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that died while it asked is told by its process."""

    def renew(self, answers: dict[str, str]) -> None:
        """Forget the last world's keys: they lead to sockets that are closed."""
        self.store = {key: value.encode() for key, value in answers.items()}


class _Started:
    """A worker's process group here, or the remote shell that runs it elsewhere; its output goes on."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], where: str):
        # A process of its own hands the output on: workers that outlive the driver can save and end.
        self._output = subprocess.Popen(
            ["sed", "--unbuffered", f"s|^|[{where}] |"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._output.stdin is not None
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output.stdin,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._output.stdin.close()

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            with suppress(subprocess.TimeoutExpired):  # a process of the worker's may hold it
                self._output.wait(1)
        return code

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface. Raises UserError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(one.fileno(), 0x8915, request)  # SIOCGIFADDR
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(
                f"--network-interface {interface}: no IPv4 address ({error}). There are: {known}."
            ) from error
    return socket.inet_ntoa(answer[20:24])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt elastic`."""
    parser.add_argument("--min-workers", type=int, default=1, help="fewer wait for more [1]")
    parser.add_argument("--max-workers", type=int, required=True, help="more are never started")
    parser.add_argument(
        "--discover",
        help="a command that prints HOST:SLOTS lines, asked every second [localhost:MAX]",
    )
    parser.add_argument(
        "--network-interface", help="where workers reach each other [lo without --discover]"
    )
    parser.add_argument(
        "--remote-shell",
        default="ssh -o BatchMode=yes -o ServerAliveInterval=10",
        help="how to run a command on another host: SHELL HOST COMMAND [%(default)s]",
    )
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds to wait for MIN workers [600]"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train RECIPE --out RUN …")


def main(args: argparse.Namespace) -> int:
    """Run `hvd_lbt train …` on workers that may come and go; the exit code is theirs."""
    words = [word for word in args.command if word != "--"]
    if words[:1] != ["train"] or "--out" not in words[:-1]:
        raise UserError(
            f"hvd_lbt elastic … {' '.join(words)}: it must end with `train RECIPE --out RUN …`; "
            "the run's folder says how many workers it wishes for."
        )
    if not 1 <= args.min_workers <= args.max_workers:
        raise UserError(
            f"--min-workers {args.min_workers} and --max-workers {args.max_workers}: it must be "
            "1 ≤ MIN ≤ MAX."
        )
    if args.discover and not args.network_interface:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(
            f"--discover needs --network-interface: the one that connects the hosts, of: {known}."
        )
    run = Path(words[words.index("--out") + 1])
    interface = args.network_interface or "lo"
    address = address_of(interface)
    server = _Server(address)
    began = time.monotonic()

    def say(text: str, **facts: Any) -> None:
        seconds = time.monotonic() - began
        print(f"elastic {seconds:7.1f} s: {text}", flush=True)
        if facts and run.is_dir():
            with (run / "elastic.jsonl").open("a") as lines:
                lines.write(
                    json.dumps({"seconds": round(seconds, 2), "time": time.time(), **facts}) + "\n"
                )

    def start(slot: Slot, name: str) -> Process:
        say(f"starting {slot[0]}:{slot[1]}")
        own = {
            "HVD_LBT_ELASTIC": f"http://{address}:{server.server_port}/{name}",
            "HOROVOD_ELASTIC": "1",
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": interface,
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_port),
            "HOROVOD_GLOO_TIMEOUT_SECONDS": os.environ.get(
                "HOROVOD_GLOO_TIMEOUT_SECONDS", GLOO_SECONDS
            ),
            "HOROVOD_HOSTNAME": slot[0],
            "NCCL_SOCKET_IFNAME": interface,
            "PYTHONUNBUFFERED": "1",
        }
        # as this very program was started; -P: its folder is not searched for modules
        program = [sys.executable, "-P", sys.argv[0], *words]
        environment = dict(os.environ) | own
        if slot[0] not in ("localhost", "127.0.0.1", socket.gethostname()):
            passed = [
                f"{key}={value}"
                for key, value in environment.items()
                if key in EXPORTED or key.startswith(EXPORTED_BEGINNINGS)
            ]
            there = (
                f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *passed, *program])}"
            )
            program = [*shlex.split(args.remote_shell), slot[0], there]
        return _Started(program, environment, f"{slot[0]}:{slot[1]}")

    driver = Driver(
        args.min_workers,
        args.max_workers,
        start=start,
        serve=server.renew,
        say=say,
        patience=args.patience,
    )
    server.driver = driver

    def discover() -> list[Slot]:
        if args.discover:
            found = subprocess.run(
                args.discover, shell=True, capture_output=True, text=True, timeout=60
            )
            if found.returncode:
                raise UserError(
                    f"--discover {args.discover}: exit code {found.returncode}: {found.stderr.strip()}"
                )
            slots = find_slots(found.stdout.splitlines())
        else:
            slots = [("localhost", number) for number in range(args.max_workers)]
        wish = read_wish(run / WISH)
        return slots if wish is None else slots[: max(args.min_workers, wish)]

    def keep_discovering() -> None:
        while True:
            time.sleep(DISCOVERY_SECONDS)
            try:
                driver.slots = discover()
            except (UserError, subprocess.TimeoutExpired) as error:
                say(f"host discovery failed, the hosts stay as they were: {error}")

    def told_to_stop(number: int, frame: Any) -> None:
        if driver.stop:
            driver.kill()
            os._exit(128 + number)
        driver.stop = True

    (run / WISH).unlink(missing_ok=True)  # an earlier run's
    driver.slots = discover()
    for number in SIGNALS:
        signal.signal(number, told_to_stop)
    for job in (server.serve_forever, keep_discovering):
        threading.Thread(target=job, daemon=True).start()
    try:
        while not driver.done():
            driver.tick()
            time.sleep(TICK_SECONDS)
    finally:
        driver.kill()
    assert driver.finished is not None
    return driver.finished
