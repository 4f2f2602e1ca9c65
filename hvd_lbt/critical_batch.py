"""Measure the critical batch at a checkpoint: branch with B, 2B, 4B, … and compare.

Every branch trains on the same samples, from the same state; one set of branches keeps the noise
scale g (the lr grows with the batch), one keeps the lr. The largest batch that loses nothing beyond
the noise of the seeds is printed beside tr(Σ)/|G|² of the checkpoint. Nothing in the run's folder
changes; results go to --out, where the same command continues after an interruption.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvd_lbt import checkpoint, comm, terminal
from hvd_lbt.arguments import add_take_over, count, positive
from hvd_lbt.branch_record import (
    branches_of,
    entry_of,
    finite,
    key_of,
    losses_of,
    open_record,
    write_record,
    write_result,
)
from hvd_lbt.branch_table import WHAT, render_branches, sentences
from hvd_lbt.branch_training import Branch, Brancher, Origin
from hvd_lbt.data.identity import same_at_resume, same_on_all_ranks
from hvd_lbt.data.on_device import keep_images
from hvd_lbt.data.order import other_version
from hvd_lbt.data.store import open_data
from hvd_lbt.errors import UserError
from hvd_lbt.growing import Growing
from hvd_lbt.measure.branch_verdict import RULE, judge
from hvd_lbt.measure.gradient_noise import simple_noise_scale
from hvd_lbt.micro_batch import MicroBatchSizes
from hvd_lbt.recipe import Recipe, recipe_of
from hvd_lbt.run_lock import RunLock
from hvd_lbt.schedule.branches import Kept, Span, branch_updates, make_span
from hvd_lbt.schedule.plan import Plan
from hvd_lbt.world import World

PICTURE = "probe.png"
MOST_SEEDS = 100
TABLE_WIDTH = 120
KEPT: tuple[Kept, ...] = ("noise", "lr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt probe`."""
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/update-NNNNNNNN.pt")
    parser.add_argument("--data", type=Path, help="the data of the run, as for train [digits]")
    parser.add_argument("--out", type=Path, help="folder of the results [probes/NAME_UPDATE]")
    parser.add_argument(
        "--largest", type=count, metavar="BATCH", help="largest batch, up to 2·B, 4·B, … [N/4]"
    )
    parser.add_argument(
        "--epochs", type=positive, help="length of a branch [0.1, at least 16 updates of B]"
    )
    parser.add_argument(
        "--seeds", type=count, default=3, help="orders of the samples, at least 2 [3]"
    )
    parser.add_argument(
        "--buffer",
        choices=("keep", "rescale"),
        help="rescale: where the lr grows k times, divide the momentum buffer by k [rescale]",
    )
    add_take_over(parser)


def main(args: argparse.Namespace) -> int:
    """Train and evaluate all branches, and write the verdict; the exit code is 0."""
    world = comm.init()
    probe(args, world)
    comm.shutdown()
    return 0


def probe(args: argparse.Namespace, world: World) -> None:
    """The command, on ranks that are there already."""
    if not 2 <= args.seeds <= MOST_SEEDS:
        raise UserError(
            f"--seeds {args.seeds:,} is not allowed: the noise of the seeds needs at least 2; at "
            f"most {MOST_SEEDS} are allowed."
        )
    state = comm.broadcast_object(load_state(args.checkpoint) if world.rank == 0 else None)
    recipe = recipe_of(state["recipe"], f"The checkpoint {args.checkpoint}")
    out = args.out or Path("probes", f"{recipe.name}_{state['update']:08}")
    refuse_run_folder(out, args.checkpoint)
    origin, splits = _origin(recipe, state, args.data, args.checkpoint, world)
    span = make_span(origin.plan, state["update"], epochs=args.epochs, largest=args.largest)
    head: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": state["sha256"],
        "name": recipe.name,
        "train_samples": origin.plan.train_samples,
        "first_update": span.first_update,
        "first_sample": span.first_sample,
        "samples": span.samples,
        "buffer": _buffer(args.buffer, origin.plan, span),
        "data": splits,
    }
    owned = RunLock(out, role="probe", take_over=args.take_over) if world.rank == 0 else None
    with owned or nullcontext():
        Probe(out, head, origin, span, args.seeds).run()


