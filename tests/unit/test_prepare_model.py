"""Networks of others get ghost norms and masks by sample, in place, under their own names."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hvd_lbt
from hvd_lbt.errors import UserError
from hvd_lbt.models import GhostBatchNorm2d, RunningStatistics, prepare_model, samples_of
from hvd_lbt.models.ghost_norm import GhostNorm
from hvd_lbt.models.random_masks import ByGhostBatch, philox
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

CPU = torch.device("cpu")


class Activated(nn.BatchNorm2d):
    """A norm of one's own, as many networks have them."""

    def forward(self, x):
        return F.softplus(super().forward(x))


class Twice(nn.Module):
    """A norm and a dropout that are used at two places, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.other(self.drop(self.norm(self.one(x))))))


NORMS = {
    "1d": (nn.BatchNorm1d(4), (6, 4)),
    "1d of sequences": (nn.BatchNorm1d(4), (6, 4, 5)),
    "2d": (nn.BatchNorm2d(4), (6, 4, 3, 3)),
    "3d": (nn.BatchNorm3d(4), (6, 4, 2, 3, 3)),
    "sync": (nn.SyncBatchNorm(4), (6, 4, 3, 3)),
    "not affine": (nn.BatchNorm2d(4, affine=False, eps=1e-3, momentum=0.3), (6, 4, 3, 3)),
    "own": (Activated(4), (6, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_works_by_ghost_batch_and_keeps_its_names(kind):
    norm, shape = NORMS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape) * 2 + 1
    if isinstance(norm, nn.SyncBatchNorm):  # runs on GPUs only; the plain norm is its reference
        plain: nn.Module = nn.BatchNorm2d(4)
    else:
        plain = copy.deepcopy(norm)
    ghost = prepare_model(nn.Sequential(copy.deepcopy(norm)), ghost_batch=3)
    statistics = RunningStatistics(ghost) if kind != "not affine" else None
    expected = torch.cat([copy.deepcopy(plain)(x[:3]), copy.deepcopy(plain)(x[3:])])
    torch.testing.assert_close(ghost(x), expected)
    assert ghost.state_dict().keys() == nn.Sequential(norm).state_dict().keys()
    if statistics:
        statistics.fold(6)
        for part in (x[:3], x[3:]):
            plain(part)
        # two updates one after the other, and one of the mean of both: alike to second order
        assert (ghost[0].running_mean - plain.running_mean).abs().max() < 0.01
        assert (ghost[0].running_mean).abs().max() > 0.05
        nn.Sequential(norm).load_state_dict(ghost.state_dict(), strict=True)
    ghost.load_state_dict(nn.Sequential(norm).state_dict(), strict=True)
    torch.testing.assert_close(ghost.eval()(x), copy.deepcopy(norm).eval()(x))


def test_hooks_and_layers_used_twice_stay():
    model, seen = Twice(), []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    prepare_model(model, ghost_batch=2)
    assert isinstance(model.norm, GhostNorm)
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert model.other.weight is model.one.weight
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 2)
    model.drop.p = 0.0
    statistics = RunningStatistics(model)
    model(x)
    assert len(seen) == 2
    # two calls of two groups each: as far as four updates, and to the mean of all four groups
    first = model.one(x)
    with torch.no_grad():
        parts = [F.batch_norm(part, None, None, training=True) for part in first.split(2)]
        means = [
            part.mean((0, 2, 3))
            for part in (*first.split(2), *model.other(torch.cat(parts)).split(2))
        ]
    statistics.fold(4)
    torch.testing.assert_close(
        model.norm.running_mean, torch.stack(means).mean(0) * (1 - 0.9**4), rtol=1e-4, atol=1e-6
    )
    assert model.norm.num_batches_tracked == 1


def test_a_norm_that_is_not_called_or_frozen_keeps_its_statistics():
    model = prepare_model(nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2)]), ghost_batch=2)
    nn.init.constant_(model[0].running_mean, 3.0)
    statistics = RunningStatistics(model)
    model[0].eval()
    model[1](torch.randn(2, 2, 3, 3))
    statistics.fold(2)
    assert model[0].running_mean.tolist() == [3.0, 3.0]
    assert model[0].num_batches_tracked == 0
    assert model[1].num_batches_tracked == 1


def test_a_cumulative_average_weighs_all_ghost_batches_alike():
    norm = nn.BatchNorm1d(2, momentum=None)
    model = prepare_model(nn.Sequential(norm), ghost_batch=2)
    statistics, means = RunningStatistics(model), []
    torch.manual_seed(0)
    for groups in (1, 3):
        x = torch.randn(2 * groups, 2)
        means += [part.mean(0) for part in x.split(2)]
        model(x)
        statistics.fold(2 * groups)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    assert norm.num_batches_tracked == 4


def test_rows_of_a_sample_stay_in_its_ghost_batch():
    """As LeViT's norm of (n·tokens, C)."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x.flatten(0, 1)).view_as(x)

    torch.manual_seed(0)
    x = torch.randn(4, 5, 4)
    model = prepare_model(Tokens(), ghost_batch=2)
    expected = [F.batch_norm(part.flatten(0, 1), None, None, training=True) for part in x.split(2)]
    torch.testing.assert_close(model(x), torch.cat(expected).view_as(x))
    with pytest.raises(UserError, match="7 rows in a forward of 4 samples"):
        model.norm(torch.randn(7, 4))


