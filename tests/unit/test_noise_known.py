"""The estimates of tr(Σ) and |G|² against linear regression, where both are known."""

import copy
import math
from pathlib import Path

import pytest
import torch
from known_gradients import SIZE, Regression, by_parts, is_unbiased
from thread_ranks import SEEDING, Ranks, reducer_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvd_lbt.errors import UserError
from hvd_lbt.measure.gradient_noise import GradientNoise, noise_of_difference, noise_of_parts
from hvd_lbt.models.ghost_norm import GhostBatchNorm2d
from hvd_lbt.optim import FusedSGD
from hvd_lbt.sampler import MicroBatches, PlanSampler
from hvd_lbt.schedule.layout import count_micro_batches, make_layout
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.training import Training
from hvd_lbt.world import World

DRAWS = 10_000
PARTS = ([8, 8, 8], [1, 2, 5, 16], [23, 1], [7, 7, 7, 3])


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_one_update_are_unbiased(parts):
    case = Regression()
    total = sum(parts)
    sums = by_parts(case.gradients(DRAWS, total), parts)
    found = noise_of_parts(*sums, total)
    true = case.true()
    error = found.std(1) / math.sqrt(DRAWS)
    assert (error < torch.tensor([0.02, 0.15]) * true).all()  # else the next line says little
    assert is_unbiased(found, true) == [True, True]


@pytest.mark.parametrize(
    ("wrong", "which"),
    [
        (lambda among, squared, parts, total: noise_of_parts(among, squared, parts + 1, total), 0),
        (lambda among, squared, parts, total: noise_of_parts(among, squared, parts, total - 1), 0),
        (lambda among, squared, parts, total: torch.stack([among, squared]), 1),
    ],
    ids=["K for K - 1", "B - 1 for B", "nothing taken off |g|²"],
)
def test_the_draws_suffice_to_see_a_wrong_formula(wrong, which):
    case, parts = Regression(), PARTS[0]
    sums = by_parts(case.gradients(DRAWS, sum(parts)), parts)
    assert not is_unbiased(wrong(*sums, sum(parts)), case.true())[which]


def test_parts_that_are_not_weighted_by_their_samples_are_seen():
    case, parts = Regression(), PARTS[1]
    gradients = case.gradients(DRAWS, sum(parts))
    _, squared, count = by_parts(gradients, parts)
    means = torch.stack([part.mean(1) for part in gradients.split(parts, 1)], 1)
    among = means.square().sum(-1).mean(1)
    assert not is_unbiased(noise_of_parts(among, squared, count, sum(parts)), case.true())[0]


@pytest.mark.parametrize("batches", [(8, 8), (8, 24), (24, 5)])
def test_the_difference_of_two_updates_is_unbiased_where_the_weights_do_not_move(batches):
    case = Regression()
    before, after = (case.gradients(DRAWS, samples).mean(1) for samples in batches)
    squares = (value.square().sum(-1) for value in (before, after, after - before))
    found = noise_of_difference(*squares, batches)
    assert is_unbiased(found, case.true()) == [True, True]
    # it would be seen that the mean of the two batches is not their harmonic one
    squares = (value.square().sum(-1) for value in (before, after, after - before))
    mean = noise_of_difference(*squares, (sum(batches) / 2,) * 2)
    assert is_unbiased(mean, case.true())[0] == (batches[0] == batches[1])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_where_the_weights_move_the_difference_is_biased_as_the_docs_say(momentum, nesterov):
    """In the stationary state: tr(Σ) by 1 + s·tr(CΣ)/tr(Σ), |G|² by 1 - 2(1 - m)·s/ε.

    s is how far a gradient moves the weights at once: ε, and with Nesterov's momentum ε(1 + m).
    """
    case, batch, trainings = Regression(distance=0.0), 4, 200
    lr = 0.08 * (1 - momentum)
    off = torch.zeros(trainings, SIZE, dtype=torch.float64)
    velocity, found, true = torch.zeros_like(off), [], []
    before = off
    for update in range(190):
        gradient = case.gradients(trainings, batch, off=off).mean(1)
        if update >= 150:
            squares = (value.square().sum(-1) for value in (before, gradient, gradient - before))
            found.append(noise_of_difference(*squares, (batch, batch)))
            true.append(case.true(off))
        before = gradient
        velocity = momentum * velocity + gradient
        off = off - lr * (gradient + momentum * velocity if nesterov else velocity)
    each = torch.stack(found).mean(0)  # of a training; the trainings are independent
    truth = torch.stack(true).mean((0, 2))
    error = each.std(1) / math.sqrt(trainings) / truth
    ratio = each.mean(1) / truth
    at_once = 1 + momentum if nesterov else 1.0
    curvature = case.curvature
    along_noise = curvature.square().sum() / curvature.sum()  # tr(CΣ)/tr(Σ), near the minimum
    wanted = (1 + lr * at_once * along_noise, 1 - 2 * (1 - momentum) * at_once)
    assert error[0] < 0.02
    assert error[1] < 0.15
    # to first order in the lr, hence the rest
    assert abs(ratio[0] - wanted[0]) < 3 * error[0] + 0.03
    assert abs(ratio[1] - wanted[1]) < 3 * error[1] + 0.05


