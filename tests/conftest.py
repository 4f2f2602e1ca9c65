"""For all tests: what keeps them from waiting busily, collecting garbage that is none, and timing.

How long an example of hypothesis takes says nothing on a shared machine.
"""

import gc
import os

# Threads without work sleep at once, instead of taking a core from the other test processes. Read
# when torch is imported, here and in the processes that tests start; results are the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish():
    """Leave what was imported out of the garbage collections that follow.

    The probe, and whatever runs out of memory, collect each time, and each time went through the
    modules of all tests.
    """
    gc.collect()
    gc.freeze()
