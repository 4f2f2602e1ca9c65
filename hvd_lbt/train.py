"""Train with a batch that grows: the story of a run, from recipe to the last checkpoint."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hvd_lbt import comm
from hvd_lbt.arguments import add_take_over
from hvd_lbt.auto_micro_batch import ghost_batches, starting_sizes
from hvd_lbt.checkpoint import Checkpoints, open_run
from hvd_lbt.data.batches import batches_of
from hvd_lbt.data.identity import Identity, same_on_all_ranks
from hvd_lbt.data.on_device import keep_images
from hvd_lbt.data.samples import Batch, Images
from hvd_lbt.data.stage import stage_data
from hvd_lbt.data.store import open_data
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.elastic import worker as elastic
from hvd_lbt.evaluate import local_device
from hvd_lbt.growing import Growing, read_decisions
from hvd_lbt.log.loggers import check_loggers
from hvd_lbt.log.profile import Profile, allow_timeline
from hvd_lbt.log.run_log import RunLog
from hvd_lbt.micro_batch import MicroBatchSizes, Range, UpdateStream
from hvd_lbt.models import allow_graphs, check_image_sizes, check_one_sample
from hvd_lbt.recipe import Recipe, load_recipe
from hvd_lbt.run import Run
from hvd_lbt.run_lock import RunLock, own_run
from hvd_lbt.schedule.plan import Plan, PlannedUpdates, Update, has_single_samples
from hvd_lbt.stop import EXIT_STOPPED, StopRequest, ignore_signals
from hvd_lbt.training import Training, make_training
from hvd_lbt.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt train`."""
    parser.add_argument("recipe", help="a shipped recipe's name, or a YAML file")
    parser.add_argument(
        "--data", type=Path, help="a data set, MODULE:FUNCTION, `synthetic` or `teacher` [digits]"
    )
    parser.add_argument("--out", type=Path, help="the run's folder [runs/NAME]")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out where it stopped"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="RUN",
        help="with schedule.policy measured: take the batches that this run decided on",
    )
    add_take_over(parser)


def main(args: argparse.Namespace) -> int:
    """Run one training; the exit code is 0 when it is finished, 75 when a signal stopped it."""
    recipe = load_recipe(args.recipe, args.set)
    check_loggers(recipe.run.loggers)
    allow_timeline(recipe.run.profile)
    out = args.out or Path("runs", recipe.name)
    if elastic.is_launched():
        again = partial(train, recipe, data=args.data, out=out, replay=args.replay)
        return elastic.run(recipe, out, again, args.resume)
    world = comm.init()
    with own_run(out, world, take_over=args.take_over) as owner:
        code = train(
            recipe,
            data=args.data,
            out=out,
            resume=args.resume,
            world=world,
            owner=owner,
            replay=args.replay,
        )
    ignore_signals()
    comm.shutdown()
    return code


def _begin(
    recipe: Recipe,
    plan: Plan,
    classes: Sequence[str],
    world: World,
    state: dict[str, Any] | None,
) -> Training:
    """The training with the weights of `state`, or new ones: the same on all ranks."""
    training = make_training(
        recipe,
        len(classes),
        world=world,
        device=local_device(world),
        graphs=0,  # as many as there are sizes, see _stream
        train_samples=plan.train_samples,
        has_state=state is not None,
    )
    sizes = {stage.image_size or recipe.data.image_size for stage in plan.stages}
    check_image_sizes(training.model, sizes)
    if has_single_samples(plan, recipe.layout.ghost_batch):
        check_one_sample(training.model, min(sizes))
    if state:
        training.load_state_dict(state)
    comm.broadcast_(training.model.state_dict())
    training.model.train()
    return training


def _stream(
    recipe: Recipe,
    growing: Growing,
    updates: Sequence[Update],
    store: Images | SyntheticStore,
    world: World,
    sizes: MicroBatchSizes,
    log: RunLog,
) -> UpdateStream[Batch]:
    """The samples of `updates`, in micro-batches for this rank."""

    def make(ranges: Iterable[Range], micro_batch: int) -> Iterator[Batch]:
        return batches_of(
            store,
            recipe.data,
            ranges,
            lambda sample: growing.plan.image_size_at(sample),  # of the plan as it is then
            seed=recipe.run.seed,
            micro_batch=micro_batch,
            device=local_device(world),
            local_size=world.local_size,
            on_skipped=log.skipped_sample,
        )

    stream = UpdateStream(updates, make, world, sizes, ghost_batches(recipe, growing.plan))
    if recipe.run.compile:
        allow_graphs(len(stream.shapes(sizes)))
    return stream