def load_state(file: Path) -> dict[str, Any]:
    """The state that a training can continue from, and the SHA-256 of its file."""
    state, _ = checkpoint.load_trained(file)
    wanted = {"optimizer": dict, "reducer": dict, "gradient_noise": dict, "train_samples": int}
    if missing := checkpoint.missing_parts(state, wanted):
        raise UserError(
            f"The checkpoint {file} has no {', '.join(missing)}: a branch cannot continue from it. "
            "Give one that `hvd_lbt train` wrote, RUN/checkpoints/update-NNNNNNNN.pt."
        )
    with file.open("rb") as stream:
        return {**state, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _buffer(asked: str | None, plan: Plan, span: Span) -> str:
    """What is done with the momentum buffer. Raises UserError if there is none to ask about."""
    momentum = branch_updates(plan, span, span.batches[-1], "noise")[0].momentum
    if asked and not momentum:
        raise UserError(
            f"--buffer {asked} has no effect: the checkpoint's next update has momentum 0. Leave "
            "it out."
        )
    return asked or "rescale"


def refuse_run_folder(out: Path, file: Path) -> None:
    """Raise UserError if the results would lie in the folder of the checkpoint's run."""
    folder = Path(os.path.realpath(file)).parent
    run = folder.parent if folder.name == "checkpoints" else folder
    inside = Path(os.path.realpath(out))
    if inside in (run, folder) or (folder.name == "checkpoints" and run in inside.parents):
        raise UserError(
            f"--out {out}: it lies in the folder of the run, {run}, in which nothing is changed; "
            "give another folder."
        )


def _origin(
    recipe: Recipe, state: Mapping[str, Any], data: Path | None, file: Path, world: World
) -> tuple[Origin, dict[str, Any]]:
    """What the branches begin with; UserError unless the data is the checkpoint's."""
    train_store, test_store = open_data(data, recipe)
    splits = same_on_all_ranks({"train": train_store, "test": test_store}, comm.allgather_object)
    if state["train_samples"] != len(train_store):
        raise UserError(
            f"The checkpoint {file} was trained on {state['train_samples']:,} images, and --data "
            f"{data or 'digits'} has {len(train_store):,}. Give the --data of its run."
        )
    said = same_at_resume(state, splits, f"The checkpoint {file}", resumes=False)
    if said and world.rank == 0:
        print(said, flush=True)
    if other_version(state) and world.rank == 0:
        print(
            f"The checkpoint {file} is of another version of the samples' order: the branches take "
            "other samples than the run itself would have taken next.",
            flush=True,
        )
    plan = Growing(recipe, len(train_store), state.get("growing")).plan
    if not 0 <= state["update"] <= plan.updates:
        raise UserError(
            f"The checkpoint {file} is of {state['update']:,} updates, and its recipe's plan has "
            f"{plan.updates:,}: it is not one that `hvd_lbt train` wrote."
        )
    origin = Origin(
        recipe=recipe,
        state=state,
        plan=plan,
        train_store=train_store,
        test_store=test_store,
        world=world,
    )
    return origin, splits


@dataclass
class Probe:
    """The branches of one checkpoint, kept in OUT/probe.json as they are done.

    head: what they are of; seeds: how many orders of the samples. All ranks call the same.
    """

    out: Path
    head: dict[str, Any]
    origin: Origin
    span: Span
    seeds: int
    _sizes: MicroBatchSizes | None = None

    def run(self) -> None:
        """Do the branches that are not done yet, judge, and write and print what was found."""
        speaks = self.origin.world.rank == 0
        record = comm.broadcast_object(open_record(self.out, self.head) if speaks else None)
        self._say(self._beginning(len(record["branches"])))
        self._say(RULE)
        for number in range(self.seeds):
            self._seed(record, number)
        if speaks:
            self._conclude(record)
        comm.barrier()

    def _say(self, text: str) -> None:
        if self.origin.world.rank == 0:
            print(terminal.printable(text), flush=True)

    def _beginning(self, done: int) -> str:
        span, n = self.span, self.origin.plan.train_samples
        batches = ", ".join(f"{batch:,}" for batch in span.batches)
        updates = span.samples // span.batches[-1]
        text = (
            f"Branches from {self.head['checkpoint']}, after {span.first_update:,} updates: global "
            f"batches of {batches}; {span.samples:,} samples each ({span.samples / n:.3g} epochs, "
            f"{updates:,} update{'s' * (updates > 1)} of the largest batch); {self.seeds} seeds."
        )
        return f"{text} {done} branch{'es' * (done > 1)} of it done already." if done else text

    def _seed(self, record: dict[str, Any], number: int) -> None:
        """The branches of one seed that are not done yet."""
        done = {key_of(one) for one in record["branches"]}
        wanted = [
            Branch(kept=kept, batch=batch, seed=number)
            for kept in KEPT
            for batch in self.span.batches[0 if kept == "noise" else 1 :]
        ]
        wanted = [one for one in wanted if key_of(asdict(one)) not in done]
        if not wanted and record["start"]:
            return
        run_seed = (self.origin.recipe.run.seed + number) % 2**63
        brancher = Brancher(self.origin, run_seed, self._sizes)
        if self.origin.recipe.data.cache_on_device:
            stores = (self.origin.train_store, self.origin.test_store)
            keep_images(stores, self.origin.recipe.data, brancher.device)
        if not record["start"]:
            self._start(record, brancher)
        for branch in wanted:
            updates = branch_updates(self.origin.plan, self.span, branch.batch, branch.kept)
            factor = 1.0
            if self.head["buffer"] == "rescale" and branch.kept == "noise":
                factor = self.span.batches[0] / branch.batch
            branched = brancher.branch(updates, buffer_factor=factor)
            ranks = self.origin.world.size
            entry = entry_of(branch, branched, updates, run_seed=run_seed, ranks=ranks)
            record["branches"].append(entry)
            if self.origin.world.rank == 0:
                write_record(self.out, record)
            found = "diverged" if branched.diverged else f"test loss {entry['loss']:.4f}"
            self._say(
                f"seed {number + 1}, B = {branch.batch:,}, {WHAT[branch.kept]}: "
                f"{found} ({branched.seconds:,.1f} s)"
            )
        self._sizes = brancher.sizes
        brancher.close()

    def _start(self, record: dict[str, Any], brancher: Brancher) -> None:
        """What the checkpoint itself has: its test loss, and the noise that its run measured."""
        noise = brancher.gradient_noise()
        first = branch_updates(self.origin.plan, self.span, self.span.batches[-1], "lr")[0]
        record["start"] = finite(brancher.evaluate_start(first.image_size).to_dict())
        record["gradient_noise"] = {
            **finite(noise),
            "noise_scale": simple_noise_scale(noise["variance"], noise["squared"]),
        }

    def _conclude(self, record: dict[str, Any]) -> None:
        """Judge, write the record and the picture, and print."""
        from hvd_lbt.report.branch_picture import draw_branches  # matplotlib is slow to import

        batches = self.span.batches
        branches = {kept: branches_of(record, kept, batches, self.seeds) for kept in KEPT}
        verdicts = {kept: judge(losses_of(its)) for kept, its in branches.items()}
        found = {str(kept): (branches[kept], verdicts[kept]) for kept in KEPT}
        record["rule"] = RULE
        record["batches"], record["seeds"] = list(batches), self.seeds
        record["verdict"] = {kept: its.to_dict() for kept, its in verdicts.items()}
        write_record(self.out, record)
        noise = record["gradient_noise"]["noise_scale"]
        title = (
            f"{record['name']} after {self.span.first_update:,} updates: branches of "
            f"{self.span.samples:,} samples, {self.seeds} seeds"
        )
        write_result(self.out / PICTURE, draw_branches(title, found, noise))
        console = terminal.console()
        if console.width < TABLE_WIDTH:  # such as under mpirun: numbers must not be cut
            console = terminal.console(live=False)
        console.print(render_branches(title, found))
        by_name = {str(kept): its for kept, its in verdicts.items()}
        for line in sentences(branches["noise"], by_name, noise, record["gradient_noise"]["from"]):
            terminal.say(console, line)
        terminal.say(console, f"Written: {self.out}/probe.json and probe.png.")
