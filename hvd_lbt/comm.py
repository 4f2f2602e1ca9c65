"""Horovod behind one door: the only module that imports it.

Every collective sums (averages are the caller's arithmetic: weighting is by samples, not by ranks).
Collectives on tensors work in place and return when, or a handle to wait until, the world's sum is
there. `name` pairs the tensors of the ranks; a stable name lets Horovod's response cache skip the
negotiation.

Every call that waits for other ranks is watched: where one does not answer (frozen, unreachable),
this process ends with EXIT_STALLED instead of waiting for ever.
"""

import atexit
import ctypes
import errno
import io
import math
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import Tensor

from hvd_lbt import launcher
from hvd_lbt.errors import UserError
from hvd_lbt.world import RANK_VARIABLES, World

# Horovod finalises MPI when the library is unloaded unless mpi4py, imported first, owns that duty:
# the other order ends about one run in five with signal 11. Under Gloo no MPI must be touched.
_GLOO = os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "gloo"
try:
    if not _GLOO:
        import mpi4py

        # mpi4py's own MPI_Init and MPI_Finalize keep the GIL while they wait for all ranks, and the
        # watchdog waiting too: _start_mpi, below, and _end_mpi call them.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
    from horovod.torch import mpi_lib_v2
except ImportError as error:
    raise UserError(
        f"Horovod and mpi4py are needed to train, and one does not import ({error}). "
        "`launch/setup` builds and installs both; `hvd_lbt doctor` says what is missing."
    ) from error


# What a collective raises when a rank has died: the world is over, and this process may leave it.
WorkerLostError = HorovodInternalError

# A collective that one rank does not join ends the run after so many seconds; Horovod names tensor
# and ranks, first as a warning. It must be set before Horovod starts; 0 waits for ever.
STALL_SECONDS = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
GLOO_SECONDS = "HOROVOD_GLOO_TIMEOUT_SECONDS"
# Horovod cannot see a rank that is frozen or unreachable: a watchdog comes so much later.
WATCHDOG_MARGIN = 30.0
EXIT_STALLED = 74  # EX_IOERR of sysexits.h: another rank does not answer
_names: dict[int, str] = {}  # of the handles that are out
_waiting: tuple[str, float] | None = None  # for what, since when
_watched = False
_world: World | None = None  # that init() joined
_opened: list[tuple[int, str, str]] = []  # this world's connections: file descriptor and ends


