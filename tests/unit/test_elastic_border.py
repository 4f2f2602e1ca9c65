"""Who may speak to an elastic driver: this run's workers only, whoever else connects.

The strangers are real connections over loopback; one of them is another user, where root runs the
tests.
"""

import base64
import contextlib
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing

import psutil
import pytest

from hvd_lbt.elastic import rendezvous
from hvd_lbt.elastic.messages import (
    ANSWER,
    REQUEST,
    WINDOW,
    NotAuthenticError,
    Signer,
    Verifier,
    key_of,
    new_secret,
    sign,
)
from hvd_lbt.elastic.rendezvous import BODY_LIMIT, CONNECTIONS, Link, Relay, Rendezvous, Store

WORKER = "localhost.0.f00d"


class Border:
    """A driver's server with one known worker, and what was reported to it."""

    def __init__(self):
        self.secret, self.store = new_secret(), Store()
        self.reports: list[tuple[str, dict]] = []
        self.said: list[str] = []
        self.server = Rendezvous(
            "127.0.0.1",
            self.secret,
            self.store,
            report=self.report,
            workers=lambda: {WORKER},
            say=self.said.append,
        )
        self.close = self.server.close

    def report(self, worker: str, message: dict) -> dict:
        self.reports.append((worker, message))
        if "connections" in message:
            raise ValueError("too many values to unpack")  # as the driver does for nonsense
        return {"rank": 0, "generation": message["generation"]}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def link(self, worker: str = WORKER, secret: bytes | None = None) -> Link:
        return Link(self.address, worker, key_of(secret or self.secret, worker))

    def http(self, method: str, path: str = "/", body: bytes = b"", **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        with closing(connection):
            connection.request(method, path, body, headers)
            return connection.getresponse().status

    def raw(self, sent: bytes) -> bytes:
        """Send these bytes; all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.server.port), 30) as one:
            got = b""
            try:
                one.sendall(sent)
                while data := one.recv(4096):
                    got += data
            except ConnectionError:
                pass
            return got


@pytest.fixture
def border():
    one = Border()
    yield one
    one.close()


def test_a_worker_is_answered(border):
    border.store.renew(3, {"rank_and_size/localhost:0": "0,1,0,1,0,1"}, 1)
    link = border.link()
    assert link.ask({"generation": 0}) == {"rank": 0, "generation": 0}
    assert border.reports == [(WORKER, {"generation": 0})]
    value = base64.b64encode(bytes(range(256))).decode()
    assert link.ask({"generation": 3, "put": "global/0", "value": value}) == {"stored": True}
    assert link.ask({"generation": 3, "get": "global/0"}) == {"value": value}
    assert link.ask({"generation": 3, "get": "global/1"}) == {"value": None}


@pytest.mark.parametrize("path", ["global/0", "rank_and_size/localhost:0", f"/{WORKER}", "", "//"])
def test_plain_requests_change_nothing(border, path):
    border.store.renew(1, {"rank_and_size/localhost:0": "0,1,0,1,0,1"}, 1)
    body = json.dumps({"generation": 0}).encode()
    for method in ("PUT", "POST", "GET", "DELETE", "PATCH", "HEAD"):
        assert border.http(method, f"/{path.lstrip('/')}", body) == 401, method
    assert border.reports == []
    assert border.store.get(1, "rank_and_size/localhost:0") == b"0,1,0,1,0,1"
    assert border.store.get(1, "global/0") is None
    assert len(border.said) == 1  # a minute holds one line, however many come
    assert "refused" in border.said[0]


def test_another_runs_secret_another_workers_key_and_no_key_are_refused(border):
    strangers = [
        border.link(secret=new_secret()),
        Link(border.address, WORKER, key_of(border.secret, "localhost.1.beef")),
        Link(border.address, WORKER, b""),
        Link(border.address, WORKER, border.secret),
    ]
    for stranger in strangers:
        with pytest.raises(OSError, match="401"):
            stranger.ask({"generation": 0})
    assert border.reports == []
    # who had a place once is asked to leave, and is not heard
    assert border.link("localhost.0.01d").ask({"generation": 9, "update": 10**9}) == {"leave": True}
    assert border.reports == []


def test_a_request_counts_once_and_a_changed_one_never(border):
    signer = Signer(WORKER, key_of(border.secret, WORKER))
    body, signature = signer.request({"generation": 0})
    signed = {"Authorization": f"HMAC-SHA256 {signature.hex()}"}
    for changed in (body.replace(b"0}", b"1}"), body + b" ", b"", body[:-1]):
        assert border.http("POST", "/", changed, **signed) == 401
    assert border.http("POST", "/", body, **signed) == 200
    for _ in range(3):
        assert border.http("POST", "/", body, **signed) == 401
    assert len(border.reports) == 1


def test_requests_may_overtake_each_other_and_old_ones_are_refused():
    secret = new_secret()
    verifier = Verifier(secret)
    for number in (5, 2, 4, 1, 3, 2 * WINDOW):
        verifier.refuse_replay(WORKER, number)
    for number in (5, 1, 2 * WINDOW, WINDOW, 0, -1, -(10**30)):
        with pytest.raises(NotAuthenticError):
            verifier.refuse_replay(WORKER, number)
    for number in range(2 * WINDOW + 1, 40 * WINDOW):
        verifier.refuse_replay(WORKER, number)
    (_, near) = verifier._seen[WORKER]
    assert len(near) <= 2 * WINDOW  # memory does not grow with the run
    verifier.forget_all_but(set())
    assert verifier._seen == {}


def test_an_answer_is_bound_to_its_request_and_its_direction():
    key = key_of(new_secret(), WORKER)
    signer = Signer(WORKER, key)
    first, second = signer.request({"generation": 0}), signer.request({"generation": 0})
    body = b'{"leave": true}'
    good = sign(key, ANSWER + first[1], body)
    assert signer.answer(body, good, first[1]) == {"leave": True}
    wrong = [
        (body, good, second[1]),  # an answer to another request
        (b'{"wait": true}', good, first[1]),
        (body, sign(key, REQUEST + first[1], body), first[1]),
        (first[0], first[1], first[1]),  # the request sent back
        (body, b"", first[1]),
    ]
    for answer in wrong:
        with pytest.raises(NotAuthenticError):
            signer.answer(*answer)


def test_a_false_driver_is_not_believed():
    """Who takes the port of a driver that has ended cannot give orders to its workers."""
    with socket.create_server(("127.0.0.1", 0)) as false_driver:

        def answer() -> None:
            connection, _ = false_driver.accept()
            with connection:
                connection.recv(65536)
                body = b'{"rank": 0}'
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body)
                    + b"Authorization: HMAC-SHA256 %s\r\n\r\n" % (b"00" * 32)
                    + body
                )

        threading.Thread(target=answer, daemon=True).start()
        link = Link(f"127.0.0.1:{false_driver.getsockname()[1]}", WORKER, new_secret())
        with pytest.raises(OSError, match="signature"):
            link.ask({"generation": 0})


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST / HTTP/1.1\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nContent-Length: ١\r\n\r\n".encode(), 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: %s\r\n\r\n" % (b"9" * 5000), 413),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 100_000), 431),
        (b"POST / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000, 431),
        (b"POST / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nAuthorization: HMAC-SHA256 zz\r\nContent-Length: 0\r\n\r\n", 401),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\n[[[[", 401),
        (b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000, 401),
        (b'POST / HTTP/1.1\r\nContent-Length: 14\r\n\r\n{"worker": {}}', 401),
    ],
)
def test_what_is_no_request_has_its_status(border, sent, status):
    got = border.raw(sent)
    # beyond a limit the server closes at once, and the rest that comes may cancel its answer
    assert got.startswith(f"HTTP/1.1 {status} ".encode()) or (not got and len(sent) > 8192)
    assert border.link().ask({"generation": 0})["rank"] == 0


def test_signed_nonsense_of_a_worker_is_a_bad_request(border):
    link = border.link()
    for message in (
        {},
        {"get": 1},
        {"put": "x"},
        {"put": "x", "generation": 1, "value": "%%"},
        {"connections": 1},
    ):
        with pytest.raises(OSError, match="400"):
            link.ask(message)


def test_keys_are_written_once_and_counted():
    store = Store()
    store.renew(1, {"rank_and_size/a:0": "x"}, 2)
    assert store.put(1, "global/0", b"first")
    assert store.put(1, "global/0", b"first")  # the same again, after a lost answer
    assert not store.put(1, "global/0", b"second")
    assert not store.put(1, "rank_and_size/a:0", b"y")
    assert not store.put(0, "global/1", b"of another world")
    assert store.get(0, "global/0") is None
    stored = sum(store.put(1, f"global/{number}", b"") for number in range(1, 10_000))
    assert stored == 2 * rendezvous.KEYS_OF_A_WORKER - 1
    store.renew(2, {}, 1)
    assert store.get(2, "global/0") is None


def test_900_connections_and_50_mb_bodies_leave_the_driver_as_it_was(border):
    process = psutil.Process()
    link = border.link()
    link.ask({"generation": 0})
    threads, memory = process.num_threads(), process.memory_info().rss
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = min(900, limit - 300)
    most = 0
    with ExitStack() as stack:
        for number in range(held):
            one = socket.create_connection(("127.0.0.1", border.server.port), 10)
            stack.enter_context(one)
            if number % 3:
                one.sendall(b"PUT /global/0 HTTP/1.1\r\nContent-Length: 900000\r\nX: ")
        most = max(most, process.num_threads())
        assert link.ask({"generation": 1})["generation"] == 1  # a worker is heard meanwhile
        assert len(border.server._server._open) <= CONNECTIONS
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", border.server.port), 10) as one:
            one.sendall(b"PUT /global/0 HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (50 << 20))
            try:
                for _ in range(50):
                    one.sendall(bytes(1 << 20))
            except OSError:
                pass  # refused before it was read
    assert link.ask({"generation": 2})["generation"] == 2
    assert max(most, process.num_threads()) <= threads + 1
    grown = process.memory_info().rss - memory
    assert grown < CONNECTIONS * BODY_LIMIT / 4


def test_bytes_that_drip_in_are_not_waited_for_for_ever(border, monkeypatch):
    monkeypatch.setattr(rendezvous, "REQUEST_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", border.server.port), 60) as slow:
        closed = False
        while not closed:  # by the server: it does not wait for the end of a request that drips
            try:
                slow.sendall(b"G")
            except ConnectionError:
                closed = True
            time.sleep(0.02)
    assert border.link().ask({"generation": 0})["rank"] == 0


def forward_bytes(source: socket.socket, target: socket.socket) -> None:
    """Until one of the two is closed: then the other is closed too."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in source, target:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_a_worker_waits_for_a_driver_whose_port_is_flooded(monkeypatch):
    """Connections that are closed before an answer are no sign that the driver has ended."""
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 30.0)
    border = Border()
    with closing(border), closing(socket.create_server(("127.0.0.1", 0))) as front:

        def forward() -> None:
            for number in range(6):
                connection, _ = front.accept()
                if number < 5:
                    connection.close()
                    continue
                with connection, socket.create_connection(("127.0.0.1", border.server.port)) as to:
                    ways = (connection, to), (to, connection)  # head and body may come apart
                    copies = [threading.Thread(target=forward_bytes, args=way) for way in ways]
                    for copy in copies:
                        copy.start()
                    for copy in copies:
                        copy.join()

        threading.Thread(target=forward, daemon=True).start()
        link = Link(f"127.0.0.1:{front.getsockname()[1]}", WORKER, key_of(border.secret, WORKER))
        assert link.ask({"generation": 0})["rank"] == 0


