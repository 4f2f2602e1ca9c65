"""launch/supervise.py without ranks: what is shown of a launcher's stderr, and that nothing is left
behind.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

FILE = Path(__file__).parents[2] / "launch/supervise.py"
SPEC = importlib.util.spec_from_file_location("supervise", FILE)
supervise = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(supervise)

RULE = "-" * 74 + "\n"
ABORT = f"""\
{RULE}MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD
with errorcode 2.

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
You may or may not see output from other processes, depending on
exactly when Open MPI kills them.
{RULE}"""
NOT_ZERO = f"""\
{RULE}Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
{RULE}{RULE}mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[15426,1],0]
  Exit code:    2
{RULE}"""
SIGNAL = f"""\
{RULE}mpirun noticed that process rank 1 with PID 4711 on node n exited on signal 9 (Killed).
{RULE}"""
MORE = """\
[n:47] 1 more process has sent help message help-mpi-api.txt / mpi-abort
[n:47] Set MCA parameter "orte_base_help_aggregate" to 0 to see all help / error messages
[n:47] [[1,0],0] ORTE_ERROR_LOG: Data unpack would read past end of buffer in file ../../../orte/util/show_help.c at line 507
"""  # noqa: E501 -- as Open MPI prints it
FAILED = "hvd_lbt: rank 1 on n failed:\nTraceback\n"
SRUN = """\
srun: error: node1: tasks 0-1: Exited with exit code 2
srun: launch/slurm: _step_signal: Terminating StepId=64.0
srun: Force Terminated StepId=64.0
slurmstepd-node1: error: *** STEP 64.0 ON node1 CANCELLED AT 2026-11-25T15:11:00 ***
"""
REASON = "hvd_lbt: Recipe digtis: there is no shipped recipe of this name.\n"
TAG = "[1,0]<stderr>:"


def shown(text: str, code: int, step: int = 10**6) -> str:
    written = bytearray()
    screen = supervise.Screen(written.extend)
    data = text.encode()
    for begin in range(0, len(data), step):
        screen.feed(data[begin : begin + step])
    screen.end(code)
    return written.decode()


@pytest.mark.parametrize("step", [1, 7, 10**6])
@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        (REASON + ABORT + MORE, 2, REASON),
        (TAG + REASON + MORE + NOT_ZERO, 2, TAG + REASON),
        (REASON + SRUN, 2, REASON),
        (REASON + SRUN, 143, REASON),
        (NOT_ZERO, 75, ""),
        ("stopped\n" + ABORT, 74, "stopped\n"),
        # the last word is the reason's, also if something else came after it
        (REASON + ABORT + "a warning\n", 2, REASON + "a warning\n" + REASON),
        # of exit codes that nobody has explained the launcher's text is all there is
        (NOT_ZERO, 3, NOT_ZERO),
        (NOT_ZERO, 1, NOT_ZERO),
        (SRUN.replace("code 2", "code 3"), 3, SRUN.replace("code 2", "code 3")),
        (FAILED + ABORT, 1, FAILED),
        # a signal is always news, and so is what only begins like a block
        (SIGNAL, 137, SIGNAL),
        (NOT_ZERO + SIGNAL, 137, SIGNAL + NOT_ZERO),
        (RULE + "my own table\n" + RULE, 0, RULE + "my own table\n" + RULE),
        ("no end of line", 0, "no end of line"),
        ("10 %\r20 %\r[x] 30 %\rdone\n", 0, "10 %\r20 %\r[x] 30 %\rdone\n"),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_thing_on_the_screen(text, code, expected, step):
    assert shown(text, code, step) == expected


def test_a_progress_bar_is_shown_before_its_line_ends():
    written = bytearray()
    screen = supervise.Screen(written.extend)
    for part in (b"10 %\r", b"20 %\r", TAG.encode() + b"30 %\r"):
        screen.feed(part)
    assert written == b"10 %\r20 %\r" + TAG.encode() + b"30 %\r"


# Two children of which one leaves group and session, and one that does not heed SIGTERM.
TREE = "trap '' TERM; setsid sleep 1000 & sleep 1000 & echo started; while :; do wait; done"
RUN = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import supervise; "
RUN += "supervise.SECONDS_TO_SAVE = 0.5; sys.exit(supervise.main())"


def begin(*words: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("whom", ["supervisor", "guard", "command", "quit"])
def test_nothing_is_left_whatever_is_killed(whom):
    process = begin("bash", "-c", TREE)
    assert process.stdout.readline() == "started\n"
    supervisor = psutil.Process(process.pid)
    (guard,) = supervisor.children()
    (command,) = guard.children()
    tree = [guard, *guard.children(recursive=True)]
    assert len(tree) == 4
    if whom == "quit":
        supervisor.send_signal(signal.SIGQUIT)
    else:
        {"supervisor": supervisor, "guard": guard, "command": command}[whom].kill()
    process.communicate(timeout=60)
    assert process.returncode == {"supervisor": -9}.get(whom, 128 + 9)
    _, left = psutil.wait_procs(tree, timeout=60)
    assert not left


def test_what_the_command_leaves_behind_is_named_and_killed():
    process = begin("bash", "-c", "sleep 1000 >/dev/null 2>&1 & exit 3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors == "launch/supervise.py: killing 1 processes that did not end: sleep\n"


def test_exit_codes_and_a_command_that_is_not_there():
    for word, code in (("exit 5", 5), ("kill -TERM $$", 128 + 15), ("true", 0)):
        process = begin("bash", "-c", word)
        process.communicate(timeout=60)
        assert process.returncode == code
    process = begin("no-such-command")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        2,
        "launch/supervise.py: no-such-command does not start: No such file or directory\n",
    )


def test_nohup_holds():
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = begin("bash", "-c", "echo started; sleep 1; echo finished", preexec_fn=ignore)
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "finished\n")
