"""`layout.micro_batch: auto`: which sizes are tried, what is taken, and that nothing is left."""

import copy
import gc
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from hvd_lbt.auto_micro_batch import starting_sizes
from hvd_lbt.cli import main
from hvd_lbt.errors import UserError
from hvd_lbt.memory import HostMemory, Memory, memory_of
from hvd_lbt.micro_batch import MicroBatchSizes
from hvd_lbt.models import GhostBatchNorm2d
from hvd_lbt.optim import FusedSGD
from hvd_lbt.probe import Demand, Found, Probe, Trial, agreed, best, candidates, from_plain, plain
from hvd_lbt.recipe import load_recipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.schedule import Schedule, make_plan
from hvd_lbt.training import Training
from hvd_lbt.world import World

GHOST = 4


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """Each trial collects garbage: what the tests before have left in memory is none of it."""
    gc.collect()
    gc.freeze()


class Net(nn.Module):
    """With batch norm, buffers that a forward changes, and random numbers."""

    def __init__(self, limit):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), GhostBatchNorm2d(4, GHOST)
        self.last = nn.Linear(4, 5)
        self.register_buffer("calls", torch.tensor(0))
        self.limit, self.seen = limit, set()

    def forward(self, images):
        if len(images) > self.limit:
            torch.empty(2**50)
        self.seen.add((len(images), images.shape[-1], self.training))
        self.calls += 1
        hidden = self.norm(self.first(images))
        return self.last(nn.functional.dropout(hidden, training=self.training).mean((2, 3)))


@dataclass
class Plenty(Memory):
    """Memory whose share grows with the samples of the newest attempt. room: samples that fit."""

    model: Net
    room: float
    hardware: str = "a test's"
    shares: list = field(default_factory=list)

    def begin(self):
        self.model.seen.clear()

    def share(self, more=0):
        return max((one[0] for one in self.model.seen), default=0) / self.room


def setting(limit=10**9, room=10**9):
    torch.manual_seed(0)
    model = Net(limit)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    one = {"allreduce_async": lambda tensor, name: None, "synchronize": lambda handle: None}
    reducer = GradientReducer(model, optimizer, world=World(), **one)
    schedule = Schedule(policy="grow_batch", epochs=1, lr=0.1, momentum=0.9, global_batch=64)
    training = Training(model, optimizer, schedule, reducer=reducer, noise_every=1)
    return training, Probe(training, Plenty(model, room), classes=5)


def demand(most=64, ghost_batch=GHOST, image_size=8):
    return Demand(image_size=image_size, ghost_batch=ghost_batch, most=most)


def test_candidates_are_whole_ghost_batches_up_to_the_largest_share():
    assert [*candidates(demand(most=64))] == [4, 8, 12, 16, 24, 32, 48, 64]
    assert [*candidates(demand(most=20))] == [4, 8, 12, 16, 20]
    assert [*candidates(demand(most=22))] == [4, 8, 12, 16, 20]
    assert [*candidates(demand(most=4))] == [4]
    assert [*candidates(demand(most=5, ghost_batch=1))] == [1, 2, 3, 4, 5]
    assert max(candidates(demand(most=10**9, ghost_batch=1))) == 2**20


def test_what_would_not_leave_memory_is_not_even_tried():
    _, probe = setting(room=30)
    found = probe.find([demand()], 8)
    assert {trial.samples for trial in found.trials} <= {4, 8, 12, 16, 24}
    assert all(trial.fits for trial in found.trials)
    assert found.sizes[0] in {4, 8, 12, 16, 24}


def test_memory_that_runs_out_ends_the_search():
    _, probe = setting(limit=13)
    found = probe.find([demand()], 8)
    assert [trial.samples for trial in found.trials if not trial.fits] in ([], [16])
    assert found.sizes[0] <= 12


def test_the_fastest_that_fits_is_taken():
    def trial(samples, speed, memory=0.5):
        return Trial(
            image_size=8,
            ghost_batch=4,
            samples=samples,
            memory=memory,
            images_per_second=speed,
        )

    assert best([trial(4, 10.0), trial(8, 20.0), trial(12, 15.0)]) == 8
    assert best([trial(4, 10.0), trial(8, 20.0, memory=1.01)]) == 4
    assert best([trial(4, 10.0, memory=1.5)]) == 4  # the smallest there is, if it ran at all
    assert best([trial(4, 0.0)]) == 0