def test_samples_without_replacement_measure_the_distribution_behind_the_data():
    """An epoch's samples are drawn without replacement: Σ is then that with a divisor of N − 1,
    and tr(Σ)/N is taken off |G|² of the data set, for parts and for differences.
    """
    case, samples, batch = Regression(), 30, 10
    data = case.gradients(samples)
    order = torch.rand(DRAWS, samples, generator=case.generator).argsort(1)[:, : 2 * batch]
    first, second = data[order].split(batch, 1)
    variance = data.var(0).sum()  # divided by N - 1
    true = torch.stack([variance, data.mean(0).square().sum() - variance / samples])
    parts = noise_of_parts(*by_parts(first, [4, 4, 2]), batch)
    assert is_unbiased(parts, true) == [True, True]
    before, after = first.mean(1), second.mean(1)
    squares = (value.square().sum(-1) for value in (before, after, after - before))
    assert is_unbiased(noise_of_difference(*squares, (batch, batch)), true) == [True, True]


# -- the class, on ranks: exactly these formulas ---------------------------------------------------


class Weights(nn.Module):
    """Its loss has the gradient that is given for each sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, gradients):
        return (gradients @ self.weight).sum()


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [6, 40])
def test_ranks_with_uneven_micro_batches_compute_the_formulas(wire, size, micro_batch):
    """27 samples in ghost batches of 2, the last of 3; of 40 only one rank makes one part."""
    case, samples, updates = Regression(), 27, 2
    gradients = case.gradients(updates, samples).float()
    parts = count_micro_batches(samples, size=size, micro_batch=micro_batch, ghost_batch=2)

    def program(rank, make):
        with SEEDING:
            model = Weights()
        optimizer = FusedSGD(model.parameters(), lr=1e-3)
        reducer = make(model, optimizer, wire=wire)
        noise, told = GradientNoise(model, 1), []
        layout = make_layout(samples, rank=rank, size=size, micro_batch=micro_batch, ghost_batch=2)
        own = layout.micro_batches
        for update in range(updates):
            noise.begin(update, samples, one_part=parts == 1)
            for part in own:
                loss = model(gradients[update, part.start : part.stop]) / samples
                reducer.backward(loss, last=part is own[-1])
                noise.add_part(len(part))
            for handle in noise.send(reducer.allreduce_async):
                reducer.synchronize(handle)
            optimizer.step()
            noise.end(reducer)
            told.append(noise.averages)
        return torch.stack(told), [len(part) for part in own], noise.source

    results = Ranks(size).run(program)
    for result in results:
        assert not isinstance(result, Exception), result
        assert torch.equal(result[0].nan_to_num(-1), results[0][0].nan_to_num(-1))
    told, _, source = results[0]
    lengths = [length for _, own, _ in results for length in own]
    assert len(lengths) == parts
    assert source == ("differences" if parts == 1 else "parts")
    rounding = 1e-5 if wire == "fp32" else 2e-2  # fp16 keeps 2^-11 of each element
    if parts == 1:
        assert told[0].isnan().all()
        before, after = gradients.mean(1)
        squares = (value.square().sum() for value in (before, after, after - before))
        wanted = noise_of_difference(*squares, (samples, samples))
    else:
        wanted = noise_of_parts(*by_parts(gradients[:1], lengths), samples)[:, 0]
    scale = float(gradients.mean(1).square().sum(-1).max())
    found = told[-1] if parts == 1 else told[0]
    torch.testing.assert_close(found[0], wanted[0], rtol=rounding, atol=0)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("size", [2, 3])
def test_one_ghost_batch_on_one_of_several_ranks_is_compared_on_all_of_them(size):
    """The others have no samples, and say the same."""
    gradients = Regression().gradients(4, 5).float()

    def program(rank, make):
        with SEEDING:
            model = Weights()
        optimizer = FusedSGD(model.parameters(), lr=1e-3)
        reducer = make(model, optimizer)
        noise = GradientNoise(model, 2)
        for update in range(4):
            noise.begin(update, 5, one_part=True)
            loss = model(gradients[update]) / 5 if rank == 1 else None
            reducer.backward(loss, last=True)
            assert noise.send(reducer.allreduce_async) == []  # one sum less
            optimizer.step()
            noise.end(reducer)
        return noise.averages, int(noise.measurements)

    results = Ranks(size).run(program)
    before, after = gradients.mean(1)[1:3]
    squares = (value.square().sum() for value in (before, after, after - before))
    wanted = noise_of_difference(*squares, (5, 5))
    for averages, measurements in results:
        assert measurements == 1
        assert torch.equal(averages, results[0][0])
        torch.testing.assert_close(averages, wanted, rtol=1e-5, atol=1e-6)


def test_micro_batches_of_all_ranks_are_counted_as_the_layouts_cut_them():
    for samples in (1, 2, 5, 16, 33, 97):
        for ghost_batch, micro_batch in ((1, 1), (2, 6), (4, 4), (16, 64)):
            for size in (1, 2, 3, 7):
                cut = {"micro_batch": micro_batch, "ghost_batch": ghost_batch}
                layouts = [make_layout(samples, rank=r, size=size, **cut) for r in range(size)]
                total = sum(len(layout.micro_batches) for layout in layouts)
                assert count_micro_batches(samples, size=size, **cut) == total


# -- a whole training ------------------------------------------------------------------------------


def train(updates: range, state=None, *, micro_batch: int = 8):
    """A training of updates of 8 samples, from a state, measured in every second one."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, SIZE), torch.randint(3, (48,)))
    model = nn.Linear(SIZE, 3)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = Schedule(policy="decay_lr", epochs=2, lr=0.1, momentum=0.9, global_batch=8)
    world = World()
    sampler = PlanSampler(
        data,
        make_plan(schedule, len(data)),
        micro_batch=micro_batch,
        start_update=updates.start,
        world=world,
    )
    training = Training(
        model, optimizer, schedule, reducer=reducer_of(model, optimizer), noise_every=2
    )
    if state:
        training.load_state_dict(state)
    loader = DataLoader(data, batch_sampler=sampler)
    for update, batches in sampler.updates(loader):
        training.update(update, batches)
        if update.index + 1 == updates.stop:
            break
    return copy.deepcopy(training.state_dict())


