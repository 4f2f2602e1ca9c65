"""Networks by their recipe name, with ghost batch norm where they have a norm."""

import re
from functools import partial

from torch import nn

from hvd_lbt.errors import UserError
from hvd_lbt.models.forward import allow_graphs, compiled, make_forward
from hvd_lbt.models.ghost_norm import GhostBatchNorm2d, RunningStatistics, check_one_sample
from hvd_lbt.models.image_size import check_image_sizes
from hvd_lbt.models.inception_resnet import InceptionResNetV2
from hvd_lbt.models.perceptron import Perceptron
from hvd_lbt.models.resnet import DEPTHS, ResNet
from hvd_lbt.models.wide_resnet import WideResNet
from hvd_lbt.recipe import ModelRecipe

__all__ = [
    "GhostBatchNorm2d",
    "RunningStatistics",
    "allow_graphs",
    "build_model",
    "check_image_sizes",
    "check_one_sample",
    "compiled",
    "make_forward",
]


def build_model(settings: ModelRecipe, classes: int, ghost_batch: int) -> nn.Module:
    """The recipe's network on images (n, 3, H, W), with `classes` outputs unless it says how many.

    Raises UserError for a name that is no network of ours, or a depth that does not exist.
    """
    name, outputs = settings.name, settings.num_classes or classes
    if outputs < classes:
        raise UserError(
            f"model.num_classes: {outputs} outputs are too few for the data's {classes} classes."
        )
    norm = partial(GhostBatchNorm2d, ghost_batch=ghost_batch)
    if (match := re.fullmatch(r"resnet(\d+)", name)) and int(match[1]) in DEPTHS:
        return ResNet(
            int(match[1]),
            outputs,
            norm=norm,
            stem=settings.stem,
            width=settings.width,
            zero_init_residual=settings.zero_init_residual,
        )
    if (match := re.fullmatch(r"wide_resnet(\d+)_(\d+)", name)) and int(match[1]) % 6 == 4:
        return WideResNet(int(match[1]), int(match[2]), outputs, norm=norm)
    if name == "inception_resnet_v2":
        return InceptionResNetV2(outputs, norm=partial(norm, eps=1e-3))
    if name == "perceptron":
        return Perceptron(settings.width, outputs)
    raise UserError(
        f"model.name: {settings.name!r} cannot be built. Allowed: "
        + ", ".join(f"resnet{depth}" for depth in DEPTHS)
        + ", inception_resnet_v2, perceptron, wide_resnet<depth>_<k> with depth = 6·blocks + 4, "
        "such as wide_resnet16_4."
    )
