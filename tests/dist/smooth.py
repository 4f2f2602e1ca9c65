"""`python smooth.py …` is `hvd_lbt …` with softplus for ReLU: a network without kinks.

A pre-activation that rounding moves over a ReLU's kink changes the gradient by a finite amount, so
two trainings that differ by 1e-7 part within ten updates: in plain PyTorch, in float64, with any
code. Without kinks the rounding of the sums stays what it is, and trainings can be compared.
"""

import sys

from torch import nn

from hvd_lbt.cli import main

nn.ReLU = lambda inplace=False: nn.Softplus()
sys.exit(main())
