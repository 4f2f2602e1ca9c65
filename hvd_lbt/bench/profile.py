"""`hvd_lbt bench profile`: measure how fast this cluster is, for `hvd_lbt plan --speed FILE`.

Run it as the training is run: alone, or under launch/local, horovodrun, mpirun or srun, on one node
or more. It does real updates of the recipe on random images, with and without the sums over the
ranks, at several sizes of micro-batch; sums the gradients alone, within a node and over all; and
with --data makes images by the recipe's own input. One node says nothing about the network between
nodes, one worker nothing about sums: what is not measured is null in the file, and named.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_lbt import comm
from hvd_lbt.arguments import count, positive
from hvd_lbt.auto_micro_batch import number_of
from hvd_lbt.bench.harness import Lines, machine
from hvd_lbt.data.batches import batch_maker
from hvd_lbt.data.samples import Images
from hvd_lbt.data.store import open_data
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.elastic import worker as elastic
from hvd_lbt.errors import UserError
from hvd_lbt.evaluate import local_device
from hvd_lbt.log.provenance import revision, versions
from hvd_lbt.recipe import Recipe, load_recipe
from hvd_lbt.rounding import five_digits
from hvd_lbt.sampler import by_update
from hvd_lbt.schedule.plan import Update, layout_of
from hvd_lbt.schedule.speed import Link, SpeedProfile, Work, update_time
from hvd_lbt.speed_profile import load_profile, profile_text, shipped_profiles
from hvd_lbt.terminal import printable
from hvd_lbt.training import Training, make_training
from hvd_lbt.whole_file import write_whole
from hvd_lbt.world import RANK_VARIABLES, World

ALONE = World()
FEWEST, MOST = 3, 30  # updates timed of one kind
INPUT_SHARE = 0.2  # of the time, for the input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt bench profile`."""
    parser.add_argument(
        "recipe", nargs="?", default="imagenet_resnet50", help="[imagenet_resnet50]"
    )
    parser.add_argument("--out", type=Path, help="the profile's file, such as speed.yaml")
    parser.add_argument("--data", type=Path, help="measure the input with this data set too")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--image-sizes", type=count, nargs="+", metavar="PIXELS", help="[the recipe's]"
    )
    parser.add_argument("--micro-batch", type=count, help="the largest one timed [the recipe's]")
    parser.add_argument("--minutes", type=positive, default=4.0, help="that it may take [4]")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An update that was timed: its samples in micro-batches of at most `micro_batch`."""

    image_size: int
    samples: int
    micro_batch: int
    seconds: float

    @property
    def micro_batches(self) -> int:
        """Forwards of the update."""
        return -(-self.samples // self.micro_batch)


class Sum(NamedTuple):
    """Seconds to sum all gradients, and as many messages of a few bytes."""

    seconds: float
    empty: float

    def less(self, other: "Sum") -> "Sum":
        """What this sum takes more than `other`, a part of it."""
        return Sum(self.seconds - other.seconds, max(0.0, self.empty - other.empty))


@dataclass(frozen=True, kw_only=True)
class Sums:
    """The sum over all ranks, within a node, between one rank of each; None: there is none here."""

    everywhere: Sum | None = None
    within_node: Sum | None = None
    between_nodes: Sum | None = None


def main(args: argparse.Namespace) -> int:
    """Measure, print, and write the profile."""
    recipe = load_recipe(args.recipe, args.settings)  # an error of it comes before anything starts
    if elastic.is_launched():
        raise UserError(
            "bench profile measures a fixed number of workers: run it by launch/local, horovodrun, "
            "mpirun or srun instead of `hvd_lbt elastic`."
        )
    if args.out and next((os.environ[n] for n in RANK_VARIABLES if n in os.environ), "0") == "0":
        _check_writable(args.out)
    if not args.micro_batch:
        number_of(recipe, "give --micro-batch N, the one that a training has found")
    store = open_data(args.data, recipe)[0] if args.data else None
    if isinstance(store, SyntheticStore):
        raise UserError("--data synthetic: these images are not made; name a data set.")
    # The sums within a node and between nodes are of some ranks only.
    os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    world = comm.init()
    nodes = _nodes(world)
    settings: dict[str, Any] = {name: str(value) for name, value in vars(args).items()}
    settings |= {"world_size": world.size, "nodes": nodes, "device": local_device(world).type}
    lines = Lines("profile", settings=settings, speaks=world.rank == 0)
    bench = _Bench(recipe, args, world, nodes, lines)
    profile = bench.profile(store)
    if world.rank == 0:
        text = bench.head() + profile_text(profile)
        print(text, flush=True)
        if args.out:
            _write(args.out, text)
            load_profile(args.out)  # what `plan --speed` does
            command = f"hvd_lbt plan {args.recipe} --speed {args.out} --workers"
            print(f"Written to {args.out}. {command} {world.size} {8 * world.size}", flush=True)
    comm.shutdown()
    return 0


def _nodes(world: World) -> int:
    """How many nodes there are. Raises UserError if they have different numbers of ranks."""
    sizes = set(comm.allgather_object(world.local_size))
    if len(sizes) > 1:
        raise UserError(
            f"the nodes have {' and '.join(map(str, sorted(sizes)))} ranks; a profile is of nodes "
            "with the same number of them. Start as many on each."
        )
    return world.size // world.local_size


def _check_writable(file: Path) -> None:
    """Raise UserError unless the profile can be written; another kind of file is left alone."""
    if str(file) in shipped_profiles():
        raise UserError(
            f"--out {file}: `plan --speed {file}` is the shipped profile; give another name, such "
            f"as {file}.yaml."
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and (not file.is_file() or file.stat().st_size):
            load_profile(file)
        file.open("a").close()
    except OSError as error:
        raise UserError(f"--out {file}: it cannot be written to ({error.strerror}).") from error
    except UserError as error:
        raise UserError(
            f"--out {file}: it exists and is no speed profile; give another name. ({error})"
        ) from error


def _write(file: Path, text: str) -> None:
    """Write the profile; one that is there already stays, if that fails."""
    try:
        write_whole(file.resolve(), text)
    except OSError as error:
        raise UserError(
            f"--out {file}: it cannot be written ({error.strerror}). The profile is printed above: "
            "save it elsewhere."
        ) from error


class _Bench:
    """The measurements of one run of `bench profile`, in order."""

    def __init__(
        self, recipe: Recipe, args: argparse.Namespace, world: World, nodes: int, lines: Lines
    ) -> None:
        self.recipe, self.args, self.lines = recipe, args, lines
        self.world, self.nodes = world, nodes
        self.device = local_device(world)
        self.sizes = sorted(set(args.image_sizes or image_sizes(recipe)))
        self.largest = int(args.micro_batch or recipe.layout.micro_batch)
        self.seconds = 60 * args.minutes
        self.missing: list[str] = []
        self.notes: list[str] = []
        self.training: Training  # made after the input was measured, which needs the memory too

    def profile(self, store: Images | None) -> SpeedProfile:
        """Measure everything that can be measured here; store: the images of the input."""
        images, classes = None, self.recipe.model.num_classes or 1000
        if store is not None:
            images, classes = self._input(store), max(len(store.classes), 1)
            self.seconds *= 1 - INPUT_SHARE
        else:
            self.missing.append("the input, input_images_per_second (give --data)")
        run = self.recipe.run.model_copy(update={"noise_every": 0})
        self.training = make_training(
            self.recipe.model_copy(update={"run": run}),
            classes,
            world=self.world,
            device=self.device,
            graphs=8 * len(self.sizes),
            train_samples=self.recipe.data.train_samples or 1_000_000,
        )
        few = self._fewest(self.largest)
        self._update(self.sizes[0], few, few, sums=True)()  # the ranks' weights are compared
        sums = self._sums()
        timed = [one for size in self.sizes for one in self._without_sums(size)]
        fixed, of_micro_batch, of_sample = fit(timed)
        worst = max(
            abs(fixed + of_micro_batch * t.micro_batches + of_sample[t.image_size] * t.samples
                - t.seconds) / t.seconds
            for t in timed
        )  # fmt: skip
        self.notes.append(
            f"a + c·k + b·L differs from the {len(timed)} updates timed without sums by at most "
            f"{worst:.1%}." + (" Was the machine busy?" if worst > 0.1 else "")
        )
        buffers = self.training.reducer.wire_buffers
        profile = SpeedProfile(
            name=self.args.out.stem if self.args.out else "measured",
            source=f"hvd_lbt bench profile {self.args.recipe}: {self._where()}",
            model=self.recipe.model.name,
            workers_per_node=self.world.local_size,
            update_seconds=five_digits(fixed),
            micro_batch_seconds=five_digits(of_micro_batch),
            sample_seconds=five_digits(of_sample),
            gradient_bytes=sum(buffer.numel() * buffer.itemsize for buffer in buffers),
            messages=len(buffers),
            input_images_per_second=five_digits(images),
        )
        return self._with_sums(profile, sums, timed)

    def head(self) -> str:
        """What the file says above its numbers, as YAML comments."""
        changed = "".join(f" --set {setting}" for setting in self.args.settings)
        command, when = f"hvd_lbt bench profile {self.args.recipe}{changed}", "%Y-%m-%d %H:%M"
        parts = [
            f"Measured by `{command}`, {time.strftime(when)}: {self._where()}.",
            "Machine: " + ", ".join(f"{key} {value}" for key, value in machine().items() if value),
            "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()),
            f"Revision: {revision() or 'of an installed package'}",
            *(f"Not measured: {what}." for what in self.missing),
            *self.notes,
        ]
        return "".join(f"# {printable(part)}\n" for part in parts)

    def _where(self) -> str:
        ranks = f"{self.world.size} rank{'s' * (self.world.size > 1)}"
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        return f"{ranks} on {nodes}, {self.device.type}"

    # -- time -------------------------------------------------------------------------------------

    def _time(self, *runs: Callable[[], Any], seconds: float) -> list[float]:
        """The median of each, on the slowest rank; they are run in turn.

        seconds: what all repetitions may take; FEWEST are done anyway.
        """
        taken: list[list[float]] = [[] for _ in runs]
        repetitions = FEWEST
        for number in range(1 + MOST):  # the first is not counted
            if number > repetitions:
                break
            for run, its in zip(runs, taken, strict=True):
                self._wait()
                began = time.perf_counter()
                run()
                self._synchronize()
                its.append(time.perf_counter() - began)
            if number == 1:  # all ranks do as many
                slowest = max(comm.allgather_object(sum(its[1] for its in taken)))
                repetitions = max(FEWEST, min(MOST, int(seconds / max(slowest, 1e-6))))
        medians = comm.allgather_object([statistics.median(its[1:]) for its in taken])
        return [max(of_rank) for of_rank in zip(*medians, strict=True)]

    def _wait(self) -> None:
        self._synchronize()
        comm.barrier()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- updates ----------------------------------------------------------------------------------

    def _fewest(self, micro_batch: int) -> int:
        """Samples of the smallest update that is timed; batch norm needs two."""
        return max(min(2, micro_batch), micro_batch // 4)

    def _update(
        self, image_size: int, samples: int, micro_batch: int, *, sums: bool
    ) -> Callable[[], None]:
        """A function that does one update of so many samples on this rank, with or without sums."""
        training = self.training
        ghost = self.recipe.layout.ghost_batch
        ghost = ghost if micro_batch % ghost == 0 else micro_batch
        update = Update(
            index=1,
            stage=0,
            epoch=0.0,
            samples_seen=0,
            global_batch=samples,
            lr=0.0,  # the weights stay as they are
            momentum=self.recipe.schedule.momentum,
            noise_scale=0.0,
            settled=1.0,
            ghost_batch=ghost,
        )
        layout = {"micro_batch": micro_batch, "ghost_batch": ghost}
        sizes = [len(part) for part in layout_of(update, ALONE, **layout).micro_batches]
        generator = torch.Generator().manual_seed(0)
        shape = (max(sizes), 3, image_size, image_size)
        images = torch.randn(shape, generator=generator).to(self.device)
        wide = self.recipe.run.channels_last
        images = images.contiguous(
            memory_format=torch.channels_last if wide else torch.contiguous_format
        )
        labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)

        def run() -> None:
            source = ((images[:size], labels[:size]) for size in sizes)
            with contextlib.nullcontext() if sums else _no_sums(training):
                for one, batches in by_update([update], source, ALONE, **layout):
                    training.update(one, batches)

        return run

    def _without_sums(self, image_size: int) -> list[Timed]:
        """Updates of one image size at several numbers of samples, without communication."""
        micro_batch = self._affordable(image_size)
        share = 0.5 * self.seconds / len(self.sizes) / 4
        found = []
        fewest = self._fewest(micro_batch)
        for samples in sorted(
            {fewest, max(fewest, micro_batch // 2), micro_batch, 2 * micro_batch}
        ):
            run = self._update(image_size, samples, micro_batch, sums=False)
            (seconds,) = self._time(run, seconds=share)
            one = Timed(
                image_size=image_size, samples=samples, micro_batch=micro_batch, seconds=seconds
            )
            found.append(one)
            self.lines.result(
                case=f"update without sums, {image_size} px, {samples} samples",
                micro_batches=one.micro_batches,
                ms=1e3 * seconds,
            )
        return found

    def _affordable(self, image_size: int) -> int:
        """The recipe's micro-batch, or the largest half of it whose updates fit into the time."""
        micro_batch = self.largest
        fewest = self._fewest(micro_batch)
        (probe,) = self._time(
            self._update(image_size, fewest, fewest, sums=False), seconds=0.02 * self.seconds
        )
        # all that is timed is about 11 micro-batches, each FEWEST times and once before
        of_all = probe / fewest * 11 * (1 + FEWEST)
        while micro_batch > 4 and of_all * micro_batch > self.seconds / len(self.sizes):
            micro_batch //= 2
        if micro_batch < self.largest:
            self.notes.append(
                f"At {image_size} px micro-batches of at most {micro_batch} samples were timed, "
                f"not {self.largest}: more take longer than --minutes {self.args.minutes:g}."
            )
        return micro_batch

    # -- sums -------------------------------------------------------------------------------------

    def _sums(self) -> Sums:
        """Sum buffers of the gradients' sizes: over all ranks, and over parts of them."""
        if self.world.size == 1:
            return Sums()
        horovod = comm.horovod()
        share = 0.05 * self.seconds
        everywhere = self._time_sum("all", seconds=share)
        if self.nodes == 1:
            return Sums(everywhere=everywhere, within_node=everywhere)
        if self.world.local_size == 1:
            return Sums(everywhere=everywhere, between_nodes=everywhere)
        places = comm.allgather_object([horovod.cross_rank(), self.world.local_rank])
        nodes: dict[int, list[int]] = {}
        for rank, (node, _) in enumerate(places):
            nodes.setdefault(node, []).append(rank)
        sets = {node: horovod.add_process_set(ranks) for node, ranks in sorted(nodes.items())}
        heads = horovod.add_process_set([ranks[0] for ranks in nodes.values()])
        own = sets[places[self.world.rank][0]]
        within = self._time_sum("node", seconds=share, process_set=own)
        between = self._time_sum("heads", seconds=share, process_set=heads)
        return Sums(everywhere=everywhere, within_node=within, between_nodes=between)

    def _time_sum(self, what: str, *, seconds: float, process_set: Any = None) -> Sum:
        """Sum buffers as the reducer sends them over a set of ranks, and as many of a few bytes."""
        horovod = comm.horovod()
        options = {} if process_set is None else {"process_set": process_set}
        takes_part = process_set is None or self.world.rank in process_set.ranks

        def summed(name: str, buffers: Sequence[Tensor]) -> Callable[[], None]:
            def run() -> None:
                handles = [
                    horovod.allreduce_async_(
                        buffer, name=f"{name}.{place}", op=horovod.Sum, **options
                    )
                    for place, buffer in enumerate(buffers if takes_part else ())
                ]
                for handle in handles:
                    horovod.synchronize(handle)

            return run

        whole = [torch.zeros_like(buffer) for buffer in self.training.reducer.wire_buffers]
        empty = [buffer[:8].clone() for buffer in whole]
        found = Sum(
            *self._time(
                summed(f"profile.{what}", whole),
                summed(f"profile.{what}.empty", empty),
                seconds=seconds,
            )
        )
        size = sum(buffer.numel() * buffer.itemsize for buffer in whole)
        self.lines.result(
            case=f"sum of the gradients, {what}",
            bytes=size,
            ms=1e3 * found.seconds,
            ms_of_a_few_bytes=1e3 * found.empty,
        )
        return found

    def _with_sums(self, profile: SpeedProfile, sums: Sums, timed: Sequence[Timed]) -> SpeedProfile:
        """The profile with the network and with what hides behind backward; checked once."""
        self._name_missing_sums()
        if sums.everywhere is None:
            return profile
        size, ranks, nodes = profile.gradient_bytes or 0, self.world.local_size, self.nodes
        between = sums.between_nodes
        if between is not None and sums.within_node is not None:
            # What the training waits for is the sum over all ranks: the file must give that again.
            rest = sums.everywhere.less(sums.within_node)
            between = rest if rest.seconds > 0.1 * sums.everywhere.seconds else between
        profile = replace(
            profile,
            within_node=_link(size, ranks, sums.within_node),
            between_nodes=_link(size, nodes, between),
        )
        largest = [one for one in timed if one.image_size == self.sizes[-1]]
        micro_batch = largest[-1].micro_batch
        few = self._fewest(micro_batch)
        hidden = [
            self._hidden(self.sizes[-1], samples, micro_batch, sums.everywhere.seconds)
            for samples in sorted({few, micro_batch})
        ]
        per_sample = profile.sample_seconds[self.sizes[-1]]
        overlap, share = overlap_of(hidden, per_sample, sums.everywhere.seconds)
        profile = replace(profile, overlap=five_digits(overlap), hidden_share=five_digits(share))
        self._check(profile, 2 * micro_batch, micro_batch)
        return profile

    def _name_missing_sums(self) -> None:
        if self.world.local_size == 1:
            self.missing.append(
                "sums within a node, within_node (start two ranks or more on each node)"
            )
        if self.nodes == 1:
            self.missing.append("sums between nodes, between_nodes (start it on two nodes)")
        if self.world.size == 1:
            self.missing.append("what of the sums hides behind backward (start two ranks or more)")

    def _hidden(
        self, image_size: int, samples: int, micro_batch: int, whole: float
    ) -> tuple[int, float]:
        """(samples, seconds of the sum that hide behind the backward of so many samples)."""
        alone, summed = self._time(
            self._update(image_size, samples, micro_batch, sums=False),
            self._update(image_size, samples, micro_batch, sums=True),
            seconds=0.15 * self.seconds,
        )
        self.lines.result(
            case=f"update with sums, {image_size} px, {samples} samples",
            ms=1e3 * summed,
            ms_without_sums=1e3 * alone,
            sum_ms=1e3 * whole,
        )
        return samples, whole - (summed - alone)

    def _check(self, profile: SpeedProfile, samples: int, micro_batch: int) -> None:
        """Compare one update that calibrated nothing with what the profile predicts for it."""
        (measured,) = self._time(
            self._update(self.sizes[-1], samples, micro_batch, sums=True),
            seconds=0.1 * self.seconds,
        )
        work = Work(
            workers=self.world.size,
            samples=samples,
            micro_batches=2,
            last_micro_batch=micro_batch,
            image_size=self.sizes[-1],
        )
        parts = update_time(profile, work)
        assert parts.exposed_sum is not None
        predicted = parts.compute + parts.exposed_sum
        self.notes.append(
            f"Check: an update of {samples} samples a rank with sums, which calibrated nothing: "
            f"predicted {predicted:.4g} s, measured {measured:.4g} s "
            f"({predicted / measured - 1:+.1%})."
        )
        self.lines.result(case="check", ms=1e3 * measured, predicted_ms=1e3 * predicted)

    # -- input ------------------------------------------------------------------------------------

    def _input(self, store: Images) -> float:
        """Training images a second of one node, all its ranks making them at once; the slowest
        node's.
        """
        data = self.recipe.data.model_copy(update={"image_size": self.sizes[-1]})
        micro_batch = min(self.largest, 256)
        ghost = micro_batch
        places = itertools.count(self.world.rank, self.world.size)
        stream = batch_maker(data).train_batches(
            store,
            data,
            ((place * micro_batch, micro_batch, ghost) for place in places),
            seed=self.recipe.run.seed,
            micro_batch=micro_batch,
            device=self.device,
            local_size=self.world.local_size,
        )
        for _ in range(2 + data.prefetch):  # what was made ahead is not counted
            next(stream)
        self._wait()
        began, images = time.perf_counter(), 0
        until = min(20.0, INPUT_SHARE * self.seconds)
        while time.perf_counter() < began + until:
            images += len(next(stream).labels)
        self._synchronize()
        rate = images / (time.perf_counter() - began)
        stream.close()
        nodes: dict[int, float] = {}
        for node, its in comm.allgather_object([comm.horovod().cross_rank(), rate]):
            nodes[node] = nodes.get(node, 0.0) + its
        slowest = min(nodes.values())
        self.lines.result(case=f"input, {data.image_size} px", images_per_second_of_a_node=slowest)
        return slowest


