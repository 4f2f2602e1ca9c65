"""The gradient's noise against a distribution of gradients whose tr(Σ) and |G|² are known."""

import math

import pytest
import torch
from torch import nn

from hvd_lbt.measure.gradient_noise import MEMORY, GradientNoise, simple_noise_scale
from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

SIZE = 50


class Weights(nn.Module):
    """Two parameters; the loss of a sample is their product with that sample's gradient."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(SIZE // 2))
        self.second = nn.Parameter(torch.zeros(SIZE - SIZE // 2))

    def loss(self, gradients: torch.Tensor) -> torch.Tensor:
        return (gradients @ torch.cat([self.first, self.second])).sum()


class Measured:
    """One process that measures every update; `true` are tr(Σ) and |G|²."""

    def __init__(self, wire: str = "fp32", every: int = 1, mean: float = 0.1):
        self.model = Weights()
        self.optimizer = FusedSGD(self.model.parameters(), lr=1e-3)
        self.reducer = GradientReducer(
            self.model,
            self.optimizer,
            world=World(),
            allreduce_async=lambda tensor, name: tensor,
            synchronize=lambda handle: handle,
            wire=wire,
        )
        self.every = every
        self.generator = torch.Generator().manual_seed(0)
        self.mean = mean * torch.randn(SIZE, generator=self.generator)
        self.deviation = torch.linspace(0.1, 1.0, SIZE)  # Σ is no multiple of one
        self.true = (float(self.deviation.square().sum()), float(self.mean.square().sum()))
        self.begin_again()
        self.updates = 0

    def begin_again(self):
        self.noise = GradientNoise(self.model, self.every)

    def update(self, parts, factor: float = 1.0, setting=None, known: bool = True):
        one_part = known and len(parts) == 1
        self.noise.begin(self.updates, sum(parts), one_part=one_part, setting=setting)
        for index, count in enumerate(parts):
            drawn = torch.randn(count, SIZE, generator=self.generator)
            loss = factor * self.model.loss(self.mean + drawn * self.deviation) / sum(parts)
            self.reducer.backward(loss, last=index == len(parts) - 1)
            self.noise.add_part(count)
        self.noise.send(lambda tensor, name: tensor)  # one rank's sum is the world's
        self.optimizer.step()
        self.noise.end(self.reducer)
        self.updates += 1


def test_both_estimates_are_unbiased_for_unequal_parts():
    """Through backward and the wire; more draws and layouts: tests/unit/test_noise_known.py."""
    measured, parts = Measured(), [1, 2, 5, 16]
    found = []
    for _ in range(1500):
        measured.begin_again()  # one measurement each, not their average
        measured.update(parts)
        found.append(measured.noise.averages)
    found = torch.stack(found).double()
    error = found.std(0) / math.sqrt(len(found))
    true = torch.tensor(measured.true)
    assert (error < torch.tensor([0.02, 0.2]) * true).all()  # else the next line says little
    assert ((found.mean(0) - true).abs() < 4 * error).all()


@pytest.mark.parametrize("wire", ["fp16", "fp32"])
def test_the_ratio_of_the_averages_finds_the_noise_scale_while_the_batch_grows(wire):
    measured = Measured(wire, mean=0.3)
    scales = []
    for parts in [[4] * 4] * 150 + [[16] * 4] * 150:
        measured.update(parts)
        scales.append(simple_noise_scale(*measured.noise.averages.tolist()))
    variance, squared = measured.true
    late = torch.tensor([scale for scale in scales[50:] if scale is not None])
    assert len(late) > 240
    assert float(late.median()) == pytest.approx(variance / squared, rel=0.1)


def test_updates_that_were_skipped_or_sent_again_do_not_count():
    measured = Measured("fp16")
    measured.update([4, 4])
    before = measured.noise.averages
    measured.update([4, 4], factor=1e6)  # does not fit the wire
    assert measured.reducer.stats()["overflows"] == 1
    measured.update([4, 4], factor=float("nan"))
    assert measured.reducer.stats()["skipped"] == 1
    torch.testing.assert_close(measured.noise.averages, before, rtol=0, atol=0)
    measured.update([4, 4])
    assert not torch.equal(measured.noise.averages, before)
    assert measured.noise.averages.isfinite().all()


def test_one_part_that_is_not_known_to_be_one_tells_nothing():
    """Where the layout of the other ranks is not known, K is on the device only."""
    measured = Measured()
    for _ in range(2):
        measured.update([8], known=False)
        assert measured.noise.averages.isnan().all()
        assert simple_noise_scale(*measured.noise.averages.tolist()) is None
        measured.update([4, 4])
        assert measured.noise.averages.isfinite().all()


def test_only_every_so_many_updates_are_measured_and_0_measures_none():
    for every, counts in ((3, {0, 3, 6}), (0, set())):
        measured = Measured(every=every)
        moved = set()
        for update in range(8):
            before = measured.noise.averages
            measured.update([4, 4])
            if not torch.equal(measured.noise.averages.nan_to_num(), before.nan_to_num()):
                moved.add(update)
        assert moved == counts


def test_a_resumed_run_goes_on_with_the_averages():
    measured = Measured()
    for _ in range(5):
        measured.update([4, 4])
    state, before = measured.noise.state_dict(), measured.noise.averages
    measured.begin_again()
    measured.noise.load_state_dict(state)
    torch.testing.assert_close(measured.noise.averages, before, rtol=0, atol=0)
    assert int(measured.noise.measurements) == 5


def test_a_state_from_before_measurements_were_counted_loads():
    measured = Measured()
    measured.update([4, 4])
    state = measured.noise.state_dict()
    del state["measurements"]
    measured.noise.load_state_dict(state)
    assert int(measured.noise.measurements) == 0


def test_only_measurements_are_counted():
    measured = Measured("fp16", every=2)
    counts = []
    for factor in (1.0, 1.0, 1e6, 1.0, float("nan"), 1.0, 1.0):  # 1e6: sent again in fp32
        measured.update([4, 4], factor=factor)
        counts.append(int(measured.noise.measurements))
    assert counts == [1, 1, 1, 1, 1, 1, 2]


def test_no_noise_scale_while_the_gradient_drowns():
    assert simple_noise_scale(2.0, 0.5) == 4.0
    assert simple_noise_scale(2.0, -0.1) is None
    assert simple_noise_scale(float("nan"), float("nan")) is None


# -- one part in the whole update: the difference to the update before ----------------------------


class Kept(Measured):
    """Updates that are one part, with the gradient of each as the wire had it."""

    def one(self, samples: int, **options) -> torch.Tensor:
        self.update([samples], **options)
        scale = self.reducer.applied_scale or 1
        sums = [wire.float() / scale for wire in self.reducer.wire_buffers]
        return torch.cat(sums)


@pytest.mark.parametrize("wire", ["fp16", "fp32"])
def test_two_updates_of_one_part_are_compared(wire):
    """Literally |g - h|²/(1/B' + 1/B) and g·h, though the batch grows between them."""
    measured = Kept(wire)
    first, second = measured.one(8), measured.one(24)
    assert int(measured.noise.measurements) == 1
    assert measured.noise.source == "differences"
    variance = (second - first).square().sum() / (1 / 8 + 1 / 24)
    found = measured.noise.averages
    torch.testing.assert_close(found[0], variance, rtol=1e-5, atol=0)
    rounding = 1e-6 * float(first.square().sum())
    torch.testing.assert_close(found[1], first @ second, rtol=1e-5, atol=rounding)


def test_the_update_before_each_measured_one_is_kept_and_no_other():
    measured = Kept(every=4)
    counts, kept = [], []
    for _ in range(10):
        measured.one(8)
        counts.append(int(measured.noise.measurements))
        kept.append(measured.noise._kept is not None)
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert kept == [False, False, False, True, False, False, False, True, False, False]
    never = Kept(every=0)
    for _ in range(3):
        never.one(8)
    assert never.noise._kept is None
    assert never.noise.averages.isnan().all()


def test_pairs_with_a_skipped_update_or_one_sent_again_or_of_two_settings_do_not_count():
    measured = Kept("fp16")
    counts = []
    for options in (
        {},  # nothing before it
        {},
        {"factor": 1e6},  # does not fit the wire: sent again in fp32
        {},
        {},
        {"factor": float("nan")},
        {},
        {},
        {"setting": (32, 24)},  # another ghost batch or image size
        {"setting": (32, 24)},
    ):
        measured.one(8, **options)
        counts.append(int(measured.noise.measurements))
    assert measured.reducer.stats()["overflows"] == 1
    assert measured.reducer.stats()["skipped"] == 1
    assert counts == [0, 1, 1, 1, 2, 2, 2, 3, 3, 4]


def test_averages_of_parts_and_of_differences_are_not_mixed():
    measured = Kept()

    for _ in range(4):
        measured.update([4, 4])
    of_parts = measured.noise.averages
    measured.one(8)  # the first of a pair: nothing is measured
    assert torch.equal(measured.noise.averages, of_parts)
    assert measured.noise.source == "parts"
    measured.one(8)
    assert measured.noise.source == "differences"
    assert float(measured.noise._averages[2]) == pytest.approx(1 - MEMORY)  # begun anew
    assert int(measured.noise.measurements) == 5  # never from 0 again
    measured.update([4, 4])
    assert measured.noise.source == "parts"
    assert float(measured.noise._averages[2]) == pytest.approx(1 - MEMORY)
    assert measured.noise._kept is None  # its memory is free


def test_a_resumed_run_loses_the_pair_that_it_divides_and_no_other():
    for done, lost in ((4, 1), (5, 0), (6, 0)):
        whole, resumed = Kept(every=4), Kept(every=4)
        for _ in range(9):
            whole.one(8)
        for update in range(9):
            if update == done:
                state = resumed.noise.state_dict()
                resumed.begin_again()
                resumed.noise.load_state_dict(state)
            resumed.one(8)
        assert int(whole.noise.measurements) - int(resumed.noise.measurements) == lost
        assert resumed.noise.source == "differences"
        assert torch.equal(resumed.noise.averages, whole.noise.averages) == (lost == 0)


def test_out_of_memory_frees_the_kept_gradient():
    measured = Kept(every=2)
    measured.one(8)
    measured.one(8)
    assert measured.noise._kept is not None
    measured.noise.discard()
    assert measured.noise._kept is None
    measured.one(8)
    assert int(measured.noise.measurements) == 0


def test_a_pair_is_of_consecutive_updates_whatever_the_scale_of_the_wire():
    measured = Kept("fp16")
    measured.one(8)
    measured.updates += 1  # one that this loop did not begin
    first = measured.one(8)
    assert int(measured.noise.measurements) == 0
    measured.reducer._scale = measured.reducer._scale / 4
    second = measured.one(8)
    wanted = (second - first).square().sum() * 4
    torch.testing.assert_close(measured.noise.averages[0], wanted, rtol=1e-5, atol=0)


def test_a_measurement_that_is_not_finite_does_not_count():
    measured = Kept("fp32")
    for _ in range(2):
        measured.one(8)
    before = measured.noise.averages
    measured.one(8, factor=1e25)  # its square is infinite in fp32
    measured.update([4, 4], factor=1e25)
    assert int(measured.noise.measurements) == 1
    assert measured.noise.source == "parts"
    assert measured.noise.averages.isnan().all()  # of the other kind, and none yet
    assert before.isfinite().all()
