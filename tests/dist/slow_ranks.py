"""`python slow_ranks.py …` is `hvd_lbt …` whose forward and backward take at least 40 ms.

$HVD_LBT_TEST_SLOW: `RANK:WHAT:SECONDS:UPDATE`, several by commas. From that update on the rank is
slower by so many seconds an update, in `compute` or in waiting for `data`. All of it is slept, so
that it does not depend on how many cores there are.
"""

import os
import sys
import time

from hvd_lbt import sampler, training
from hvd_lbt.cli import main

SLOW = [part.split(":") for part in os.environ.get("HVD_LBT_TEST_SLOW", "").split(",") if part]
now = {"rank": -1, "update": -1}
update, backward = training.Training.update, training.GradientReducer.backward


def extra(what):
    for rank, where, seconds, first in SLOW:
        if (int(rank), where) == (now["rank"], what) and now["update"] >= int(first):
            time.sleep(float(seconds))


def noted_update(self, planned, batches, *votes):
    now.update(rank=self.reducer.world.rank, update=planned.index)
    return update(self, planned, batches, *votes)


def slow_backward(self, loss, *, last=True):
    if last and loss is not None:
        time.sleep(0.04)
        extra("compute")
    return backward(self, loss, last=last)


class SlowSource:
    """A source of batches that is slow now and then."""

    def __init__(self, source):
        self._source = iter(source)

    def __iter__(self):
        return self

    def __next__(self):
        extra("data")
        return next(self._source)


begin = sampler.MicroBatches.__init__


def slow_source(self, sizes, source, *args, **options):
    begin(self, sizes, SlowSource(source), *args, **options)


training.Training.update, training.GradientReducer.backward = noted_update, slow_backward
sampler.MicroBatches.__init__ = slow_source
if __name__ == "__main__":
    sys.exit(main())