def _state(
    recipe: Recipe, out: Path, splits: dict[str, Identity], resume: bool, world: World
) -> dict[str, Any] | None:
    """What all ranks resume from, None at the start."""
    state: dict[str, Any] | None = comm.broadcast_object(
        open_run(out, recipe, splits, resume) if world.rank == 0 else None
    )
    return state


def _growing(
    recipe: Recipe,
    train_samples: int,
    state: dict[str, Any] | None,
    replay: Path | None,
    world: World,
) -> Growing:
    """The plan as far as it is decided; rank 0 alone reads the decisions of another run."""
    decisions = None
    if replay is not None:
        if world.rank == 0:
            decisions, notes = read_decisions(replay, recipe, train_samples)
            for note in notes:
                print(note, flush=True)
        decisions = comm.broadcast_object(decisions)
    return Growing(recipe, train_samples, state and state.get("growing"), decisions)


def _profile(
    recipe: Recipe, plan: Plan, first_update: int, out: Path, world: World, log: RunLog
) -> Profile:
    """What `run.profile` asks for."""
    return Profile(
        out,
        recipe.run.profile,
        recipe.run.profile_rank,
        world=world,
        plan=plan,
        first_update=first_update,
        start_timeline=comm.start_timeline,
        stop_timeline=comm.stop_timeline,
        say=log.say,
    )


def train(
    recipe: Recipe,
    *,
    data: Path | None,
    out: Path,
    resume: bool,
    world: World,
    membership: elastic.Membership | None = None,
    owner: RunLock | None = None,
    replay: Path | None = None,
) -> int:
    """Train `recipe` on the images in `data` (None: the digits), all of the run's files in `out`.

    membership: of workers that may come and go; training resumes from its state, if it has one.
    owner: rank 0's ownership of `out`, looked at again before each save. replay: the run whose
    decisions about the batch are taken instead of new ones.
    """
    # Set up, plan, and where an earlier run stopped.
    stop = StopRequest()
    train_store, test_store = open_data(data, recipe)
    splits = same_on_all_ranks({"train": train_store, "test": test_store}, comm.allgather_object)
    state = membership.state if membership else None
    if state is None:
        state = _state(recipe, out, splits, resume, world)
    growing = _growing(recipe, len(train_store), state, replay, world)
    plan = growing.plan
    first_update = state["update"] if state else 0
    if first_update == plan.updates:
        if world.rank == 0:
            print(f"{out} is finished: all {plan.updates:,} updates are done.", flush=True)
        return 0  # a requeued job has nothing left to do, which is no failure
    updates = PlannedUpdates(plan, first_update)
    stores = {"train": train_store, "test": test_store}
    staged = stage_data(stores, recipe.data, copies=world.local_rank == 0)
    training = _begin(recipe, plan, train_store.classes, world, state)
    if recipe.data.cache_on_device and recipe.layout.micro_batch == "auto":
        keep_images((train_store, test_store), recipe.data, training.device)
    same_job = membership is not None and state is membership.state
    classes, gather = len(train_store.classes), comm.allgather_object
    kept = state.get("micro_batch") if state else None
    start = starting_sizes(recipe, plan, training, world, classes, kept, same_job, gather)
    log = RunLog(out, world, plan, first_update, recipe)
    stream = _stream(recipe, growing, updates, train_store, world, start.sizes, log)
    best_top1 = state["best_top1"] if state else -1.0
    run = Run(
        recipe=recipe,
        growing=growing,
        world=world,
        training=training,
        classes=train_store.classes,
        splits=splits,
        test_store=test_store,
        checkpoints=Checkpoints(out / "checkpoints", recipe.run, world, gather, best_top1, owner),
        log=log,
        stream=stream,
        profile=_profile(recipe, plan, first_update, out, world, log),
    )
    run.begin(start, staged, _hosts())
    if membership:
        membership.begin(plan.stages[updates[0].stage], at_end=run.close, stop=stop)

    # Train, and save at the end of a stage, when it is due, and where the accuracy is best.
    for update, batches in stream:
        votes = run.update(update, batches, stop.votes(save=run.checkpoints.due()))
        done = update.index + 1
        asked_to_stop, due = stop.agreed(votes)
        stopped = asked_to_stop and done < run.plan.updates
        best = run.evaluate(update)
        run.grow(update)
        ends = done == run.plan.updates or run.plan.at(done).stage != update.stage
        if stopped or due or best or ends:
            run.save(done, best=best)
        if stopped:
            run.end("stopped", done)
            return EXIT_STOPPED
        if membership and done < run.plan.updates:
            run.commit(membership, done)
    run.end("finished", run.plan.updates)
    return 0


def _hosts() -> list[str]:
    """The name of each rank's host."""
    return comm.allgather_object(os.uname().nodename)
