"""`python own_data.py train … --data DATA` is `hvd_lbt train …` with DATA/RANK: a copy on each
node.
"""

import os
import sys

from hvd_lbt.cli import main

place = sys.argv.index("--data") + 1
sys.argv[place] += "/" + os.environ["OMPI_COMM_WORLD_RANK"]
sys.exit(main())
