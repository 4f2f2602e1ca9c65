"""Train a branch from a checkpoint, and evaluate it; nothing of the run itself is written."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from hvd_lbt import comm
from hvd_lbt.auto_micro_batch import ghost_batches, starting_sizes
from hvd_lbt.checkpoint import weights_checksum
from hvd_lbt.data.batches import batches_of
from hvd_lbt.data.order import ORDER_VERSION
from hvd_lbt.data.samples import Batch, Images
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.errors import OutOfMemoryError, SampleError, UserError, one_line
from hvd_lbt.evaluate import Evaluation, evaluate, local_device
from hvd_lbt.micro_batch import MicroBatchSizes, Range, UpdateStream
from hvd_lbt.recipe import EmaRecipe, Recipe
from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule.branches import Kept
from hvd_lbt.schedule.plan import Plan, Update
from hvd_lbt.training import Tally, Training, make_training
from hvd_lbt.world import World

NEVER = 2**62  # bad updates in a row, after which the reducer would end the whole program


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all branches begin with.

    recipe, state: of the checkpoint; test_store and train_store: its data, on every rank.
    """

    recipe: Recipe
    state: Mapping[str, Any]
    plan: Plan
    train_store: Images | SyntheticStore
    test_store: Images | SyntheticStore
    world: World


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Which one: what is kept of the plan, the global batch, and the seed of the samples' order."""

    kept: Kept
    batch: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Branched:
    """What a branch came to, the same on all ranks.

    train_loss, train_accuracy: means over its samples, as they were met; None if nothing was
    finite. evaluation: of the test split after it. bad_updates: dropped, since their gradients were
    not finite. diverged: run.max_bad_updates of them in a row ended the branch, or the test loss is
    not finite. skipped_samples: that could not be decoded. weights_crc32: of the weights after it.
    """

    train_loss: float | None
    train_accuracy: float | None
    evaluation: Evaluation
    updates: int
    bad_updates: int
    skipped_samples: int
    diverged: bool
    weights_crc32: int
    seconds: float


def branch_recipe(recipe: Recipe, seed: int) -> Recipe:
    """The recipe without what is only of a whole run: averages, measurements, profiles, graphs."""
    run = {
        "seed": seed,
        "noise_every": 0,
        "profile": None,
        "profile_rank": 0,
        "compile": False,
        "loggers": (),
        "max_bad_updates": NEVER,
    }
    return recipe.model_copy(update={"ema": EmaRecipe(), "run": recipe.run.model_copy(update=run)})