def image_sizes(recipe: Recipe) -> list[int]:
    """The sizes in pixels that a recipe trains at."""
    others = [milestone.image_size for milestone in recipe.schedule.milestones]
    return [recipe.data.image_size, *(size for size in others if size)]


def fit(timed: Sequence[Timed]) -> tuple[float, float, dict[int, float]]:
    """a of an update, c of a micro-batch, b of a sample by image size: seconds, none negative.

    Least squares of the relative errors of a + c·k + b·L. What would come out negative is 0, and
    where a b would be 0, a and c are 0 and b is all of the time (SpeedProfile allows no b of 0).
    """
    sizes = sorted({one.image_size for one in timed})
    rows = np.array(
        [
            [1.0, one.micro_batches, *(one.samples * (one.image_size == size) for size in sizes)]
            for one in timed
        ]
    ) / np.array([[one.seconds] for one in timed])
    used = list(range(rows.shape[1]))
    while True:
        solution = np.zeros(rows.shape[1])
        solution[used] = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)[0]
        lowest = min(used, key=lambda place: solution[place])
        if solution[lowest] >= 0:
            break
        used.remove(lowest)
    if min(solution[2:]) <= 0:
        solution[:2] = 0
        for place, size in enumerate(sizes, start=2):
            its = [one for one in timed if one.image_size == size]
            solution[place] = sum(o.seconds for o in its) / sum(o.samples for o in its)
    fixed, of_micro_batch, *of_sample = map(float, solution)
    return fixed, of_micro_batch, dict(zip(sizes, of_sample, strict=True))


