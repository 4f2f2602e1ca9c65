"""Networks by their recipe name, with ghost batch norm where they have a norm."""

import re
from functools import partial

from torch import nn

from hvd_lbt.errors import UserError
from hvd_lbt.models.foreign import build_foreign, is_foreign, unused_settings
from hvd_lbt.models.forward import allow_graphs, compiled, make_forward
from hvd_lbt.models.forward_samples import samples_of
from hvd_lbt.models.ghost_norm import GhostBatchNorm2d, RunningStatistics, check_one_sample
from hvd_lbt.models.image_size import check_image_sizes
from hvd_lbt.models.inception_resnet import InceptionResNetV2
from hvd_lbt.models.perceptron import Perceptron
from hvd_lbt.models.prepare import prepare_model
from hvd_lbt.models.pretrained import load_pretrained
from hvd_lbt.models.probe import check_network
from hvd_lbt.models.random_masks import ByGhostBatch, draws_by_rank
from hvd_lbt.models.resnet import DEPTHS, ResNet
from hvd_lbt.models.wide_resnet import WideResNet
from hvd_lbt.recipe import ModelRecipe

__all__ = [
    "ByGhostBatch",
    "GhostBatchNorm2d",
    "RunningStatistics",
    "allow_graphs",
    "build_model",
    "check_image_sizes",
    "check_network",
    "check_one_sample",
    "compiled",
    "draws_by_rank",
    "is_foreign",
    "load_pretrained",
    "make_forward",
    "prepare_model",
    "samples_of",
    "unused_settings",
]


def build_model(
    settings: ModelRecipe, classes: int, ghost_batch: int, *, image_size: int = 224, seed: int = 0
) -> nn.Module:
    """The recipe's network on images (n, 3, H, W), with `classes` outputs unless it says how many.

    A network of others has ghost norms, and dropout that follows (seed, sample); image_size is for
    its lazy layers. Raises UserError for a name that is no network, or one that cannot be made.
    """
    name, outputs = settings.name, settings.num_classes or classes
    if outputs < classes:
        raise UserError(
            f"model.num_classes: {outputs} outputs are too few for the data's {classes} classes."
        )
    if is_foreign(name):
        model = build_foreign(settings, outputs, image_size)
        return prepare_model(model, ghost_batch=ghost_batch, seed=seed)
    norm = partial(GhostBatchNorm2d, ghost_batch=ghost_batch)
    if (match := re.fullmatch(r"resnet(\d+)", name)) and int(match[1]) in DEPTHS:
        return ResNet(
            int(match[1]),
            outputs,
            norm=norm,
            stem=settings.stem or "imagenet",
            width=settings.width,
            zero_init_residual=settings.zero_init_residual,
        )
    if (match := re.fullmatch(r"wide_resnet(\d+)_(\d+)", name)) and int(match[1]) % 6 == 4:
        return WideResNet(int(match[1]), int(match[2]), outputs, norm=norm)
    if name == "inception_resnet_v2":
        return InceptionResNetV2(outputs, norm=partial(norm, eps=1e-3))
    if name == "perceptron":
        return Perceptron(settings.width, outputs, image_size)
    raise UserError(
        f"model.name: {settings.name!r} cannot be built. Allowed: "
        + ", ".join(f"resnet{depth}" for depth in DEPTHS)
        + ", inception_resnet_v2, perceptron, wide_resnet<depth>_<k> with depth = 6·blocks + 4, "
        "such as wide_resnet16_4."
    )
