"""The ImageNet schedules of Smith et al. 2018 at their real size: N, batches and update counts.

1,281,167 samples a fixed network labels (`--data teacher`), of whose training labels a fifth is
random; a perceptron, since two CPU cores have to train on 115 million samples a schedule.
"""

from collections.abc import Sequence
from dataclasses import replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS, PLAIN
from hvd_lbt.studies.paired import Outcome, all_of, held_if, paired
from hvd_lbt.studies.pictures import BANDS, late_range
from hvd_lbt.studies.trainings import Arm, Results, Study, Teacher, Verdict

MARGIN = 0.5  # percentage points that a schedule with fewer updates may lose
SCHEDULES = "90 epochs, noise ÷10 at 30, 60 and 80"
LR, BATCH, IMAGES = 1.0, 8192, 1_281_167
SWEPT = (8192, 32_768, 131_072, 262_144, 524_288, 640_583)  # to N/2; N/10 is 128,117
SWEPT_LRS = (0.015, 0.06)  # at B = 8,192: two noise scales, to tell B/N from the lr
SWEPT_EPOCHS = 10
SMALLER = 80  # of the scale for tests
GROWN = ("m090", "first_fall", "m095", "m0975")
STYLES = {  # name: colour, line
    "decay_lr": (COLOURS[0], "-"),
    "warm_up": (COLOURS[0], ":"),
    "first_fall": (COLOURS[1], "--"),
    "m090": (COLOURS[1], "-"),
    "m095": (COLOURS[2], "-"),
    "m0975": (COLOURS[3], "-"),
    "constant": ("#777777", "--"),
}


def _schedules() -> tuple[Arm, ...]:
    grow, lr = "schedule.policy=grow_batch", f"schedule.lr={LR:g}"
    warm_up = f"schedule.warm_up={{epochs: 5, first_lr: {LR / 32:g}}}"  # that of a batch of 256
    arms = {
        "decay_lr": ("lr decays at B 8,192", "14,075 updates", ("schedule.policy=decay_lr",)),
        "warm_up": (
            "lr decays, 5 epochs of warm-up",
            "–",
            ("schedule.policy=decay_lr", warm_up),
        ),
        "constant": (
            "lr and B constant (control)",
            "–",
            ("schedule.policy=decay_lr", "schedule.milestones=[]"),
        ),
        "m090": ("B 8,192 → 65,536, m 0.9", "5,865 updates", (grow,)),
        "first_fall": (
            "B 8,192 → 81,920, then the lr decays",
            "–",
            (grow, "schedule.max_global_batch=81920"),
        ),
        "m095": (
            "B 16,384 → 65,536, m 0.95",
            "3,519 updates",
            (grow, "schedule.scaled_start={momentum: 0.95}"),
        ),
        "m0975": (
            "B 32,768 → 65,536, m 0.975",
            "2,346 updates",
            (grow, "schedule.scaled_start={momentum: 0.975}"),
        ),
    }
    return tuple(
        Arm(
            name=name,
            label=label,
            panel=SCHEDULES,
            recipe="imagenet_teacher",
            data=Teacher(),
            overrides=(lr, *overrides),
            paper=paper,
        )
        for name, (label, paper, overrides) in arms.items()
    )


def _sweep() -> tuple[Arm, ...]:
    """One noise scale, ever larger batches: lr ∝ B at m 0.9."""
    return tuple(
        Arm(
            name=f"g{place}-b{batch}",
            label=f"lr {lr:g} at B 8,192",
            panel=f"{SWEPT_EPOCHS} epochs, lr ∝ B",
            x=batch,
            recipe="imagenet_teacher",
            data=Teacher(),
            overrides=(
                "schedule.policy=decay_lr",
                "schedule.milestones=[]",
                f"schedule.epochs={SWEPT_EPOCHS}",
                f"schedule.global_batch={batch}",
                f"schedule.max_global_batch={batch}",
                f"schedule.lr={lr * batch / BATCH:g}",
                "run.eval_every=10",
            ),
        )
        for place, lr in enumerate(SWEPT_LRS)
        for batch in SWEPT
    )


