"""`python -m hvd_lbt` is `hvd_lbt`."""

import sys

from hvd_lbt.cli import main

sys.exit(main())
