"""The doctor starts two ranks itself, also from an environment that is not activated."""

import pytest

from hvd_lbt import doctor


@pytest.mark.parametrize("part", ["Horovod", "two ranks, mpi", "two ranks, gloo"])
def test_horovod_and_its_two_ranks_work(part, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    finding = doctor.examine(part)
    assert finding.fix == "", finding
