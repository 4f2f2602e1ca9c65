"""One rank of three runs out of memory: all drop the update, and doing it again loses nothing.

The error is torch's own, of an allocation that no machine can make. The ranks are threads; a sum
that one of them does not take part in, or twice, is an error.
"""

import copy
import math
from functools import cache, partial

import pytest
import torch
from thread_ranks import SEEDING, AsyncRanks
from torch import nn

from hvd_lbt import reducer as reducer_module
from hvd_lbt.errors import OutOfMemoryError, UserError
from hvd_lbt.micro_batch import MicroBatchSizes, UpdateStream
from hvd_lbt.models import GhostBatchNorm2d
from hvd_lbt.optim import FusedSGD
from hvd_lbt.out_of_memory import is_out_of_memory
from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule import Milestone, Schedule, make_layout, make_plan
from hvd_lbt.schedule.layout import largest_share
from hvd_lbt.training import Training
from hvd_lbt.world import World

SIZE, GHOST, BATCH = 3, 4, 48  # ranks; samples of a ghost batch; of an update: four ghosts a rank
SCHEDULE = Schedule(policy="grow_batch", epochs=1, lr=0.1, momentum=0.9, global_batch=BATCH)
PLAN = make_plan(SCHEDULE, 3 * BATCH)
SHORT = 1  # the rank whose memory runs out, in update 1
WORDS = {
    "data": "its data",
    "forward": "its forward pass",
    "a backward": "a backward pass",
    "the last backward": "its last backward pass",
    "measuring": "the sums",
    "sending again": "the sums",
}


def allocate_too_much(*_):
    torch.empty(2**50)


class Net(nn.Module):
    """Small, with batch norm; `fails` says in which of its passes memory runs out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = GhostBatchNorm2d(4, GHOST)
        self.second = nn.Conv2d(4, 8, 3)
        self.last = nn.Linear(8, 5)
        self.fails: list[str] = []

    def forward(self, images):
        hidden = self.norm(self.first(images))
        fails = self.fails.pop(0) if self.fails else ""
        if fails == "forward":
            allocate_too_much()
        if fails == "backward":  # when the gradients of `last` and `second` have left
            hidden.register_hook(allocate_too_much)
        return self.last(torch.tanh(self.second(hidden)).mean((2, 3)))


def train(rank, make, place, monkeypatch, *, short):
    """Three updates; if `short`, memory runs out on one rank in update 1, at this place."""
    with SEEDING:
        torch.manual_seed(0)
        model = Net()
    scale = 1e8 if place == "sending again" else 1.0  # more than fp16 holds
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    reducer = make(model, optimizer, wire="fp16", bucket_mb=0.0001)
    training = Training(
        model,
        optimizer,
        SCHEDULE,
        loss=lambda x, y: scale * nn.functional.cross_entropy(model(x), y, reduction="none"),
        reducer=reducer,
        noise_every=1,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PLAN.samples, 3, 8, 8, generator=generator)
    labels = torch.randint(5, (PLAN.samples,), generator=generator)

    def batches(update, micro_batch, fails=False):
        layout = make_layout(
            BATCH, rank=rank, size=SIZE, micro_batch=micro_batch, ghost_batch=GHOST
        )

        def source():
            for number, part in enumerate(layout.micro_batches):
                if fails and number == 1:
                    allocate_too_much()
                where = slice(update.samples_seen + part.start, update.samples_seen + part.stop)
                yield images[where], labels[where]

        return MicroBatches([len(part) for part in layout.micro_batches], source(), GHOST)

    for index, size in enumerate((8, 4, 4)):
        update = PLAN.at(index)
        if place == "measuring" and index == 1:
            reducer._until_measured = 0
        if short and index == 1:
            before = copy.deepcopy(training.state_dict())
            first = batches(update, 8, fails=place == "data" and rank == SHORT)
            if rank == SHORT:
                run_out(training, place, monkeypatch)
            with pytest.raises(OutOfMemoryError) as raised:
                training.update(update, first)
            assert raised.value.ranks == {SHORT: WORDS[place]}
            assert ("allocate memory" in raised.value.own) == (rank == SHORT)
            monkeypatch.undo()
            assert_same(training.state_dict(), before)
            assert all(parameter.grad is None for parameter in model.parameters())
        training.update(update, batches(update, size))
    return training.state_dict()


def run_out(training, place, monkeypatch):
    """Let the memory of this rank run out in its next update, of two micro-batches."""
    model, reducer = training.model, training.reducer
    if place == "forward":
        model.fails += ["", "forward"]
    elif place == "a backward":
        model.fails += ["backward"]
    elif place == "the last backward":
        model.fails += ["", "backward"]
    elif place == "measuring":
        monkeypatch.setattr(reducer, "_measure", allocate_too_much)
    elif place == "sending again":
        view = reducer_module._view

        def short(flat, slot):
            return allocate_too_much() if slot in reducer._slots else view(flat, slot)

        monkeypatch.setattr(reducer_module, "_view", short)


def assert_same(one, other):
    """Bit for bit; a NaN is equal to itself."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape
        assert one.numpy().tobytes() == other.numpy().tobytes()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other or (math.isnan(one) and math.isnan(other)), (one, other)