def _small(arm: Arm) -> Arm:
    """For tests: an eightieth of the images and of every batch, a thirtieth of the epochs."""

    def less(override: str) -> str:
        key, _, value = override.partition("=")
        if key in ("schedule.global_batch", "schedule.max_global_batch"):
            return f"{key}={int(value) // SMALLER}"
        if key == "schedule.warm_up":
            return override.replace("epochs: 5", "epochs: 0.2")
        return f"{key}=1" if key == "schedule.epochs" else override

    milestones = "[{epoch: 1, factor: 10}, {epoch: 2, factor: 10}, {epoch: 2.5, factor: 10}]"
    first = (
        f"data.train_samples={IMAGES // SMALLER}",
        f"schedule.global_batch={BATCH // SMALLER}",
        f"schedule.max_global_batch={65_536 // SMALLER}",
        "schedule.epochs=3",
        f"schedule.milestones={milestones}",
        "layout.micro_batch=1024",
        "run.eval_every=1",
    )
    overrides = (*first, *map(less, arm.overrides))
    return replace(arm, overrides=overrides, x=arm.x and arm.x // SMALLER)


def judge(found: Results) -> Verdict:
    """Every schedule with fewer updates loses at most MARGIN, and one without a fall more."""
    arms = {arm["name"]: arm for arm in found["arms"]}
    base = arms["decay_lr"]
    against = {name: paired(arms[name], base) for name in (*GROWN, "warm_up", "constant")}
    control = against["constant"].above(-MARGIN)
    outcome = all_of(
        [
            held_if(all(arms[name]["updates"] < base["updates"] for name in GROWN)),
            *(against[name].above(-MARGIN) for name in GROWN),
        ]
    )
    if outcome is Outcome.HELD and control is not Outcome.NO:
        outcome = Outcome.UNDECIDED  # the design could not have said otherwise
    listed = "; ".join(
        f"{arms[name]['label']} {arms[name]['updates']:,} updates, {against[name]}"
        for name in GROWN
    )
    needed = max(one.needed or 0 for one in against.values())
    return Verdict(
        outcome=outcome,
        sentence=f"{base['label']}: {np.mean(base['finals']):.2f} % in {base['updates']:,} "
        f"updates. Against it, in points with 95 % intervals, paired by seed: {listed}. With a "
        f"warm-up {against['warm_up']}; the control, which never lets the noise fall, "
        f"{against['constant']}. (Held: each loses at most {MARGIN:g} points, its whole interval "
        f"above −{MARGIN:g}, in fewer updates, and the control loses more. "
        f"{needed} seeds would show 0.3 points in each.) {_where_it_breaks(found)}",
    )


def _where_it_breaks(found: Results) -> str:
    """At a constant noise scale, the last batch that keeps the accuracy, the first that loses."""
    parts = []
    for label, arms in _swept(found).items():
        outcomes = [(arm["x"], paired(arm, arms[0])) for arm in arms[1:]]
        kept = [x for x, one in outcomes if one.above(-MARGIN) is Outcome.HELD]
        lost = [(x, one) for x, one in outcomes if one.above(-MARGIN) is Outcome.NO]
        samples = arms[0]["train_samples"]
        last = f"kept to B = {max(kept):,} ({max(kept) / samples:.2f} N)" if kept else "never kept"
        first = "lost by none"
        if lost:
            batch, one = lost[0]
            first = f"lost from {batch:,} ({batch / samples:.2f} N): {one}"
        parts.append(f"{label}: {last}, {first}")
    return f"At a constant noise scale over larger batches, within {MARGIN:g} points: " + (
        "; ".join(parts) + "."
    )


def _swept(found: Results) -> dict[str, list[Results]]:
    """The arms of each noise scale, by batch."""
    lines: dict[str, list[Results]] = {}
    for arm in found["arms"]:
        if arm["x"] is not None:
            lines.setdefault(arm["label"], []).append(arm)
    return lines


def draw(found: Results) -> Figure:
    """Accuracy and loss over epochs and updates, and accuracy over the batch at constant noise."""
    arms = [arm for arm in found["arms"] if arm["x"] is None]
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9.5, 10.5), layout="constrained")
        grid = figure.subplot_mosaic("ab;cd;ee")
        for key, quantity, against in (
            ("a", "accuracy", "epochs"),
            ("b", "accuracy", "updates"),
            ("c", "loss", "epochs"),
            ("d", "loss", "updates"),
        ):
            _curves(grid[key], arms, quantity, against)
        _sweep_panel(grid["e"], found)
        handles, labels = grid["a"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel(BANDS, fontsize=11)
    return figure


def _curves(axes: Axes, arms: Sequence[Results], quantity: str, against: str) -> None:
    for arm in arms:
        colour, line = STYLES[arm["name"]]
        curve = arm[quantity]
        x = curve[against]
        axes.plot(x, curve["mean"], line, color=colour, linewidth=1.8, label=arm["label"])
        axes.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(*late_range(arms, quantity, 1 / 9))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes.set_xlabel(against)
    axes.set_ylabel("train loss" if quantity == "loss" else "test accuracy, %")


def _sweep_panel(axes: Axes, found: Results) -> None:
    for place, (label, arms) in enumerate(_swept(found).items()):
        samples = arms[0]["train_samples"]
        x = [arm["x"] / samples for arm in arms]
        finals = np.array([arm["finals"] for arm in arms])
        middle = finals.mean(1)
        axes.errorbar(
            x,
            middle,
            [middle - finals.min(1), finals.max(1) - middle],
            fmt="o-",
            color=COLOURS[place],
            capsize=4,
            label=label,
        )
        axes.axhline(middle[0], color=COLOURS[place], linestyle=":", linewidth=1)
    axes.axvline(0.1, color="#777777", linewidth=1)
    axes.annotate("N/10", (0.1, 0.02), xycoords=("data", "axes fraction"), color="#555555")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.set_xlabel("global batch ÷ N, at a constant noise scale (bars: range of the seeds)")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, loc="lower left")


