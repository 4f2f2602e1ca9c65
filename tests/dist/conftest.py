"""Real ranks: `ranks(n, …)` and `start(n, …)`, see launching.py.

What other files import has a module of its own: each folder has a conftest, and one name.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import Launch, begin, run_ranks


@pytest.fixture
def start() -> Iterator[Callable[..., Launch]]:
    """`begin`, and what still runs when the test ends is killed."""
    begun: list[Launch] = []

    def start(ranks: int, *words: str | Path, **options) -> Launch:
        begun.append(begin(ranks, *words, **options))
        return begun[-1]

    yield start
    for launch in begun:
        if launch.process.poll() is None:
            launch.kill()
            launch.process.wait()


@pytest.fixture
def ranks() -> Callable[..., str]:
    """`run_ranks`."""
    return run_ranks
