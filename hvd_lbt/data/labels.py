"""The labels of all samples, looked up where they are asked for."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Labels:
    """As an int64 (n,) array is read; the labels are looked up in a table when they are indexed.

    table: int64, the label of each class of the index; tokens: int32 (n,), each sample's class. An
    array of all labels is 8 bytes a sample on every rank; the tokens are shared by a node's ranks.
    """

    def __init__(self, table: NDArray[np.int64], tokens: NDArray[np.int32]):
        self._table, self._tokens = table, tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, key: Any) -> Any:
        return self._table[self._tokens[key]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)

    def tolist(self) -> list[int]:
        """All of them."""
        return [int(label) for label in self[:]]
