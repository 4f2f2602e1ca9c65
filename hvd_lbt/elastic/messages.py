"""Requests and answers between a worker and its driver, signed with HMAC-SHA256.

The driver draws a secret for each run and derives a key for each worker from it. A request carries
the worker's name and a number that is used once; its answer is signed together with the request's
own signature, so neither can be replayed, answered by another process, or sent back to its sender.
"""

import hashlib
import hmac
import json
import secrets
import threading
import time
from typing import Any

# What is signed begins with who speaks: a request is never a valid answer.
REQUEST, ANSWER = b"hvd_lbt elastic request 1\n", b"hvd_lbt elastic answer 1\n"
WINDOW = 4096  # requests of one worker that may overtake each other


class NotAuthenticError(OSError):
    """The other side has not proven that it knows the run's secret."""


def new_secret() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(32)


def key_of(secret: bytes, worker: str) -> bytes:
    """The key that the driver and this worker share, 32 bytes."""
    return hmac.digest(secret, b"hvd_lbt elastic key 1\n" + worker.encode(), hashlib.sha256)


def sign(key: bytes, beginning: bytes, body: bytes) -> bytes:
    """The signature of `body`, 32 bytes; beginning: who speaks."""
    return hmac.digest(key, beginning + body, hashlib.sha256)


def is_signed(key: bytes, beginning: bytes, body: bytes, signature: bytes) -> bool:
    """Whether `signature` was made with `key`; takes the same time for every wrong one."""
    return hmac.compare_digest(sign(key, beginning, body), signature)


class Signer:
    """A worker's side: numbers and signs its requests, checks the answers. For any thread."""

    def __init__(self, worker: str, key: bytes):
        self._worker, self._key = worker, key
        # above those of the program that this one may have replaced in the same process
        self._lock, self._number = threading.Lock(), time.monotonic_ns()

    def request(self, message: dict[str, Any]) -> tuple[bytes, bytes]:
        """Body and signature of a new request."""
        with self._lock:
            self._number += 1
            number = self._number
        envelope = {"worker": self._worker, "number": number, "message": message}
        body = json.dumps(envelope).encode()
        return body, sign(self._key, REQUEST, body)

    def answer(self, body: bytes, signature: bytes, request_signature: bytes) -> dict[str, Any]:
        """The message in an answer to that request. NotAuthenticError if it is another's."""
        if not is_signed(self._key, ANSWER + request_signature, body, signature):
            raise NotAuthenticError("an answer without the run's signature")
        return _object(body)


class Verifier:
    """The driver's side: checks each request, and signs the answer. For one thread only."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self._seen: dict[str, tuple[int, set[int]]] = {}  # highest number, those near it

    def request(self, body: bytes, signature: bytes) -> tuple[str, int, dict[str, Any]]:
        """Worker, number and message of a request. NotAuthenticError if it is not signed."""
        try:
            envelope = _object(body)
            worker, number = envelope["worker"], envelope["number"]
            message = envelope["message"]
        except (NotAuthenticError, KeyError) as error:
            raise NotAuthenticError("a request that is none") from error
        if not (isinstance(worker, str) and type(number) is int and isinstance(message, dict)):
            raise NotAuthenticError("a request that is none")
        if not is_signed(key_of(self._secret, worker), REQUEST, body, signature):
            raise NotAuthenticError("a request without the run's signature")
        return worker, number, message

    def refuse_replay(self, worker: str, number: int) -> None:
        """Note the number of a request. NotAuthenticError if it was used, or is too old to know."""
        highest, near = self._seen.get(worker, (0, set[int]()))
        if number in near or number <= highest - WINDOW:
            raise NotAuthenticError(f"a request of {worker} came twice")
        near.add(number)
        highest = max(highest, number)
        if len(near) > 2 * WINDOW:
            near = {one for one in near if one > highest - WINDOW}
        self._seen[worker] = (highest, near)

    def forget_all_but(self, workers: set[str]) -> None:
        """Drop the numbers of workers that are gone; their requests have no effect any more."""
        for worker in set(self._seen) - workers:
            del self._seen[worker]

    def answer(
        self, worker: str, message: dict[str, Any], request_signature: bytes
    ) -> tuple[bytes, bytes]:
        """Body and signature of the answer to a request."""
        body = json.dumps(message).encode()
        return body, sign(key_of(self._secret, worker), ANSWER + request_signature, body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotAuthenticError("a body that is no JSON") from error
    if not isinstance(value, dict):
        raise NotAuthenticError("a body that is no JSON object")
    return value
