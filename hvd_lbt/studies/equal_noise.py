"""Equal g, equal training: where runs of one noise scale g = εN/(B(1−m)) coincide.

Along one g a larger batch has a larger ε/(1−m) in proportion, so B/N and ε/(1−m) cannot be told
apart there. The study therefore has several g, each with the same batches: where a curve bends at
the same B/N for all g, B/N is the limit; where at the same ε/(1−m), that is.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.studies.paired import Difference, Outcome, all_of, paired
from hvd_lbt.studies.trainings import Arm, Results, Study, Teacher, Verdict

NAME = "equal_noise"
SAMPLES, EPOCHS = 20_000, 8
REFERENCE = 250
BATCHES = (250, 500, 1000, 2000, 4000)  # 1.25 % to 20 % of N
RATES = (0.25, 1.0, 4.0)  # ε/(1−m) at the first batch: three g, each four times the one before
MOMENTA = (0.0, 0.9)
MARGIN = 1.0  # percentage points within which two accuracies count as the same
TENTH = 0.1  # of N: where the papers stay below
SMALL = RATES[-1]  # ε/(1−m): the largest at which the first batch trains too


def rate(lr: float, batch: int) -> float:
    """ε/(1−m) at this batch, of the g that has `lr` at the first."""
    return lr * batch / REFERENCE


def arm_name(lr: float, batch: int, momentum: float) -> str:
    """Of the arm at the g that has ε/(1−m) = lr at the first batch."""
    return f"g{lr:g}_b{batch}_m{momentum:g}"


def noise(lr: float) -> float:
    """g ≈ εN/(B(1−m)) of the first epochs."""
    return lr * SAMPLES / REFERENCE


def arms() -> tuple[Arm, ...]:
    """Every batch and momentum at every g."""
    return tuple(
        Arm(
            name=arm_name(lr, batch, momentum),
            label=f"B {batch:,}, m {momentum:g}",
            panel=f"g {noise(lr):.4g}",
            x=batch,
            recipe="imagenet_teacher",
            data=Teacher(),
            overrides=(
                f"data.train_samples={SAMPLES}",
                *("model.width=64", f"schedule.epochs={EPOCHS}", "schedule.policy=decay_lr"),
                "schedule.milestones=[{epoch: 4, factor: 4}, {epoch: 6, factor: 4}]",
                *("run.eval_every=1", "run.noise_every=0", "run.loggers=[]"),
                f"schedule.momentum={momentum:g}",
                f"schedule.global_batch={batch}",
                f"schedule.lr={rate(lr, batch) * (1 - momentum):.6g}",
            ),
        )
        for lr in RATES
        for momentum in MOMENTA
        for batch in BATCHES
    )


def find(found: Results, name: str) -> Results:
    """The arm of this name."""
    return next(arm for arm in found["arms"] if arm["name"] == name)


def against(found: Results, lr: float, batch: int, momentum: float) -> Difference:
    """Final test accuracy minus that of the first batch without momentum at the same g."""
    arm = find(found, arm_name(lr, batch, momentum))
    return paired(arm, find(found, arm_name(lr, REFERENCE, 0.0)))


def judge(found: Results) -> Verdict:
    """All runs of one g agree as long as B ≤ N/10 and ε/(1−m) is small."""
    cells = [(lr, batch, m) for lr in RATES for m in MOMENTA for batch in BATCHES]
    cells = [cell for cell in cells if cell[1:] != (REFERENCE, 0.0)]
    small = [
        (lr, batch, m)
        for lr, batch, m in cells
        if batch <= TENTH * SAMPLES and rate(lr, batch) <= SMALL
    ]
    outcomes = {cell: against(found, *cell).within(MARGIN) for cell in cells}
    parts = []
    for lr in RATES:
        for momentum in MOMENTA:
            own = [(lr, batch, momentum) for batch in BATCHES if (lr, batch, momentum) in outcomes]
            parted = [cell for cell in own if outcomes[cell] is not Outcome.HELD]
            same = own[: own.index(parted[0])] if parted else own
            other = [cell for cell in own if outcomes[cell] is Outcome.NO]
            part = f"g {noise(lr):.4g}, m {momentum:g}: the same up to "
            part += f"B {same[-1][1]:,}" if same else f"none of {len(own)} batches"
            if other:
                cell = min(other, key=lambda one: one[1])
                part += (
                    f", another from B {cell[1]:,} (B/N {cell[1] / SAMPLES:.2g}, ε/(1−m) "
                    f"{rate(lr, cell[1]):.3g}: {against(found, *cell)})"
                )
            parts.append(part)
    return Verdict(
        outcome=all_of(outcomes[cell] for cell in small),
        sentence=f"Final test accuracy against the batch of {REFERENCE} without momentum at the "
        f"same g: {'; '.join(parts)}. Of the {len(small)} runs with B ≤ N/10 and "
        f"ε/(1−m) ≤ {SMALL:g}, "
        f"{sum(outcomes[cell] is Outcome.HELD for cell in small)} are the same, "
        f"{sum(outcomes[cell] is Outcome.NO for cell in small)} are not, the others are undecided; "
        f"{_limit(found)} (95 % intervals, paired by seed. The same: the whole interval within "
        f"± {MARGIN:g} point; not: wholly outside. Held: all with B ≤ N/10 and ε/(1−m) ≤ "
        f"{SMALL:g}, the largest of the first batch, are the same.)",
    )


def _limit(found: Results) -> str:
    """The largest B/N, and the largest ε/(1−m), up to which all runs are the same."""

    def bound(key: str) -> float:
        values: dict[float, list[bool]] = {}
        for lr in RATES:
            for momentum in MOMENTA:
                for batch in BATCHES:
                    if (batch, momentum) != (REFERENCE, 0.0):
                        value = batch / SAMPLES if key == "share" else rate(lr, batch)
                        same = against(found, lr, batch, momentum).within(MARGIN)
                        values.setdefault(value, []).append(same is Outcome.HELD)
        fitting = 0.0
        for value in sorted(values):
            if not all(values[value]):
                break
            fitting = value
        return fitting

    return (
        f"all are the same up to B/N {bound('share'):.2g}, and up to ε/(1−m) "
        f"{bound('rate'):.3g} (0: not even the least)."
    )


# --------------------------------------------------------------------------------------- figure


def draw(found: Results) -> Figure:
    """Above: curves over epochs at one g; below: the map of differences."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(8.4, 7.6), layout="constrained")
        curves, maps = figure.subplots(2, len(MOMENTA), height_ratios=(1, 1.1))
        for axes, momentum in zip(curves, MOMENTA, strict=True):
            _draw_curves(axes, found, RATES[len(RATES) // 2], momentum)
        for axes, momentum in zip(maps, MOMENTA, strict=True):
            _draw_map(axes, found, momentum)
        curves[0].set_ylabel("train loss")
        maps[0].set_ylabel("ε/(1−m)")
        handles, labels = curves[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=11
        )
    return figure


def _draw_curves(axes: Axes, found: Results, lr: float, momentum: float) -> None:
    """Training loss over epochs, mean and range of the seeds; the baseline without momentum too."""
    shown = [(REFERENCE, 0.0, "#555")]
    shown += [(batch, momentum, COLOURS[place]) for place, batch in enumerate(BATCHES)]
    for batch, m, colour in shown:
        curve = find(found, arm_name(lr, batch, m))["loss"]
        baseline = colour == "#555"
        axes.plot(
            curve["epochs"],
            curve["mean"],
            "--" if baseline else "-",
            color=colour,
            zorder=3 if baseline else 2,
            label=f"B {batch:,}, m 0" if baseline else f"B {batch:,}",
        )
        axes.fill_between(
            curve["epochs"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0
        )
    axes.set_xlim(0, EPOCHS)
    # what diverges at first goes out of the picture
    axes.set_ylim(top=1.3 * max(find(found, arm_name(lr, REFERENCE, 0.0))["loss"]["mean"]))
    axes.set_xlabel("epochs")
    axes.set_title(f"m {momentum:g}, g {noise(lr):.4g}", loc="left", fontsize=12)


def _draw_map(axes: Axes, found: Results, momentum: float) -> None:
    """Each run at its B/N and ε/(1−m), with its difference from the baseline of its g."""
    marks = {
        Outcome.HELD: (COLOURS[2], "o"),
        Outcome.UNDECIDED: ("#bbbbbb", "D"),
        Outcome.NO: (COLOURS[1], "X"),
    }
    for lr in RATES:
        shares = [batch / SAMPLES for batch in BATCHES]
        axes.plot(shares, [rate(lr, b) for b in BATCHES], "-", color="#ddd", zorder=1)
        for batch in BATCHES:
            one = against(found, lr, batch, momentum)
            outcome = one.within(MARGIN)
            colour, mark = marks[outcome]
            x, y = batch / SAMPLES, rate(lr, batch)
            axes.plot(x, y, mark, color=colour, markersize=10, zorder=2)
            text = "base" if (batch, momentum) == (REFERENCE, 0.0) else f"{one.mean:+.1f}"
            axes.annotate(
                text, (x, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=10
            )
    axes.axvline(TENTH, color="#555", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.12)
    axes.set_xlabel("B/N (dotted: 1/10)")
    axes.set_title(f"m {momentum:g}: points against the baseline", loc="left", fontsize=12)


STUDIES = (
    Study(
        name=NAME,
        scale="laptop",
        title="Equal noise scale, equal training",
        claim="Smith & Le 2018, section 4, and Smith et al. 2018, section 3: runs whose ε, B and m "
        "give the same g = εN/(B(1−m)) train alike after equal epochs, as long as B ≪ N (about "
        "N/10) and ε is small. Neither paper maps where that ends.",
        setting="Here: 20,000 images with labels of a fixed random network (`--data teacher`; 20 % "
        "of the training labels are random), a perceptron of 64 units without weight decay, 8 "
        "epochs, noise ÷4 at epochs 4 and 6 by the lr. Three g, each four times the one before; "
        "at each, B from 250 (1.25 % of N) to 4,000 (20 %), with m 0 and 0.9, and "
        "ε = g·B·(1−m)/N. Above: training loss over epochs at the middle g, with the range of "
        "the seeds; dashed: the batch of 250 without momentum, which every run is compared with. "
        "Below: the difference in final test accuracy; green circles: the same, orange crosses: "
        "not, grey diamonds: undecided. Nothing was tuned; the middle g is half of that of "
        "`momentum_settling`, and it and the rule were chosen before the first run.",
        arms=arms(),
        seeds=tuple(range(5)),
        draw=draw,
        judge=judge,
    ),
)
