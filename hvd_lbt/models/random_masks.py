"""Dropout and stochastic depth whose masks follow the sample, not the rank that computes it.

The random numbers are Philox 4×32-10 (J. K. Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), a function of key and counter. The key is run.seed; the counter is the sample's
place in the stream of samples, the layer, the layer's call in this forward, and the element's place
within the sample. So a mask is the same after a resume, on any number of workers, in any
micro-batch, and on CPU and GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvd_lbt.errors import UserError
from hvd_lbt.models.forward_samples import ForwardSamples, is_recomputing, random_states
from hvd_lbt.schedule.layout import count_ghost_batches

WORD = 0xFFFFFFFF  # of 32 bits, kept in int64: torch has little arithmetic for uint32
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
CALLS = 1 << 12  # of one layer in one forward
WHOLE_FORWARD = WORD  # the place of a layer, for the seed of a whole forward


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox 4×32-10: four words of 32 random bits from four words of counter and two of key.

    counter: int64 tensors of values below 2^32, of shapes that broadcast. Products wrap at 64 bits;
    the bits that are used are right all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & WORD) ^ c1 ^ k0,
            high & WORD,
            ((low >> 32) & WORD) ^ c3 ^ k1,
            low & WORD,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return [c0, c1, c2, c3]


def random_words(seed: int, first: Tensor, samples: int, place: int, draws: int) -> Tensor:
    """`draws` random words for each of `samples` samples from `first` on: int64 (samples, draws).

    place: of the layer and its call; each has numbers of its own.
    """
    positions = (first + torch.arange(samples, device=first.device))[:, None]
    blocks = torch.arange(-(-draws // 4), device=first.device)[None]
    counter = (blocks, torch.full_like(blocks, place), positions & WORD, (positions >> 32) & WORD)
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32)), dim=-1)
    return words.flatten(1)[:, :draws]


class RandomLayer(nn.Module):
    """What dropouts that follow the sample share; their classes are mixed with torch's."""

    samples: ForwardSamples
    place: int

    def keeps(self, x: Tensor, dims: int, drop: float) -> Tensor:
        """The mask of x: True with the probability 1 − drop, of x's first `dims` sizes, then 1."""
        samples, calls = self.samples, self.samples.calls
        if is_recomputing():
            if calls.get(self.place, 1) > 1:
                raise UserError(
                    "model.name: a dropout layer that is called several times in a forward is "
                    "inside of torch.utils.checkpoint, and its masks cannot be drawn again in the "
                    "same order. Make a dropout layer for each place."
                )
            call = 0
        else:
            call = calls.get(self.place, 0)
            calls[self.place] = call + 1
        rows = samples.rows_of(len(x), type(self).__name__)
        shape = x.shape[:dims]
        draws = rows * shape[1:].numel()
        place = self.place * CALLS + call
        words = random_words(samples.seed, samples.first, len(x) // rows, place, draws)
        kept = words >= round(drop * 2**32)
        return kept.reshape(*shape, *[1] * (x.ndim - dims))


class SampleDropout(RandomLayer):
    """nn.Dropout, per element; nn.Dropout1d, 2d and 3d, per channel."""

    p: float
    whole_channels: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0
        mask = self.keeps(x, 2 if self.whole_channels else x.ndim, self.p)
        return x * (mask.to(x.dtype) / (1 - self.p))


class SampleDropPath(RandomLayer):
    """timm's DropPath and torchvision's StochasticDepth(mode="row"): per row of a branch."""

    def forward(self, x: Tensor) -> Tensor:
        drop = float(getattr(self, "drop_prob", None) or getattr(self, "p", 0.0) or 0.0)
        if not self.training or drop == 0:
            return x
        if drop == 1:
            return x * 0
        mask = self.keeps(x, 1, drop).to(x.dtype)
        return x * (mask / (1 - drop) if getattr(self, "scale_by_keep", True) else mask)


def follow_samples(model: nn.Module, samples: ForwardSamples) -> int:
    """Let the dropout layers of `model` draw by sample, in place; how many there are."""
    place = 0
    for module in model.modules():
        mixin = _mixin(module)
        if mixin is None:
            continue
        cls = type(module)
        module.__class__ = type(f"Sample{cls.__name__}", (mixin, cls), {"__module__": __name__})
        object.__setattr__(module, "samples", samples)
        module.place = place  # type: ignore[assignment]
        if mixin is SampleDropout:
            module.whole_channels = cls is not nn.Dropout  # type: ignore[assignment]
        place += 1
    return place


def draws_by_rank(module: nn.Module) -> bool:
    """Whether this very layer drops something, and `follow_samples` has not changed it."""
    drop = getattr(module, "drop_prob", None) or getattr(module, "p", 0.0)
    return _mixin(module) is not None and bool(drop)


def _mixin(module: nn.Module) -> type[RandomLayer] | None:
    """How this very layer is drawn by sample; None for what is not random, or is not known."""
    cls = type(module)
    if cls in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        return SampleDropout
    if cls.__module__.startswith("timm.") and cls.__name__ == "DropPath":
        return SampleDropPath
    is_depth = cls.__module__.startswith("torchvision.") and cls.__name__ == "StochasticDepth"
    return SampleDropPath if is_depth and getattr(module, "mode", "") == "row" else None


class ByGhostBatch(nn.Module):
    """Runs a network one ghost batch at a time, torch's generators seeded by its first sample.

    For networks that draw random numbers in a way that cannot be drawn by sample (F.dropout,
    attention's dropout, DropBlock). Slower, since small batches use a GPU less well; exact.
    The generators are left as they were.
    """

    def __init__(self, model: nn.Module, samples: ForwardSamples) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "samples", samples)
        self.samples: ForwardSamples

    def forward(self, images: Tensor) -> Tensor:
        samples, size = self.samples, self.samples.ghost_batch
        groups = count_ghost_batches(len(images), size)
        sizes = [size] * (groups - 1) + [len(images) - size * (groups - 1)]
        device = samples.first.device
        before = random_states(device)
        first = samples.place
        done = []
        try:
            for part in images.split(sizes):
                samples.first.fill_(first)
                place = torch.tensor(first)  # on the CPU: nobody waits for the device
                words = random_words(samples.seed, place, 1, WHOLE_FORWARD, 2)
                high, low = words[0].tolist()
                torch.manual_seed(high << 31 | low >> 1)  # 63 bits
                done.append(self.model(part))
                first += len(part)
        finally:
            torch.set_rng_state(before[0])
            for state in before[1:]:
                torch.cuda.set_rng_state(state, device)
        return done[0] if len(done) == 1 else torch.cat(done)


def random_layers(model: nn.Module) -> Iterator[RandomLayer]:
    """The layers that draw by sample."""
    return (module for module in model.modules() if isinstance(module, RandomLayer))
