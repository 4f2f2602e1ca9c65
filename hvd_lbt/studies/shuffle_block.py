"""What it costs in accuracy to shuffle blocks of samples that lie together (`data.shuffle_block`).

The images lie class by class, as in a folder and in shards made from it: a block is of one class,
which is the worst case for blocks.
"""

from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.studies.paired import paired
from hvd_lbt.studies.trainings import Arm, Digits, Results, Study, Verdict

MARGIN = 2.0  # percentage points that the finest blocks may lose
WHOLE, FINEST = "whole", "16x16"
BLOCKS = ((16, 16), (16, 64), (128, 4), (500, 1))  # samples of a block, blocks of a window


def _arms(recipe: str, *overrides: str, data: Digits | None = None) -> tuple[Arm, ...]:
    whole = Arm(
        name=WHOLE, label="all samples shuffled", recipe=recipe, overrides=overrides, data=data
    )
    return whole, *(
        Arm(
            name=f"{block}x{window}",
            label=f"{window} block{'s' if window > 1 else ''} of {block}",
            recipe=recipe,
            x=block * window,
            data=data,
            overrides=(
                *overrides,
                f"data.shuffle_block={block}",
                f"data.shuffle_window={window}",
            ),
        )
        for block, window in BLOCKS
    )


def judge(found: Results) -> Verdict:
    """The finest blocks lose at most MARGIN points against the whole shuffle."""
    arms = {arm["name"]: arm for arm in found["arms"]}
    against = {name: paired(arm, arms[WHOLE]) for name, arm in arms.items() if name != WHOLE}
    listed = "; ".join(f"{arms[name]['label']} {one}" for name, one in against.items())
    return Verdict(
        outcome=against[FINEST].above(-MARGIN),
        sentence=f"All samples shuffled: {np.mean(arms[WHOLE]['finals']):.2f} %. Against it, in "
        f"points with 95 % intervals, paired by seed: {listed}. (Held: {arms[FINEST]['label']} "
        f"lose at most {MARGIN:g} points, the whole interval above −{MARGIN:g}. "
        f"{against[FINEST].needed} seeds would show 0.3 points.)",
    )


def draw(found: Results) -> Figure:
    """Test accuracy over epochs, and the final difference to the whole shuffle."""
    arms = found["arms"]
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, arm in enumerate(arms):
            curve, colour = arm["accuracy"], COLOURS[place]
            left.plot(curve["epochs"], curve["mean"], "o-", color=colour, label=arm["label"])
            left.fill_between(
                curve["epochs"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0
            )
            if place:
                one = paired(arm, arms[0])
                error = [[one.mean - one.low], [one.high - one.mean]]
                right.errorbar(place, one.mean, error, fmt="o", color=colour, capsize=5)
        left.set_xlabel("epochs (bands: range of the seeds)")
        left.set_ylabel("test accuracy, %")
        left.legend(frameon=False, loc="upper left")
        right.axhline(0, color=COLOURS[0])
        right.axhline(-MARGIN, color="#777777", linestyle=":")
        right.set_xticks(range(1, len(arms)), [f"{b} × {w}" for b, w in BLOCKS])
        right.set_xlabel("samples of a block × blocks of a window")
        right.set_ylabel("points against all shuffled\n(95 % interval, paired by seed)")
    return figure


_STUDY = partial(
    Study,
    name="shuffle_block",
    claim="None of the papers: they shuffle all samples. Ours, set beforehand: 16 blocks of 16 "
    f"images shuffled together lose at most {MARGIN:g} points against shuffling all, though every "
    "block is of one class.",
    draw=draw,
    judge=judge,
)
STUDIES = (
    _STUDY(
        scale="cifar10",
        title="Shuffling blocks of samples, on CIFAR-10",
        setting="Here: the CIFAR-10 images of --data at 16×16 pixels, in class folders, a "
        "ResNet-18 of width 8 with ghost batches of 64, 3 epochs in which the noise falls 4× at "
        "epochs 2 and 2.5, global batch 64 → 1,024. The page is of the first 500 images of each "
        "class to train on and 300 to test on, so that one block of 500 is one whole class: 16 "
        "blocks of 16 have at most 16 pieces of classes in a window, 4 blocks of 128 at most 8. "
        "Nothing was tuned. 64 blocks of 16 were added when the results of the others were in, to "
        "see how large a window has to be.",
        arms=_arms(
            "cifar10_small",
            "data.image_size=16",
            "data.pad=2",
            "model.width=8",
            "schedule.epochs=3",
            "schedule.lr=0.1",
            "schedule.global_batch=64",
            "schedule.milestones=[{epoch: 2, factor: 4}, {epoch: 2.5, factor: 4}]",
            "schedule.max_global_batch=1024",
            "layout.micro_batch=128",
            "run.eval_every=1",
        ),
        seeds=(0, 1, 2, 3, 4),
    ),
    _STUDY(
        scale="smoke",
        title="Shuffling blocks of samples, in small",
        setting="One epoch of the digits, two seeds: to see that all of it runs.",
        arms=_arms(
            "digits_perceptron",
            "schedule.epochs=1",
            "schedule.milestones=[]",
            data=Digits(train_samples=1200),
        ),
        seeds=(0, 1),
    ),
)
