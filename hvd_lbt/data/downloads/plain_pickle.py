"""A pickle of plain values and arrays of bytes, read without running anything that it names.

A pickle is a program: loading one that was changed runs what its author wants. Here only the
instructions that CIFAR's files have are accepted, and the four names that NumPy's arrays need stand
for classes of this file that keep what they are given. No code of NumPy's or of any other package
is called by the pickle, and nothing larger than the file is allocated.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

# Values, containers, the memo, and the two instructions that build an array.
ALLOWED = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
LARGEST_MEMO = 1 << 20  # the unpickler allocates a table as long as the largest number
ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric")


class _Array:
    """Stands for numpy.ndarray: keeps shape, kind of number and bytes."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Kind:
    """Stands for numpy.dtype: keeps its name."""

    def __init__(self, *about: Any):
        self.about = about

    def __setstate__(self, state: Any) -> None:
        pass


def _make_array(*_: Any) -> _Array:
    return _Array()


def _make_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands for _codecs.encode, as Python 3 writes bytes into an old pickle."""
    if not isinstance(text, str | bytes) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it encodes something else than bytes")
    return text if isinstance(text, bytes) else text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ARRAY_MODULES:
            return _make_array
        stands_for = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Kind,
            ("_codecs", "encode"): _make_bytes,
        }
        if (module, name) not in stands_for:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stands_for[module, name]


def read_pickle(file: Path, raw: bytes) -> dict[str, Any]:
    """The dictionary in a pickle: text keys; arrays of bytes as uint8 of their shape.

    file: for messages. Raises UserError for any pickle that is not of plain values and arrays.
    """

    def refused(why: object) -> UserError:
        return UserError(
            f"{printable(file)} is no pickle of plain values and arrays ({printable(why)[:200]}), "
            "and nothing else is loaded, since a pickle can run any program. Download the archive "
            "again, or take CIFAR's binary version."
        )

    try:
        for opcode, argument, at in pickletools.genops(raw):
            if opcode.name not in ALLOWED:
                raise refused(f"the instruction {opcode.name} at byte {at}")
            if "PUT" in opcode.name and int(argument or 0) > LARGEST_MEMO:
                raise refused(f"a memo of {argument:,} at byte {at}")
        found = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise refused(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise refused(f"it is of the type {type(found).__name__}, not a dictionary")
    values = {}
    for key, value in found.items():
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
        try:
            values[name] = _array(value) if isinstance(value, _Array) else value
        except (TypeError, ValueError) as error:
            raise refused(f"{name}: {error}") from error
    return values


def _array(value: _Array) -> NDArray[np.uint8]:
    """The array of bytes that was kept. Raises ValueError or TypeError for another."""
    _, shape, kind, fortran, data = value.state
    if not isinstance(kind, _Kind) or kind.about[:1] not in ((b"u1",), ("u1",), (b"|u1",)):
        raise ValueError("its array is not of bytes (uint8)")
    if fortran or not isinstance(data, bytes) or not all(type(n) is int for n in shape):
        raise ValueError("its array is not one block of bytes, row by row")
    return np.frombuffer(data, np.uint8).reshape(shape)
