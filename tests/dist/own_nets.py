"""Networks as a user has them, for test_own_models.py: `tests.dist.own_nets:NAME`."""

import torch
from torch import nn
from torch.nn import functional as F


class Smooth(nn.Module):
    """Convolution, norm and dropout; without kinks, see smooth.py. functional: no layer for it."""

    def __init__(self, num_classes: int, width: int = 8, functional: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Identity() if functional else nn.Dropout2d(0.3)
        self.fc1 = nn.Linear(width * 9, 32)
        self.norm1 = nn.BatchNorm1d(32)
        self.drop1 = nn.Identity() if functional else nn.Dropout(0.3)
        self.fc2 = nn.Linear(32, num_classes)
        self.functional = functional

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.softplus(self.norm(self.conv(images))))
        x = self.drop1(F.softplus(self.norm1(self.fc1(x.flatten(1)))))
        if self.functional:
            x = F.dropout(x, 0.3, self.training)
        return self.fc2(x)


def smooth(num_classes: int, **arguments: bool) -> nn.Module:
    return Smooth(num_classes, **arguments)
