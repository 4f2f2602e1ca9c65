"""PlanSampler and Training in a loop of one's own, on real ranks; the page that shows it."""

import difflib
from pathlib import Path

import pytest
import torch
from launching import run_ranks

DOCS = Path(__file__).parents[2] / "docs"
PLAIN, OWN = DOCS / "example_plain_loop.py", DOCS / "example_own_loop.py"
ROUNDING = 1e-4  # see test_train.py


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_loop")
    for ranks in (1, 2):
        run_ranks(ranks, Path(__file__).with_name("own_loop_ranks.py"), folder)
    return {ranks: torch.load(folder / f"{ranks}.pt", weights_only=False) for ranks in (1, 2)}


def test_two_ranks_are_one(results):
    one, two = results[1], results[2]
    for name, weight in one["whole"]["model"].items():  # running statistics too
        other = two["whole"]["model"][name]
        largest = weight.double().abs().max().clamp(min=1e-30)
        assert float((weight.double() - other.double()).abs().max() / largest) < ROUNDING, name
    assert two["losses"] == pytest.approx(one["losses"], rel=ROUNDING)
    assert sum(one["losses"][-3:]) < sum(one["losses"][:3]) / 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_in_the_middle_it_has_the_same_bits(results, ranks):
    whole, resumed = results[ranks]["whole"], results[ranks]["resumed"]
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    for key, state in whole["optimizer"]["state"].items():
        momentum = resumed["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], momentum)
    assert torch.equal(whole["gradient_noise"]["averages"], resumed["gradient_noise"]["averages"])
    # the first 16 updates are one ghost batch each, on whichever rank; those of even index but the
    # first are compared with the one before, and the resume lies between no such two
    counts = [int(state["gradient_noise"]["measurements"]) for state in (whole, resumed)]
    assert counts == [10, 10]  # of 22 updates


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_of_the_docs_learns(ranks):
    told = run_ranks(ranks, OWN)
    assert float(told.rpartition("accuracy ")[2].split()[0]) > 0.95
    assert told.count("accuracy ") == 1


def test_the_page_shows_the_difference_of_the_two_files():
    before, after = (file.read_text().splitlines()[2:] for file in (PLAIN, OWN))
    lines = list(difflib.unified_diff(before, after, lineterm="", n=1))[2:]
    page = (DOCS / "own_loop.md").read_text()
    assert "```diff\n" + "\n".join(lines) + "\n```" in page, "\n".join(lines)
