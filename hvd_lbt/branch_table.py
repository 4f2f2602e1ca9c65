"""What the branches of a checkpoint came to, as a table and as sentences for the terminal."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import mean
from typing import Any

from rich.table import Table

from hvd_lbt.measure.branch_verdict import CONFIDENCE, Compared, Verdict

WHAT = {"noise": "g kept", "lr": "lr kept"}
STILL = 0.001  # of B's test loss: less noise of the seeds than this is of weights that stand still
Branches = Mapping[int, Sequence[Mapping[str, Any]]]


def render_branches(title: str, found: Mapping[str, tuple[Branches, Verdict]]) -> Table:
    """One row for each batch; found: by what was kept, the branches of each batch and the verdict.

    Losses and accuracies are means over the seeds, what they are above B's geometric ones.
    """
    table = Table(title=title)
    for heading in (
        *("kept", "global batch", "updates", "lr", "train loss", "test loss", "top-1, %"),
        *("above B's by", f"{CONFIDENCE:.0%} interval", "outcome"),
    ):
        table.add_column(heading, justify="right")
    for kept, (branches, verdict) in found.items():
        compared = {one.batch: one for one in verdict.compared}
        for batch, its in branches.items():
            if batch in compared:
                table.add_row(WHAT[kept], *_measured(batch, its), *_compared(compared[batch]))
            elif kept == "noise":
                table.add_row("both", *_measured(batch, its), "", "", "is B")
    return table


def sentences(
    branches: Branches,
    verdicts: Mapping[str, Verdict],
    gradient_noise: float | None,
    source: str = "parts",
) -> list[str]:
    """The verdict in words.

    branches: of one kind, for what all have in common. gradient_noise: tr(Σ)/|G|² of the
    checkpoint, in samples; source: of an update's parts, or of differences of two updates.
    """
    batches, seeds = list(branches), len(next(iter(branches.values())))
    noise = next(iter(verdicts.values())).noise
    lines = [
        f"The noise of the seeds (standard deviation of B's log test loss): {100 * noise:.1f} %.",
        *(f"{WHAT[kept]}: {_verdict(its, batches, seeds)}" for kept, its in verdicts.items()),
    ]
    measured = "not known: run.noise_every was 0, or nothing could be measured yet"
    if gradient_noise is not None:
        marked = " (from differences of consecutive updates)" if source == "differences" else ""
        measured = f"{gradient_noise:,.4g} samples{marked}"
    lines.append(f"tr(Σ)/|G|² of the checkpoint, as the run measured it: {measured}.")
    base = next(iter(branches.values()))
    if noise < STILL and not any(one["diverged"] for one in base):
        lines.append(
            f"The test losses of B differ by less than {STILL:.1%} among the seeds: with an lr of "
            f"{base[0]['lr']:.3g} the weights hardly move, and no batch can lose much. Branch from "
            "an earlier checkpoint."
        )
    short = [batch for batch, its in branches.items() if _is_short(its[0])]
    if short:
        settled = 1 / (1 - base[0]["momentum"])
        lines.append(
            f"From B = {short[0]:,} on, the branches have fewer than 1/(1−m) = {settled:.3g} "
            "updates: much of their gradients is in the momentum buffer still. Longer --epochs "
            "give it time."
        )
    flat = [one for its in branches.values() for one in its]
    if bad := sum(one["bad_updates"] for one in flat):
        lines.append(f"{bad:,} updates were dropped: their gradients were infinite or NaN.")
    if skipped := sum(one["skipped_samples"] for one in flat):
        lines.append(f"{skipped:,} samples were skipped: they cannot be decoded.")
    return lines


def _verdict(verdict: Verdict, batches: Sequence[int], seeds: int) -> str:
    critical, losing = verdict.critical, verdict.losing
    untold = [
        f"{one.batch:,}"
        for one in verdict.compared
        if one.outcome == "cannot be told"
        and one.batch > (critical or 0)
        and (losing is None or one.batch < losing)
    ]
    parts = []
    if critical is not None:
        parts.append(f"the largest batch that loses nothing is {critical:,}")
    if untold:
        parts.append(
            f"{', '.join(untold)} cannot be told (more --seeds than {seeds} or longer --epochs "
            "make the interval narrower)"
        )
    if losing is not None:
        parts.append(f"{losing:,} loses")
    elif critical == batches[-1]:
        parts.append("no batch of this probe loses: a larger --largest may find one that does")
    return "; ".join(parts) + "."


def _measured(batch: int, its: Sequence[Mapping[str, Any]]) -> list[str]:
    first = its[0]
    diverged = sum(one["diverged"] for one in its)
    cells = [f"{batch:,}", f"{first['updates']:,}", f"{first['lr']:.4g}"]
    if diverged:
        return [*cells, "", f"{diverged} of {len(its)} diverged", ""]
    train = [one["train_loss"] for one in its]
    cells.append("" if None in train else f"{mean(train):.4f}")
    cells.append(f"{mean(one['loss'] for one in its):.4f}")
    return [*cells, f"{100 * mean(one['top1'] for one in its):.2f}"]


def _compared(one: Compared) -> list[str]:
    if not isfinite(one.above):
        return ["", "", one.outcome]
    return [percent(one.above), f"{percent(one.low)} to {percent(one.high)}", one.outcome]


def percent(share: float) -> str:
    """A share above the test loss of B with its sign, +1.2 %; from ten times on the ratio, ×12."""
    return f"{100 * share:+.1f} %" if share < 9 else f"×{1 + share:.3g}"


def _is_short(branch: Mapping[str, Any]) -> bool:
    """Whether it has fewer updates than a momentum buffer averages over."""
    return bool(branch["updates"] * (1 - branch["momentum"]) < 1 - 1e-9)
