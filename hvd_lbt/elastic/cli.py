"""Train on MIN to MAX workers that may come, go and fail (docs/elastic.md)."""

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvd_lbt.elastic.decisions import Driver, Process, Slot
from hvd_lbt.elastic.discovery import MOST_SLOTS, OLD_TARGET, TARGET, Discovery
from hvd_lbt.elastic.messages import key_of, new_secret
from hvd_lbt.elastic.processes import address_of, start_worker
from hvd_lbt.elastic.rendezvous import Rendezvous, Store
from hvd_lbt.errors import UserError
from hvd_lbt.run_lock import RunLock
from hvd_lbt.stop import SECONDS_OF_ONE_SIGNAL, SIGNALS

TICK_SECONDS = 0.1
DISCOVERY_SECONDS = 1.0
# A worker that has no connection to the lost one notices only by this; in Horovod all ranks talk to
# each other many times a second, whatever the training does.
GLOO_SECONDS = "20"
ADDRESS, NAME, KEY = "HVD_LBT_ELASTIC", "HVD_LBT_ELASTIC_NAME", "HVD_LBT_ELASTIC_KEY"
LINGER_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt elastic`."""
    parser.add_argument(
        "--min-workers",
        type=int,
        default=1,
        metavar="N",
        help="pause training while fewer workers than this are available [1]",
    )
    parser.add_argument(
        "--max-workers", type=int, required=True, metavar="N", help="never start more than this"
    )
    parser.add_argument(
        "--discover",
        metavar="COMMAND",
        help="a shell command that prints HOST:SLOTS lines, run every second [localhost:MAX]",
    )
    parser.add_argument(
        "--network-interface",
        metavar="NAME",
        help="the interface by which the hosts reach each other [lo without --discover]",
    )
    parser.add_argument(
        "--remote-shell",
        default="ssh -o BatchMode=yes -o ServerAliveInterval=10",
        metavar="COMMAND",
        help="how to run a program on another host: COMMAND HOST PROGRAM [%(default)s]",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600,
        metavar="SECONDS",
        help="how long to wait for --min-workers before giving up [600]",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="train RECIPE --out RUN …, as without elastic"
    )


def main(args: argparse.Namespace) -> int:
    """Run `hvd_lbt train …` on workers that may come and go; the exit code is theirs."""
    words = [word for word in args.command if word != "--"]
    train = _train_arguments(words)
    _check(args)
    interface = args.network_interface or "lo"
    address = address_of(interface)
    # workers on other hosts write until they notice that their driver is gone
    linger = LINGER_SECONDS if args.discover else 0.0
    with RunLock(
        train.out, role="elastic driver", take_over=train.take_over, linger=linger
    ) as owner:
        return _Training(args, words, owner, interface, address).drive()


def _train_arguments(words: list[str]) -> argparse.Namespace:
    """out and take_over of the command. UserError if it is not `train … --out RUN`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--take-over", action="store_true")
    with suppress(argparse.ArgumentError):
        found = parser.parse_known_args(words)[0]
        if words[:1] == ["train"] and found.out is not None:
            return found
    raise UserError(
        f"hvd_lbt elastic … {' '.join(words)}: it must end with `train RECIPE --out RUN …`; the "
        "driver and its workers meet in the run's folder."
    )


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.min_workers <= args.max_workers:
        raise UserError(
            f"--min-workers {args.min_workers} and --max-workers {args.max_workers}: it must be "
            "1 ≤ MIN ≤ MAX."
        )
    if args.discover is None and args.max_workers > MOST_SLOTS:
        raise UserError(
            f"--max-workers {args.max_workers}: without --discover all are on this machine, "
            f"which has at most {MOST_SLOTS:,} slots."
        )
    if args.discover is not None and not args.discover.strip():
        raise UserError("--discover '': it must be a command that prints HOST:SLOTS lines.")
    try:
        shell = shlex.split(args.remote_shell)
    except ValueError as error:
        raise UserError(f"--remote-shell {args.remote_shell}: {error}.") from error
    if not shell:
        raise UserError("--remote-shell '': it must be a command, such as ssh.")
    if not args.patience >= 0:
        raise UserError(f"--patience {args.patience}: it must be a number of seconds ≥ 0.")
    if args.discover and not args.network_interface:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(
            f"--discover needs --network-interface: the one that connects the hosts, of: {known}."
        )


class _Training:
    """The driver of one run, and what it is connected to."""

    def __init__(
        self,
        args: argparse.Namespace,
        words: list[str],
        owner: RunLock,
        interface: str,
        address: str,
    ):
        self._words, self._owner, self._interface = words, owner, interface
        run = self._run = owner.out
        self._remote_shell = args.remote_shell
        self._began = time.monotonic()
        self._stop_asked_at: float | None = None
        self._unwritten = False
        self._taken_over: UserError | None = None
        self._secret, store = new_secret(), Store()
        self._driver = Driver(
            args.min_workers,
            args.max_workers,
            start=self._start,
            serve=store.renew,
            say=self._say,
            patience=args.patience,
        )
        self._discovery = Discovery(
            args.discover, run, args.min_workers, args.max_workers, self._say
        )
        server = Rendezvous(
            address, self._secret, store, self._driver.report, self._driver.known, self._say
        )
        self._address = f"{address}:{server.port}"

    def drive(self) -> int:
        """Tick until the exit code is known and all workers have ended."""
        for name in (TARGET, OLD_TARGET):  # an earlier run's
            try:
                (self._run / name).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{self._run / name} cannot be removed ({error}).") from error
        for number in SIGNALS:
            signal.signal(number, self._asked_to_stop)
        threading.Thread(target=self._keep_discovering, daemon=True).start()
        try:
            while not self._driver.done():
                if self._taken_over is not None:
                    raise self._taken_over
                self._driver.tick()
                time.sleep(TICK_SECONDS)
        finally:
            self._driver.kill()
        assert self._driver.finished is not None
        return self._driver.finished

    def _keep_discovering(self) -> None:
        while True:
            self._driver.slots = self._discovery.slots()
            try:
                self._owner.check()
            except UserError as error:
                self._taken_over = error
            time.sleep(DISCOVERY_SECONDS)

    def _asked_to_stop(self, number: int, frame: Any) -> None:
        """Signals within 2 s of the first are one request to stop; a later one ends all at once."""
        now = time.monotonic()
        if self._stop_asked_at is None:
            self._stop_asked_at = now
            self._driver.stop = True
        elif now > self._stop_asked_at + SECONDS_OF_ONE_SIGNAL:
            self._driver.kill()
            os._exit(128 + number)

    def _say(self, text: str, **facts: Any) -> None:
        """Print what happens, and keep the facts in RUN/elastic.jsonl."""
        seconds = time.monotonic() - self._began
        plain = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
        with suppress(OSError):  # nobody reads it any more
            print(f"elastic {seconds:7.1f} s: {plain}", flush=True)
        if not facts:
            return
        line = {"seconds": round(seconds, 2), "time": time.time(), **facts}
        try:
            with (self._run / "elastic.jsonl").open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:  # training does not depend on it
                self._unwritten = True
                self._say(f"elastic.jsonl cannot be written, training continues: {error}")

    def _start(self, slot: Slot, name: str) -> Process:
        host, number = slot
        self._say(f"starting {host}:{number}")
        timeout = os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", GLOO_SECONDS)
        own = {
            ADDRESS: self._address,
            NAME: name,
            KEY: key_of(self._secret, name).hex(),
            "HOROVOD_ELASTIC": "1",
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": self._interface,
            "HOROVOD_GLOO_TIMEOUT_SECONDS": timeout,
            "HOROVOD_HOSTNAME": host,
            "NCCL_SOCKET_IFNAME": self._interface,
            "PYTHONUNBUFFERED": "1",
        }
        # as this very program was started; -P: its folder is not searched for modules
        program = [sys.executable, "-P", os.path.abspath(sys.argv[0]), *self._words]
        return start_worker(program, slot, own, self._remote_shell, keep=(self._owner.fileno(),))
