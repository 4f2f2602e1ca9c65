"""Which hosts offer slots, by the user's command, and how many workers a stage wants.

Every answer that cannot be used (an exit code, a hang, bytes that are no text, a line that is no
HOST:SLOTS) is one bad answer: it is reported once, the last good one counts, and the command runs
again a second later.
"""

import ipaddress
import os
import re
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from hvd_lbt.elastic.decisions import Slot
from hvd_lbt.errors import UserError

TARGET = "target_workers"  # the file in RUN that says how many workers the stage is worth
OLD_TARGET = "wished_workers"  # its name until 0.1; written too until 0.3
ANSWER_SECONDS = 30.0
ANSWER_BYTES = 1 << 20
MOST_SLOTS = 4096  # of one host
MOST_WORKERS = 1_000_000
# RFC 1123, and the underscore that some clusters use inside a label.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)
_LINE = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:\[\]]*))(?P<count>:[0-9]{1,9})?", re.ASCII)


def check_host(name: str) -> str:
    """`name` if it can be a host's name or address. UserError otherwise."""
    with suppress(ValueError):
        if "%" not in name:  # an IPv6 zone may hold any character
            return str(ipaddress.ip_address(name))
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise UserError(
            f"{name[:80]!r} is no host: a name has letters, digits, '-', '_' and '.', and begins "
            "and ends with a letter or digit; or it is an IPv4 address, or an IPv6 address in "
            "brackets."
        )
    return name


def find_slots(lines: Iterable[str]) -> list[Slot]:
    """The slots that lines `HOST:SLOTS` offer, a host's in a row; UserError for any other line."""
    counts: dict[str, int] = {}
    total = 0
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{line[:80]!r} is no HOST:SLOTS, such as node1:8 or [fe80::1]:8.")
        host = check_host(match["name"] if match["v6"] is None else match["v6"])
        if (":" in host) != (match["v6"] is not None):
            raise UserError(f"{line[:80]!r}: brackets are for IPv6 addresses, such as [fe80::1]:8.")
        count = int(match["count"][1:]) if match["count"] else 1
        counts[host] = counts.get(host, 0) + count
        total += count
        if counts[host] > MOST_SLOTS or total > MOST_WORKERS:
            raise UserError(
                f"{line[:80]!r}: a host has at most {MOST_SLOTS:,} slots, "
                f"all together {MOST_WORKERS:,}."
            )
    return [(host, number) for host, count in counts.items() for number in range(count)]


def run_command(command: str, seconds: float = ANSWER_SECONDS) -> str:
    """What the user's shell command prints. UserError if that is no answer."""
    process = subprocess.Popen(
        command,
        shell=True,  # it is a command line that the user wrote; nothing is put into it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        said, complaint = _read_both(process, process.stdout, process.stderr, seconds)
        code = process.wait()
    finally:
        with suppress(ProcessLookupError):  # what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
    if code:
        reason = complaint[-400:].decode(errors="replace").strip()
        raise UserError(f"exit code {code}" + (f": {reason!r}" if reason else ""))
    try:
        return said.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"its output is not UTF-8 ({error})") from error


def _read_both(
    process: subprocess.Popen[bytes], out: IO[bytes], err: IO[bytes], seconds: float
) -> tuple[bytes, bytes]:
    """Output and error output, until the command has ended. UserError beyond a limit."""
    deadline, got = time.monotonic() + seconds, {out: bytearray(), err: bytearray()}
    with selectors.DefaultSelector() as selector:
        for pipe in got:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            if time.monotonic() > deadline:
                raise UserError(f"no answer in {seconds:g} s")
            ready = selector.select(0.1)
            for key, _ in ready:
                pipe = out if key.fileobj is out else err
                data = os.read(pipe.fileno(), 1 << 16)
                if not data:
                    selector.unregister(pipe)
                got[pipe] += data
                if len(got[pipe]) > ANSWER_BYTES:
                    raise UserError(f"more than {ANSWER_BYTES:,} bytes of output")
            # A process that it left in the background may hold the pipes open.
            if not ready and process.poll() is not None:
                break
    while process.poll() is None:  # it has closed its output and runs on
        if time.monotonic() > deadline:
            raise UserError(f"no end in {seconds:g} s")
        time.sleep(0.01)
    return bytes(got[out]), bytes(got[err])


def read_target(file: Path) -> int | None:
    """How many workers the run asks for; None before it does. UserError if it cannot be read."""
    try:
        # a pipe or a device under this name must not hold the driver up
        number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise UserError(f"{file} is no regular file")
            text = os.read(number, 64).decode("ascii", errors="replace").strip()
        finally:
            os.close(number)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if not (text.isascii() and text.isdigit() and int(text) <= MOST_WORKERS):
        raise UserError(f"{file} holds {text!r}, which is no number of workers")
    return int(text)


class Discovery:
    """The slots that the driver may use now: the last good answer, cut to what the stage wants.

    command: None offers `maximum` slots of this machine.
    """

    def __init__(
        self,
        command: str | None,
        run: Path,
        minimum: int,
        maximum: int,
        say: Callable[[str], None],
    ):
        self._command, self._run, self._say = command, run, say
        self._minimum, self._maximum = minimum, maximum
        self._offered: list[Slot] = []
        self._target: int | None = None
        self._complaints: dict[str, str] = {}  # by what is asked: the last one

    def slots(self) -> list[Slot]:
        """Ask once more. Never raises for what hosts, files and the command answer."""
        self._ask("host discovery", self._ask_hosts)
        self._ask("number of workers", self._ask_target)
        if self._target is None:
            return self._offered
        return self._offered[: max(self._minimum, self._target)]

    def _ask(self, what: str, ask: Callable[[], None]) -> None:
        try:
            ask()
        except (UserError, OSError, ValueError) as error:
            if self._complaints.get(what) != str(error):
                self._say(f"{what}: bad answer, the last good one counts: {error}")
            self._complaints[what] = str(error)
            return
        if self._complaints.pop(what, None) is not None:
            self._say(f"{what}: answers again")

    def _ask_hosts(self) -> None:
        if self._command is None:
            self._offered = [("localhost", number) for number in range(self._maximum)]
            return
        said = run_command(self._command)
        if not said.strip():
            raise UserError("no HOST:SLOTS line")
        self._offered = find_slots(said.splitlines())

    def _ask_target(self) -> None:
        self._target = read_target(self._run / TARGET)
