"""GradientReducer on two and three real ranks against one process on the union of the samples."""

from pathlib import Path

import pytest
import torch
from launching import run_ranks
from reducer_ranks import SAMPLES, SHARES, UPDATES, network, samples, sgd
from torch.nn import functional as F

EPS = 2.0**-24


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases on 1, 2 and 3 ranks, started once: results[size][rank][case]."""
    folder = tmp_path_factory.mktemp("reducer")
    script = Path(__file__).with_name("reducer_ranks.py")
    for size in SHARES:
        run_ranks(size, script, folder)
    return {
        size: [torch.load(folder / f"{size}-{r}.pt", weights_only=False) for r in range(size)]
        for size in SHARES
    }


def alone(spoil=None) -> dict[str, torch.Tensor]:
    """The same training in plain torch and float64, without a reducer."""
    model = network().double()
    optimizer = sgd(model, torch.optim.SGD)
    for update in range(UPDATES):
        optimizer.zero_grad(set_to_none=False)
        for p in model.unused.parameters():
            p.grad = torch.zeros_like(p)  # as if it were reached: decay and momentum go on
        images, labels = samples(update)
        losses = F.cross_entropy(model(images.double()), labels, reduction="none")
        weights = torch.ones(SAMPLES, dtype=torch.float64)
        if spoil is not None:
            weights = spoil(update)
        ((losses * weights).sum() / SAMPLES).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def largest_difference(weights, reference) -> float:
    return max(float((w.double() - reference[n]).abs().max()) for n, w in weights.items())


# Weights and summed gradients are of order 1; an update adds at most EPS·(a few) of rounding, and
# an error of the gradient e moves the weights by lr·e/(1-m) = e in the end.
BOUNDS = {
    "fp32": 100 * UPDATES * EPS,
    "fp16": UPDATES * 2.0**-11 * 0.1,
    "bf16": UPDATES * 2.0**-8 * 0.1,
}


@pytest.mark.parametrize("size", SHARES)
@pytest.mark.parametrize("wire", BOUNDS)
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_any_shares_give_the_gradient_of_the_mean(results, size, wire, micro_batches):
    result = results[size][0][wire][micro_batches]
    assert largest_difference(result["weights"], alone()) < BOUNDS[wire]
    assert result["stats"]["skipped"] == result["stats"]["overflows"] == 0


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("wire", BOUNDS)
def test_the_ranks_weights_are_the_same_bits_after_every_update(results, size, wire):
    for micro_batches in (1, 3, 8):
        checksums = [rank[wire][micro_batches]["checksums"] for rank in results[size]]
        assert all(other == checksums[0] for other in checksums)
        assert len(set(checksums[0])) == UPDATES


@pytest.mark.parametrize("size", SHARES)
def test_frozen_parameters_stay_and_unused_ones_only_decay(results, size):
    weights = results[size][0]["fp16"][3]["weights"]
    fresh = dict(network().named_parameters())
    assert torch.equal(weights["frozen.weight"], fresh["frozen.weight"])
    ratio = weights["unused.weight"] / fresh["unused.weight"].detach()
    assert ratio.max() - ratio.min() < 1e-5
    assert ratio.mean() < 1


@pytest.mark.parametrize("size", SHARES)
def test_an_overflow_on_the_wire_loses_nothing(results, size):
    fp16, fp32 = (results[size][0]["overflow"][wire] for wire in ("fp16", "fp32"))
    assert fp16["stats"]["overflows"] >= 1
    assert fp16["stats"]["skipped"] == 0
    assert fp32["stats"]["overflows"] == 0
    # the huge update makes huge weights; what is lost in fp16 later is relative to them
    for name, weight in fp32["weights"].items():
        scale = weight.abs().max()
        assert (fp16["weights"][name] - weight).abs().max() <= scale * UPDATES * 2.0**-11, name
    assert len({rank["overflow"]["fp16"]["checksums"][-1] for rank in results[size]}) == 1


@pytest.mark.parametrize("size", SHARES)
def test_a_nan_on_one_rank_is_skipped_by_all_and_too_many_stop_all(results, size):
    for rank in results[size]:
        result = rank["nan"]
        # updates 4 and 6: the weights stay as update 3 and 5 left them
        sums = result["checksums"]
        assert sums[4] == sums[3]
        assert sums[6] == sums[5]
        assert len(set(sums)) == UPDATES - 2
        assert result["stats"]["skipped"] == 2
        assert "3 updates in a row had infinite or NaN gradients" in result["error"]
        assert "last.bias" in result["error"]
        assert torch.stack([w.isfinite().all() for w in result["weights"].values()]).all()


@pytest.mark.parametrize("size", SHARES)
def test_any_torch_optimizer_finds_the_sum_in_grad(results, size):
    weights = results[size][0]["peer_optimizer"]["weights"]
    assert largest_difference(weights, alone()) < BOUNDS["fp32"]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_disagree_are_told_on_every_rank(results, size):
    for rank in results[size]:
        shapes, settings = rank["disagreement"]
        assert "the ranks' models differ: parameter" in shapes
        assert "last.weight" in shapes
        assert "the ranks' reducers differ in wire, bucket_mb or overlap" in settings


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_begin_with_different_weights_are_told_on_every_rank(results, size):
    for rank in results[size]:
        others = "rank 1" if size == 2 else "ranks 1, 2"
        assert f"last.bias differs between rank 0 and {others}" in rank["weights"]
        assert "hvd.broadcast_parameters" in rank["weights"]


@pytest.mark.parametrize("size", SHARES)
def test_sums_begin_while_backward_runs_and_only_in_the_last(results, size):
    story = results[size][0]["overlap"]
    first, last = (index for index, word in enumerate(story) if word == "backward")
    assert not any(word.startswith("send") for word in story[first:last])
    sends = [index for index, word in enumerate(story) if word.startswith("send gradient.")]
    gradients = [index for index, word in enumerate(story) if word.startswith("first.")]
    assert min(sends) < max(gradients)  # the last layer's bucket left before the first layer's came
