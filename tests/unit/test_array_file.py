"""Arrays in a file that processes share: what comes back, and every damage found."""

import numpy as np
import pytest

from hvd_lbt.data.array_file import DamageError, map_arrays, write_arrays

ARRAYS = {
    "bytes": np.arange(200, dtype=np.uint8),
    "none": np.empty((0, 3), np.int64),
    "pairs": np.arange(14, dtype=np.int64).reshape(7, 2),
    "every other": np.arange(20, dtype=np.int32)[::2],
}
ABOUT = {"text": "ü \udcff", "number": 1.5, "list": [1, [2]]}


@pytest.fixture
def file(tmp_path):
    with (tmp_path / "arrays").open("wb") as stream:
        write_arrays(stream, ARRAYS, ABOUT)
    return tmp_path / "arrays"


def read(file):
    with file.open("rb") as stream:
        return map_arrays(stream)


def test_what_was_written_comes_back(file):
    about, arrays = read(file)
    assert about == ABOUT
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        assert array.dtype == ARRAYS[name].dtype
        assert np.array_equal(array, ARRAYS[name])
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0 or not array.size


def test_every_flipped_bit_of_an_array_and_every_cut_is_found(file):
    whole = file.read_bytes()
    padding = 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            about, found = read(file)
        except DamageError:
            continue
        padding += 1  # between arrays: nothing is read there
        assert about == ABOUT
        assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    assert padding < 64 * len(ARRAYS)
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(DamageError):
            read(file)
