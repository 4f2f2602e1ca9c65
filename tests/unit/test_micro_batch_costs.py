"""Timing micro-batches of other sizes leaves a training as it was."""

import torch
from torch import nn

from hvd_lbt.measure.micro_batch_costs import micro_batch_costs
from hvd_lbt.models import GhostBatchNorm2d, RunningStatistics, make_forward


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), GhostBatchNorm2d(8, 4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 5)
    )


def test_nothing_changes_and_every_size_has_a_cost():
    model = network()
    statistics = RunningStatistics(model)
    hooked = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hooked.append)
    statistics.collected.fill_(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    like = [torch.rand(1, 3, 8, 8), torch.tensor([4])]
    random = torch.get_rng_state()
    costs = micro_batch_costs(make_forward(model), model, like, [4, 256])
    assert sorted(costs) == [4, 256]
    assert all(seconds > 0 for seconds in costs.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert bool((statistics.collected == 7).all())
    assert not hooked
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_size_that_cannot_be_run_gives_no_costs_and_changes_nothing():
    model = network()
    statistics = RunningStatistics(model)

    def forward(images, labels):
        if len(images) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return make_forward(model)(images, labels)

    like = [torch.rand(1, 3, 8, 8), torch.tensor([4])]
    assert micro_batch_costs(forward, model, like, [4, 16]) == {}
    assert not statistics.collected.any()
