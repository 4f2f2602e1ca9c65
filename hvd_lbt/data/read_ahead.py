"""Read blocks of samples that lie together ahead of the samples' own reads (`data.shuffle_block`).

The samples of a window come in random order, but they are all of its blocks. Before the first of
them is read, the kernel is asked for each block as a whole (POSIX_FADV_WILLNEED), in the order of
the index: the storage sees one read for a block of a shard, and the samples' reads find the bytes
in the page cache.
"""

import os
from collections.abc import Callable
from contextlib import suppress

from hvd_lbt.data.index_store import Store
from hvd_lbt.data.reading import Readers
from hvd_lbt.data.samples import Images
from hvd_lbt.errors import UserError

Windows = dict[tuple[int, int], list[range]]


class ReadAhead:
    """Asks for the blocks of each window once, in a reader's thread.

    windows_of: the windows that [first, first + count) of the stream lies in (`SampleStream`); none
    where all samples are shuffled. Samples in memory or of a Python data set are not read ahead.
    """

    def __init__(self, store: Images, windows_of: Callable[[int, int], Windows], readers: Readers):
        self._store, self._windows_of, self._readers = store, windows_of, readers
        self._asked: set[tuple[int, int]] = set()

    def before(self, first: int, count: int) -> None:
        """Ask for what the samples [first, first + count) of the stream need; returns at once."""
        if type(self._store) is not Store:
            return
        windows = self._windows_of(first, count)
        for key, blocks in windows.items():
            if key not in self._asked:
                self._readers.submit(ask_for, self._store, blocks)
        self._asked = set(windows)  # the stream does not return to windows before


def ask_for(store: Store, blocks: list[range]) -> None:
    """Ask the kernel for these blocks. It is advice: what fails here fails where it is read."""
    for block in blocks:
        with suppress(OSError, UserError):
            for place, offset, length in store.pieces(block):
                descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
