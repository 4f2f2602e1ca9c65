"""The wire's scale: one spike costs one resend, and what is large for long is sent in fp16
again.
"""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.wire_scale import SMALLEST_SCALE, WireScale
from hvd_lbt.world import World

ELEMENTS = 20_000


@cache
def drawn(update: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(update)
    signs = torch.randn(ELEMENTS, generator=generator)
    return signs * torch.exp(1.5 * torch.randn(ELEMENTS, generator=generator))


def gradients(update: int, size: float = 1e-3) -> torch.Tensor:
    """Many small elements and few large ones, as networks have: a log-normal of 2 decades."""
    return size * drawn(update)


class Course:
    """A reducer whose gradient of every update is given, and what the optimizer then gets."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(ELEMENTS))
        self.optimizer = FusedSGD([self.weight], lr=1.0)
        self.reducer = GradientReducer(
            [("weight", self.weight)],
            self.optimizer,
            world=World(),
            allreduce_async=lambda tensor, name: tensor,
            synchronize=lambda handle: handle,
        )

    def update(self, gradient: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.zero_()
        self.reducer.backward((self.weight * gradient).sum())
        self.optimizer.step()
        return -self.weight.detach().clone()

    @property
    def overflows(self) -> int:
        return self.reducer.stats()["overflows"]


def assert_nothing_lost(sent: torch.Tensor, wanted: torch.Tensor) -> None:
    """Less than 0.1 % of the norm and of the elements, fp16's rounding included."""
    sent, wanted = sent.double(), wanted.double()
    assert (sent - wanted).norm() < 1e-3 * wanted.norm()
    assert ((sent == 0) & (wanted != 0)).sum() < 1e-3 * ELEMENTS


SPIKES = [1e3, 1e5, 1e6, 1e8, 1e12, 1e20, 1e30, 3e38]


@pytest.mark.parametrize("spike", SPIKES)
@pytest.mark.parametrize("at", [0, 1, 20])
def test_after_one_spike_the_next_updates_lose_nothing(spike, at):
    course = Course()
    for update in range(at + 25):  # the longest memory is of 16 updates and 3 trials
        gradient = gradients(update)
        if update == at:
            gradient[7] = spike
        sent = course.update(gradient)
        if update == at:
            assert sent[7] == pytest.approx(spike, rel=1e-3)
        sent[7] = gradient[7] = 0
        assert_nothing_lost(sent, gradient)
    assert course.overflows == 1 if spike > 1e2 else 0


@pytest.mark.parametrize("period", [2, 3, 10])
@pytest.mark.parametrize("spike", SPIKES)
def test_spikes_that_come_again_and_again(period, spike):
    course = Course()
    updates = max(40, 5 * period)
    for update in range(updates):
        gradient = gradients(update)
        if update % period == 0:
            gradient[7] = spike
        sent = course.update(gradient)
        sent[7] = gradient[7] = 0
        assert_nothing_lost(sent, gradient)
    if spike <= 1e3:  # the lower scale harms nothing: it is taken, and kept while spikes come
        assert course.overflows <= 3
    assert course.overflows <= -(-updates // period)


def test_a_burst_that_fades_does_not_set_the_scale():
    course = Course()
    for update in range(40):
        size = {20: 1e6, 21: 20.0, 22: 5.0}.get(update, 1.0)
        gradient = gradients(update, 1e-3 * size)
        assert_nothing_lost(course.update(gradient), gradient)
    assert course.overflows == 1


@pytest.mark.parametrize("size", [1e1, 1e5, 1e12, 1e30])
def test_gradients_that_stay_large_are_sent_again_twice_at_most(size):
    course = Course()
    for update in range(300):
        large = 50 <= update < 250
        gradient = gradients(update, size if large else 1e-3)
        sent, overflows = course.update(gradient), course.overflows
        if not 250 <= update < 253:  # they show that it is over
            assert_nothing_lost(sent, gradient)
        if update == 52:
            assert overflows <= 2
    assert course.overflows <= 6  # of 300


def test_one_large_element_that_stays_is_sent_again_twice_and_the_share_lost_is_shown():
    course = Course()
    for update in range(60):
        gradient = gradients(update)
        if 20 <= update < 40:
            gradient[7] = 1e12
        course.update(gradient)
        if 30 <= update < 40:
            assert course.overflows == 2
            assert course.reducer.stats()["underflow"] > 0.99
    assert course.overflows == 2
    assert course.reducer.stats()["underflow"] < 0.1
    assert course.reducer.stats()["wire_scale"] == 2.0**10


def test_the_share_below_the_smallest_normal_number_is_counted():
    course = Course()
    gradient = torch.full((ELEMENTS,), 2.0**-24)  # times 2^10 exactly the smallest normal number
    gradient[:100] = 2.0**-25
    gradient[100:200] = -(2.0**-60)
    gradient[200:1200] = 0.0
    course.update(gradient)
    assert course.reducer.stats()["underflow"] == pytest.approx(200 / (ELEMENTS - 1000))


def spiked(update: int) -> torch.Tensor:
    gradient = gradients(update)
    if update in (3, 6, 7, 10):
        gradient[7] = 1e9
    return gradient


@pytest.fixture(scope="module")
def whole():
    """A run of 30 updates, and what each sent."""
    course = Course()
    return course, [course.update(spiked(update)) for update in range(30)]


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_resumed_run_continues_with_the_same_scales(whole, stop):
    uninterrupted, expected = whole
    first = Course()
    for update in range(stop):
        first.update(spiked(update))
    resumed = Course()
    resumed.reducer.load_state_dict(first.reducer.state_dict())
    for update in range(stop, 30):
        assert torch.equal(resumed.update(spiked(update)), expected[update])
    assert resumed.reducer.state_dict() == uninterrupted.reducer.state_dict()


def test_a_checkpoint_of_an_older_program_loads_and_its_lowered_scale_recovers():
    old = {"good_updates": 30, "wire_scale": 2.0**-28, "overflows": 1, "skipped": 0}
    course = Course()
    course.reducer.load_state_dict(old | {"bad_in_a_row": 0, "bad_parameter": ""})
    for update in range(10):
        sent = course.update(gradients(update))
    assert_nothing_lost(sent, gradients(9))


def test_without_an_overflow_the_scale_doubles_after_200_updates():
    scale = WireScale(4)
    scales = []
    for _ in range(401):
        scales.append(scale.scale)
        scale.fitted(0.0)
    assert scales[0] == scales[199] == 2.0**10
    assert scales[200] == scales[399] == 2.0**11
    assert scales[400] == 2.0**12


@given(
    st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=60),
    st.integers(1, 2000),
)
def test_any_course_of_gradients_has_a_scale_that_float32_holds(course, ranks):
    scale = WireScale(ranks)
    for largest in course:
        overflows = largest * scale.scale * (2 * ranks if ranks > 1 else 1) >= 65520
        scale.sent_again(largest) if overflows else scale.fitted(largest, harmless=largest > 1)
        assert SMALLEST_SCALE <= scale.scale <= scale.ceiling <= 2.0**24
    in_a_row = 0
    while largest * scale.scale * (2 * ranks if ranks > 1 else 1) >= 65520:
        scale.sent_again(largest)
        in_a_row += 1
    assert in_a_row <= 2
