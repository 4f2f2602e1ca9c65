"""Where workers meet: the driver's server, and the relay from Horovod's own client to it.

Horovod's Gloo asks for its peers' addresses by plain HTTP, which it cannot sign. In each worker a
relay on 127.0.0.1 takes these requests, under a path that only Horovod in this process knows, and
hands them on to the driver as signed messages.
"""

import asyncio
import base64
import hmac
import http.client
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hvd_lbt.elastic.messages import NotAuthenticError, Signer, Verifier

BODY_LIMIT = 1 << 20  # bytes; Gloo sends about 136 a rank
HEAD_LIMIT = 8 << 10
CONNECTIONS = 128  # open at once; the oldest makes room for a new one
REQUEST_SECONDS = 10.0  # for a whole request, however slowly its bytes come
KEYS_OF_A_WORKER = 64  # Gloo sets 7 in a world without process sets
# Gloo asks again after 10 ms for what is not there yet: so long the relay lets it wait.
NOT_YET_SECONDS = 0.05
# A worker tries so long to reach a driver whose port answers, but not in time: strangers may flood
# it.
PATIENCE_SECONDS, TRY_AGAIN_SECONDS = 20.0, 0.1

OK, BAD, UNSIGNED, MISSING, TIMEOUT, CONFLICT = 200, 400, 401, 404, 408, 409
NO_LENGTH, TOO_LARGE, HEAD_TOO_LARGE = 411, 413, 431


@dataclass(frozen=True)
class Request:
    """An HTTP request within the limits."""

    method: str
    path: str
    signature: bytes
    body: bytes


Reply = tuple[int, bytes, bytes]  # status, signature, body


class RefusedError(Exception):
    """A request that is answered by a status alone."""

    def __init__(self, status: int):
        self.status = status