@pytest.mark.parametrize(("done", "lost"), [(4, 1), (5, 0)])
def test_a_resume_has_the_same_bits_but_for_the_measurement_that_it_divides(done, lost):
    whole = train(range(9))
    resumed = train(range(done, 9), train(range(done)))
    for part in ("model", "optimizer"):
        assert str(resumed[part]) == str(whole[part])
    for name, weight in whole["model"].items():
        assert torch.equal(resumed["model"][name], weight)
    counts = [int(state["gradient_noise"]["measurements"]) for state in (whole, resumed)]
    assert counts == [4, 4 - lost]
    assert whole["gradient_noise"]["source"] == "differences"


def test_the_same_update_in_smaller_micro_batches_is_measured_by_its_parts():
    state = train(range(3), micro_batch=4)["gradient_noise"]
    assert state["source"] == "parts"
    assert int(state["measurements"]) == 2  # of update 0 too


def test_micro_batches_made_by_hand_are_known_on_one_rank():
    model = nn.Linear(SIZE, 3)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = Schedule(policy="decay_lr", epochs=2, lr=0.1, momentum=0.9, global_batch=8)
    plan = make_plan(schedule, 48)
    training = Training(
        model, optimizer, schedule, reducer=reducer_of(model, optimizer), noise_every=1
    )
    for index in range(3):
        batch = torch.randn(8, SIZE), torch.randint(3, (8,))
        training.update(plan.at(index), MicroBatches([8], [batch]))
    assert training.noise.source == "differences"
    assert int(training.noise.measurements) == 2