@cache
def never_short(place):
    """What the ranks end with whose memory never runs out; place: where it matters for that too."""
    return AsyncRanks(SIZE).run(partial(train, place=place, monkeypatch=None, short=False))


@pytest.mark.parametrize("place", WORDS)
def test_the_update_done_again_is_that_of_a_training_that_never_ran_out(place, monkeypatch):
    run = partial(train, place=place, monkeypatch=monkeypatch, short=True)
    short = AsyncRanks(SIZE).run(run)
    never = never_short(place if place in ("measuring", "sending again") else "")
    for result in (*short, *never):
        if isinstance(result, Exception):
            raise result
    for rank in range(SIZE):
        assert_same(short[rank], never[rank])


@pytest.mark.parametrize("kind", [FusedSGD, torch.optim.SGD])
def test_a_loop_with_the_reducer_alone_gets_the_error_in_the_step_of_every_rank(kind):
    def program(rank, make):
        with SEEDING:
            torch.manual_seed(0)
            model = Net()
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        reducer = make(model, optimizer)
        for short in (False, True, False):
            if short and rank == SHORT:
                model.fails += ["backward"]
            for last in (False, True):
                reducer.backward(model(torch.ones(4, 3, 8, 8)).square().mean(), last=last)
            if short:
                with pytest.raises(OutOfMemoryError, match="rank 1 in a backward pass"):
                    optimizer.step()
            else:
                optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    results = AsyncRanks(SIZE).run(program)
    for result in results:
        assert torch.equal(result, results[0]), result


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        allocate_too_much()
    assert is_out_of_memory(raised.value)

    class CollectiveError(RuntimeError):
        """As Horovod's: the world has ended, whatever it says."""

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("std::bad_alloc")):
        assert is_out_of_memory(error)
    # oneDNN's, under RLIMIT_AS; with more words it is another fault
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    for words in ("could not create a primitive descriptor for a convolution", "size"):
        assert not is_out_of_memory(RuntimeError(words))
    for error in (CollectiveError("NCCL: out of memory"), RuntimeError("size"), UserError("")):
        assert not is_out_of_memory(error)


STAGES = make_plan(
    Schedule(
        policy="grow_batch",
        epochs=3,
        lr=0.1,
        momentum=0.9,
        global_batch=96,
        milestones=(Milestone(epoch=1, factor=2, ghost_batch=12),),
    ),
    960,
)


@pytest.mark.parametrize(
    ("sizes", "update", "wanted"),
    [
        ((48, 48), 0, (24, 24)),  # of 96 samples on two workers
        ((1024, 1024), 0, (24, 24)),  # what the update had is halved, not what it might have
        ((24, 96), 0, (16, 12)),  # three ghost batches of 8: two, then one of 12
        ((8, 96), 0, None),
        ((8, 96), 10, (8, 48)),  # the earlier stage is not made larger
        ((8, 36), 10, (8, 24)),
        ((8, 12), 10, None),
    ],
)
def test_half_is_of_whole_ghost_batches_and_of_what_the_update_had(sizes, update, wanted):
    before = MicroBatchSizes(stages=sizes, evaluation=100)
    after = before.smaller(STAGES.at(update), (8, 12), World(size=2))
    assert (after and after.stages) == wanted
    assert after is None or after.evaluation == 100


def test_the_stream_begun_again_has_every_sample_once():
    made = []

    def make(ranges, micro_batch):
        made.append(micro_batch)
        for first, count, _ in ranges:
            assert count <= micro_batch + 1
            yield range(first, first + count)

    for world in (World(), World(rank=1, size=2)):
        sizes = MicroBatchSizes(stages=(48, 96), evaluation=1)
        updates = [STAGES.at(index) for index in range(STAGES.updates)]
        stream = UpdateStream(updates, make, world, sizes, (8, 12))
        for update, batches in stream:
            if update.index in (3, 12):
                next(batches)
                smaller = stream.sizes.smaller(update, stream.ghost_batches, world)
                batches = stream.again(smaller)
            seen = [sample for batch in batches for sample in batch]
            layout = make_layout(
                update.global_batch,
                rank=world.rank,
                size=world.size,
                micro_batch=960,
                ghost_batch=(8, 12)[update.stage],
            )
            parts = [[*range(part.start, part.stop)] for part in layout.micro_batches]
            assert seen == [update.samples_seen + at for part in parts for at in part]
    assert made == [96, 24, 12, 96, 24, 12]


def test_batches_that_were_not_taken_are_an_error():
    sizes = MicroBatchSizes(stages=(48, 96), evaluation=1)
    stream = UpdateStream([STAGES.at(0), STAGES.at(1)], _numbers, World(), sizes, (8, 12))
    with pytest.raises(UserError, match="update 0: 2 of 2 micro-batches were not used"):
        for _ in stream:
            pass


def _numbers(ranges, micro_batch):
    yield from range(9)


def test_the_largest_share():
    assert largest_share(96, 8, 5) == 24  # 12 ghost batches: 2, 2, 3, 2, 3
    assert largest_share(65, 32, 1) == 64
    assert largest_share(3, 8, 4) == 8
