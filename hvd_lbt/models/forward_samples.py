"""Which samples of the stream a forward pass is of, for layers whose work depends on that."""

from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt.errors import UserError


class ForwardSamples:
    """The samples of the forward pass under way, as all layers of one network see them.

    count: how many; place, first: the first one's place in the stream of samples, as a number, and
    as int64 () on the device; seed: of the run; ghost_batch: of the layout. by_ghost_batch: the
    network draws random numbers of its own, so its forward runs one ghost batch at a time
    (`models.random_masks`).
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.count, self.place, self.ghost_batch = seed, 0, 0, 1
        self.first = torch.zeros((), dtype=torch.int64)
        self.by_ghost_batch = False
        self.calls: dict[int, int] = {}  # of each random layer in this forward
        self._random: list[Tensor] = []

    def begin(self, first: int, ghost_batch: int, device: torch.device) -> None:
        """The next forward is of the samples from `first` on."""
        if self.first.device != device:
            self.first = self.first.to(device)
        self.first.fill_(first)
        self.place, self.ghost_batch = first, ghost_batch
        self.calls.clear()  # compiled code is for the state that it begins with
        self._random = random_states(device)

    def end(self) -> None:
        """Raise UserError if the forward drew random numbers that do not follow the samples."""
        states = random_states(self.first.device)
        if not all(map(torch.equal, states, self._random)):
            raise UserError(
                "the network drew random numbers in forward from torch's global generator, and did "
                "not when it was tested before training; they would depend on the number of "
                "workers. Use nn.Dropout or timm's DropPath as layers, or draw in every forward."
            )

    def rows_of(self, rows: int, what: str) -> int:
        """Rows of one sample in a layer's input of so many rows, sample after sample.

        Raises UserError if they cannot be the samples' alone.
        """
        if self.count == 0 or rows == self.count:
            return 1
        if rows % self.count:
            raise UserError(
                f"model.name: {what} got an input of {rows} rows in a forward of {self.count} "
                "samples. The first dimension must be the samples, or a multiple of them, since "
                "statistics and masks are per ghost batch."
            )
        return rows // self.count


def watch(model: nn.Module, samples: ForwardSamples) -> None:
    """Let `samples` know how many samples each forward of `model` has."""

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        samples.count = args[0].shape[0]
        samples.calls = {}

    model.register_forward_pre_hook(begin)
    object.__setattr__(model, "forward_samples", samples)


def samples_of(model: nn.Module) -> ForwardSamples | None:
    """What `watch` gave the model, or None."""
    return model.__dict__.get("forward_samples")


def is_recomputing() -> bool:
    """Whether a forward is run again inside of backward, as torch.utils.checkpoint does."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators that a forward on `device` can draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