ARMS = (*_schedules(), *_sweep())
FULL = Study(
    name="imagenet_schedules",
    scale="laptop",
    title="The ImageNet schedules at their real size",
    claim="Smith et al. 2018, sections 5.2 and 5.3: 90 epochs of ImageNet in 14,075, 5,865, 3,519 "
    "and 2,346 updates, by batches of up to 65,536 images and without a warm-up, at about the same "
    "accuracy (77 % with momentum 0.975 in under 2,500 updates).",
    setting="Here: the paper's number of images, batches, momentum, milestones and updates; but "
    "4×4 pixels that a fixed random network labels (10 classes; a fifth of the training labels is "
    "random, the test labels are not), and a perceptron of 32 hidden units instead of "
    "Inception-ResNet-V2, without weight decay. lr 1.0 was chosen beforehand among 0.3, 1 and 3 "
    "by runs of 18 epochs with the seeds 100 and 101, as was the width. Lines are the mean of "
    "three seeds, bands their range. The lowest panel keeps the noise scale and raises the batch "
    "with the lr ∝ B, at two noise scales: where both lose at the same B/N, that is what breaks; "
    "where the larger one loses earlier, it is the lr.",
    arms=ARMS,
    seeds=(0, 1, 2),
    draw=draw,
    judge=judge,
)
SMOKE = replace(
    FULL,
    scale="smoke",
    title="The ImageNet schedules in small",
    setting="An eightieth of the images and of every batch, a thirtieth of the epochs, one seed: "
    "to see that all of it runs.",
    arms=tuple(map(_small, ARMS)),
    seeds=(0,),
)
STUDIES = (FULL, SMOKE)
