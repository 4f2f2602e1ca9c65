"""A run and a probe of it on the same ranks, for test_critical_batch.py: … RUN PROBE

The run is saved after each update; the probe branches from its second one.
"""

import argparse
import sys
from pathlib import Path

from torch import nn

from hvd_lbt import comm
from hvd_lbt.critical_batch import add_arguments, probe
from hvd_lbt.recipe import load_recipe
from hvd_lbt.train import train

# 8 updates of 32; the branches are as long as the last six of them.
SETTINGS = (
    *("model.width=4", "schedule.epochs=0.23", "schedule.lr=0.02", "schedule.momentum=0.9"),
    *("schedule.milestones=[{epoch: 0.18, factor: 2}]", "schedule.momentum_start=corrected"),
    *("run.keep_checkpoints=99", "run.checkpoint_minutes=0.00001"),
    *("wire.form=fp32", "layout.micro_batch=16", "run.noise_every=1", "ema.decay=0.9"),
    *("loss.mixup=0.2", "data.cache_on_device=true", "data.image_size=8"),
)
AFTER = 2
ARGUMENTS = ("--epochs", "0.14", "--seeds", "2", "--largest", "64")

nn.ReLU = lambda inplace=False: nn.Softplus()  # as in smooth.py

if __name__ == "__main__":
    run, out = map(Path, sys.argv[1:])
    world = comm.init()
    train(load_recipe("digits", SETTINGS), data=None, out=run, resume=False, world=world)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = run / f"checkpoints/update-{AFTER:08}.pt"
    args = parser.parse_args([str(file), "--out", str(out), *ARGUMENTS])
    probe(args, world)
    comm.shutdown()
