"""Train with a batch that grows: the story of a run, from recipe to the last checkpoint."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvd_lbt import comm
from hvd_lbt.checkpoint import Checkpoints, open_run
from hvd_lbt.data.samples import Batch, batch_maker
from hvd_lbt.data.store import open_data
from hvd_lbt.elastic import worker as elastic
from hvd_lbt.errors import BadUpdatesError
from hvd_lbt.evaluate import evaluate, local_device
from hvd_lbt.hyperparameters import make_optimizer, set_hyperparameters
from hvd_lbt.measure.gradient_noise import GradientNoise
from hvd_lbt.metrics import RunLog
from hvd_lbt.models import RunningStatistics, build_model, check_one_sample, compiled, make_forward
from hvd_lbt.recipe import Recipe, load_recipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.run_lock import RunLock, own_run
from hvd_lbt.schedule.plan import (
    Plan,
    Update,
    has_single_samples,
    layout_of,
    make_plan,
    micro_batch_ranges,
)
from hvd_lbt.stop import EXIT_STOPPED, StopRequest, ignore_signals
from hvd_lbt.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt train`."""
    parser.add_argument("recipe", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--data", type=Path, help="a data set, or `synthetic` [digits]")
    parser.add_argument("--out", type=Path, help="the run's folder [runs/NAME]")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run in --out stopped"
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take --out from an owner that cannot be proven gone, because you know that it is",
    )


def main(args: argparse.Namespace) -> int:
    """Run one training; the exit code is 0 when it is finished, 75 when a signal stopped it."""
    recipe = load_recipe(args.recipe, args.set)
    out = args.out or Path("runs", recipe.name)
    if elastic.is_launched():
        return elastic.run(
            recipe, out, partial(train, recipe, data=args.data, out=out), args.resume
        )
    world = comm.init()
    with own_run(out, world, take_over=args.take_over) as owner:
        code = train(recipe, data=args.data, out=out, resume=args.resume, world=world, owner=owner)
    ignore_signals()
    comm.shutdown()
    return code


