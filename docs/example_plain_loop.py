"""A plain PyTorch training: one process, a batch of 32 from the first update to the last."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
pattern = torch.randn(4, 20)
labels = torch.randint(0, 4, (2000,))
data = TensorDataset(pattern[labels] + torch.randn(2000, 20), labels)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=1)


def loss(x, y):
    return F.cross_entropy(model(x), y)


for _ in range(10):
    for x, y in loader:
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()

right = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
print(f"accuracy {right:.3f}")
