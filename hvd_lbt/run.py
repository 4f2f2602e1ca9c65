"""One training as a whole, and what is done between its updates: log, evaluate, save."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NoReturn

from hvd_lbt import comm
from hvd_lbt.auto_micro_batch import Start, ghost_batches
from hvd_lbt.checkpoint import Checkpoints
from hvd_lbt.data.identity import Identity
from hvd_lbt.data.samples import Batch, Images
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.elastic import worker as elastic
from hvd_lbt.errors import BadUpdatesError, OutOfMemoryError, UserError
from hvd_lbt.evaluate import evaluate
from hvd_lbt.growing import Growing, Noise, profile_costs
from hvd_lbt.log.profile import Profile
from hvd_lbt.log.run_log import RunLog
from hvd_lbt.micro_batch import UpdateStream
from hvd_lbt.models import allow_graphs
from hvd_lbt.recipe import Recipe
from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule.growth import MEASUREMENTS, Costs
from hvd_lbt.schedule.plan import Plan, PlannedUpdates, Stage, Update
from hvd_lbt.schedule.plan_time import Cluster
from hvd_lbt.schedule.speed import SpeedProfile
from hvd_lbt.speed_profile import load_profile
from hvd_lbt.training import Training
from hvd_lbt.world import World


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training consists of, and what is done between its updates."""

    recipe: Recipe
    growing: Growing
    world: World
    training: Training
    classes: Sequence[str]
    splits: dict[str, Identity]
    test_store: Images | SyntheticStore
    checkpoints: Checkpoints
    log: RunLog
    stream: UpdateStream[Batch]
    profile: Profile

    @property
    def plan(self) -> Plan:
        """As far as it is decided."""
        return self.growing.plan

    @cached_property
    def speed(self) -> SpeedProfile | None:
        """For decisions about the batch, instead of the run's own times."""
        name = self.recipe.run.speed
        return load_profile(name) if name else None

    def begin(self, start: Start, staged: str, hosts: Sequence[str]) -> None:
        """Show and note what the run begins with; staged: about its data; hosts: of all ranks.

        Raises UserError if run.speed does not say what the updates of some stage take.
        """
        for stage in self.plan.stages if self.speed else ():
            self._predicted_costs(stage)
        if staged:
            self.log.say(staged)
        self.log.begin(self.recipe, len(self.test_store), start.to_dict(), start.lines, hosts)
        self.log.write_decisions(self.growing)
        for decision in self.growing.decisions if self.growing.replays else ():
            self.log.event("decision", **decision)

    def update(
        self, update: Update, batches: MicroBatches[Batch], votes: Sequence[float]
    ) -> list[float]:
        """Do one update, again in smaller micro-batches if memory runs out, and log it.

        Gives the sums of the ranks' votes.
        """
        self.profile.before(update.index)
        data_wait, tally = 0.0, None
        while tally is None:
            try:
                tally = self.training.update(update, batches, votes)
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
            noise_from=self.training.noise.source,
            times=tally.times,
        )
        if sizes := self.log.unknown_costs(update):  # once, after some updates
            self.log.learn_costs(comm.allgather_object(self.training.costs(sizes)))
        return tally.votes.tolist()

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

    def grow(self, update: Update) -> None:
        """With policy measured: decide the batch where that is due, and go on with it."""
        if not self.growing.is_due(update):
            return
        decision = self._decide(update) if self.world.rank == 0 else None
        decision = comm.broadcast_object(decision)
        if decision is None:
            return
        before = self.plan
        changes = self.growing.take(decision)
        self.log.decision(decision, self.growing)
        if not changes:
            return
        plan, stream = self.plan, self.stream
        ghosts = ghost_batches(self.recipe, plan)
        sizes = stream.sizes.replanned(before, plan, ghosts)
        stream.replan(PlannedUpdates(plan, update.index + 1), sizes, ghosts)
        if self.recipe.run.compile:
            allow_graphs(len(stream.shapes(sizes)))
        self.log.replan(plan, sizes.stages)

    def _decide(self, update: Update) -> dict[str, Any] | None:
        """Rank 0's decision: None while too little has been measured."""
        noise = self.training.noise
        variance, squared = noise.averages.tolist()
        measured = Noise(
            variance=variance,
            squared=squared,
            measurements=int(noise.measurements),
            source=noise.source,
        )
        costs = None if self.recipe.schedule.overhead else self._costs(update)
        return self.growing.decide(update, measured, costs)

    def _costs(self, update: Update) -> Costs | None:
        """a and b of updates as they are now, by run.speed or as this run's updates lasted."""
        stage = self.plan.stages[update.stage]
        if self.speed is not None:
            return self._predicted_costs(stage)
        return self.log.costs(update)

    def _predicted_costs(self, stage: Stage) -> Costs:
        """By run.speed. Raises UserError where the profile does not say."""
        assert self.speed is not None
        layout = self.recipe.layout
        cluster = Cluster(
            workers=self.world.size,
            micro_batch=self.stream.sizes.stages[stage.index],
            ghost_batch=layout.ghost_batch,
            image_size=self.recipe.data.image_size,
        )
        return profile_costs(
            self.speed,
            cluster,
            stage.global_batch,
            stage.ghost_batch or layout.ghost_batch,
            stage.image_size or cluster.image_size,
        )

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
            "growing": self.growing.state_dict(),
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
        self.profile.close(updates_done=updates_done if reason == "finished" else None)
        self.checkpoints.wait()
        self.log.write_decisions(self.growing, reason)
        if self.growing.undecided:
            self.log.say(
                f"schedule.policy measured decided nothing: {MEASUREMENTS} measurements of the "
                "gradient's noise are needed, and times of some updates. A smaller run.noise_every "
                f"({self.recipe.run.noise_every}) measures more often."
                + (
                    " Its updates were one micro-batch each, where |G|² comes out too small; a "
                    "smaller layout.micro_batch does not have that fault."
                    if self.training.noise.source == "differences"
                    else ""
                )
            )
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
