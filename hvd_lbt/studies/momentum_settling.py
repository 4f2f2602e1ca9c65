"""What a large momentum costs at equal noise scale, and which treatment of its start helps.

Smith et al. 2018, section 4: a larger m with a batch of equal noise costs accuracy. Two things
change there, the batch and the momentum, and the study tells them apart: the same batch with both
momenta (same ε/(1−m), same B/N), and several batches with each. The treatments are tried where B is
a thirtieth of N.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.studies.paired import Difference, Outcome, all_of, interval, paired
from hvd_lbt.studies.trainings import Arm, Digits, Results, Study, Teacher, Verdict

NAME = "momentum_settling"
MOMENTA = (0.9, 0.95, 0.975, 0.98)
LARGE = MOMENTA[-1]
TIMES = (1, 5, 10, 20)  # the first batch, at both ends of MOMENTA
TREATED = 5  # times the first batch, with the large momentum and the recipe's lr
PANELS = (
    "equal lr, batch ∝ 1/(1−m)",
    "equal lr/(1−m)·N/B, other batches",
    f"m {LARGE} from the start, treated",
    f"m 0.9, then {LARGE} at the first milestone",
)
CLAIMED = ("ramp_batch", "ramp_lr")  # one of them wins back half of the momentum's cost
TREATMENTS = {
    "ramp_batch": "ramp by the batch",
    "ramp_lr": "ramp by the lr",
    "warm_up": "warm-up of the lr",
    "corrected": "corrected start",
    "corrected_warm_up": "corrected, warm-up",
    "equal_updates": "a smaller batch",
}
LATER = {
    "later_keep": "nothing done",
    "later_ramp": "ramp by the lr",
    "later_rescale": "buffer rescaled",
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Recipe and sizes: lr and batch at m 0.9; milestones as (epoch, factor); rise: epochs of a
    ramp or a warm-up; first_lr: of a warm-up; control: the batch with as many updates as the ramp.
    """

    recipe: str
    data: Digits | Teacher | None
    overrides: tuple[str, ...]
    lr: float
    batch: int
    falls: tuple[tuple[float, float], ...]
    rise: float
    first_lr: float
    control: int


LAPTOP = Scale(
    recipe="imagenet_teacher",
    data=Teacher(),
    overrides=(
        *("data.train_samples=20000", "model.width=64", "schedule.epochs=8"),
        *("run.eval_every=8", "run.noise_every=0", "run.loggers=[]"),
    ),
    lr=0.1,
    batch=128,
    falls=((4, 4), (6, 4)),
    rise=3,
    first_lr=0.01,
    control=420,
)
GPU = Scale(
    recipe="cifar10_decay_lr",
    data=None,
    overrides=(),
    lr=0.1,
    batch=128,
    falls=((60, 5), (120, 5), (160, 5)),
    rise=20,
    first_lr=0.01,
    control=560,
)


def at(momentum: float, times: int) -> str:
    """The name of the arm with this momentum and so many times the first batch."""
    return f"m{momentum:g}_b{times}"


REFERENCE, UNTREATED, SAME_BATCH = at(0.9, 1), at(LARGE, TREATED), at(0.9, TREATED)


def arms(scale: Scale) -> tuple[Arm, ...]:
    """Those of the table: equal lr, other batches, treatments, and a momentum raised later."""

    def arm(name: str, label: str, panel: str, times: float, *overrides: str) -> Arm:
        return Arm(
            name=name,
            label=label,
            panel=panel,
            x=times,
            recipe=scale.recipe,
            data=scale.data,
            overrides=(*scale.overrides, "schedule.policy=decay_lr", *overrides),
        )

    def settings(momentum: float, batch: int) -> tuple[str, ...]:
        lr = scale.lr * (batch / scale.batch) * (1 - momentum) / 0.1
        return (
            f"schedule.momentum={momentum:g}",
            f"schedule.global_batch={batch}",
            f"schedule.lr={lr:.6g}",
            _falls(scale.falls),
        )

    def grown(*overrides: str) -> tuple[str, ...]:
        """The large momentum by scaled_start, from which a ramp knows where it begins."""
        start = f"schedule.scaled_start={{momentum: {LARGE}}}"
        return (*settings(0.9, scale.batch), start, *overrides)

    warm_up = f"schedule.warm_up={{epochs: {scale.rise}, first_lr: {scale.first_lr}}}"
    corrected = "schedule.momentum_start=corrected"
    ramp = f"schedule.momentum_ramp={{epochs: {scale.rise}, compensate: %s}}"
    treated = {
        "ramp_batch": grown(ramp % "batch"),
        "ramp_lr": grown(ramp % "lr"),
        "warm_up": grown(warm_up),
        "corrected": grown(corrected),
        "corrected_warm_up": grown(corrected, warm_up),
        "equal_updates": settings(LARGE, scale.control),
    }
    base, raised = settings(0.9, scale.batch)[:-1], _falls(scale.falls, LARGE)
    later = {
        "later_keep": (*base, raised),
        "later_ramp": (*base, raised, ramp.replace(str(scale.rise), str(scale.rise / 2)) % "lr"),
        "later_rescale": (*base, raised, "schedule.momentum_change=rescale"),
    }
    equal_lr = [(m, round(0.1 / (1 - m))) for m in MOMENTA]
    others = [(m, t) for m in (0.9, LARGE) for t in TIMES if (m, t) not in equal_lr]
    return (
        *(
            arm(at(m, t), f"m {m:g}", panel, t, *settings(m, t * scale.batch))
            for panel, pairs in zip(PANELS, (equal_lr, others), strict=False)
            for m, t in pairs
        ),
        *(
            arm(name, TREATMENTS[name], PANELS[2], TREATED, *overrides)
            for name, overrides in treated.items()
        ),
        *(arm(name, LATER[name], PANELS[3], 1, *overrides) for name, overrides in later.items()),
    )