def test_stages_are_tried_at_their_own_ghost_batch_and_test_images_at_their_size():
    training, probe = setting()
    found = probe.find([demand(), demand(ghost_batch=6, most=12), demand()], 16)
    assert found.sizes[0] == found.sizes[2]
    assert found.sizes[0] % 4 == 0
    assert found.sizes[1] in (6, 12)
    assert {trial.ghost_batch for trial in found.trials} == {4, 6}
    # four times the pixels: a quarter of the samples
    assert found.evaluation == max(1, max(found.sizes) // 4)
    assert {(size, training_) for _, size, training_ in training.model.seen} == {(16, False)}


@pytest.mark.parametrize("limit", [10**9, 13])
def test_nothing_is_left_of_a_probe(limit):
    training, probe = setting(limit=limit)
    before = copy.deepcopy(training.state_dict())
    buffers = {name: value.clone() for name, value in training.model.named_buffers()}
    random = torch.get_rng_state()
    probe.find([demand(), demand(ghost_batch=8)], 8)
    after = training.state_dict()
    for part in ("model", "reducer", "gradient_noise"):
        assert str(after[part]) == str(before[part])
    for own, its in zip(
        after["optimizer"]["state"].values(), before["optimizer"]["state"].values(), strict=True
    ):
        assert torch.equal(own["momentum_buffer"], its["momentum_buffer"])
    for name, value in training.model.named_buffers():  # those that are not saved, too
        assert torch.equal(value, buffers[name])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert training.statistics.ghost_batch == GHOST
    assert training.model.training
    assert not training.reducer.dropped


def test_the_smallest_of_all_ranks_is_taken_and_none_is_an_error_on_every_rank():
    def found(*sizes, evaluation=9):
        return from_plain(plain(Found(sizes=sizes, evaluation=evaluation, trials=())))

    demands = [demand(), demand(ghost_batch=6)]
    ranks = [found(8, 12), found(16, 6), found(4, 12, evaluation=2)]
    assert agreed(ranks, demands).sizes == (4, 6)
    assert agreed(ranks, demands).evaluation == 2
    with pytest.raises(UserError, match="rank 1 is too small for one ghost batch of 6 samples"):
        agreed([found(8, 12), found(16, 0)], demands)


def test_the_memory_of_a_process_is_measured():
    memory = memory_of(torch.device("cpu"), 1)
    assert isinstance(memory, HostMemory)
    memory.begin()
    first = memory.share()
    block = torch.ones(64 << 18)  # 64 MiB
    grown = memory.share()
    assert grown > first
    assert memory.share(more=1 << 40) > grown
    del block
    assert memory.share() == pytest.approx(grown, rel=0.5)  # the peak stays
    memory.begin()
    assert memory.share() < grown
    assert HostMemory(4).share() >= 0
    assert "CPU" in memory.hardware


def test_sizes_are_kept_as_plain_values():
    sizes = MicroBatchSizes(stages=(8, 16), evaluation=4, asked="auto", hardware=("CPU", "another"))
    assert MicroBatchSizes.of(sizes.to_dict()) == sizes


def test_a_recipe_may_say_auto_and_nothing_else_that_is_no_number():
    recipe = load_recipe("digits", ["layout.micro_batch=auto"])
    assert recipe.layout.micro_batch == "auto"
    assert not recipe.changes_since(load_recipe("digits").to_dict())
    for value in ("automatic", "0", "-4", "2.5", "1048577", "[16]", "true"):
        with pytest.raises(UserError, match=r"layout\.micro_batch: .*(auto|true or false)"):
            load_recipe("digits", [f"layout.micro_batch={value}"])


class OneRank:
    """Gathers as a world of one rank, or as one whose other rank says something else."""

    def __init__(self, other=None):
        self.other, self.calls = other, 0

    def __call__(self, value):
        self.calls += 1
        return [value] if self.other is None else [value, self.other(value)]


def start(micro_batch, kept=None, *, same_job=False, other=None):
    training, _ = setting()
    small = ["data.image_size=8", "schedule.max_global_batch=128"]  # few and small trials
    recipe = load_recipe("digits", [f"layout.micro_batch={micro_batch}", *small])
    plan = make_plan(recipe.schedule, 1437)
    gather = OneRank(other)
    return starting_sizes(recipe, plan, training, World(), 5, kept, same_job, gather)


def test_a_run_keeps_what_it_had_on_the_same_hardware():
    found = start("auto")
    assert found.sizes.asked == "auto"
    assert found.trials
    assert all(size % 16 == 0 for size in found.sizes.stages)
    assert "auto is" in found.lines[-1]
    lowered = replace(found.sizes, stages=tuple(16 for _ in found.sizes.stages), evaluation=3)
    again = start("auto", lowered.to_dict())
    assert again.sizes == lowered
    assert not again.trials
    # other hardware: tried again, and said; an elastic job keeps it all the same
    elsewhere = replace(lowered, hardware=("a GPU",)).to_dict()
    fresh = start("auto", elsewhere)
    assert fresh.trials
    assert "it was 16 on a GPU" in fresh.lines[0]
    assert "auto tries again" in fresh.lines[0]
    assert start("auto", elsewhere, same_job=True).sizes.stages == lowered.stages
    # a recipe that asks for something else gets that
    assert set(start("32", lowered.to_dict()).sizes.stages) == {32}
    number = start("32")
    assert (set(number.sizes.stages), number.sizes.evaluation, number.lines) == ({32}, 32, ())
    halved = replace(number.sizes, stages=tuple(16 for _ in number.sizes.stages))
    assert start("32", halved.to_dict()).sizes == halved
    back = start("32", replace(halved, hardware=("a GPU",)).to_dict())
    assert set(back.sizes.stages) == {32}
    assert "it begins with 32 again" in back.lines[0]


def test_checkpoints_of_before_have_no_micro_batch():
    assert set(start("32", None).sizes.stages) == {32}


def test_the_rank_with_less_memory_decides():
    def less(value):
        return value if isinstance(value, str) else value | {"sizes": (16,) * len(value["sizes"])}

    assert set(start("auto", other=less).sizes.stages) == {16}


def test_a_plan_shows_what_auto_may_choose(capsys):
    words = ["plan", "digits", "--set", "layout.micro_batch=auto", "--workers", "2"]
    assert main(words) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "auto, 16 each" in output  # 32 samples on two workers
    assert "auto, 16–64 each" in output
    assert "auto is chosen when the run starts" in output