def test_a_driver_that_has_ended_is_noticed_at_once(monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 1e9)
    border = Border()
    link = border.link()
    border.close()
    with pytest.raises(ConnectionRefusedError):
        link.ask({"generation": 0})


# -- the relay in a worker -----------------------------------------------------------------------


@pytest.fixture
def relay(border, monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "")
    border.store.renew(1, {"rank_and_size/localhost:0": "0,1,0,1,0,1"}, 1)
    one = Relay(border.link())
    one.generation = 1
    one.direct_horovod_here()
    yield one
    one.close()


def gloo(method: str, key: str, body: bytes = b"") -> tuple[int, bytes]:
    """A request as Horovod's http_store.cc and HTTPRequest.hpp make it of the environment."""
    address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
    host, slash, path = f"{address}:{port}/{key}".partition("/")
    name, _, number = host.partition(":")
    connection = http.client.HTTPConnection(name, int(number), timeout=20)
    with closing(connection):
        connection.request(method, slash + path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_the_relay_carries_what_horovod_asks(relay, border):
    assert gloo("GET", "rank_and_size/localhost:0") == (200, b"0,1,0,1,0,1")
    assert gloo("GET", "global/0") == (404, b"")
    assert gloo("PUT", "global/0", bytes(range(256))) == (200, b"")
    assert gloo("GET", "global/0") == (200, bytes(range(256)))
    assert gloo("PUT", "global/0", b"other")[0] == 409
    assert gloo("DELETE", "global/0")[0] == 200
    assert border.store.get(1, "global/0") == bytes(range(256))


def test_the_relay_serves_nobody_who_does_not_know_its_path(relay, border):
    for path in ("/global/0", "/", f"/{'0' * 64}:0/global/0", "/../global/0", "/%C3%A9"):
        connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=20)
        with closing(connection):
            connection.putrequest("PUT", path)
            connection.putheader("Content-Length", "1")
            connection.endheaders(b"x")
            assert connection.getresponse().status == 401
    assert border.store.get(1, "global/0") is None


