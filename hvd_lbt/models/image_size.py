"""Whether a network takes images of every size of a plan, tried before training."""

from collections.abc import Iterable

import torch
from torch import nn

from hvd_lbt.errors import UserError, one_line


@torch.no_grad()
def check_image_sizes(model: nn.Module, sizes: Iterable[int]) -> None:
    """Raise UserError if the model cannot take images of one of these sizes, in pixels.

    Nothing is tried for a single size: the first update is its test. In evaluation mode, so that
    nothing of the model changes.
    """
    wanted = sorted(set(sizes))
    if len(wanted) < 2:
        return
    like = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        for size in wanted:
            try:
                model(like.new_zeros(1, 3, size, size))
            except (RuntimeError, ValueError) as error:
                reason = one_line(error, 200)
                raise UserError(
                    f"image_size: the network does not take images of {size} pixels ({reason}). "
                    f"The plan has images of {', '.join(map(str, wanted))} pixels; leave out those "
                    "that it cannot take, or use a network that ends with a global pooling."
                ) from error
    finally:
        model.train(was_training)
