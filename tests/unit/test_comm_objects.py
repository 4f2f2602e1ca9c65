"""What ranks say to each other is data: bytes from the network are never run as code."""

import ast
import io
import os
import pickle
import socket
from collections import OrderedDict
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path, PurePosixPath

import cloudpickle
import pytest
import torch

from hvd_lbt import comm

PACKAGE = Path(__file__).parents[2] / "hvd_lbt"


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def saved(value, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.mark.parametrize(
    "write",
    [
        partial(pickle.dumps, protocol=2),
        partial(cloudpickle.dumps, protocol=2),
        saved,
        partial(saved, zipped=False),
    ],
)
def test_a_pickled_command_from_the_network_is_refused(tmp_path, write):
    sent = write({"update": 3, "state": Command(tmp_path / "flag")})
    with pytest.raises(pickle.UnpicklingError):
        comm._unpacked(torch.frombuffer(bytearray(sent), dtype=torch.uint8))
    assert not (tmp_path / "flag").exists()


@pytest.mark.parametrize("sent", [b"x", b"PK\x03\x04", bytes(1000)])
def test_bytes_that_are_no_value_are_an_error(sent):
    with pytest.raises((pickle.UnpicklingError, RuntimeError, EOFError)):
        comm._unpacked(torch.frombuffer(bytearray(sent), dtype=torch.uint8))


@pytest.mark.parametrize("small", [False, True])
def test_a_state_arrives_as_it_was(small):
    value = {
        "update": 7,
        "model": OrderedDict(weight=torch.randn(3, 4), half=torch.ones(2, dtype=torch.float16)),
        "recipe": {"lr": 0.1, "names": ["a", "é"], "none": None, "on": True},
        "pair": ("", 2**40),
        1: -1.5,
    }
    got = comm._unpacked(comm._packed(value, small))
    assert got.keys() == value.keys()
    assert torch.equal(got["model"]["weight"], value["model"]["weight"])
    assert got["model"]["half"].dtype == torch.float16
    assert {key: got[key] for key in ("update", "recipe", "pair", 1)} == {
        key: value[key] for key in ("update", "recipe", "pair", 1)
    }


def test_what_each_rank_sends_to_all_is_small():
    assert comm._packed(("", 2**31), small=True).numel() < 300


@pytest.mark.parametrize(
    "value", [PurePosixPath("x"), {"a": [object()]}, {print: 1}, (1, {2, 3}), Command(Path("x"))]
)
def test_what_would_be_refused_is_not_sent(value):
    with pytest.raises(TypeError, match="plain data"):
        comm._packed(value)


def test_nothing_in_the_package_calls_horovods_pickling_functions():
    forbidden = {"broadcast_object_fn", "broadcast_optimizer_state"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                called_on_horovod = isinstance(node.value, ast.Name) and node.value.id == "hvd"
                objects = node.attr in ("broadcast_object", "allgather_object")
                assert not (called_on_horovod and objects), f"{file}:{node.lineno}"
                assert node.attr not in forbidden, f"{file}:{node.lineno}"


def test_only_connections_of_this_world_are_reported_and_ended(monkeypatch):
    with ExitStack() as stack:
        server = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        ends = [
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
            for _ in range(2)
        ]
        accepted = [stack.enter_context(closing(server.accept()[0])) for _ in range(2)]
        read, write = os.pipe()
        local, _ = (stack.enter_context(closing(one)) for one in socket.socketpair())
        numbers = [server.fileno(), read, write, local.fileno(), 10**6]
        numbers += [one.fileno() for one in (*ends, *accepted)]
        before = len(os.listdir("/proc/self/fd"))
        opened = list(comm._connected(numbers))
        assert len(os.listdir("/proc/self/fd")) == before
        monkeypatch.setattr(comm, "_opened", opened)
        reported = comm.connections()
        assert len(reported) == 4  # not what listens, pipes, or closed numbers
        assert {(other, own) for own, other in reported} == set(reported)
        assert all(own.startswith("127.0.0.1:") for own, _ in reported)

        # the number of one is another connection's by now: that must not be ended
        stranger = stack.enter_context(closing(socket.create_connection(server.getsockname())))
        stranger_end = stack.enter_context(closing(server.accept()[0]))
        os.dup2(stranger.fileno(), ends[1].fileno())
        comm.disconnect()
        assert accepted[0].recv(1) == b""
        stranger_end.sendall(b"x")
        assert stranger.recv(1) == b"x"
        os.close(read)
        os.close(write)


def test_a_connection_on_a_number_that_was_used_before_is_a_new_one():
    """The last world's sockets are closed while the next one opens its own on the same numbers."""
    with ExitStack() as stack:
        server = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        old = socket.create_connection(server.getsockname())
        number = old.fileno()
        before = set(comm._open_files().values())
        old.close()
        new = stack.enter_context(closing(socket.create_connection(server.getsockname())))
        assert new.fileno() == number  # the lowest free one
        opened = {n: file for n, file in comm._open_files().items() if file not in before}
        assert number in {n for n, _, _ in comm._connected(opened)}
