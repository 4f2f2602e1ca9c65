"""Out of memory and `layout.micro_batch: auto` on a GPU (launch/gpu_check runs this).

The limit is torch's own, of the share that a process may have of the device: what runs out is the
real allocator, in a real backward.
"""

import copy

import pytest
import torch

from hvd_lbt import ops
from hvd_lbt.errors import OutOfMemoryError
from hvd_lbt.memory import SPARE, DeviceMemory
from hvd_lbt.models import build_model
from hvd_lbt.optim import FusedSGD
from hvd_lbt.out_of_memory import release_cached_memory
from hvd_lbt.probe import Demand, Probe
from hvd_lbt.recipe import ModelRecipe
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.sampler import MicroBatches
from hvd_lbt.schedule import Schedule, make_plan
from hvd_lbt.training import Training
from hvd_lbt.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GHOST, BATCH, SIDE = 32, 512, 64
SCHEDULE = Schedule(policy="grow_batch", epochs=1, lr=0.1, momentum=0.9, global_batch=BATCH)
PLAN = make_plan(SCHEDULE, 2 * BATCH)
ONE_RANK = {"allreduce_async": lambda tensor, name: None, "synchronize": lambda handle: None}


@pytest.fixture(autouse=True)
def kernels():
    ops.require_on(torch.device("cuda"))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    release_cached_memory()


def training():
    torch.manual_seed(0)
    recipe = ModelRecipe(name="resnet18", stem="cifar", width=64)
    model = build_model(recipe, 10, GHOST).cuda()
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    reducer = GradientReducer(model, optimizer, world=World(), **ONE_RANK)
    return Training(model, optimizer, SCHEDULE, reducer=reducer, noise_every=1)


def batches(micro_batch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)
    parts = zip(images.split(micro_batch), labels.split(micro_batch), strict=True)
    return MicroBatches([micro_batch] * (BATCH // micro_batch), parts, GHOST)


def limit(more):
    """Allow so many bytes beside what is allocated now."""
    release_cached_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)


def test_an_update_that_runs_out_leaves_no_trace_and_half_of_it_trains():
    its = training()
    its.update(PLAN.at(0), batches(GHOST))  # cuDNN and cuBLAS have their memory
    before = copy.deepcopy(its.state_dict())
    its.noise.discard()
    limit(400 << 20)  # a micro-batch of 512 takes some 3 GiB of activations, one of 32 some 200 MB
    with pytest.raises(OutOfMemoryError, match="rank 0 in"):
        its.update(PLAN.at(1), batches(BATCH))
    after = its.state_dict()
    for name, value in after["model"].items():
        assert torch.equal(value, before["model"][name]), name
    assert after["reducer"] == before["reducer"]
    for key, values in after["optimizer"]["state"].items():
        other = before["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(values["momentum_buffer"], other)
    tally = its.update(PLAN.at(1), batches(GHOST))
    assert not tally.skipped
    assert tally.sums[2] == BATCH


def test_the_probe_ends_where_memory_ends_and_leaves_nothing():
    its = training()
    before = copy.deepcopy(its.state_dict()["model"])
    memory = DeviceMemory(torch.device("cuda", 0))
    its.reducer.first_sum()
    demand = Demand(image_size=SIDE, ghost_batch=GHOST, most=BATCH)
    found = Probe(its, memory, classes=10).find([demand], SIDE)
    assert found.sizes[0] % GHOST == 0
    assert GHOST <= found.sizes[0] <= BATCH
    assert 1 <= found.evaluation <= found.sizes[0]
    assert all(trial.memory > 0 for trial in found.trials)
    used = [trial.memory for trial in found.trials]
    assert used[-1] >= used[0]
    for name, value in its.state_dict()["model"].items():
        assert torch.equal(value, before[name]), name
    # with little memory the search ends earlier, by torch's own error
    limit(1 << 30)
    fewer = Probe(its, memory, classes=10).find([demand], SIDE)
    assert fewer.sizes[0] < BATCH
    assert any(not trial.fits for trial in fewer.trials)


def test_other_processes_memory_counts():
    memory = DeviceMemory(torch.device("cuda", 0))
    memory.begin()
    first = memory.share()
    total = torch.cuda.get_device_properties(0).total_memory
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert memory.share() >= first + block.numel() / total
    del block
    assert memory.share(more=total) > 1 / (1 - SPARE)