class _WaitingFor:
    """Everything that waits for other ranks runs in this context, for the watchdog to see."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        global _waiting
        self._outer, _waiting = _waiting, _waiting or (self._what, time.monotonic())

    def __exit__(self, *error: object) -> None:
        global _waiting
        _waiting = self._outer


def init(device: int | None = None, on_failure: Callable[[], NoReturn] | None = None) -> World:
    """Join the world: start Horovod and, with a GPU per local rank, take this rank's GPU.

    device: the number of the GPU if it is not the local rank; a worker that has outlived a smaller
    local rank keeps its own. on_failure: called in Horovod's own thread if it cannot connect to the
    other ranks, instead of the process being aborted; it must end or replace this process.
    """
    global _world
    _start_watchdog()
    launcher.watch()
    before = set(_open_files().values())
    with _WaitingFor("the start of all ranks"), _on_uncaught_error(on_failure):
        hvd.init()
    opened = {number: file for number, file in _open_files().items() if file not in before}
    _opened[:] = _connected(opened)
    world = _here(device)
    if torch.cuda.is_available():
        if world.device >= torch.cuda.device_count():
            raise UserError(
                f"local rank {world.device} has no GPU: this node shows "
                f"{torch.cuda.device_count()}. Start at most one rank a GPU."
            )
        torch.cuda.set_device(world.device)
    _world = world
    return world


@contextmanager
def _on_uncaught_error(handle: Callable[[], NoReturn] | None) -> Iterator[None]:
    """Have `handle` called where a thread of Horovod's would abort for an uncaught C++ exception.

    Gloo raises one where a rank dies while it connects them: Horovod 0.28.1 catches it nowhere.
    """
    if handle is None:
        yield
        return
    # looked up through Horovod's own library, which leads to the C++ runtime that it uses
    library = ctypes.CDLL(mpi_lib_v2.__file__)
    set_terminate = library._ZSt13set_terminatePFvvE  # std::set_terminate(void (*)())
    set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    callback = ctypes.CFUNCTYPE(None)(handle)
    before = set_terminate(ctypes.cast(callback, ctypes.c_void_p))
    try:
        yield
    except ValueError:  # Horovod has caught one that came late, and cannot begin again either
        handle()
    finally:
        set_terminate(before)


def world() -> World:
    """The world this process is in. Raises UserError before `init()`."""
    if not hvd.is_initialized():
        raise UserError("this process is in no world yet. Call hvd_lbt.init() once, at the start.")
    return _world or _here(None)  # the latter where the program has called horovod's own init()


def _here(device: int | None) -> World:
    return World(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=hvd.local_rank(),
        local_size=hvd.local_size(),
        device=hvd.local_rank() if device is None else device,
    )


def _start_mpi() -> None:
    """MPI_Init, without the GIL."""
    if MPI.Is_initialized():
        return
    _start_watchdog()
    provided = ctypes.c_int()
    with _WaitingFor("the start of all ranks"):
        ctypes.CDLL(MPI.__file__).MPI_Init_thread(
            None, None, MPI.THREAD_MULTIPLE, ctypes.byref(provided)
        )
    atexit.register(_end_mpi)


def _end_mpi() -> None:
    """MPI_Finalize, without the GIL; it waits for all ranks, and needs the launcher."""
    if MPI.Is_initialized() and not MPI.Is_finalized() and not launcher.is_gone():
        with _WaitingFor("the end of all ranks"):
            ctypes.CDLL(MPI.__file__).MPI_Finalize()


def horovod() -> Any:
    """Horovod's own module, for what this one does not cover: process sets, timeline, peers to
    measure.
    """
    return hvd


def is_initialized() -> bool:
    """Whether this process has joined a world and not left it."""
    return hvd.is_initialized()


def allreduce_async_(tensor: Tensor, name: str) -> int:
    """Begin the in-place sum of `tensor` over all ranks; the handle goes to `synchronize`."""
    handle = hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)
    _names[handle] = name
    return handle


def synchronize(handle: int) -> Tensor:
    """Wait for a handle of `allreduce_async_`."""
    with _WaitingFor(f"the ranks' sum of {_names.pop(handle, 'a collective')!r}"):
        return hvd.synchronize(handle)


def allreduce_(tensor: Tensor, name: str) -> Tensor:
    """Sum `tensor` over all ranks in place."""
    return synchronize(allreduce_async_(tensor, name))


def broadcast_(tensors: Mapping[str, Tensor], root: int = 0) -> None:
    """Give every rank `root`'s values of these tensors, in place."""
    handles = [
        hvd.broadcast_async_(_as_it_lies(tensor), root, name=f"broadcast.{name}")
        for name, tensor in tensors.items()
    ]
    with _WaitingFor("a broadcast of tensors"):
        for handle in handles:
            hvd.synchronize(handle)


def _as_it_lies(tensor: Tensor) -> Tensor:
    """A dense tensor's memory in its own order: Horovod refuses what is not contiguous
    (channels_last).
    """
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def broadcast_object(value: Any, root: int = 0) -> Any:
    """Give every rank `root`'s plain value: numbers, strings, None, tensors; lists and dicts of
    them.

    Nothing that arrives is unpickled as code: unlike Horovod's function of this name, a process
    that poses as `root` can send data only. TypeError, on `root`, for what is not plain.
    """
    here = _packed(value) if hvd.rank() == root else torch.zeros(0, dtype=torch.uint8)
    with _WaitingFor(f"a broadcast of rank {root}'s data"):
        size = hvd.broadcast_(torch.tensor([here.numel()]), root, name="object.size")
        if hvd.rank() != root:
            here = torch.empty(int(size), dtype=torch.uint8)
        hvd.broadcast_(here, root, name="object.bytes")
    return value if hvd.rank() == root else _unpacked(here)


def allgather_object(value: Any) -> list[Any]:
    """The plain values of all ranks, by rank; plain as in `broadcast_object`.

    Ranks that gave the same share one object: thousands of them would take seconds to read.
    """
    here = _packed(value, small=True)
    with _WaitingFor("the data of all ranks"):
        sizes = hvd.allgather(torch.tensor([here.numel()]), name="objects.size").tolist()
        parts = hvd.allgather(here, name="objects.bytes").split(sizes)
    texts = [part.numpy().tobytes() for part in parts]
    read = {text: _unpacked(part) for text, part in dict(zip(texts, parts, strict=True)).items()}
    return [read[text] for text in texts]


_PLAIN = (type(None), bool, int, float, str, bytes, Tensor)


def _packed(value: Any, small: bool = False) -> Tensor:
    """The bytes of a plain value. TypeError if `_unpacked` would refuse them on another rank.

    small: without torch's zip container, which adds 1.1 kB, times the ranks where each sends to
    all.
    """
    _check_plain(value)
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not small)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    """The plain value in these bytes. UnpicklingError if they hold anything else."""
    # weights_only: tensors and plain containers are made, no function is imported or called
    stream = io.BytesIO(data.numpy().tobytes())
    return torch.load(stream, map_location="cpu", weights_only=True)


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        parts = [*value]
    elif type(value) in _PLAIN or isinstance(value, Tensor):
        return
    else:
        raise TypeError(f"ranks exchange plain data and tensors only, not {type(value)}: {value!r}")
    for part in parts:
        _check_plain(part)


