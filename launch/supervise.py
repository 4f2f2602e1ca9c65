"""`supervise.py COMMAND …` runs mpirun, horovodrun or srun, and no process of it outlives this one.

    supervisor   this process: it passes signals on to the guard and waits for it
      └ guard    in a session of its own, so that a terminal's Ctrl-C does not reach it
          └ COMMAND → ranks

SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the ranks to stop: mpirun or srun gets SIGUSR1 and hands it
on to them. (mpirun itself takes SIGTERM for the end: the ranks get it only after
odls_base_sigkill_timeout seconds, and their exit code is lost. horovodrun is a shell by then, and
hands on nothing.) Before there is an mpirun a signal ends what has begun. SIGQUIT (Ctrl-\\ in a
terminal) kills all at once.

When the supervisor dies, by SIGKILL too, the guard asks the ranks to stop and kills what still runs
SECONDS_TO_SAVE later; when the guard dies, the supervisor does. Both adopt orphans (subreaper), so
each finds all processes by descent. If both are killed, the ranks notice it (hvd_lbt/launcher.py).

What COMMAND writes to stderr passes through the guard, which leaves out the launcher's own text
about exit codes if a rank has already printed the reason.
"""

import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import psutil

# prterun: Open MPI 5
HAND_ON = {"mpirun", "mpiexec", "orterun", "prterun", "srun"}
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SECONDS_TO_SAVE = 15.0
SECONDS_TO_DIE = 5.0  # after SIGKILL: longer only if the kernel cannot end it
ME = "launch/supervise.py"
EXPLAINED = (2, 74, 75)  # exit codes of which hvd_lbt prints the reason (docs/cluster.md)

RULE = re.compile(rb"-{60,}\s*$")
BLOCK = re.compile(  # after a line of dashes, to the next one
    rb"MPI_ABORT was invoked on rank|Primary job +terminated normally, but|"
    rb"\S+ detected that one or more processes exited with non-zero status"
)
LINE = re.compile(
    rb"\[\S+:\d+\] (\d+ more process(es)? ha(s|ve) sent help message|"
    rb"Set MCA parameter \"orte_base_help_aggregate\"|.*ORTE_ERROR_LOG: .*show_help\.c)|"
    rb"srun: error: \S+: tasks? \S+: (Exited with exit code \d+|Terminated)|"
    rb"srun: .*Terminat(ing|ed) StepId=|slurmstepd\S*: error: \*\*\* STEP \S+ ON \S+ CANCELLED AT|"
    rb"srun: Job step aborted: Waiting up to"
)
EXITED = re.compile(rb"srun: error: .* Exited with exit code (\d+)")
HOLDABLE = re.compile(
    rb"-+$|\[[^\],:]*(:\d*(\](?!<).*)?)?$|s($|r|l)"
)  # the start of a line that may match
REASON = re.compile(rb"(?:\[\d+,\d+\]<stderr>:)?(hvd_lbt(?: [a-z ]+)?: .*)")


class Screen:
    """Copies the launcher's stderr; holds back its text about exit codes until the end.

    write: takes the bytes that are shown.
    """

    def __init__(self, write: Callable[[bytes], object]):
        self._write = write
        self._rest = b""  # of a line
        self._shown = 0  # so many bytes of it
        self._rule = b""  # a line of dashes whose block is not known yet
        self._in_block = False
        self._held = b""
        self._reason = b""
        self._after = False  # whether other lines have come after the reason
        self._first = 0  # the exit code that srun was told first

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")
        if self._rest and not (self._rule or self._in_block or self._may_be_held(self._rest)):
            self._write(self._rest[self._shown :])  # such as a progress bar
            self._shown = len(self._rest)

    @staticmethod
    def _may_be_held(start: bytes) -> bool:
        return bool(HOLDABLE.match(start))

    def _line(self, line: bytes) -> None:
        if self._shown:
            self._show(line)
        elif self._in_block:
            self._held += line
            self._in_block = not RULE.match(line)
        elif self._rule and BLOCK.match(line):
            self._held += self._rule + line
            self._rule, self._in_block = b"", True
        elif RULE.match(line):
            self._show(self._rule)
            self._rule = line
        elif LINE.match(line):
            self._held += line
            if (found := EXITED.match(line)) and not self._first:
                self._first = int(found[1])
        else:
            self._show(self._rule + line)
            self._rule = b""

    def _show(self, line: bytes) -> None:
        self._write(line[self._shown :])
        self._shown = 0
        if found := REASON.match(line):
            self._reason, self._after = found[1], False
        elif line.strip():
            self._after = True

    def end(self, code: int) -> int:
        """Show what was held back, unless it is known why the ranks ended with this code.

        Gives the code to end with: srun's is the largest of all ranks', and so that of those which
        it has ended because one had failed.
        """
        if self._rest:
            self._line(self._rest)
        self._show(self._rule)
        if code in (128 + signal.SIGTERM, 128 + signal.SIGKILL) and self._first:
            code = self._first
        if not (code in EXPLAINED or (code == 1 and self._reason)):
            self._write(self._held)
        elif code == 2 and self._reason and self._after:
            self._write(self._reason + b"\n")
        return code