# -- ghost batches: the unit is the ghost batch ----------------------------------------------------

GHOST, CHANNELS = 4, 3


def ghost_gradients(draws: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Inputs, targets and, by autograd's rules, the mean gradient of the head of each ghost batch.

    Batch norm of the ghost batch's own mean and variance, then ½(w·x̂ − y)² with w = 1.
    """
    inputs = torch.randn(draws, GHOST, CHANNELS, generator=generator)
    targets = inputs.exp().sum(-1)  # skewed, so that the statistics matter
    spread = inputs.var(1, unbiased=False, keepdim=True) + 1e-5
    normed = (inputs - inputs.mean(1, keepdim=True)) / spread.sqrt()
    errors = normed.sum(-1) - targets
    return inputs, targets, (normed * errors.unsqueeze(-1)).mean(1)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = GhostBatchNorm2d(CHANNELS, ghost_batch=GHOST)
        self.norm.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)
        self.weight = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, inputs, targets):
        normed = self.norm(inputs[..., None, None]).flatten(1)
        return 0.5 * (normed @ self.weight - targets).square().sum()


def test_with_ghost_batches_sigma_is_that_of_their_means_times_their_size():
    generator = torch.Generator().manual_seed(0)
    *_, many = ghost_gradients(100_000, generator)
    many = many.double()
    true = torch.stack([GHOST * many.var(0).sum(), many.mean(0).square().sum()])
    *_, means = ghost_gradients(6 * DRAWS, generator)
    means = means.double().view(DRAWS, 6, CHANNELS)
    total = 6 * GHOST
    for parts in ([1] * 6, [2, 2, 2], [5, 1]):  # ghost batches a micro-batch
        among, squared, count = by_parts(means, parts)
        assert is_unbiased(noise_of_parts(among, squared, count, total), true) == [True, True]
    # no sample is independent of the others of its ghost batch: another size is another number
    before, after = means.view(-1, 2, CHANNELS).unbind(1)
    squares = (value.square().sum(-1) for value in (before, after, after - before))
    found = noise_of_difference(*squares, (GHOST, GHOST))
    assert is_unbiased(found, true) == [True, True]


def test_the_network_with_ghost_batches_measures_these_means():
    inputs, targets, means = ghost_gradients(6, torch.Generator().manual_seed(1))
    total = 6 * GHOST
    parts = [4, 2]  # ghost batches of the two micro-batches

    def program(rank, make):
        with SEEDING:
            model = Normed()
        optimizer = FusedSGD([model.weight], lr=1e-3)
        reducer = make(model, optimizer)
        noise = GradientNoise(model, 1)
        noise.begin(0, total)
        micro_batches = zip(inputs.split(parts), targets.split(parts), strict=True)
        for number, (some, their) in enumerate(micro_batches):
            loss = model(some.flatten(0, 1), their.flatten()) / total
            reducer.backward(loss, last=number == 1)
            noise.add_part(len(their.flatten()))
        noise.send(reducer.allreduce_async)
        optimizer.step()
        noise.end(reducer)
        return noise.averages

    (found,) = Ranks(1).run(program)
    wanted = noise_of_parts(*by_parts(means[None], parts), total)[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_page_has_the_tables_of_its_numbers():
    docs = Path(__file__).parents[2] / "docs"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(docs)
        import gradient_noise_picture as picture
    page = (docs / "gradient_noise.md").read_text()
    for table in (
        picture.known_markdown(),
        picture.frozen_markdown(),
        picture.moving_markdown(),
    ):
        assert "\n".join(table) in page


@pytest.mark.parametrize("version", [None, 1, 99])
def test_a_loop_of_ones_own_is_not_resumed_in_another_order_of_samples(version):
    state = train(range(2))
    del state["order_version"]
    with pytest.raises(UserError, match=rf"version {version or 1} of the samples' order"):
        train(range(2, 3), state | ({} if version is None else {"order_version": version}))
