"""For all tests: how long an example of hypothesis takes says nothing on a shared machine, and the
files that take longest come first, so that several processes end together (`launch/test`).
"""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONGEST_FIRST = ("slurm", "dist")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's tests mostly wait, and real ranks start slowly."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))