def adopt_orphans() -> None:
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started() -> list[psutil.Process]:
    """All that this process has started, by descent."""
    return psutil.Process().children(recursive=True)


def name_of(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def hand_on(number: int) -> None:
    """Ask the ranks to stop; SIGQUIT kills them."""
    begun = started()
    launchers = [process for process in begun if name_of(process) in HAND_ON]
    for process in begun:
        with suppress(psutil.NoSuchProcess):
            if number == signal.SIGQUIT:
                process.kill()
            elif process in launchers:
                process.send_signal(signal.SIGUSR1)
            elif not launchers:
                process.terminate()


def end_the_rest(deadline: float) -> None:
    """Wait until nothing runs that this process has started; kill what does at the deadline."""
    said = False
    while (begun := started()) and time.monotonic() < deadline + SECONDS_TO_DIE:
        if time.monotonic() > deadline:
            if not said:
                names = ", ".join(sorted({name_of(process) for process in begun} - {""}))
                written(
                    f"{ME}: killing {len(begun)} processes that did not end: {names}\n".encode()
                )
                said = True
            hand_on(signal.SIGQUIT)
        time.sleep(0.02)
        reap()


def reap(wanted: int = -1) -> int | None:
    """Collect the processes that have ended; the exit code of the one that is wanted."""
    code = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == wanted:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def wake_by(numbers: tuple[int, ...], pipe: int) -> None:
    """Let each of these signals do no more than write its number into the pipe."""
    os.set_blocking(pipe, False)
    signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, frame: None)


def guard(command: list[str], supervisor: int) -> int:
    """Run the command; the exit code is its own, 128 + n if signal n ended it.

    supervisor: a pipe with the signals that the supervisor got; it closes when that one dies.
    """
    os.setsid()
    adopt_orphans()
    signals, wake = os.pipe()
    wake_by((*STOP, signal.SIGQUIT, signal.SIGCHLD), wake)
    try:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        written(f"{ME}: {command[0]} does not start: {error.strerror}\n".encode())
        return 2
    assert launcher.stderr is not None
    screen = Screen(written)
    selector = selectors.DefaultSelector()
    for source in (signals, supervisor, launcher.stderr.fileno()):
        selector.register(source, selectors.EVENT_READ)
    code, deadline = None, float("inf")
    while code is None:
        for key, _ in selector.select(None if deadline == float("inf") else 0.5):
            data = os.read(key.fd, 65536)
            if key.fd == launcher.stderr.fileno():
                screen.feed(data)
            else:
                for number in set(data) - {signal.SIGCHLD}:
                    hand_on(number)
            if not data:
                selector.unregister(key.fd)
                if key.fd == supervisor:
                    hand_on(signal.SIGTERM)
                    deadline = time.monotonic() + SECONDS_TO_SAVE
        code = reap(launcher.pid)
        if code is None and time.monotonic() > deadline:
            hand_on(signal.SIGQUIT)
    end_the_rest(min(deadline, time.monotonic() + SECONDS_TO_SAVE))
    while key := selector.get_map().get(launcher.stderr.fileno()):  # the rest of what was written
        if data := os.read(key.fd, 65536):
            screen.feed(data)
        else:
            selector.unregister(key.fd)
    return screen.end(code if code >= 0 else 128 - code)


def written(data: bytes) -> None:
    """Write to stderr, as long as someone reads it."""
    with suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def main() -> int:
    """Fork the guard and wait for it."""
    adopt_orphans()
    read, write = os.pipe()
    wake_by((*STOP, signal.SIGQUIT), write)
    child = os.fork()
    if child == 0:
        os.close(write)
        code = 1
        try:
            code = guard(sys.argv[1:], read)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        hand_on(signal.SIGTERM)
        end_the_rest(time.monotonic() + SECONDS_TO_SAVE)
        code = 128 - code
    return code


if __name__ == "__main__":
    sys.exit(main())
