"""`python counting_sums.py …` is `hvd_lbt …`; each rank prints how often it summed what."""

import json
import sys
from collections import Counter

from hvd_lbt import comm
from hvd_lbt.cli import main

sums, sum_, shutdown = Counter(), comm.allreduce_async_, comm.shutdown


def counted(tensor, name):
    sums[name] += 1
    return sum_(tensor, name)


def printed():
    print(f"sums: {json.dumps(sums)}", flush=True)
    shutdown()


comm.allreduce_async_, comm.shutdown = counted, printed
if __name__ == "__main__":
    sys.exit(main())
