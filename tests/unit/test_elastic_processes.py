"""What an elastic driver takes from outside: hosts, files, signals; and how it starts workers."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_lbt.elastic import cli, discovery, processes
from hvd_lbt.elastic.discovery import Discovery, check_host, find_slots, read_target, run_command
from hvd_lbt.errors import UserError
from hvd_lbt.run_lock import RunLock

ROOT = Path(__file__).parents[2]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(started: processes.Started) -> None:
    started.kill()
    until(lambda: started.poll() is not None)
    started._output.wait(60)


# -- hosts ---------------------------------------------------------------------------------------


def test_discovery_lines():
    found = find_slots(
        ["# comment", "a:2", "", " b ", "a:1", "[fe80::1]:1", "10.0.0.1:1", "n_1.x-y:1"]
    )
    assert found[:4] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert [host for host, _ in found[4:]] == ["fe80::1", "10.0.0.1", "n_1.x-y"]


@pytest.mark.parametrize(
    "line",
    [
        *("a:x", "a:-1", "a: 1", "a:", ":3", "a:1:2", "a:١", "a:1e3", "a b:1", "a:0x2"),
        *("localhost:90000000", "a:4097", "-oProxyCommand=touch FLAG:1", "-l:1", "a-:1"),
        *("x|;1e touch FLAG #:1", "$(touch FLAG):1", "`touch FLAG`:1", "a;b:1", "a'b:1", 'a"b:1'),
        *("a\\b:1", "a/b:1", "a&b:1", "a\x00b:1", "a\x1b[2J:1", "é:1", "a..b:1", ".a:1", "_a:1"),
        *("user@host:1", f"{'a' * 64}:1", f"{'a.' * 127}bb:1", "[::1:1", "[fe80::1%e;x]:1"),
        *("[a]:1", "::1", "*:1", "a\u2028b:1", "a\tb:1"),
    ],
)
def test_what_is_no_host_is_no_slot(line):
    with pytest.raises(UserError):
        find_slots(["good:1", line])


def test_slots_of_many_lines_are_bounded():
    with pytest.raises(UserError, match="1,000,000"):
        find_slots(f"h{number}:4096" for number in range(100_000))


@pytest.mark.parametrize("name", ["node1", "Node-1.cluster.local", "n_1", "127.0.0.1", "::1", "a."])
def test_hosts(name):
    assert check_host(name) == name


# -- what --discover answers ---------------------------------------------------------------------

BAD = {
    "an exit code": "echo good:1; echo why >&2; exit 3",
    "no program": "/no/such/program",
    "killed": "kill -9 $$",
    "not UTF-8": r"printf 'n\377de:1\n'",
    "too many slots": "echo localhost:90000000",
    "no host": "echo 'x|;1e touch FLAG #:1'",
    "empty": "true",
    "blank": "echo; echo ' '",
    "huge": "head -c 3000000 /dev/zero | tr '\\0' 'a'",
    "endless": "yes localhost:1",
    "endless complaints": "yes >&2",
    "NUL": r"printf 'a\0b:1\n'",
    "a hang": "sleep 1000",
    "a hang behind closed output": "exec >&- 2>&-; sleep 1000",
    "a syntax error": "if",
}


@pytest.mark.parametrize("command", BAD.values(), ids=BAD.keys())
def test_a_bad_answer_is_said_once_and_the_last_good_one_counts(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run_command, "__defaults__", (2.0,))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    found = Discovery("echo a:2; echo b:1", tmp_path, 1, 9, said.append)
    good = [("a", 0), ("a", 1), ("b", 0)]
    assert found.slots() == good
    found._command = command
    assert [found.slots(), found.slots()] == [good, good]
    assert len(said) == 1
    assert said[0].startswith("host discovery: bad answer")
    assert len(said[0]) < 700
    found._command = "echo c:1"
    assert found.slots() == [("c", 0)]
    assert said[1:] == ["host discovery: answers again"]
    assert not Path("FLAG").exists()


def test_a_bad_first_answer_is_asked_again(tmp_path):
    said: list[str] = []
    found = Discovery("exit 1", tmp_path, 1, 9, said.append)
    assert found.slots() == []
    found._command = "echo a:1"
    assert found.slots() == [("a", 0)]


def test_a_command_that_leaves_a_process_behind_is_answered_and_cleaned_up(tmp_path):
    assert run_command(f"(sleep 1000 & echo $! >{tmp_path}/pid); echo a:1") == "a:1\n"
    left = int((tmp_path / "pid").read_text())
    until(lambda: not Path(f"/proc/{left}/fd/1").exists())


def test_no_hosts_can_be_said_by_a_comment(tmp_path):
    found = Discovery("echo a:1", tmp_path, 1, 9, lambda text: None)
    assert found.slots() == [("a", 0)]
    found._command = "echo '# none now'"
    assert found.slots() == []


def make_unreadable(file: Path, how: str) -> None:
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "circle":
        file.symlink_to(file.name)
    else:
        file.write_bytes(how.encode("latin-1"))


@pytest.mark.parametrize(
    "how",
    ["folder", "pipe", "device", "circle", "", "-1", "2.5", "\xff\xfe", "9" * 5000, "1 2", "x\n"],
)
def test_a_target_that_cannot_be_read_leaves_the_last_one(how, tmp_path):
    said: list[str] = []
    found = Discovery(None, tmp_path, 1, 9, said.append)
    assert len(found.slots()) == 9
    target = tmp_path / discovery.TARGET
    target.write_text("3\n")
    assert len(found.slots()) == 3
    make_unreadable(target, how)
    assert [len(found.slots()), len(found.slots())] == [3, 3]
    assert len(said) == 1
    if target.is_dir():
        target.rmdir()
    else:
        target.unlink()
    target.write_text("5\n")
    assert len(found.slots()) == 5
    assert read_target(target) == 5


# -- starting workers ----------------------------------------------------------------------------


@pytest.fixture
def printed(capfd):
    """Wait for, and give, what processes have printed here."""
    text = ""

    def now(condition) -> str:
        nonlocal text

        def happened() -> bool:
            nonlocal text
            text += capfd.readouterr().out
            return condition(text)

        until(happened)
        return text

    return now


SHELL = """#!/usr/bin/env bash
# a remote shell as ssh: the program is a word that a shell on the other host reads
printf '%s\\n' "$@" >>"$SHELL_LOG"
host=$1; shift
exec env -i PATH="$PATH" bash -c "$*"
"""


@pytest.fixture
def remote_shell(tmp_path, monkeypatch):
    file = tmp_path / "remote shell"
    file.write_text(SHELL)
    file.chmod(0o755)
    monkeypatch.setenv("SHELL_LOG", str(tmp_path / "shell.log"))
    return shlex.quote(str(file))


def test_a_key_never_stands_on_a_command_line(remote_shell, printed, tmp_path, monkeypatch):
    monkeypatch.setenv("HVD_LBT_ODD", "a 'b' $(touch FLAG) \n;|")
    monkeypatch.setenv("UNRELATED", "secret")
    monkeypatch.chdir(tmp_path)
    program = [
        sys.executable,
        "-c",
        (
            "import os, sys, json; print(json.dumps([os.environ.get(n) for n in sys.argv[1:]]));"
            "print(os.getcwd(), sys.stdin.read() == '', flush=True); import time; time.sleep(1000)"
        ),
        *("HVD_LBT_ELASTIC_KEY", "HVD_LBT_ODD", "UNRELATED"),
    ]
    started = processes.start_worker(
        program, ("node1", 3), {cli.KEY: "00112233445566778899"}, remote_shell
    )
    try:
        text = printed(lambda text: text.count("\n") >= 2)
        lines = text.splitlines()
        assert all(line.startswith("[node1:3] ") for line in lines)
        got = json.loads(lines[0].removeprefix("[node1:3] "))
        assert got == ["00112233445566778899", "a 'b' $(touch FLAG) \n;|", None]
        assert lines[1] == f"[node1:3] {tmp_path} True"
        everything = b"".join(
            file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()
        )
        assert b"00112233445566778899" not in everything
        assert "00112233445566778899" not in (tmp_path / "shell.log").read_text()
        assert not Path("FLAG").exists()
    finally:
        end(started)


def test_output_is_prefixed_whatever_the_prefix_and_the_lines_hold(printed):
    odd = "x|;1e touch FLAG #"
    output = processes.start_output(odd)
    output.stdin.write(b"one\n\ntwo|;\xff\n" + b"y" * 100_000 + b"\nlast")
    output.stdin.close()
    output.wait(60)
    lines = printed(lambda text: text.endswith("last\n")).split("\n")
    assert lines[:2] == [f"[{odd}] one", f"[{odd}] "]
    assert all(line.startswith(f"[{odd}] ") for line in lines[:-1])
    assert sum(line.count("y") for line in lines) == 100_000


def test_the_output_outlives_signals_and_a_reader_that_has_gone():
    read, write = os.pipe()
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from hvd_lbt.elastic.processes import start_output
output = start_output("here")
print(output.pid, flush=True)
output.stdin.write(b"before\\n"); output.stdin.flush()
input()
output.stdin.write(b"after\\n" * 100_000); output.stdin.flush()
print("written", flush=True)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=write, text=True
    )
    os.close(write)
    with os.fdopen(read) as lines:
        pid = int(lines.readline())
        assert lines.readline() == "[here] before\n"
        # at once, as Slurm does: the process has just been started
        for number in (*cli.SIGNALS, signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM):
            os.kill(pid, number)
        driver.stdin.write("\n")
        driver.stdin.flush()
        got = [lines.readline() for _ in range(10)]
        assert got == ["[here] after\n"] * 10
    # nobody reads any more: the writer is not ended by a broken pipe
    driver.stdin.close()
    assert driver.wait(60) in (0, 1, 120)  # its own print may fail, its write to the output did not
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_worker_here_gets_signals_though_its_output_does_not(printed):
    program = [
        sys.executable,
        "-c",
        (
            "import signal, time\n"
            "signal.signal(signal.SIGUSR1, lambda *a: print('asked', flush=True))\n"
            "print('ready', flush=True)\n"
            "while True: time.sleep(0.05)"
        ),
    ]
    started = processes.start_worker(program, ("localhost", 0), {}, "false")
    try:
        printed(lambda text: "ready" in text)
        os.killpg(started._process.pid, signal.SIGUSR1)
        os.killpg(started._output.pid, signal.SIGUSR1)
        printed(lambda text: "asked" in text)
    finally:
        end(started)


def test_a_remote_worker_outlives_its_shell(remote_shell, printed, tmp_path):
    """A job that is taken down signals ssh too; behind it the worker saves and prints."""
    program = [
        sys.executable,
        "-c",
        (
            f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
            "print('ready', flush=True)\n"
            f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.02)\n"
            "for _ in range(20000): print('saving', flush=True)\n"
            f"open({str(tmp_path / 'saved')!r}, 'w').close()"
        ),
    ]
    started = processes.start_worker(program, ("node1", 0), {}, remote_shell)
    printed(lambda text: "ready" in text)
    worker = int((tmp_path / "pid").read_text())
    os.kill(started._output.pid, signal.SIGKILL)  # even this, as if the connection had gone
    (tmp_path / "go").touch()
    until(lambda: (tmp_path / "saved").exists())
    end(started)
    assert worker


def test_the_lease_of_a_node_is_read_as_data(tmp_path):
    """launch/slurm/on_node finds the job of a node without making a program of either."""
    hosts = tmp_path / "hosts $(touch FLAG)"
    hosts.mkdir()
    (hosts / "0").write_text("node1:4 17\n")
    (hosts / "1").write_text("node1x:4 99\nnode2:1 18\n")
    (hosts / "2").write_text("odd:1 18; touch FLAG\n")
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\ncat\n')
    srun.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": str(hosts)}

    def on_node(name: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [ROOT / "launch/slurm/on_node", name, "exec true"],
            env=environment,
            cwd=tmp_path,
            input="given",
            capture_output=True,
            text=True,
            timeout=60,
        )

    for name, job in (("node1", "17"), ("node2", "18")):
        ended = on_node(name)
        assert ended.returncode == 0, ended.stderr
        assert f"--jobid={job}\n" in ended.stdout
        assert ended.stdout.endswith("exec true\ngiven")
    for name in (".*", "node3", "x/;1e touch FLAG;/", "odd", "node", "-N"):
        ended = on_node(name)
        assert ended.returncode != 0
        assert name in ended.stderr
    assert not (tmp_path / "FLAG").exists()


# -- the command ---------------------------------------------------------------------------------


def elastic(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hvd_lbt", "elastic", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_help_is_a_list_of_options_and_needs_no_torch():
    ended = elastic("--help")
    assert ended.returncode == 0
    for option in ("--min-workers N", "--discover COMMAND", "--remote-shell COMMAND"):
        assert option in ended.stdout
    loaded = "import sys, hvd_lbt.elastic.cli; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--max-workers", "1", "train", "digits"], "--out"),
        (["--max-workers", "1", "train", "digits", "--out"], "--out"),
        (["--max-workers", "1"], "--out"),
        (["--max-workers", "0", "train", "digits", "--out", "RUN"], "--max-workers 0"),
        (["--max-workers", "1", "--discover", "x", "train", "digits", "--out=RUN"], "--network-i"),
        (
            ["--max-workers", "1", "--network-interface", "no0", "train", "digits", "--out=RUN"],
            "no0: no IPv4",
        ),
        (["--max-workers", "9999999", "train", "digits", "--out=RUN"], "at most 4,096"),
        (["--max-workers", "1", "--discover", " ", "train", "digits", "--out=RUN"], "--discover"),
        (["--max-workers", "1", "--remote-shell", "", "train", "d", "--out=RUN"], "--remote-shell"),
        (
            ["--max-workers", "1", "--remote-shell", "'", "train", "d", "--out=RUN"],
            "--remote-shell",
        ),
        (["--max-workers", "1", "--patience", "nan", "train", "d", "--out=RUN"], "--patience"),
        (["--max-workers", "1", "train", "digits", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_a_users_error_is_one_paragraph(words, reason, tmp_path):
    ended = elastic(*(word.replace("RUN", str(tmp_path / "run")) for word in words))
    assert ended.returncode == 2, ended.stderr
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_driver_on_a_run_is_refused(tmp_path):
    with RunLock(tmp_path / "run"):
        ended = elastic("--max-workers", "1", "train", "digits", "--out", str(tmp_path / "run"))
    assert ended.returncode == 2
    assert f"pid {os.getpid()} on " in ended.stderr
    assert "starting" not in ended.stdout


def test_signals_within_two_seconds_are_one_request():
    """Slurm signals every process, and the batch script's trap the driver, within milliseconds."""
    program = """
import os, signal, sys, time
from types import SimpleNamespace
from hvd_lbt.elastic import cli
one = object.__new__(cli._Training)
one._stop_asked_at = None
one._driver = SimpleNamespace(stop=False, kill=lambda: print("killed", flush=True))
now = [0.0]
cli.time = SimpleNamespace(monotonic=lambda: now[0])
for number in cli.SIGNALS:
    signal.signal(number, one._asked_to_stop)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.raise_signal(number)
    now[0] += 0.5
print(one._driver.stop, flush=True)
now[0] = 2.5
signal.raise_signal(signal.SIGTERM)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert ended.stdout.split() == ["True", "killed"], ended.stderr
    assert ended.returncode == 128 + signal.SIGTERM