def overlap_of(
    hidden: Sequence[tuple[int, float]], per_sample: float, whole: float
) -> tuple[float, float]:
    """SpeedProfile's overlap and hidden_share, from (samples, seconds of the sum that hid).

    whole: seconds of the sum. An update of few samples shows how much hides in its short backward;
    one of many, how much hides at the most. Where the many were not enough to reach that, the share
    is what they hid: more is not known.
    """
    seconds = [(samples, min(whole, max(0.0, its))) for samples, its in hidden]
    overlap = max(its / (per_sample * samples) for samples, its in seconds)
    return min(1.0, overlap), max(its for _, its in seconds) / whole


def _link(size: int, members: int, measured: Sum | None) -> Link | None:
    """The link over which a ring's sum of `size` bytes takes what was measured.

    What a sum of a few bytes takes counts as overhead, at most half of it all: on two members it
    cannot be told which part of it every further hop would add.
    """
    if measured is None:
        return None
    overhead = min(measured.empty, 0.5 * measured.seconds)
    bandwidth = 2 * (members - 1) / members * size / (measured.seconds - overhead)
    return Link(bandwidth=five_digits(bandwidth), overhead=five_digits(overhead))


@contextlib.contextmanager
def _no_sums(training: Training) -> Iterator[None]:
    """Leave each rank with its own gradients, as if it were alone."""
    reducer = training.reducer
    before = reducer.allreduce_async, reducer.synchronize
    reducer.allreduce_async, reducer.synchronize = _as_it_is, _is_there
    try:
        yield
    finally:
        reducer.allreduce_async, reducer.synchronize = before


def _as_it_is(tensor: Tensor, name: str) -> Tensor:
    return tensor


def _is_there(tensor: Tensor) -> Tensor:
    return tensor
