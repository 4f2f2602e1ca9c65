"""The same on any number of Horovod ranks, with a batch that grows from 32 to 128 at epoch 5."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hvd_lbt

world = hvd_lbt.init()
torch.manual_seed(0)
pattern = torch.randn(4, 20)
labels = torch.randint(0, 4, (2000,))
data = TensorDataset(pattern[labels] + torch.randn(2000, 20), labels)
fall = hvd_lbt.Milestone(epoch=5, factor=4)
settings = {"lr": 0.1, "momentum": 0.9, "global_batch": 32, "milestones": (fall,)}
schedule = hvd_lbt.Schedule(policy="grow_batch", epochs=10, **settings)
sampler = hvd_lbt.PlanSampler(data, hvd_lbt.make_plan(schedule, len(data)), micro_batch=32)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = hvd_lbt.FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(data, batch_sampler=sampler, num_workers=1)


def loss(x, y):
    return F.cross_entropy(model(x), y, reduction="none")


training = hvd_lbt.Training(model, optimizer, schedule, loss=loss)
for update, batches in sampler.updates(loader):
    training.update(update, batches)

right = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
if world.rank == 0:
    print(f"accuracy {right:.3f}")
hvd_lbt.shutdown()
