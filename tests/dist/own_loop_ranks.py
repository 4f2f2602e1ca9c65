"""A loop of one's own, for test_own_loop.py: own_loop_ranks.py FOLDER

Trains once without a break and once resumed in the middle; rank 0 saves both as FOLDER/RANKS.pt.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hvd_lbt

N, MIDDLE = 66, 9
SCHEDULE = hvd_lbt.Schedule(
    policy="grow_batch",
    epochs=3,
    lr=0.05,
    momentum=0.9,
    global_batch=4,  # one ghost batch: a second rank has no samples
    milestones=(
        hvd_lbt.Milestone(epoch=1, factor=4.5),
        hvd_lbt.Milestone(epoch=2, factor=1.5, ghost_batch=8),
    ),
)


class Run:
    """Model, data and training, from the beginning or from a state."""

    def __init__(self, start_update: int = 0, state=None):
        torch.manual_seed(3)
        images = torch.randn(N, 3, 6, 6) + 2 * torch.randn(N, 3, 1, 1)
        labels = images.mean((2, 3)).argmax(1)
        plan = hvd_lbt.make_plan(SCHEDULE, N)
        data = TensorDataset(images, labels)
        self.sampler = hvd_lbt.PlanSampler(
            data, plan, micro_batch=8, ghost_batch=4, start_update=start_update
        )
        self.loader = DataLoader(data, batch_sampler=self.sampler, num_workers=1)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            hvd_lbt.GhostBatchNorm2d(8, ghost_batch=4),
            nn.Softplus(),  # no kinks: trainings on other numbers of ranks can be compared
            nn.Flatten(),
            nn.Linear(128, 4),
        )
        optimizer = hvd_lbt.FusedSGD(self.model.parameters(), lr=0.1, momentum=0.9)
        reducer = hvd_lbt.GradientReducer(self.model, optimizer, wire="fp32")
        self.training = hvd_lbt.Training(
            self.model, optimizer, SCHEDULE, loss=self.losses, reducer=reducer, noise_every=2
        )
        if state:
            self.training.load_state_dict(state)

    def losses(self, images, labels):
        return F.cross_entropy(self.model(images), labels, reduction="none")

    def train(self, end: int) -> list[float]:
        found = []
        for update, batches in self.sampler.updates(self.loader):
            found.append(self.training.update(update, batches).loss)
            if update.index + 1 == end:
                break
        return found


if __name__ == "__main__":
    world = hvd_lbt.init()
    whole = Run()
    losses = whole.train(whole.sampler.plan.updates)
    first = Run()
    first.train(MIDDLE)
    second = Run(MIDDLE, first.training.state_dict())
    second.train(whole.sampler.plan.updates)
    if world.rank == 0:
        result = {
            "whole": whole.training.state_dict(),
            "resumed": second.training.state_dict(),
            "losses": losses,
        }
        torch.save(result, Path(sys.argv[1]) / f"{world.size}.pt")
    hvd_lbt.shutdown()
