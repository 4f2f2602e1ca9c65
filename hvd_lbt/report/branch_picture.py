"""The picture of a probe: what each global batch loses over the same samples."""

import io
from collections.abc import Mapping
from math import isfinite

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from hvd_lbt.branch_table import WHAT, Branches
from hvd_lbt.measure.branch_verdict import CONFIDENCE, SMALLEST, Verdict
from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS, PLAIN


def draw_branches(
    title: str,
    found: Mapping[str, tuple[Branches, Verdict]],
    gradient_noise: float | None,
) -> bytes:
    """A PNG: the ratio of each test loss to that of B with its interval, and the losses themselves.

    found: by what was kept, the branches of each batch and the verdict. gradient_noise:
    tr(Σ)/|G|², in samples.
    """
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, (kept, (branches, verdict)) in enumerate(found.items()):
            _differences(left, branches, verdict, WHAT[kept], COLOURS[place], 1 + 0.04 * place)
            _losses(right, branches, WHAT[kept], COLOURS[place])
        noise = next(iter(found.values()))[1].noise
        left.axhline(1, color="#555", linewidth=1)
        left.axhspan(
            1 / (1 + noise),
            1 + noise,
            color="#555",
            alpha=0.12,
            linewidth=0,
            label="noise of the seeds",
        )
        left.set_ylabel(f"test loss / that of B,\ngeometric mean and {CONFIDENCE:.0%} interval")
        for axes in (left, right):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PLAIN)
            axes.yaxis.set_minor_formatter(NullFormatter())
            low, high = axes.get_ylim()
            if high < 10 * low:  # hardly a power of ten in it, and none without a number
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                axes.yaxis.set_minor_locator(NullLocator())
        right.set_ylabel("loss, mean of the seeds")
        batches = list(next(iter(found.values()))[0])
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            if gradient_noise is not None:
                axes.axvline(gradient_noise, color=COLOURS[2], linestyle=":", label="tr(Σ)/|G|²")
            axes.set_xticks(batches)
            axes.xaxis.set_major_formatter(PLAIN)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("global batch")
        handles = {
            label: handle
            for axes in (left, right)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            [*handles.values()], [*handles], loc="outside lower center", ncols=4, frameon=False
        )
        figure.suptitle(title, fontsize=12)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _differences(
    axes: Axes, branches: Branches, verdict: Verdict, label: str, colour: str, shift: float
) -> None:
    base = [one["loss"] for one in next(iter(branches.values()))]
    shown = [one for one in verdict.compared if isfinite(one.above) and isfinite(one.high)]
    x = [one.batch * shift for one in shown]
    axes.errorbar(
        x,
        [1 + one.above for one in shown],
        [
            [one.above - one.low for one in shown],
            [one.high - one.above for one in shown],
        ],
        fmt="o",
        color=colour,
        capsize=4,
        label=f"ratio, {label}",
    )
    for at, one in zip(x, shown, strict=True):
        its = [branch["loss"] for branch in branches[one.batch]]
        points = [own / max(of_base, SMALLEST) for own, of_base in zip(its, base, strict=True)]
        axes.plot([at] * len(points), points, ".", color=colour, alpha=0.35)


def _losses(axes: Axes, branches: Branches, label: str, colour: str) -> None:
    for key, dash, what in (("loss", "-", "test"), ("train_loss", "--", "train")):
        points = [
            (batch, sum(one[key] for one in its) / len(its))
            for batch, its in branches.items()
            if not any(one["diverged"] or one[key] is None for one in its)
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), f"o{dash}", color=colour, label=f"{what}, {label}"
            )