# -- another user --------------------------------------------------------------------------------

ATTACK = """
import encodings.idna, http.client, json, os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
def send(port, method, path, body):
    one = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    one.request(method, path, body)
    return one.getresponse().status
seen = {"uid": os.getuid()}
driver, relay, trainer = (int(word) for word in sys.argv[1:4])
paths = ["/global/0", "/rank_and_size/localhost:0", "/" + sys.argv[4]]
place = json.dumps({"generation": 0}).encode()
seen["statuses"] = [
    send(port, method, path, place)
    for port in (driver, relay)
    for path in paths
    for method in ("PUT", "POST", "GET", "DELETE")
]
def read(name):
    try:
        return os.path.basename(name) if open(name, "rb").read() else ""
    except PermissionError:
        return ""
seen["readable"] = [read(f"/proc/{trainer}/{name}") for name in ("environ", "mem")]
seen["command line"] = open(f"/proc/{trainer}/cmdline").read()
print(json.dumps(seen))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a program as another user")
def test_another_user_of_this_machine_gets_no_place_and_no_secret(relay, border):
    """`nobody` tries what took a worker's place before the driver's messages were signed."""
    # a worker as the driver starts it: the key is in its environment
    key = key_of(border.secret, WORKER)
    trainer = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(100)"],
        env=os.environ | {"HVD_LBT_ELASTIC_KEY": key.hex()},
    )
    try:
        ports = (str(border.server.port), str(relay.port), str(trainer.pid))
        attack = subprocess.run(
            [sys.executable, "-I", "-c", ATTACK, *ports, WORKER],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert attack.returncode == 0, attack.stderr
        seen = json.loads(attack.stdout)
    finally:
        trainer.kill()
        trainer.wait()
    assert seen["uid"] == 65534
    assert set(seen["statuses"]) == {401}
    assert seen["readable"] == ["", ""]
    assert key.hex() not in seen["command line"]
    assert border.reports == []
    assert border.store.get(1, "global/0") is None
    assert border.store.get(1, "rank_and_size/localhost:0") == b"0,1,0,1,0,1"
