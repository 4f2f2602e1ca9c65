"""The average of the weights: torch's at a constant batch, a memory in samples for any other."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvd_lbt.data.digits import write_digits
from hvd_lbt.data.store import open_data
from hvd_lbt.ema import WeightAverage
from hvd_lbt.evaluate import evaluate
from hvd_lbt.recipe import load_recipe
from hvd_lbt.world import World


def walk(model):
    """Change weights and statistics as an update would."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_with_a_constant_batch_it_is_torchs():
    model = network()
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = WeightAverage(model, decay=0.9, global_batch=32)
    for _ in range(8):
        walk(model)
        torchs.update_parameters(model)
        ours.update(32)
    for name, value in torchs.module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(ours.averages[name], value, rtol=1e-6), name
    assert ours.averages["1.num_batches_tracked"] == model[1].num_batches_tracked == 8


def test_its_memory_is_counted_in_samples():
    ours = WeightAverage(network(), decay=0.9, global_batch=32)
    assert ours.share_of(32) == pytest.approx(0.1)
    assert ours.share_of(128) == pytest.approx(1 - 0.9**4)
    assert ours.share_of(8) == pytest.approx(1 - 0.9**0.25)
    slow, fast = (WeightAverage(network(), decay=0.9, global_batch=32) for _ in range(2))
    for average in (slow, fast):  # four updates of 32 without a change are one of 128
        average.update(32)
        walk(average._model)
    for _ in range(4):
        slow.update(32)
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, its in zip(
            fast._model.state_dict().values(), slow._model.state_dict().values(), strict=True
        ):
            mine.copy_(its)
    fast._averages = {name: value.clone() for name, value in start_of(slow).items()}
    fast.update(128)
    for name, value in slow.averages.items():
        assert torch.allclose(value.float(), fast.averages[name].float(), atol=1e-6), name


def start_of(average):
    """The averages before the four updates: with weights w they are a + 0.9^4·(e − a)."""
    weights = average._model.state_dict()
    return {
        name: (value - (1 - 0.9**4) * weights[name]) / 0.9**4
        if value.is_floating_point()
        else value
        for name, value in average.averages.items()
    }


def test_a_resumed_average_continues_to_the_bit():
    model = network()
    whole = WeightAverage(model, decay=0.99, global_batch=8)
    for _ in range(3):
        walk(model)
        whole.update(8)
    kept = {
        "averages": {name: value.clone() for name, value in whole.averages.items()},
        "updates": whole.updates,
    }
    resumed = WeightAverage(model, decay=0.99, global_batch=8)
    resumed.load_state_dict(kept)
    walk(model)
    for average in (whole, resumed):
        average.update(24)
    assert resumed.updates == 4
    for name, value in whole.averages.items():
        assert torch.equal(value, resumed.averages[name])


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": 0.0}, {"global_batch": 0}])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        WeightAverage(network(), **{"decay": 0.9, "global_batch": 1} | settings)


def test_tied_weights_and_extra_state_do_not_get_in_the_way():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (nn.Linear(10, 10, bias=False) for _ in range(2))
            self.other.weight = self.one.weight

        def forward(self, images):
            return self.other(self.one(images.flatten(1)[:, :10]))

        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    model = Tied()
    average = WeightAverage(model, decay=0.5, global_batch=4)
    for _ in range(2):
        walk(model.one)
        average.update(4)
    assert torch.equal(average.averages["one.weight"], average.averages["other.weight"])
    recipe = load_recipe("digits", ["data.threads=1"])
    _, test = open_data(write_digits(), recipe)
    result = evaluate(
        model,
        test,
        recipe.data,
        micro_batch=64,
        world=World(rank=0, size=1),
        allreduce=lambda tensor, name: tensor,
        device=torch.device("cpu"),
        averages=average.averages,
    )
    with torch.no_grad():
        model.one.weight.copy_(average.averages["one.weight"])
    again = evaluate(
        model,
        test,
        recipe.data,
        micro_batch=360,
        world=World(rank=0, size=1),
        allreduce=lambda tensor, name: tensor,
        device=torch.device("cpu"),
    )
    assert result.ema_top1 == again.top1
    assert result.ema_loss == pytest.approx(again.loss, rel=1e-5) != result.loss
    assert result.best_top1 == result.ema_top1
    assert again.best_top1 == again.top1