class Brancher:
    """Trains the branches of one seed, each from the checkpoint's state.

    sizes: micro-batches to begin with; None: those of the run, or what fits here. All ranks call
    the same. Raises UserError.
    """

    def __init__(self, origin: Origin, seed: int, sizes: MicroBatchSizes | None = None):
        self.origin, self.seed = origin, seed
        self.recipe = branch_recipe(origin.recipe, seed)
        self.device = local_device(origin.world)
        classes = len(origin.train_store.classes)
        self.training: Training = make_training(
            self.recipe,
            classes,
            world=origin.world,
            device=self.device,
            graphs=0,
            train_samples=origin.plan.train_samples,
            has_state=True,
        )
        if sizes is None:
            kept, gather = origin.state.get("micro_batch"), comm.allgather_object
            start = starting_sizes(
                self.recipe, origin.plan, self.training, origin.world, classes, kept, False, gather
            )
            for line in start.lines if origin.world.rank == 0 else ():
                print(line, flush=True)
            sizes = start.sizes
        self.sizes = sizes

    def gradient_noise(self) -> dict[str, Any]:
        """tr(Σ) and |G|² as the checkpoint has them, NaN if nothing was measured, and from what."""
        self._begin()
        noise = self.training.noise
        variance, squared = noise.averages.tolist()
        return {"variance": variance, "squared": squared, "from": noise.source}

    def evaluate_start(self, image_size: int | None) -> Evaluation:
        """Evaluate the checkpoint itself."""
        self._begin()
        return self._evaluate(image_size)

    def branch(self, updates: Sequence[Update], *, buffer_factor: float = 1.0) -> Branched:
        """Train these updates from the checkpoint on, and evaluate.

        buffer_factor: what the momentum buffers are multiplied by before.
        """
        began = time.perf_counter()
        self._begin()
        if buffer_factor != 1:
            self.training.optimizer.rescale_momentum(buffer_factor)
        stream = self._stream(updates)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        bad = bad_in_a_row = done = missing = 0
        for update, batches in stream:
            tally = self._update(update, batches, stream)
            done += 1
            if tally.skipped:
                bad, bad_in_a_row = bad + 1, bad_in_a_row + 1
                missing += update.global_batch
                if bad_in_a_row == self.origin.recipe.run.max_bad_updates and done < len(updates):
                    break
                continue
            bad_in_a_row = 0
            sums += tally.sums
        stream.close()
        self.sizes = stream.sizes
        evaluation = self._evaluate(updates[-1].image_size)
        loss, right, counted = sums.tolist()
        whole = sum(update.global_batch for update in updates[:done]) - missing
        means = [value / counted if counted else float("nan") for value in (loss, right)]
        return Branched(
            train_loss=means[0] if isfinite(means[0]) else None,
            train_accuracy=means[1] if isfinite(means[1]) else None,
            evaluation=evaluation,
            updates=done,
            bad_updates=bad,
            skipped_samples=whole - round(counted),
            diverged=done < len(updates) or not isfinite(evaluation.loss),
            weights_crc32=self._weights_crc32(),
            seconds=time.perf_counter() - began,
        )

    def close(self) -> None:
        """Release what the training holds."""
        self.training.reducer.close()

    def _begin(self) -> None:
        # torch's optimizer takes the given tensors as its own, and would write into the state
        optimizer = deepcopy(self.origin.state["optimizer"])
        try:
            # of another version of the order the probe warns, and its branches have their own order
            state = {**self.origin.state, "optimizer": optimizer, "order_version": ORDER_VERSION}
            self.training.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                "The checkpoint does not hold the state of its recipe's training: "
                f"{type(error).__name__}: {one_line(error)}."
            ) from error
        self.training.model.train()

    def _stream(self, updates: Sequence[Update]) -> UpdateStream[Batch]:
        image_size = updates[0].image_size

        def make(ranges: Iterable[Range], micro_batch: int) -> Iterator[Batch]:
            return batches_of(
                self.origin.train_store,
                self.recipe.data,
                ranges,
                lambda _: image_size,
                seed=self.seed,
                micro_batch=micro_batch,
                device=self.device,
                local_size=self.origin.world.local_size,
                on_skipped=_print_skipped,
            )

        ghosts = ghost_batches(self.recipe, self.origin.plan)
        return UpdateStream(updates, make, self.origin.world, self.sizes, ghosts)

    def _update(
        self, update: Update, batches: MicroBatches[Batch], stream: UpdateStream[Batch]
    ) -> Tally:
        """One update, again in smaller micro-batches if memory runs out."""
        while True:
            try:
                return self.training.update(update, batches)
            except OutOfMemoryError as error:
                smaller = stream.sizes.smaller(update, stream.ghost_batches, self.origin.world)
                if smaller is None:
                    raise UserError(
                        f"{error.who}, and the micro-batch cannot be smaller. Take workers with "
                        "more memory."
                    ) from error
                self._print_smaller(error, smaller.stages[update.stage])
                batches = stream.again(smaller)

    def _evaluate(self, image_size: int | None) -> Evaluation:
        return evaluate(
            self.training.model,
            self.origin.test_store,
            self.recipe.data,
            micro_batch=self.sizes.evaluation,
            world=self.origin.world,
            allreduce=comm.allreduce_,
            device=self.device,
            on_skipped=_print_skipped,
            on_smaller=self._print_smaller,
            image_size=image_size,
        )

    def _weights_crc32(self) -> int:
        """Of the weights, which must be the same on all ranks."""
        of_ranks = comm.allgather_object(weights_checksum(self.training.model.state_dict()))
        if len(set(of_ranks)) > 1:
            raise RuntimeError(f"the ranks' weights differ after a branch: CRC-32 {of_ranks}")
        return int(of_ranks[0])

    def _print_smaller(self, error: OutOfMemoryError, size: int) -> None:
        if self.origin.world.rank == 0:
            print(f"{error.who}. All ranks continue with a micro-batch of {size}.", flush=True)


def _print_skipped(error: SampleError) -> None:
    print(f"skipped: {error}", file=sys.stderr, flush=True)