def _falls(falls: Sequence[tuple[float, float]], momentum: float | None = None) -> str:
    """The milestones; momentum: from the first of them on."""
    listed = [f"{{epoch: {epoch}, factor: {factor}}}" for epoch, factor in falls]
    if momentum is not None:
        listed[0] = listed[0].replace("}", f", momentum: {momentum}}}")
    return f"schedule.milestones=[{', '.join(listed)}]"


def find(found: Results, name: str) -> Results:
    """The arm of this name."""
    return next(arm for arm in found["arms"] if arm["name"] == name)


def costs(found: Results) -> dict[str, Difference]:
    """Accuracy of the reference (m 0.9, small batch) minus that of the large momentum at equal lr,
    and its two parts: the larger batch with m 0.9, and the larger momentum at that batch.
    """
    reference, same_batch, large = (
        find(found, name) for name in (REFERENCE, SAME_BATCH, UNTREATED)
    )
    return {
        "together": paired(reference, large),
        "batch": paired(reference, same_batch),
        "momentum": paired(same_batch, large),
    }


def beyond_half(found: Results, treated: str) -> Difference:
    """What a treatment wins back, minus half of the momentum's cost at equal batch; paired."""
    finals = {
        name: dict(zip(find(found, name)["seeds"], find(found, name)["finals"], strict=True))
        for name in (treated, UNTREATED, SAME_BATCH)
    }
    seeds = set.intersection(*(set(one) for one in finals.values()))
    return interval(
        finals[treated][s] - (finals[UNTREATED][s] + finals[SAME_BATCH][s]) / 2
        for s in sorted(seeds)
    )


def judge(found: Results) -> Verdict:
    """The momentum itself costs, at equal batch, and a ramp wins back half of that or more."""
    cost = costs(found)
    halves = {name: beyond_half(found, name).above(0) for name in TREATMENTS}
    ramps = [halves[name] for name in CLAIMED]
    best = next((o for o in (Outcome.HELD, Outcome.UNDECIDED) if o in ramps), Outcome.NO)
    untreated, keep = find(found, UNTREATED), find(found, "later_keep")
    won = [
        f"{label} {paired(find(found, name), untreated)}"
        + (" (half of the momentum's cost or more)" if halves[name] is Outcome.HELD else "")
        for name, label in TREATMENTS.items()
    ]
    later = [
        f"{LATER[name]} {paired(find(found, name), keep)}"
        for name in ("later_ramp", "later_rescale")
    ]
    control = paired(find(found, "ramp_batch"), find(found, "equal_updates"))
    return Verdict(
        outcome=all_of([cost["momentum"].above(0), best]),
        sentence=f"At equal lr, m {LARGE} instead of 0.9 costs {cost['together']} points: "
        f"{cost['batch']} of them for the {TREATED} times larger batch (at m 0.9) and "
        f"{cost['momentum']} for the momentum (at that batch). Against m {LARGE} with nothing "
        f"done, in points: {'; '.join(won)}. The ramp by the batch against a constant batch with "
        f"about as many updates ({find(found, 'ramp_batch')['updates']:,} and "
        f"{find(found, 'equal_updates')['updates']:,}): {control}. Raised later at the small "
        f"batch, m {LARGE} costs {paired(find(found, REFERENCE), keep)}; against that, "
        f"{'; '.join(later)}. {cost['momentum'].needed} seeds would show 0.3 points of the "
        "momentum's cost. (95 % intervals, paired by seed. Held: the momentum's own cost is "
        "above 0, and a ramp wins back half of it or more, each with its whole interval; no where "
        "an interval lies below.)",
    )


# --------------------------------------------------------------------------------------- figure