def barrier() -> None:
    """Return when every rank has come here."""
    with _WaitingFor("a barrier"):
        hvd.barrier()


def start_timeline(file: str) -> None:
    """Let Horovod write its timeline of the world's messages into `file`; each rank calls it.

    HOROVOD_TIMELINE=DYNAMIC must have been set before `init`.
    """
    hvd.start_timeline(file)


def stop_timeline() -> None:
    """End the timeline; each rank calls it."""
    hvd.stop_timeline()


def shutdown() -> None:
    """Leave together: without the barrier a rank may tear down what another still uses."""
    if is_initialized():
        with _WaitingFor("the last barrier"):
            hvd.barrier()
        with _WaitingFor("the shutdown of all ranks"):
            hvd.shutdown()
        if not _GLOO:
            _end_mpi()


def _start_watchdog() -> None:
    """Begin to watch, unless it is done or HOROVOD_STALL_SHUTDOWN_TIME_SECONDS is 0."""
    global _watched
    value = os.environ.setdefault(STALL_SECONDS, "600")
    try:
        stall = float(value)
    except ValueError as error:
        raise UserError(f"{STALL_SECONDS}={value}: it must be a number of seconds.") from error
    if stall > 0 and not _watched:
        if _GLOO and os.environ.get("HOROVOD_ELASTIC") != "1":
            # Gloo would raise after its own 30 s, which looks like a rank that died.
            patience = math.ceil(min(stall + 2 * WATCHDOG_MARGIN, 2e6))
            os.environ[GLOO_SECONDS] = str(patience)
        threading.Thread(target=_watch, args=(stall,), daemon=True, name="watchdog").start()
        _watched = True


def _watch(stall: float) -> None:
    """End this process if it waits for the others longer than Horovod's own check allows."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    while True:
        time.sleep(min(5.0, stall / 4))
        waiting = _waiting
        if waiting and time.monotonic() - waiting[1] > stall + WATCHDOG_MARGIN:
            print(
                f"hvd_lbt: rank {rank} on {os.uname().nodename} has waited "
                f"{time.monotonic() - waiting[1]:.0f} s for {waiting[0]}: another rank hangs, is "
                f"frozen or unreachable. Ended ({STALL_SECONDS}={stall:g}).",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_STALLED)


def leave() -> None:
    """Leave a world of which others are lost, or which is to change; init() joins the next one."""
    with _WaitingFor("the end of this world"):
        hvd.shutdown()


def connections() -> list[tuple[str, str]]:
    """The TCP connections that `init` opened: own address and the other's, each HOST:PORT."""
    return [(own, other) for _, own, other in _opened]


def disconnect() -> None:
    """End the connections of this world, from another thread than the one that waits in a
    collective.

    When a rank dies, Gloo notices only in the ranks that talk to it just then; the others would
    wait for them until its timeout. Disconnected, a collective raises WorkerLostError at once.
    """
    for number, own, other in _opened:
        with suppress(OSError), _socket(number) as connection:
            if _ends(connection) == (own, other):  # else the number is another file's by now
                connection.shutdown(socket.SHUT_RDWR)


def _open_files() -> dict[int, str]:
    """This process's file descriptors and what each is, such as socket:[4711].

    A number alone says nothing: one that the last world has closed is soon given to a new
    connection.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _connected(numbers: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Those of these file descriptors that are TCP connections, with their ends."""
    for number in numbers:
        with suppress(OSError), _socket(number) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                yield number, *_ends(connection)


def _socket(number: int) -> socket.socket:
    """A socket object of its own for a file descriptor. OSError if that is no socket."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        raise OSError(errno.ENOTSOCK, "no socket")
    return socket.socket(fileno=os.dup(number))


def _ends(connection: socket.socket) -> tuple[str, str]:
    """Own address and the other's, each HOST:PORT. OSError for a socket that listens."""
    # the zone of an IPv6 address is this host's own word for an interface
    host, port, *_ = connection.getpeername()
    own_host, own_port, *_ = connection.getsockname()
    return f"{own_host.partition('%')[0]}:{own_port}", f"{host.partition('%')[0]}:{port}"


def abort(code: int) -> None:
    """End all ranks at once with this exit code; call it after the reason has been printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    if hvd.size() == 1:  # MPI_Abort would print eight lines below the reason
        with _WaitingFor("the shutdown of all ranks"):
            hvd.shutdown()
        if not _GLOO:
            _end_mpi()
    elif not _GLOO:
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # under Gloo the launcher ends the other ranks when one has failed


if not _GLOO:
    _start_mpi()
