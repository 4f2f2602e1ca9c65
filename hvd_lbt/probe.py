"""`layout.micro_batch: auto`: the fastest micro-batch that leaves some memory, found by trying.

Each rank tries alone, so that no rank can wait for another one in it; the smallest of what the
ranks found is taken. What a trial touches is put back: a run with the number that was found has the
same bits.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hvd_lbt.errors import UserError
from hvd_lbt.memory import SPARE, Memory
from hvd_lbt.models import allow_graphs
from hvd_lbt.out_of_memory import is_out_of_memory, release_cached_memory
from hvd_lbt.recipe import MAX_MICRO_BATCH
from hvd_lbt.training import Training

REPEATS = 3  # passes that are timed, unless one takes longer than
LONG = 2.0  # seconds
PATIENCE = 60.0  # seconds after which a stage gets no further trial
SLOWER = 0.9  # of the best images/s; two sizes in a row below it end the search


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a stage asks for. most: samples of the largest share that a rank has of an update."""

    image_size: int
    ghost_batch: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A micro-batch that was tried. memory: of what may be used at most, above 1 too much.

    images_per_second: of forward and backward, 0 if memory ran out.
    """

    image_size: int
    ghost_batch: int
    samples: int
    memory: float
    images_per_second: float

    @property
    def fits(self) -> bool:
        """Whether it ran, and left enough memory."""
        return self.memory <= 1 and self.images_per_second > 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found: by demand the micro-batch, and that of evaluation; 0: nothing fits."""

    sizes: tuple[int, ...]
    evaluation: int
    trials: tuple[Trial, ...]


def candidates(demand: Demand) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, … ghost batches, up to all that a rank has of an update."""
    most = min(demand.most, MAX_MICRO_BATCH)
    whole = 1
    while (samples := whole * demand.ghost_batch) < most:
        yield samples
        power = 1 << (whole.bit_length() - 1)
        whole = 2 * power if whole != power else max(whole + 1, whole + whole // 2)
    yield max(demand.ghost_batch, most // demand.ghost_batch * demand.ghost_batch)


class Probe:
    """Tries micro-batches on this rank alone, without a message to any other.

    classes: outputs of the network; input_copies: batches that the input keeps in memory ahead;
    compiles: whether each new size makes a graph of torch.compile.
    """

    def __init__(
        self,
        training: Training,
        memory: Memory,
        *,
        classes: int,
        input_copies: int = 0,
        compiles: bool = False,
    ):
        self._training, self._memory, self._classes = training, memory, classes
        self._input_copies, self._compiles = input_copies, compiles
        self._device = training.device

    def find(self, demands: Sequence[Demand], test_image_size: int) -> Found:
        """Try each demand, and the evaluation; afterwards everything is as it was."""
        trials: dict[Demand, list[Trial]] = {}
        model = self._training.model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        ghost_batch, was_training = self._training.statistics.ghost_batch, model.training
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                # what a first pass allocates once, for all sizes, is no part of a size's memory
                self._try(demands[0], demands[0].ghost_batch)
                for demand in dict.fromkeys(demands):
                    trials[demand] = [*self._search(demand)]
                sizes = tuple(best(trials[demand]) for demand in demands)
                evaluation = self._evaluation(demands, sizes, test_image_size)
            finally:
                model.train(was_training)
                self._training.forget()
                if ghost_batch is not None:
                    self._training.statistics.use_ghost_batch(ghost_batch)
                with torch.no_grad():
                    for name, buffer in model.named_buffers():
                        buffer.copy_(buffers[name])
        release_cached_memory()
        tried = tuple(trial for its in trials.values() for trial in its)
        return Found(sizes=sizes, evaluation=evaluation, trials=tried)

    def _search(self, demand: Demand) -> Iterator[Trial]:
        """Larger and larger sizes, as long as the next one should fit and might be faster."""
        done: list[Trial] = []
        began = time.perf_counter()
        for samples in candidates(demand):
            if done and self._predicted(done, samples) > 1:
                return
            trial = self._try(demand, samples)
            done.append(trial)
            yield trial
            fastest = max(one.images_per_second for one in done)
            slow = [one.images_per_second < SLOWER * fastest for one in done[-2:]]
            late = time.perf_counter() - began > PATIENCE
            if not trial.fits or (len(slow) == 2 and all(slow)) or late:
                return

    def _predicted(self, done: Sequence[Trial], samples: int) -> float:
        """Share of the memory that so many samples will take: it grows with their number.

        On a CPU the kernel kills a process that takes too much, and no error can be caught: a size
        that should not fit is not tried.
        """
        last, before = done[-1], done[-2] if len(done) > 1 else None
        first = (0, self._start) if before is None else (before.samples, before.memory)
        slope = max(0.0, (last.memory - first[1]) / (last.samples - first[0]))
        return last.memory + slope * (samples - last.samples)

    def _try(self, demand: Demand, samples: int) -> Trial:
        """Forward and backward of so many samples, some times over, with their gradients kept."""
        training = self._training
        if self._compiles:
            allow_graphs(1)
        release_cached_memory()
        self._memory.begin()
        more = self._input_copies * samples * 3 * demand.image_size**2 * 4
        self._start = self._memory.share()
        seconds: list[float] = []
        try:
            images, labels = self._batch(samples, demand.image_size)
            first = self._timed(demand, images, labels)
            while not training.reducer.dropped and len(seconds) < (REPEATS if first < LONG else 1):
                seconds.append(self._timed(demand, images, labels))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            seconds = []
        ran_out = training.reducer.dropped or not seconds
        share = self._memory.share(more)
        training.forget()
        return Trial(
            image_size=demand.image_size,
            ghost_batch=demand.ghost_batch,
            samples=samples,
            memory=share,
            images_per_second=0.0 if ran_out else samples / min(seconds),
        )

    def _timed(self, demand: Demand, *batch: torch.Tensor) -> float:
        began = time.perf_counter()
        self._training.rehearse(demand.ghost_batch, *batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def _batch(self, samples: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random images and labels: on the device, from random numbers of their own."""
        generator = torch.Generator(self._device).manual_seed(0)
        shape = (samples, 3, image_size, image_size)
        images = torch.randn(shape, generator=generator, device=self._device)
        labels = torch.randint(self._classes, (samples,), generator=generator, device=self._device)
        return images, labels

    def _evaluation(self, demands: Sequence[Demand], sizes: Sequence[int], image_size: int) -> int:
        """As many test images as training takes at the most pixels; fewer if they are larger."""
        if not all(sizes):
            return 0
        demand, size = max(
            zip(demands, sizes, strict=True), key=lambda pair: (pair[0].image_size, pair[1])
        )
        size = max(1, int(size * min(1.0, (demand.image_size / image_size) ** 2)))
        while size and not self._evaluates(size, image_size):
            size //= 2
        return size

    @torch.inference_mode()
    def _evaluates(self, samples: int, image_size: int) -> bool:
        """Whether a forward pass of test images fits."""
        release_cached_memory()
        self._memory.begin()
        try:
            self._training.model.eval()(self._batch(samples, image_size)[0])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return self._memory.share() <= 1 or samples == 1


