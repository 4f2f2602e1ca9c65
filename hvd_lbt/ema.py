"""The moving average of the weights, with a memory that is counted in samples."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a model's weights, e ← d·e + (1−d)·w after each update.

    d = decay^(B/B₀) for an update of B samples: the average forgets a share of 1 − decay every B₀
    samples, some B₀/(1−decay) samples in all, also where the batch grows. With a constant batch of
    B₀ it is `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)` and
    `use_buffers=True`: the first update's weights are copied, and batch norm's running statistics
    are averaged as the weights are; whole numbers among the buffers are those of the model.
    (B. Polyak & A. Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.)

    model: whose state_dict is averaged, in fp32 on its device. decay: 0 < decay < 1, of an update
    of `global_batch` = B₀ samples. The average is the same on all ranks, as the weights are.
    """

    def __init__(self, model: nn.Module, *, decay: float, global_batch: int) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay: {decay} must be above 0 and below 1.")
        if global_batch < 1:
            raise ValueError(f"global_batch: {global_batch} must be at least 1.")
        self.decay, self.global_batch, self.updates = decay, global_batch, 0
        self._model = model
        self._averages = {name: value.detach().clone() for name, value in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; the extra state of a module is not averaged."""
        state = self._model.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def update(self, global_batch: int) -> None:
        """Take the weights after an update of so many samples into the average."""
        weights = self._weights()
        moving = [name for name, value in weights.items() if value.is_floating_point()]
        share = self.share_of(global_batch) if self.updates else 1.0
        if share == 1.0:
            for name in moving:
                self._averages[name].copy_(weights[name])
        else:
            averages, now = ([of[name] for name in moving] for of in (self._averages, weights))
            torch._foreach_lerp_(averages, now, share)
        for name in weights.keys() - moving:
            self._averages[name].copy_(weights[name])
        self.updates += 1

    def share_of(self, global_batch: int) -> float:
        """1 − d, the share that the weights after an update of so many samples get."""
        return -math.expm1(math.log(self.decay) * (global_batch / self.global_batch))

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """The averaged weights under the names of the model's state_dict; not to be changed."""
        return self._averages

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; `averages` loads into the model."""
        return {"averages": dict(self._averages), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the average of `state_dict()`."""
        for name, value in self._averages.items():
            value.copy_(state["averages"][name])
        self.updates = state["updates"]
