"""`python slow_saving.py …` is `hvd_lbt …` that takes three seconds to write a checkpoint."""

import sys
import time

from hvd_lbt import checkpoint
from hvd_lbt.cli import main

write = checkpoint._replace_pair


def slow_write(*args):
    time.sleep(3)
    write(*args)


checkpoint._replace_pair = slow_write
sys.exit(main())