def best(trials: Sequence[Trial]) -> int:
    """The fastest size that fits; the smallest, if it ran at all, where none leaves enough; else
    0.
    """
    fitting = [trial for trial in trials if trial.fits]
    if fitting:
        return max(fitting, key=lambda trial: trial.images_per_second).samples
    return trials[0].samples if trials[0].images_per_second else 0


def agreed(found: Sequence[Found], demands: Sequence[Demand]) -> Found:
    """The smallest of what all ranks found, which therefore fits all of them.

    Raises UserError, alike on all ranks, if on some rank not even one ghost batch fits.
    """
    for rank, its in enumerate(found):
        if not all((*its.sizes, its.evaluation)):
            short = next((d for d, size in zip(demands, its.sizes, strict=True) if not size), None)
            what = (
                f"one ghost batch of {short.ghost_batch} samples of {short.image_size} pixels"
                if short
                else "one test image"
            )
            raise UserError(
                f"layout.micro_batch: auto: the memory of rank {rank} is too small for {what}. "
                "Take a smaller layout.ghost_batch, data.image_size or model, or workers with "
                "more memory."
            )
    return Found(
        sizes=tuple(min(sizes) for sizes in zip(*(its.sizes for its in found), strict=True)),
        evaluation=min(its.evaluation for its in found),
        trials=found[0].trials,
    )


def plain(found: Found) -> dict[str, Any]:
    """Lists and numbers, for `agreed` of another rank and for the log."""
    return asdict(found)


def from_plain(values: dict[str, Any]) -> Found:
    """What `plain` gave."""
    trials = tuple(Trial(**trial) for trial in values["trials"])
    return Found(sizes=tuple(values["sizes"]), evaluation=values["evaluation"], trials=trials)


def words(found: Found) -> str:
    """What was tried, in one sentence."""
    tried = sorted({trial.samples for trial in found.trials})
    return f"the fastest of {tried[0]:,} to {tried[-1]:,} samples that leaves {SPARE:.0%} of memory"
