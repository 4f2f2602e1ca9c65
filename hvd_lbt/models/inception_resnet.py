"""Inception-ResNet-V2 (Szegedy et al. 2016, arXiv:1602.07261) as it was published: the network of
TensorFlow's and Keras' weights, with timm's parameter names.

Left out: the dropout before the classifier (Keras and timm have none by default either).
"""

import torch
from torch import Tensor, nn

from hvd_lbt.models.resnet import Norm

Size = int | tuple[int, int]


class ConvNorm(nn.Module):
    """Convolution, norm, ReLU; no padding unless `same`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Size,
        norm: Norm,
        stride: int = 1,
        same: bool = True,
    ):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = norm(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """branch0, branch1, … of the same input, side by side as channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        for index, branch in enumerate(branches):
            self.add_module(f"branch{index}", branch)

    def forward(self, x: Tensor) -> Tensor:
        branches = (part for name, part in self.named_children() if name.startswith("branch"))
        return torch.cat([branch(x) for branch in branches], dim=1)


class Residual(Branches):
    """x + scale · conv2d(branches), then ReLU unless it is the last block.

    channels: of x. widths: of each branch, convolution by convolution. kernels: of the branches'
    convolutions after the first, which is 1×1.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[tuple[int, ...], ...],
        kernels: tuple[Size, ...],
        scale: float,
        norm: Norm,
        last: bool = False,
    ):
        super().__init__(*(_chain(channels, width, (1, *kernels), norm) for width in widths))
        self.conv2d = nn.Conv2d(sum(width[-1] for width in widths), channels, 1)
        self.scale = scale
        self.relu = nn.Identity() if last else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.scale * self.conv2d(super().forward(x)))


def _chain(
    inputs: int, widths: tuple[int, ...], kernels: tuple[Size, ...], norm: Norm, stride: int = 1
) -> nn.Module:
    """Convolutions in a row, one is not wrapped; a stride is the last's, without padding then."""
    ends = [1] * (len(widths) - 1) + [stride]
    layers = []
    for width, kernel, step in zip(widths, kernels, ends, strict=False):
        layers.append(ConvNorm(inputs, width, kernel, norm, step, same=step == 1))
        inputs = width
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


class InceptionResNetV2(nn.Module):
    """Images (n, 3, H, W) → logits (n, num_classes); made for 299 pixels, at least 75.

    norm: should have eps = 0.001, as published.
    """

    def __init__(self, num_classes: int, *, norm: Norm):
        super().__init__()
        self.conv2d_1a = ConvNorm(3, 32, 3, norm, stride=2, same=False)
        self.conv2d_2a = ConvNorm(32, 32, 3, norm, same=False)
        self.conv2d_2b = ConvNorm(32, 64, 3, norm)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = ConvNorm(64, 80, 1, norm)
        self.conv2d_4a = ConvNorm(80, 192, 3, norm, same=False)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = Branches(
            _chain(192, (96,), (1,), norm),
            _chain(192, (48, 64), (1, 5), norm),
            _chain(192, (64, 96, 96), (1, 3, 3), norm),
            nn.Sequential(
                nn.AvgPool2d(3, 1, 1, count_include_pad=False), ConvNorm(192, 64, 1, norm)
            ),
        )
        widths: tuple[tuple[int, ...], ...] = ((32,), (32, 32), (32, 48, 64))
        self.repeat = nn.Sequential(*(Residual(320, widths, (3, 3), 0.17, norm) for _ in range(10)))
        self.mixed_6a = Branches(
            _chain(320, (384,), (3,), norm, stride=2),
            _chain(320, (256, 256, 384), (1, 3, 3), norm, stride=2),
            nn.MaxPool2d(3, 2),
        )
        widths = ((192,), (128, 160, 192))
        self.repeat_1 = nn.Sequential(
            *(Residual(1088, widths, ((1, 7), (7, 1)), 0.10, norm) for _ in range(20))
        )
        self.mixed_7a = Branches(
            _chain(1088, (256, 384), (1, 3), norm, stride=2),
            _chain(1088, (256, 288), (1, 3), norm, stride=2),
            _chain(1088, (256, 288, 320), (1, 3, 3), norm, stride=2),
            nn.MaxPool2d(3, 2),
        )
        widths = ((192,), (192, 224, 256))
        kernels = ((1, 3), (3, 1))
        self.repeat_2 = nn.Sequential(
            *(Residual(2080, widths, kernels, 0.20, norm) for _ in range(9))
        )
        self.block8 = Residual(2080, widths, kernels, 1.0, norm, last=True)
        self.conv2d_7b = ConvNorm(2080, 1536, 1, norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classif = nn.Linear(1536, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        *layers, classify = self.children()
        x = images
        for layer in layers:
            x = layer(x)
        return classify(x.flatten(1))
