"""Files read whole, and threads that read, so that no one waits longer than allowed."""

import errno
import os
import queue
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from hvd_lbt.errors import ReadError

T = TypeVar("T")


def open_regular(file: str | bytes | os.PathLike) -> int:
    """A descriptor to read a file; a FIFO, a socket, a device or a folder is an OSError, at
    once.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.ENXIO, "it is no regular file")  # as opening a socket says


def read_regular(file: str | bytes | os.PathLike, limit: int | None = None) -> bytes:
    """What Path.read_bytes gives of a regular file, in a third of its time.

    Raises OSError: with EFBIG above `limit` bytes, with EBUSY if its size changes meanwhile.
    """
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and {limit:,} are allowed")
        data = os.read(descriptor, size + 1)
        while len(data) <= size and (more := os.read(descriptor, size + 1 - len(data))):
            data += more
        if len(data) != size:
            raise OSError(errno.EBUSY, "its size changed while it was read")
        return data
    finally:
        os.close(descriptor)


class Readers:
    """`count` threads. A read that the storage never answers holds one of them, never the process:

    unlike a ThreadPoolExecutor's, they do not keep the interpreter from ending.
    """

    def __init__(self, count: int):
        self._todo: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._work, name=f"reader {number}", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Call it in one of the threads; the future has its result or what it raised."""
        future: Future = Future()
        self._todo.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Let the threads end once what was submitted is done."""
        for _ in range(self._count):
            self._todo.put(None)

    def _work(self) -> None:
        while (task := self._todo.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # it is raised where the result is asked for
                future.set_exception(error)
            del future, function, arguments, task  # an image is not to be kept until the next one


def bounded(look: Callable[[list[Path]], T], timeout: float) -> T:
    """What look([]) returns; it runs in a thread, and adds each path that it is about to ask for.

    Raises ReadError with the last path when no other follows it for `timeout` seconds.
    """
    asked: list[Path] = []
    readers = Readers(1)
    future = readers.submit(look, asked)
    readers.close()
    before = -1
    while not wait([future], timeout).done:
        if len(asked) == before:
            raise ReadError(
                f"{asked[-1]}: the storage gave nothing for {timeout:g} s (data.timeout)."
            )
        before = len(asked)
    result: T = future.result()
    return result