def draw(found: Results) -> Figure:
    """Left: accuracy against B/N for each momentum; right: each treatment against none."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(8.4, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_batches(left, found)
        _draw_treatments(right, found)
    return figure


def _draw_batches(axes: Axes, found: Results) -> None:
    reference = find(found, REFERENCE)
    accuracy = float(np.mean(reference["finals"]))
    axes.axhline(accuracy, color="#555", linestyle="--", linewidth=1.2, label="baseline")
    styles = {0.9: ("o-", COLOURS[0]), LARGE: ("s-", COLOURS[2])}
    for momentum, (style, colour) in styles.items():
        shown = [find(found, at(momentum, times)) for times in TIMES]
        _points(axes, shown, style, colour, f"m {momentum:g}")
    between = [find(found, at(m, round(0.1 / (1 - m)))) for m in MOMENTA]
    _points(axes, between, ":", "#555", "equal lr, m 0.9 to 0.98")
    axes.set_xscale("log")
    axes.set_xlabel("B/N, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("equal noise scale", loc="left", fontsize=12)
    ticks = [100 * arm["global_batches"][0] / arm["train_samples"] for arm in shown]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower left", fontsize=10)


def _points(axes: Axes, shown: Sequence[Results], style: str, colour: str, label: str) -> None:
    """Mean accuracies with their 95 % intervals."""
    means = [interval(arm["finals"]) for arm in shown]
    x = [100 * arm["global_batches"][0] / arm["train_samples"] for arm in shown]
    axes.errorbar(
        x,
        [one.mean for one in means],
        [one.high - one.mean for one in means],
        fmt=style,
        color=colour,
        capsize=3,
        label=label,
    )


def _draw_treatments(axes: Axes, found: Results) -> None:
    """Differences from no treatment, with the cost of momentum and of both as lines."""
    rows = [
        (label, paired(find(found, n), find(found, UNTREATED))) for n, label in TREATMENTS.items()
    ]
    keep = find(found, "later_keep")
    rows += [
        (f"later: {LATER[name].removeprefix('buffer ')}", paired(find(found, name), keep))
        for name in ("later_ramp", "later_rescale")
    ]
    lowest = -2 * max(one.high for _, one in rows[:3])  # what destroys the training is cut off
    for place, (label, one) in enumerate(rows):
        colour = COLOURS[1] if "ramp" in label else COLOURS[4]
        shown = max(one.mean, lowest)
        axes.plot([0, shown], [place, place], color=colour, linewidth=6, alpha=0.5)
        if one.mean > lowest:
            error = [[one.mean - one.low], [one.high - one.mean]]
            axes.errorbar(one.mean, place, xerr=error, fmt="o", color=colour, capsize=3)
        else:
            axes.text(shown, place - 0.3, f" ← {one.mean:.1f}", va="bottom", fontsize=10)
    cost = costs(found)
    axes.axvline(0, color="#555", linestyle="--", linewidth=1.2)
    lines = {"momentum": ("-", "m 0.9 at this batch"), "together": (":", "baseline, left")}
    for name, (line, label) in lines.items():
        axes.axvline(cost[name].mean, color="#555", linestyle=line, linewidth=1.2, label=label)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlabel(f"points against m {LARGE} as it is")
    axes.set_title("treatments", loc="left", fontsize=12)
    axes.legend(frameon=False, loc="lower left", fontsize=10)


def _study(scale: str, sizes: Scale, seeds: Sequence[int], setting: str) -> Study:
    return Study(
        name=NAME,
        scale=scale,
        title="How long a momentum takes to settle",
        claim="Smith et al. 2018, section 4: a larger m with a batch of equal noise loses some "
        "accuracy (94.5 % to 93.3 % with m 0.98), since the buffer, zero at first, takes "
        "B/(N(1−m)) epochs to settle, which suppresses the updates until then. They tried no "
        "treatment; those here are ours.",
        setting=setting,
        arms=arms(sizes),
        seeds=tuple(seeds),
        draw=draw,
        judge=judge,
        curves=False,
    )


STUDIES = (
    _study(
        "laptop",
        LAPTOP,
        range(8),
        "Here: 20,000 images with labels of a fixed random network (`--data teacher`; 20 % of the "
        "training labels are random), a perceptron of 64 units without weight decay, 8 epochs, "
        "noise ÷4 at epochs 4 and 6 by the lr, so that B stays what it is. All have the same "
        "noise scale (warm-ups excepted, until their end). B/N is 0.64 % for the reference and "
        "3.2 % where the treatments are tried, so B ≪ N. Ramp and warm-up last 3 epochs, 94 "
        "updates of 640; a momentum raised later ramps over 1.5 epochs. Error bars are 95 % "
        "intervals: of the mean on the left, of the paired difference on the right. Widths, lr "
        "and epochs were chosen, and the treatments first tried, by a loop in plain PyTorch with "
        "other first weights; the rule was written before the first run here.",
    ),
    _study(
        "gpu",
        GPU,
        range(3),
        "CIFAR-10 and a WRN-16-4, as the paper has it, with the lr decaying, so that B stays what "
        "it is; not run yet.",
    ),
)
