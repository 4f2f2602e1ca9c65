"""One training as a whole, and what is done between its updates: log, evaluate, save."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from hvd_lbt import comm
from hvd_lbt.checkpoint import Checkpoints
from hvd_lbt.data.identity import Identity
from hvd_lbt.data.samples import Batch, Images
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.elastic import worker as elastic
from hvd_lbt.errors import BadUpdatesError, OutOfMemoryError, UserError
from hvd_lbt.evaluate import evaluate
from hvd_lbt.log.profile import Profile
from hvd_lbt.log.run_log import RunLog
from hvd_lbt.micro_batch import UpdateStream
from hvd_lbt.models import allow_graphs
from hvd_lbt.recipe import Recipe
from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule.plan import Plan, Update
from hvd_lbt.training import Training
from hvd_lbt.world import World


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training consists of, and what is done between its updates."""

    recipe: Recipe
    plan: Plan
    world: World
    training: Training
    classes: Sequence[str]
    splits: dict[str, Identity]
    test_store: Images | SyntheticStore
    checkpoints: Checkpoints
    log: RunLog
    stream: UpdateStream[Batch]
    profile: Profile

    def update(self, update: Update, batches: MicroBatches[Batch]) -> None:
        """Do one update, again in smaller micro-batches if memory runs out, and log it."""
        self.profile.before(update.index)
        data_wait, tally = 0.0, None
        while tally is None:
            try:
                tally = self.training.update(update, batches)
            except BadUpdatesError as error:
                raise BadUpdatesError(f"{error} {self.checkpoints.last_good()}") from error
            except OutOfMemoryError as error:
                data_wait += batches.waited
                batches = self._smaller(update, error)
        self.profile.after(update.index)
        self.log.update(
            update,
            tally.sums,
            data_wait=data_wait + batches.waited,
            reducer=self.training.reducer.stats(),
            noise=self.training.noise.averages,
            times=tally.times,
        )
        if sizes := self.log.unknown_costs(update):  # once, after some updates
            self.log.learn_costs(comm.allgather_object(self.training.costs(sizes)))

    def _smaller(self, update: Update, error: OutOfMemoryError) -> MicroBatches[Batch]:
        """The update's samples once more, in smaller micro-batches; so are all later updates'."""
        before = self.stream.sizes
        after = before.smaller(update, self.stream.ghost_batches, self.world)
        if after is None:
            self._give_up(update.index, error, "a smaller layout.ghost_batch or model")
        if self.recipe.run.compile:
            allow_graphs(len(self.stream.shapes(after)))
        self.log.out_of_memory(
            update.index, error, before.stages[update.stage], after.stages[update.stage]
        )
        self.log.use_micro_batches(after.stages)
        return self.stream.again(after)

    def _smaller_evaluation(self, update: Update, error: OutOfMemoryError, size: int) -> None:
        """Note that the evaluation goes on with micro-batches of `size`; so do all later ones."""
        before = self.stream.sizes
        self.stream.sizes = replace(before, evaluation=size)
        self.log.out_of_memory(update.index + 1, error, before.evaluation, size)

    def _give_up(self, updates_done: int, error: OutOfMemoryError, what: str) -> NoReturn:
        """Save, and say on all ranks what needs less memory."""
        self.log.print_own(error)
        saved = ""
        if updates_done:
            self.save(updates_done, best=False)
            self.checkpoints.wait()
            saved = f" Saved after {updates_done:,} updates: --resume continues from there."
        raise UserError(
            f"{error.who}, and the micro-batch cannot be smaller. Take "
            f"{what}, or workers with more memory.{saved}"
        ) from error

    def evaluate(self, update: Update) -> bool:
        """Measure and log the test accuracy where it is due; whether it is the best so far."""
        if not evaluation_is_due(update, self.plan, self.recipe.run.eval_every):
            return False
        try:
            result = evaluate(
                self.training.model,
                self.test_store,
                self.recipe.data,
                micro_batch=self.stream.sizes.evaluation,
                world=self.world,
                allreduce=comm.allreduce_,
                device=self.training.device,
                on_skipped=self.log.skipped_sample,
                on_smaller=partial(self._smaller_evaluation, update),
                averages=self.training.average.averages if self.training.average else None,
                image_size=update.image_size,
            )
        except OutOfMemoryError as error:
            self._give_up(update.index + 1, error, "smaller test images or a smaller model")
        self.log.evaluation(update, result.to_dict())
        return self.checkpoints.better(result.best_top1)

    def state_after(self, updates_done: int) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "update": updates_done,
            "recipe": self.recipe.to_dict(),
            "train_samples": self.plan.train_samples,
            "data": self.splits,
            "classes": list(self.classes),
            "micro_batch": self.stream.sizes.to_dict(),
            **self.training.state_dict(),
        }

    def save(self, updates_done: int, *, best: bool) -> None:
        """Write a checkpoint, and before it what was logged."""
        self.log.flush()
        self.checkpoints.save(updates_done, self.state_after(updates_done), best=best)
        self.log.saved(updates_done)

    def commit(self, membership: elastic.Membership, updates_done: int) -> None:
        """Keep the state in memory for workers that come and go."""
        self.log.flush()
        state = self.state_after(updates_done) | {"best_top1": self.checkpoints.best_top1}
        membership.commit(state, following=self.plan.stages[self.plan.at(updates_done).stage])

    def close(self) -> None:
        """End what is logged, where the training itself goes on with other workers."""
        self.profile.close()
        self.log.close()

    def end(self, reason: str, updates_done: int) -> None:
        """Wait for the last checkpoint and close the log; reason: finished or stopped."""
        self.profile.close()
        self.checkpoints.wait()
        if reason == "stopped":
            self.log.say(
                f"Stopped after {updates_done} of {self.plan.updates} updates and saved: use "
                "--resume."
            )
        self.log.end(reason, updates_done)


def evaluation_is_due(update: Update, plan: Plan, every: int) -> bool:
    """Whether `update` ends a span of `every` epochs, or the run."""
    span = every * plan.train_samples
    seen = update.samples_seen + update.global_batch
    return seen // span > update.samples_seen // span or update.index + 1 == plan.updates
