"""One hidden layer and no norm: the network of Smith & Le 2018 (arXiv:1710.06451)."""

from torch import Tensor, nn

SIDE = 8  # pixels: larger images are averaged down to it, smaller ones are taken as they are


class Perceptron(nn.Module):
    """Images (n, 3, H, W) → logits (n, num_classes), by `width` hidden units with ReLU.

    image_size: of the first images; others are averaged to min(image_size, 8) pixels a side.
    """

    def __init__(self, width: int, num_classes: int, image_size: int = SIDE):
        super().__init__()
        self.side = min(image_size, SIDE)
        self.avgpool = nn.AdaptiveAvgPool2d(self.side)
        self.hidden = nn.Linear(3 * self.side**2, width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, num_classes)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        for layer in (self.hidden, self.fc):
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        small = images if images.shape[-2:] == 2 * (self.side,) else self.avgpool(images)
        return self.fc(self.relu(self.hidden(small.flatten(1))))