def test_a_norm_without_running_statistics_is_refused():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(UserError, match=r"batch norm 0 \(BatchNorm2d\) has track_running_stats"):
        prepare_model(net, ghost_batch=2)


# Random123's known answers for philox4x32-10: counter, key, words.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    counters = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(counters, (k0, k1))] == words.split()


def masks(model, x, first, ghost_batch=2):
    samples_of(model).begin(first, ghost_batch, CPU)
    out = model(x)
    samples_of(model).end()
    return out


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Dropout3d(0.7), nn.Dropout(0.0), nn.Dropout(1.0)],
)
def test_masks_follow_the_sample_and_not_the_micro_batch(layer):
    drop = layer.p
    model = prepare_model(nn.Sequential(layer, nn.Dropout(0.3)), ghost_batch=2, seed=7)
    x = torch.ones(64, 50, 2, 3, 1)
    whole = masks(model, x, 2**33)
    parts = [masks(model, x[:20], 2**33), masks(model, x[20:], 2**33 + 20)]
    assert torch.equal(whole, torch.cat(parts))
    if drop < 1:
        assert not torch.equal(whole, masks(model, x, 0))  # another place, another mask
    kept = (whole != 0).float().mean()
    assert abs(float(kept) - (1 - drop) * 0.7) < 0.05
    if drop < 1:
        assert float(whole.max()) == pytest.approx(1 / (1 - drop) / 0.7)
    if isinstance(layer, nn.Dropout2d | nn.Dropout3d):
        model[1].p = 0.0
        assert masks(model, x, 0).flatten(2).std(2).max() < 1e-6  # a channel as a whole
    assert torch.equal(model.eval()(x), x)


def test_layers_calls_and_seeds_have_masks_of_their_own():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x):
            return torch.stack([self.a(x), self.a(x), self.b(x)])

    x = torch.ones(8, 100)
    one, other = (prepare_model(Calls(), ghost_batch=2, seed=seed) for seed in (0, 2**40))
    a1, a2, b = masks(one, x, 0)
    assert not torch.equal(a1, a2)
    assert not torch.equal(a1, b)
    assert not torch.equal(a1, masks(other, x, 0)[0])
    assert torch.equal(a1, masks(one, x, 0)[0])


def test_recomputed_forward_has_the_same_mask_and_collects_once():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6))
            self.recompute = True

        def forward(self, x):
            return (
                checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)
            )

    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = prepare_model(Recomputed(), ghost_batch=2)
    statistics, found = RunningStatistics(model), []
    for recompute in (True, False):
        model.recompute = recompute
        model.zero_grad()
        masks(model, x, 5).square().mul(torch.arange(6)).sum().backward()
        found.append((model.inner[0].weight.grad.clone(), statistics.collected.clone()))
        statistics.discard()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][0].abs().max() > 0


def test_functional_dropout_follows_the_ghost_batch():
    class Functional(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    model = prepare_model(Functional(), ghost_batch=4, seed=1)
    network, samples, x = (
        ByGhostBatch(model, samples_of(model)),
        samples_of(model),
        torch.ones(9, 30),
    )
    before = torch.get_rng_state()

    def run(part, first):
        samples.begin(first, 4, CPU)
        out = network(part)
        samples.end()
        return out

    whole = run(x, 12)
    assert torch.equal(whole, torch.cat([run(x[:4], 12), run(x[4:], 16)]))  # 5: a rest of one joins
    assert not torch.equal(whole[:4], whole[4:8])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="did not when it was tested"):
        masks(model, x, 0)


def test_ours_and_a_prepared_norm_are_the_same():
    torch.manual_seed(0)
    x = torch.randn(9, 3, 2, 2)
    ours = nn.Sequential(GhostBatchNorm2d(3, 4))
    theirs = prepare_model(nn.Sequential(nn.BatchNorm2d(3)), ghost_batch=4)
    assert torch.equal(ours(x), theirs(x))
    for model in (ours, theirs):
        RunningStatistics(model)  # takes the buffers over, empty
        model(x)
    assert torch.equal(ours[0].collected, theirs[0].collected)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_an_own_loop_without_prepared_dropout_is_refused():
    schedule = hvd_lbt.Schedule(
        policy="decay_lr", epochs=1, lr=0.1, momentum=0.9, global_batch=4, milestones=()
    )
    for layer in (nn.Dropout(0.1), nn.Dropout(0.0), nn.Dropout(0.1).eval()):
        model = nn.Sequential(nn.Linear(2, 2), layer)
        optimizer = hvd_lbt.FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        reducer = GradientReducer(
            model,
            optimizer,
            world=World(rank=0, size=1),
            allreduce_async=lambda tensor, name: None,
            synchronize=lambda handle: None,
        )
        if layer.p and layer.training:
            with pytest.raises(UserError, match="Training: 1 is Dropout, whose masks would depend"):
                hvd_lbt.Training(model, optimizer, schedule, reducer=reducer)
        else:
            hvd_lbt.Training(model, optimizer, schedule, reducer=reducer)
