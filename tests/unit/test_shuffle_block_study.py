"""The verdict on blocks of samples: held only where the whole interval is above the margin."""

import pytest

from hvd_lbt.studies import shuffle_block
from hvd_lbt.studies.paired import Outcome

SEEDS = [0, 1, 2, 3, 4]


def found(lost: float, spread: float) -> dict:
    arms = []
    for name in (
        shuffle_block.WHOLE,
        *(f"{block}x{window}" for block, window in shuffle_block.BLOCKS),
    ):
        less = 0.0 if name == shuffle_block.WHOLE else lost
        noise = spread if name != shuffle_block.WHOLE else 0.0
        finals = [60 + s - less + noise * (s - 2) for s in SEEDS]
        arms.append({"name": name, "label": name, "seeds": SEEDS, "finals": finals})
    return {"arms": arms}


@pytest.mark.parametrize(
    ("lost", "spread", "outcome"),
    [
        (0.5, 0.3, Outcome.HELD),
        (0.5, 2.0, Outcome.UNDECIDED),  # the interval is wider than the margin
        (9.0, 0.3, Outcome.NO),
    ],
)
def test_the_verdict_follows_the_interval_of_the_paired_differences(lost, spread, outcome):
    verdict = shuffle_block.judge(found(lost, spread))
    assert verdict.outcome is outcome
    assert f"16x16 {-lost:+.2f} [" in verdict.sentence
    assert "60" in verdict.sentence or "62" in verdict.sentence


def test_the_arms_differ_in_the_blocks_alone():
    for study in shuffle_block.STUDIES:
        whole, *others = study.arms
        for arm, (block, window) in zip(others, shuffle_block.BLOCKS, strict=True):
            added = {f"data.shuffle_block={block}", f"data.shuffle_window={window}"}
            assert set(arm.overrides) - set(whole.overrides) == added
            assert (arm.recipe, arm.data) == (whole.recipe, whole.data)
