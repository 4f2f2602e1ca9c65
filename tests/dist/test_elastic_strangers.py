"""An elastic run among strangers: another user at every port; a stop of all processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from elastic_runs import Elastic, kept
from trainings import EXACT, events, last_state

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can run another user's program")

# As the user `nobody`: to every port that listens on this machine, requests that took a worker's
# place and bytes that are none, again and again; connections are kept open, as one that Gloo waits
# for.
ATTACK = """
import http.client, json, os, socket, sys, time
import encodings.idna
flag = sys.argv[1]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
evil = b"cos\\nsystem\\n(S'touch %s'\\ntR." % flag.encode()
place = json.dumps({"generation": 0}).encode()
statuses, kept, mine = {}, [], set()
def listening():
    for line in open("/proc/net/tcp").read().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[7] == "0" and words[1].startswith("0100007F"):
            yield int(words[1][9:], 16)
def ask(port, method, path, body):
    one = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        one.request(method, path, body)
        return one.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        one.close()
ports = {int(word) for word in sys.argv[2].split(",")}
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    for port in ports & set(listening()):
        for path in ("/global/0", "/rank_and_size/localhost:0", "/local_localhost/0"):
            for method, body in (("PUT", b"0,1,0,1,0,1"), ("POST", place), ("PUT", evil)):
                status = ask(port, method, path, body)
                statuses[status] = statuses.get(status, 0) + 1
        kept = kept[-50:]
        try:
            one = socket.create_connection(("127.0.0.1", port), 1)
            one.send(evil)
            kept.append(one)
        except OSError:
            pass
    time.sleep(0.05)
print(json.dumps({"uid": os.getuid(), "statuses": statuses}))
"""


@pytest.fixture
def run(tmp_path):
    one = Elastic(tmp_path, *EXACT, slots=2, maximum=2, pause="0.3")
    yield one
    one.kill_all()
    one.output.close()


def ports_of(driver: int) -> list[int]:
    """The rendezvous and the relays: what listens for the whole run."""
    processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    return sorted(
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    )


def test_another_user_at_every_port_then_a_signal_to_every_process(run, tmp_path):
    run.until(lambda: run.committed() >= 1 and run.size() == 2, "training on two")
    ports = ports_of(run.process.pid)
    assert len(ports) >= 3  # the rendezvous, two relays
    flag = tmp_path / "flag"
    attack = subprocess.Popen(
        [sys.executable, "-I", "-c", ATTACK, str(flag), ",".join(map(str, ports)), "10"],
        stdout=subprocess.PIPE,
        text=True,
    )
    before = run.committed()
    # a new world comes together while the stranger is at its ports
    os.kill(run.members()[1], signal.SIGKILL)
    said, _ = attack.communicate(timeout=120)
    seen = json.loads(said)
    assert seen["uid"] == 65534
    assert set(seen["statuses"]) <= {"401", "0"}  # 0: closed, or no HTTP at all
    assert seen["statuses"]["401"] > 20
    run.until(lambda: run.committed() > before + 2, f"going on:\n{said}")
    assert not flag.exists()
    assert "refused" in run.said()
    threads = psutil.Process(run.process.pid).num_threads()
    assert threads < 20

    # Slurm's preemption: SIGTERM to every process of the job, and the batch script's SIGUSR1
    run.until(lambda: run.size() == 2, "two again")
    driver = psutil.Process(run.process.pid)
    everyone = driver.children(recursive=True)
    for process in (driver, *everyone):
        process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    driver.send_signal(signal.SIGUSR1)
    assert run.end() == 75, run.said()
    (end,) = events(run.out, "end")
    assert end["reason"] == "stopped"
    assert last_state(run.out)["update"] == end["update"] >= run.committed() > 0
    assert [line["update"] for line in kept(run.out)] == list(range(end["update"]))
    output = Path(run.output.name).read_text()
    assert "saved: use --resume" in output  # the output process lived until then
