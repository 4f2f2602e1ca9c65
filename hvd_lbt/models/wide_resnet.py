"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv:1605.07146) for 32-pixel images."""

from torch import Tensor, nn

from hvd_lbt.models.resnet import Norm


class PreActivationBlock(nn.Module):
    """norm, ReLU, 3×3, norm, ReLU, 3×3 and the shortcut, which leaves after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.bn1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        ready = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(ready))))
        return out + (x if self.shortcut is None else self.shortcut(ready))


class WideResNet(nn.Module):
    """WRN-depth-k: images (n, 3, H, W) → logits (n, num_classes); depth = 6·blocks + 4."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, depth: int, widen: int, num_classes: int, *, norm: Norm):
        super().__init__()
        assert depth % 6 == 4, depth
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        inputs = 16
        for stage in range(3):
            outputs = (16 << stage) * widen
            layers = []
            for index in range((depth - 4) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(PreActivationBlock(inputs, outputs, stride, norm))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.bn = norm(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))