class Server:
    """HTTP on one address, within fixed limits of memory and time, whoever connects.

    One thread serves all connections; each carries one request. handle: gives the reply.
    """

    def __init__(self, address: str, handle: Callable[[Request], Awaitable[Reply]]):
        self._handle = handle
        self._open: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._serving = threading.Thread(
            target=self._run, args=(address, started), daemon=True, name="rendezvous"
        )
        self.port = 0
        self._failure: OSError | None = None
        self._serving.start()
        started.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop serving; the port is free afterwards."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._serving.join()

    def _run(self, address: str, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            server = self._loop.run_until_complete(
                asyncio.start_server(self._connected, address, 0, limit=HEAD_LIMIT, backlog=128)
            )
        except OSError as error:
            self._failure = error
            started.set()
            return
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = None
        if len(self._open) > CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                try:
                    reply = await self._handle(await _read(reader))
                except RefusedError as refused:
                    reply = refused.status, b"", b""
                writer.write(_http(reply))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it has gone away, or takes too long
        finally:
            self._open.pop(writer, None)
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    """One request. RefusedError if it is none, or beyond a limit."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.LimitOverrunError as error:
        raise RefusedError(HEAD_TOO_LARGE) from error
    first, *lines = head[:-4].split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise RefusedError(BAD)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.lower() in headers:
            raise RefusedError(BAD)
        headers[name.lower()] = value.strip()
    if "transfer-encoding" in headers:
        raise RefusedError(NO_LENGTH)
    length = headers.get("content-length", "0" if words[0] == "GET" else "")
    if not length:
        raise RefusedError(NO_LENGTH)
    if not (length.isascii() and length.isdigit()):
        raise RefusedError(BAD)
    if len(length) > 9 or int(length) > BODY_LIMIT:
        raise RefusedError(TOO_LARGE)
    try:
        signature = bytes.fromhex(headers.get("authorization", "").removeprefix("HMAC-SHA256 "))
    except ValueError as error:
        raise RefusedError(UNSIGNED) from error
    return Request(words[0], words[1], signature, await reader.readexactly(int(length)))


def _http(reply: Reply) -> bytes:
    status, signature, body = reply
    reason = http.client.responses[status]
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        f"Authorization: HMAC-SHA256 {signature.hex()}\r\n\r\n"
    ).encode() + body


class Store:
    """The keys of one world, by which Gloo's ranks find each other; each is written once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation, self._limit = -1, 0
        self._values: dict[str, bytes] = {}

    def renew(self, generation: int, answers: dict[str, str], workers: int) -> None:
        """Begin the store of a world; the last one's keys lead to sockets that are closed."""
        with self._lock:
            self._generation = generation
            self._limit = len(answers) + workers * KEYS_OF_A_WORKER
            self._values = {key: value.encode() for key, value in answers.items()}

    def get(self, generation: int, key: str) -> bytes | None:
        """The value of a key; None while there is none, or if another world has begun."""
        with self._lock:
            return self._values.get(key) if generation == self._generation else None

    def put(self, generation: int, key: str, value: bytes) -> bool:
        """Set a key; False if it has another value already, the world is another, or it is full."""
        with self._lock:
            if generation != self._generation:
                return False
            if key not in self._values and len(self._values) >= self._limit:
                return False
            return self._values.setdefault(key, value) == value


class Rendezvous:
    """The driver's server: signed requests of this run's workers, and nothing else.

    report(worker, message) gives the driver's answer; workers() the names of those it knows.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        store: Store,
        report: Callable[[str, dict[str, Any]], dict[str, Any]],
        workers: Callable[[], set[str]],
        say: Callable[[str], None],
    ):
        self._verifier, self._store = Verifier(secret), store
        self._report, self._workers, self._say = report, workers, say
        self.refused, self._said_at = 0, float("-inf")
        self._server = Server(address, self._handle)
        self.port, self.close = self._server.port, self._server.close

    async def _handle(self, request: Request) -> Reply:
        try:
            worker, number, message = self._verifier.request(request.body, request.signature)
            known = self._workers()
            self._verifier.forget_all_but(known)
            if worker in known:
                self._verifier.refuse_replay(worker, number)
        except NotAuthenticError as error:
            self._note(error)
            raise RefusedError(UNSIGNED) from error
        answer = self._answer(worker, message) if worker in known else {"leave": True}
        body, signature = self._verifier.answer(worker, answer, request.signature)
        return OK, signature, body

    def _note(self, error: NotAuthenticError) -> None:
        """Say that strangers speak to the driver, at most once in a minute."""
        self.refused += 1
        if time.monotonic() > self._said_at + 60:
            self._said_at = time.monotonic()
            self._say(f"refused {self.refused} requests that are not of this run, such as {error}")

    def _answer(self, worker: str, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if "get" in message:
                value = self._store.get(message["generation"], message["get"])
                return {"value": None if value is None else base64.b64encode(value).decode()}
            if "put" in message:
                value = base64.b64decode(message["value"], validate=True)
                return {"stored": self._store.put(message["generation"], message["put"], value)}
            return self._report(worker, message)
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(BAD) from error


class Link:
    """A worker's way to its driver: signed requests to `address` (HOST:PORT)."""

    def __init__(self, address: str, worker: str, key: bytes):
        self.address = address
        self._signer = Signer(worker, key)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The driver's answer. OSError if it is gone; NotAuthenticError if another one answers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self._ask_once(message, REQUEST_SECONDS)
            except (ConnectionRefusedError, NotAuthenticError):
                raise
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline:
                    raise OSError(str(error) or type(error).__name__) from error
            time.sleep(TRY_AGAIN_SECONDS)

    def _ask_once(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        body, signature = self._signer.request(message)
        host, _, port = self.address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        try:
            headers = {"Authorization": f"HMAC-SHA256 {signature.hex()}"}
            connection.request("POST", "/", body, headers)
            answer = connection.getresponse()
            given = answer.getheader("Authorization", "").removeprefix("HMAC-SHA256 ")
            got = answer.read(2 * BODY_LIMIT)
            if answer.status != OK:
                raise NotAuthenticError(f"status {answer.status} from {self.address}")
            try:
                return self._signer.answer(got, bytes.fromhex(given), signature)
            except ValueError as error:
                raise NotAuthenticError("an answer without a signature") from error
        finally:
            connection.close()


class Relay:
    """Takes the requests of Horovod's Gloo in this process and asks the driver in its name.

    generation: of the world that this worker joins.
    """

    def __init__(self, link: Link):
        self.generation = 0
        self._link = link
        # Horovod makes its addresses of HOROVOD_GLOO_RENDEZVOUS_ADDR:PORT/SCOPE/KEY; what follows
        # a "/" in ADDR becomes the beginning of the path, and PORT a part of it.
        token = secrets.token_hex(32)
        self._beginning = f"/{token}:0/"
        self._server = Server("127.0.0.1", self._handle)
        self.port, self.close = self._server.port, self._server.close
        self._address = f"127.0.0.1:{self._server.port}/{token}"

    def direct_horovod_here(self) -> None:
        """Have the next hvd.init() of this process ask the relay."""
        os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] = self._address
        os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = "0"

    async def _handle(self, request: Request) -> Reply:
        beginning = request.path[: len(self._beginning)]
        if not hmac.compare_digest(beginning.encode(), self._beginning.encode()):
            raise RefusedError(UNSIGNED)
        key = request.path[len(self._beginning) :]
        if (
            request.method == "DELETE"
        ):  # Horovod's rank has read all; the next world clears the store
            return OK, b"", b""
        try:
            status, value = await asyncio.to_thread(
                self._forward, request.method, key, request.body
            )
        except OSError as error:
            raise RefusedError(CONFLICT) from error
        if status == MISSING and "/rank_" not in key:
            await asyncio.sleep(NOT_YET_SECONDS)
        return status, b"", value

    def _forward(self, method: str, key: str, body: bytes) -> tuple[int, bytes]:
        message: dict[str, Any] = {"generation": self.generation}
        if method == "GET":
            value = self._link.ask(message | {"get": key})["value"]
            return (MISSING, b"") if value is None else (OK, base64.b64decode(value))
        if method == "PUT":
            value = base64.b64encode(body).decode()
            stored = self._link.ask(message | {"put": key, "value": value})["stored"]
            return (OK if stored else CONFLICT), b""
        raise RefusedError(BAD)
