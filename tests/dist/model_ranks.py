"""What each rank does for test_reducer_models.py: one update of networks from elsewhere.

Prints a JSON line {network: largest relative difference, or why it could not be made} on rank 0.
"""

import copy
import json

import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt import FusedSGD, GradientReducer, comm


class Transformer(nn.Module):
    """torch's own layers: attention, layer norm, a parameter that is no layer's, a tied weight."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.place = nn.Parameter(torch.randn(1, 16, 32) / 10)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 32)
        self.out = nn.Linear(32, 10, bias=False)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.place
        return self.out(self.head(self.layers(x).mean(1)))


def depthwise():
    """As a mobile network has them: depthwise convolutions, plain batch norm, channels_last."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).to(memory_format=torch.channels_last)


def torchvision_resnet50():
    import torchvision

    return torchvision.models.resnet50(num_classes=10)


def timm_vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)


def timm_efficientnet():
    import timm

    return timm.create_model("efficientnet_b0", num_classes=10, drop_rate=0.0)


NETWORKS = (Transformer, depthwise, torchvision_resnet50, timm_vit, timm_efficientnet)


def losses(model):
    """Each rank's loss of this update, by the same network: half of the mean over 8 images."""
    for rank in range(WORLD.size):
        generator = torch.Generator().manual_seed(rank)
        images = torch.randn(4, 3, 64, 64, generator=generator)
        labels = torch.randint(0, 10, (4,), generator=generator)
        yield lambda x=images, y=labels: F.cross_entropy(model(x), y, reduction="sum") / 8


def _values(model):
    return [parameter.detach() for parameter in model.parameters()]


def compare(make) -> float:
    """One update by the reducer on all ranks, and by plain torch in one process."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    peer = torch.optim.SGD(twin.parameters(), **settings)
    for loss in losses(twin):
        loss().backward()
    peer.step()
    optimizer = FusedSGD(model.parameters(), **settings)
    reducer = GradientReducer(
        model,
        optimizer,
        world=WORLD,
        allreduce_async=comm.allreduce_async_,
        synchronize=comm.synchronize,
        wire="fp32",
        bucket_mb=1.0,
        name=make.__name__,
    )
    reducer.backward(list(losses(model))[WORLD.rank](), last=True)
    optimizer.step()
    pairs = zip(_values(model), _values(twin), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


if __name__ == "__main__":
    WORLD = comm.init()
    results = {}
    for make in NETWORKS:
        try:
            results[make.__name__] = compare(make)
        except (ImportError, RuntimeError) as error:
            if make.__name__.split("_")[0] not in ("torchvision", "timm"):
                raise
            # torchvision's operators want the build of torch they were made for
            results[make.__name__] = f"cannot be made here: {error}"
    if WORLD.rank == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    comm.shutdown()
