"""One hidden layer and no norm: the network of Smith & Le 2018 (arXiv:1710.06451)."""

from torch import Tensor, nn

SIDE = 8  # pixels: larger images are averaged down to it


class Perceptron(nn.Module):
    """Images (n, 3, H, W) → logits (n, num_classes), by `width` hidden units with ReLU."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(SIDE)
        self.hidden = nn.Linear(3 * SIDE * SIDE, width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, num_classes)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        for layer in (self.hidden, self.fc):
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.hidden(self.avgpool(images).flatten(1))))