def train(
    recipe: Recipe,
    *,
    data: Path | None,
    out: Path,
    resume: bool,
    world: World,
    membership: elastic.Membership | None = None,
    owner: RunLock | None = None,
) -> int:
    """Train `recipe` on the images in `data` (None: the digits), all of the run's files in `out`.

    membership: of workers that may come and go; its state, if there is one, is gone on from.
    owner: rank 0's ownership of `out`, looked at again before each save.
    """
    stop = StopRequest(comm.allreduce_async_, comm.synchronize)
    device = local_device(world)
    train_store, test_store = open_data(data, recipe)
    plan = make_plan(recipe.schedule, len(train_store))
    state = membership.state if membership else None
    if state is None:
        state = comm.broadcast_object(
            open_run(out, recipe, plan.train_samples, resume) if world.rank == 0 else None
        )
    first_update = state["update"] if state else 0
    if first_update == plan.updates:
        if world.rank == 0:
            print(f"{out} is finished: all {plan.updates:,} updates are done.", flush=True)
        return 0  # a requeued job has nothing left to do, which is no failure

    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe.model, len(train_store.classes), recipe.layout.ghost_batch)
    memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's own stub lacks it
    if has_single_samples(plan, recipe.layout.ghost_batch):
        check_one_sample(model, recipe.data.image_size)
    statistics = RunningStatistics(model)
    optimizer = make_optimizer(model, recipe.optimizer, plan.at(0))
    reducer = GradientReducer(
        model,
        optimizer,
        world=world,
        allreduce_async=comm.allreduce_async_,
        synchronize=comm.synchronize,
        wire=recipe.wire.form,
        bucket_mb=recipe.wire.bucket_mb,
        max_bad_updates=recipe.run.max_bad_updates,
    )
    noise = GradientNoise(model, recipe.run.noise_every)
    trained: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "reducer": reducer,
        "gradient_noise": noise,
    }
    if state:
        for name, part in trained.items():
            part.load_state_dict(state[name])
    comm.broadcast_(model.state_dict())

    checkpoints = Checkpoints(
        out / "checkpoints",
        recipe.run,
        world,
        comm.allgather_object,
        best_top1=state["best_top1"] if state else -1.0,
        owner=owner,
    )
    log = RunLog(out, world, plan, first_update)
    log.begin(recipe, len(test_store), first_update)

    def state_after(updates_done: int) -> dict[str, Any]:
        about = {
            "update": updates_done,
            "recipe": recipe.to_dict(),
            "train_samples": plan.train_samples,
            "classes": list(train_store.classes),
        }
        return about | {name: part.state_dict() for name, part in trained.items()}

    def save(updates_done: int, *, best: bool = False) -> None:
        log.flush()
        checkpoints.save(updates_done, state_after(updates_done), best=best)

    cuts = recipe.layout.model_dump()
    updates = [plan.at(index) for index in range(first_update, plan.updates)]
    batches = batch_maker(recipe.data).train_batches(
        train_store,
        recipe.data,
        micro_batch_ranges(updates, world, **cuts),
        seed=recipe.run.seed,
        micro_batch=recipe.layout.micro_batch,
        device=device,
        local_size=world.local_size,
        left_out=log.left_out,
    )
    forward = make_forward(model, recipe.run)
    if recipe.run.compile:
        sizes = {tuple(size) for _, *size in micro_batch_ranges(updates, world, **cuts)}
        forward = compiled(forward, graphs=len(sizes))
    sums = torch.zeros(3, device=device)  # of losses, of right answers, of samples not left out
    model.train()
    if membership:
        membership.begin(plan.stages[updates[0].stage], at_end=log.close, stop=stop)

    for update in updates:
        set_hyperparameters(optimizer, update, recipe.schedule)
        statistics.use_ghost_batch(update.ghost_batch or recipe.layout.ghost_batch)
        stop.ask(save=checkpoints.due())
        sums.zero_()
        noise.begin(update.index, update.global_batch)
        data_wait = 0.0
        count = len(layout_of(update, world, **cuts).micro_batches)
        for index in range(count):
            batch, waited = timed_next(batches)
            data_wait += waited
            losses, told = forward(batch.images, batch.labels)
            reducer.backward(losses / update.global_batch, last=index == count - 1)
            noise.add_part(len(batch.labels))
            sums += told
        if count == 0:  # fewer ghost batches than workers: this one only takes part in the sum
            reducer.backward(None, last=True)
        handles = [
            comm.allreduce_async_(sums, "metrics"),
            comm.allreduce_async_(statistics.collected, "batch norm"),
            *noise.send(comm.allreduce_async_),
        ]
        skipped = reducer.stats()["skipped"]
        try:
            optimizer.step()
        except BadUpdatesError as error:
            raise BadUpdatesError(f"{error} {checkpoints.last_good()}") from error
        for handle in handles:
            comm.synchronize(handle)
        noise.end(reducer.squared_norm)
        if reducer.stats()["skipped"] == skipped:
            statistics.fold(update.global_batch)
        else:
            statistics.discard()  # they may be NaN as the gradient was
        log.update(update, sums, data_wait=data_wait, reducer=reducer.stats(), noise=noise.averages)

        done = update.index + 1
        told_to_stop, due = stop.agreed()
        stopped = told_to_stop and done < plan.updates
        best = False
        if evaluation_is_due(update, plan, recipe.run.eval_every):
            result = evaluate(
                model,
                test_store,
                recipe.data,
                micro_batch=recipe.layout.micro_batch,
                world=world,
                allreduce=comm.allreduce_,
                device=device,
                left_out=log.left_out,
            )
            log.evaluation(update, asdict(result))
            best = checkpoints.better(result.top1)
        ends = done == plan.updates or plan.at(done).stage != update.stage
        if stopped or due or best or ends:
            save(done, best=best)
        if stopped:
            checkpoints.wait()
            log.say(f"Stopped after {done} of {plan.updates} updates and saved: use --resume.")
            log.end("stopped", done)
            return EXIT_STOPPED
        if membership and done < plan.updates:
            log.flush()
            state = state_after(done) | {"best_top1": checkpoints.best_top1}
            membership.commit(state, following=plan.stages[plan.at(done).stage])

    checkpoints.wait()
    log.end("finished", plan.updates)
    return 0


def timed_next(batches: Iterator[Batch]) -> tuple[Batch, float]:
    """The next batch, and the seconds it was waited for."""
    began = time.perf_counter()
    batch = next(batches)
    return batch, time.perf_counter() - began


def evaluation_is_due(update: Update, plan: Plan, every: int) -> bool:
    """Whether `update` ends a span of `every` epochs, or the run."""
    span = every * plan.train_samples
    seen = update.samples_seen + update.global_batch
    return seen // span > update.samples_seen // span or update.index + 1 == plan.updates
