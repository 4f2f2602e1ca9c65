"""Is the variance of the weights what the noise scale says, and does it depend on g alone?

Source: S. L. Smith, Q. V. Le, "A Bayesian Perspective on Generalization and Stochastic Gradient
Descent", ICLR 2018 (arXiv:1710.06451), section 5: SGD follows a stochastic differential equation
whose noise has the scale g = ε/(1−m)·(N/B − 1). Here: a quadratic loss of known curvature, samples
of known covariance, and three ways to draw them. The rules of the verdicts, ROUGH to LIMIT below,
were written before the first simulation; nothing was tuned.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from hvd_lbt.log.provenance import revision, versions
from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.rounding import five_digits
from hvd_lbt.schedule.noise import exact_noise_scale, noise_scale
from hvd_lbt.schedule.weight_variance import (
    Sampling,
    epoch_share,
    largest_curvature,
    predicted_variance,
    stationary_variance,
)
from hvd_lbt.studies.kept_numbers import kept_or_measured
from hvd_lbt.studies.paired import LEVEL, Outcome
from hvd_lbt.studies.pictures import write_report
from hvd_lbt.studies.quadratic import (
    Setting,
    batch_means,
    difference_from_reference,
    end_of_epoch_variance,
    make_samples,
    settings_of_equal_noise,
    simulate,
)
from hvd_lbt.studies.trainings import made_with

Floats = NDArray[np.float64]

NAME = "noise_formula"
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)
TRAIN_SAMPLES, SCALE = 1_000, 1.0  # N and g; curvatures are those of g·h
RELAXATIONS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # g·h
BATCHES = (10, 20, 50, 100, 250, 500)
MOMENTA = ((0.0, False), (0.9, False), (0.9, True), (0.95, False), (0.95, True))  # m, nesterov
TRAININGS = 200  # side by side; the intervals are over them
EPOCHS = 80  # measured after the burn-in; more for the larger batches, see `_epochs`
COMPARED_UPDATES = 300  # with plain torch, before anything is measured

ROUGH = 0.10  # g is right where the variance, mean over the curvatures, is within this part of it
SMALL = 0.1  # …and updates are small where ε·h is at most this part of 1 − m
EXACT = 0.05  # the exact form is right where the same mean is within this part of it
LIMIT = 1e-4  # by which the compiled update may differ from plain torch in float64, relative


def settings_of_study(
    trainings: int = TRAININGS, epochs: int = EPOCHS, batches: Sequence[int] = BATCHES
) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "train_samples": TRAIN_SAMPLES,
        "g": SCALE,
        "relaxations": list(RELAXATIONS),
        "batches": list(batches),
        "momenta": [list(one) for one in MOMENTA],
        "samplings": list(SAMPLINGS),
        "trainings": trainings,
        "epochs": {
            f"{batch}-{sampling}": epochs * _epochs(batch, sampling)
            for batch in batches
            for sampling in SAMPLINGS
        },
    }


def _epochs(batch: int, sampling: Sampling) -> int:
    """How much longer than EPOCHS is measured.

    With larger batches only slow directions have small updates, and heavy momentum lasts for
    epochs; with every sample once an epoch the relative errors are smaller.
    """
    if sampling == "epoch":
        return 2 if batch >= TRAIN_SAMPLES / 2 else 1
    return 8 if batch >= TRAIN_SAMPLES / 4 else 2 if batch >= TRAIN_SAMPLES / 10 else 1


def study(out: Path, *, redraw: bool = False) -> str:
    """Measure what OUT does not have yet; draw, write, sum up in a sentence.

    Writes OUT/noise_formula.json, .png and .md. redraw: from the numbers in OUT, or UserError. A
    stopped study continues with the next batch and way to draw: OUT/noise_formula has a file for
    each.
    """
    settings = settings_of_study()
    file = out / f"{NAME}.json"
    parts = out / NAME
    found = kept_or_measured(
        file, settings, lambda: measure(settings, parts), _lines, redraw=redraw
    )
    write_report(out, NAME, draw(found), report(found))
    return finding(found)


def measure(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Simulate every batch, way to draw, and momentum. Keeps each piece in `folder`."""
    curvatures = np.array(settings["relaxations"]) / settings["g"]
    samples = make_samples(settings["train_samples"], len(curvatures), seed=0)
    compared = [
        difference_from_reference(samples, np.minimum(curvatures, 5.0), one, COMPARED_UPDATES)
        for one in _settings(settings, settings["batches"][0])
    ]
    if max(compared) > LIMIT:
        raise ArithmeticError(
            f"FusedSGD is {max(compared):.2g} off plain torch in float64; {LIMIT:g} is allowed"
        )
    points = []
    for batch in settings["batches"]:
        for sampling in settings["samplings"]:
            name = f"{batch}-{sampling}"
            own = {key: value for key, value in settings.items() if key != "batches"}
            own["epochs"] = settings["epochs"][name]
            piece = kept_or_measured(
                folder / f"{name}.json",
                own,
                lambda b=batch, s=sampling, own=own: {  # type: ignore[misc]  # bound in this turn
                    "settings": own,
                    "points": _measure_one(settings, samples, curvatures, b, s),
                },
                _lines,
            )
            points += piece["points"]
            print(f"{NAME}: B {batch}, {sampling}: done.", flush=True)
    return {
        "settings": settings,
        "versions": versions(),
        "revision": revision(),
        "off_plain_torch": max(compared),
        "points": points,
    }


def _settings(settings: dict[str, Any], batch: int) -> list[Setting]:
    momenta = [(float(momentum), bool(nesterov)) for momentum, nesterov in settings["momenta"]]
    return settings_of_equal_noise(settings["g"], settings["train_samples"], (batch,), momenta)


def _measure_one(
    settings: dict[str, Any],
    samples: NDArray[np.float32],
    curvatures: Floats,
    batch: int,
    sampling: Sampling,
) -> list[dict[str, Any]]:
    """All momenta at one batch and way to draw, on the same batches."""
    ours = _settings(settings, batch)
    updates = settings["train_samples"] // batch
    burn_in = max(one.burn_in(curvatures, updates) for one in ours)
    epochs = settings["epochs"][f"{batch}-{sampling}"]
    trainings = settings["trainings"]
    means = batch_means(samples, batch, sampling, trainings, burn_in + epochs)
    points = []
    for one, squares in zip(
        ours, simulate(ours, curvatures, means, burn_in, trainings), strict=True
    ):
        point = {
            "sampling": sampling,
            "global_batch": batch,
            "lr": one.lr,
            "momentum": one.momentum,
            "nesterov": one.nesterov,
            "variance": _numbers(squares.mean.mean(0)),
            "error": _numbers(squares.mean.std(0, ddof=1) / np.sqrt(trainings)),
            "end": _numbers(squares.end.mean(0)),
        }
        # Mean over the curvatures for each training: its spread gives the mean's error.
        g_says, exact, small = _expected(point, settings)
        whole = ~np.isnan(squares.mean[0])
        for key, expected, chosen in (
            ("of_g", g_says, whole & small),
            ("of_exact", exact, whole),
        ):
            shares = (squares.mean[:, chosen] / expected[chosen]).mean(1)
            point[key] = [float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(trainings))]
        points.append(point)
    return points


def _numbers(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _expected(
    point: dict[str, Any], settings: dict[str, Any]
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """What g says, the exact variance, and whether updates are small: each (curvatures,).

    g is N/B's for independent draws, and (N/B − 1)'s for the other two, as the papers derive it.
    """
    samples, batch = settings["train_samples"], point["global_batch"]
    lr, momentum = point["lr"], point["momentum"]
    form = noise_scale if point["sampling"] == "independent" else exact_noise_scale
    scale = form(lr, momentum, samples, batch)
    curvatures = np.array(settings["relaxations"]) / settings["g"]
    exact = [
        stationary_variance(
            lr=lr,
            momentum=momentum,
            train_samples=samples,
            global_batch=batch,
            curvature=float(h),
            nesterov=point["nesterov"],
            sampling=point["sampling"],
        )
        for h in curvatures
    ]
    g_says = [predicted_variance(scale, float(h), samples) for h in curvatures]
    small = lr * curvatures <= SMALL * (1 - momentum) * (1 + 1e-9)
    return np.array(g_says), np.array(exact), small


# ------------------------------------------------------------------------------------- verdicts


def judge(found: dict[str, Any], sampling: str, key: str) -> tuple[Outcome, float, float, float]:
    """Whether the means over the curvatures are all near 1: outcome, lowest, highest, half width.

    key: of_g (small updates, within ROUGH) or of_exact (within EXACT). Held: every 95 % interval,
    simultaneous over all (ε, B, m), is within the margin; did not hold: one is outside of it.
    """
    margin = ROUGH if key == "of_g" else EXACT
    shares = np.array([p[key] for p in found["points"] if p["sampling"] == sampling])
    half = _quantile(found, len(shares)) * shares[:, 1]
    off = np.abs(shares[:, 0] - 1)
    if (off - half > margin).any():
        outcome = Outcome.NO
    else:
        outcome = Outcome.HELD if (off + half <= margin).all() else Outcome.UNDECIDED
    return outcome, float(shares[:, 0].min()), float(shares[:, 0].max()), float(half.max())


def _quantile(found: dict[str, Any], count: int) -> float:
    """Student's t over the trainings, for `count` intervals that hold together (Bonferroni)."""
    degrees = found["settings"]["trainings"] - 1
    return float(stats.t.ppf(1 - (1 - LEVEL) / 2 / count, degrees))


def beyond(found: dict[str, Any], sampling: str) -> tuple[int, int]:
    """Of all single variances: how many are further from the exact form than their simultaneous
    95 % interval, and how many there are.
    """
    scores = []
    for point in found["points"]:
        if point["sampling"] == sampling:
            _, exact, _ = _expected(point, found["settings"])
            scores += [
                (variance - value) / error
                for variance, value, error in zip(
                    point["variance"], exact, point["error"], strict=True
                )
                if variance is not None
            ]
    return int((np.abs(scores) > _quantile(found, len(scores))).sum()), len(scores)


def shares_of_g(found: dict[str, Any], sampling: str) -> Floats:
    """Single variances over g's, small updates only."""
    shares: list[float] = []
    for point in found["points"]:
        if point["sampling"] == sampling:
            g_says, _, small = _expected(point, found["settings"])
            shares += [
                variance / value
                for variance, value, is_small in zip(point["variance"], g_says, small, strict=True)
                if is_small and variance is not None
            ]
    return np.array(shares)


def finding(found: dict[str, Any]) -> str:
    """What held, with the numbers."""
    names = {
        "independent": "samples drawn independently",
        "subset": "a new subset for each update",
        "epoch": "every sample once an epoch",
    }
    parts, exact_parts = [], []
    for sampling, name in names.items():
        outcome, low, high, half = judge(found, sampling, "of_g")
        single = shares_of_g(found, sampling)
        parts.append(
            f"with {name} the claim {outcome}: the variance is {low:.2f} to {high:.2f} of g's "
            f"(means over the curvatures, ± {half:.2f}; single ones {single.min():.2f} to "
            f"{single.max():.2f})"
        )
        outcome, low, high, half = judge(found, sampling, "of_exact")
        off, count = beyond(found, sampling)
        exact_parts.append(
            f"{name}: {outcome}, {low:.3f} to {high:.3f} (± {half:.3f}), {off} of {count} single "
            "variances outside their interval"
        )
    text = "; ".join(parts)
    return (
        f"{text[0].upper()}{text[1:]}. The exact, discrete form ({'; '.join(exact_parts)}). "
        f"(Held: all means within {ROUGH:.0%} of g's where εh ≤ {SMALL:g}·(1−m), within "
        f"{EXACT:.0%} of the exact form's everywhere, intervals included, simultaneous 95 %.)"
    )


def _lines(found: dict[str, Any]) -> str:
    """JSON with a line for each point, and numbers of five digits."""
    settings = found["settings"]
    text = json.dumps(five_digits(found) | {"settings": settings}, ensure_ascii=False)
    return text.replace('{"sampling"', '\n{"sampling"') + "\n"


# ------------------------------------------------------------------------- figure


def _select(found: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [p for p in found["points"] if all(p[key] == value for key, value in wanted.items())]


def _planned(scale: float, curvatures: Floats) -> Floats:
    """What g says of each curvature."""
    return np.array([predicted_variance(scale, float(h), TRAIN_SAMPLES) for h in curvatures])


def _against_g(found: dict[str, Any], point: dict[str, Any]) -> tuple[Floats, Floats]:
    """Variance over that of the planned g = εN/(B(1−m)), and its 95 % error: (curvatures,)."""
    settings = found["settings"]
    curvatures = np.array(settings["relaxations"]) / settings["g"]
    says = np.array(
        [predicted_variance(settings["g"], h, settings["train_samples"]) for h in curvatures]
    )
    t = _quantile(found, 1)
    variance, error = (np.array(point[key], dtype=float) for key in ("variance", "error"))
    return variance / says, t * error / says


def _exact_against_g(found: dict[str, Any], point: dict[str, Any], relaxations: Floats) -> Floats:
    settings = dict(found["settings"], relaxations=relaxations.tolist())
    _, exact, _ = _expected(point, settings)
    shares = exact / _planned(settings["g"], relaxations / settings["g"])
    return np.where(np.isinf(shares), np.nan, shares)


def draw(found: dict[str, Any]) -> Figure:
    """Measured (points) and exact (lines) variances over that of g, in four panels."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9, 8.6), layout="constrained")
        ways, memory, steps, batches = figure.subplots(2, 2).ravel()
        _draw_over_curvature(
            ways,
            found,
            [
                (name, {"sampling": name, "global_batch": found["settings"]["batches"][0]})
                for name in SAMPLINGS
            ],
            {"momentum": 0.0},
        )
        ways.set_title("m = 0, B = N/100, by how samples are drawn", fontsize=12)
        _draw_over_curvature(
            memory,
            found,
            [
                (
                    f"{batch / TRAIN_SAMPLES / (1 - m):.2g} epochs",
                    {"momentum": m, "global_batch": batch},
                )
                for m, batch in ((0.0, 10), (0.9, 10), (0.9, 100), (0.95, 500))
            ],
            {"sampling": "epoch", "nesterov": False},
        )
        memory.set_title("once an epoch, by the momentum's memory", fontsize=12)
        for axes in (ways, memory):
            axes.set_xlabel("g·h: relaxation times in an epoch")
        _draw_steps(steps, found)
        _draw_batches(batches, found)
        for axes in (ways, steps):
            axes.set_ylabel("variance / that of g = εN/(B(1−m))")
        for axes in (ways, memory, steps, batches):
            axes.axhline(1, color="#000000", linewidth=0.9, linestyle="--")
            axes.legend(frameon=False, fontsize=11)
        figure.supxlabel(
            "points: simulated, error bars 95 % intervals over 200 trainings; lines: exact form; "
            "dashed: g",
            fontsize=11,
        )
    return figure


def _draw_over_curvature(
    axes: Axes,
    found: dict[str, Any],
    curves: Sequence[tuple[str, dict[str, Any]]],
    common: dict[str, Any],
) -> None:
    x = np.array(found["settings"]["relaxations"])
    fine = np.geomspace(x[0], x[-1], 80)
    for place, (label, wanted) in enumerate(curves):
        for point in _select(found, **common, **wanted)[:1]:
            colour = COLOURS[place]
            shares, errors = _against_g(found, point)
            axes.plot(fine, _exact_against_g(found, point, fine), color=colour, linewidth=1.5)
            axes.errorbar(x, shares, errors, fmt="o", ms=4, color=colour, capsize=2, label=label)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.5)


def _draw_steps(axes: Axes, found: dict[str, Any]) -> None:
    """Where ε stops being small: independent draws, over ε·h."""
    kinds = ((0.0, False, "m = 0"), (0.9, False, "0.9, heavy ball"), (0.9, True, "0.9, Nesterov"))
    for place, (momentum, nesterov, label) in enumerate(kinds):
        colour = COLOURS[place]
        points = _select(found, sampling="independent", momentum=momentum, nesterov=nesterov)
        x, y, errors = [], [], []
        for point in points:
            shares, error = _against_g(found, point)
            steps = point["lr"] * np.array(found["settings"]["relaxations"]) / SCALE
            x += steps.tolist()
            y += shares.tolist()
            errors += error.tolist()
        edge = largest_curvature(1.0, momentum, nesterov)
        fine = np.geomspace(1e-4, 0.95 * edge, 100)
        point = {**points[0], "lr": 1.0}
        scale = noise_scale(1.0, momentum, TRAIN_SAMPLES, point["global_batch"])
        _, exact, _ = _expected(
            point, {**found["settings"], "g": 1.0, "relaxations": fine.tolist()}
        )
        says = np.array([predicted_variance(scale, float(h), TRAIN_SAMPLES) for h in fine])
        axes.plot(fine, exact / says, color=colour, linewidth=1.5)
        axes.errorbar(x, y, errors, fmt="o", ms=4, color=colour, capsize=2, label=label)
    axes.set_xscale("log")
    axes.set_ylim(0, 3)
    axes.set_xlim(1e-4, 5)
    axes.set_xlabel("ε·h")
    axes.set_title("independent draws: where ε is not small", fontsize=12)


def _draw_batches(axes: Axes, found: dict[str, Any], relaxations: float = 1.0) -> None:
    """At equal g and one curvature: over B/N, by momentum."""
    index = found["settings"]["relaxations"].index(relaxations)
    for place, momentum in enumerate((0.0, 0.9, 0.95)):
        colour = COLOURS[place]
        points = _select(found, sampling="epoch", momentum=momentum, nesterov=False)
        x = np.array([point["global_batch"] for point in points]) / TRAIN_SAMPLES
        pairs = [_against_g(found, point) for point in points]
        y, errors = (np.array([pair[part][index] for pair in pairs]) for part in (0, 1))
        exact = [_exact_against_g(found, p, np.array([relaxations]))[0] for p in points]
        axes.plot(x, exact, color=colour, linewidth=1.5)
        axes.errorbar(
            x, y, errors, fmt="o", ms=4, color=colour, capsize=2, label=f"m = {momentum:g}"
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("B/N, at equal g")
    axes.set_title(f"once an epoch, heavy ball, g·h = {relaxations:g}", fontsize=12)


# --------------------------------------------------------------------------- page


def report(found: dict[str, Any]) -> str:
    """The study's page, in Markdown."""
    settings = found["settings"]
    how = (
        f"Loss of sample i: ½ wᵀHw − xᵢᵀw, N = {settings['train_samples']:,}, the covariance of "
        f"the xᵢ known exactly. {len(settings['relaxations'])} curvatures, g·h from "
        f"{settings['relaxations'][0]:g} to {settings['relaxations'][-1]:g}; "
        f"{len(settings['batches']) * len(settings['momenta'])} (ε, B, m) of g = {SCALE:g} for "
        f"each way to draw. Updates are FusedSGD's, in {settings['trainings']} trainings side by "
        f"side from w = 0; over {COMPARED_UPDATES} updates they are within "
        f"{found['off_plain_torch']:.1g} of plain torch in float64, with a rotated H and "
        "gradients by autograd. w² is measured after a burn-in to within e⁻⁵ of the stationary "
        f"state, over {min(settings['epochs'].values())} to {max(settings['epochs'].values())} "
        "epochs; the order of samples is that of `data.order.epoch_order`. Rules and settings "
        "were fixed before the first full run, with one change after it: its "
        f"{EPOCHS} epochs for every batch left the first two outcomes undecided (intervals of "
        "± 0.09 from B = N/4 on), so larger batches were measured over more epochs."
    )
    return "\n".join(
        [
            "# The noise formula",
            "",
            (
                f"`hvd_lbt study {NAME}`, after Smith & Le 2018 (arXiv:1710.06451), section 5: SGD "
                "follows a stochastic differential equation, whose noise depends on ε, B and m "
                "only by g = ε/(1−m)·(N/B − 1). The variance of the weights is then g·σ²/(2hN)."
            ),
            "",
            finding(found),
            "",
            f"![Variance of the weights over that of g]({NAME}.png)",
            "",
            how,
            "",
            *_epoch_section(found),
            *_small_section(found),
            *_batch_section(found),
            "## Every (ε, B, m)",
            "",
            (
                "Mean over the curvatures ± standard error of variance / g's (εh ≤ "
                f"{SMALL:g}·(1−m) only) and of variance / the exact form (all that are stable)."
            ),
            "",
            *_table(found),
            "",
            made_with(found),
            "",
        ]
    )


def _epoch_section(found: dict[str, Any]) -> list[str]:
    ends, exact_ends, means = [], [], []
    for point in _select(found, sampling="epoch", global_batch=10, momentum=0.0):
        one = Setting(**{k: point[k] for k in ("lr", "momentum", "global_batch", "nesterov")})
        shares, _ = _against_g(found, point)
        for index, x in enumerate(found["settings"]["relaxations"]):
            says = predicted_variance(SCALE, x / SCALE, TRAIN_SAMPLES)
            ends.append(point["end"][index] / says)
            exact_ends.append(end_of_epoch_variance(one, x / SCALE, TRAIN_SAMPLES) / says)
            means.append(shares[index])
    x = found["settings"]["relaxations"]
    rows = {
        "measured, mean over updates": means,
        "1 − 2/x + 2(1 − e⁻ˣ)/x²": [epoch_share(value) for value in x],
        "measured, at the epochs' ends": ends,
        "exact, at the epochs' ends": exact_ends,
    }
    return [
        "## Every sample once an epoch",
        "",
        (
            "The deviations of one epoch's samples sum to zero, so the variance that is left is "
            "that of a weight about its own mean over an epoch (derivation: "
            "`hvd_lbt/schedule/weight_variance.py`). Without momentum and for small steps the "
            "share of g's variance depends on x = g·h alone, and not on B. m = 0, B = N/100:"
        ),
        "",
        "| g·h | " + " | ".join(f"{value:g}" for value in x) + " |",
        "|---|" + "---|" * len(x),
        *(
            f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
            for name, values in rows.items()
        ),
        "",
        (
            "At the end of an epoch, where most trainings stop, slow directions have less still: "
            "x²/12 of g's variance for small x."
        ),
        "",
    ]


def _first_off(momentum: float, nesterov: bool) -> float:
    """The smallest ε·h whose exact variance, independent draws, is ROUGH away from g's."""
    for step in np.geomspace(1e-5, 0.999 * largest_curvature(1.0, momentum, nesterov), 4000):
        exact = stationary_variance(
            lr=1.0,
            momentum=momentum,
            train_samples=TRAIN_SAMPLES,
            global_batch=1,
            curvature=float(step),
            nesterov=nesterov,
            sampling="independent",
        )
        says = predicted_variance(
            noise_scale(1.0, momentum, TRAIN_SAMPLES, 1), float(step), TRAIN_SAMPLES
        )
        if abs(exact / says - 1) > ROUGH:
            return float(step)
    raise AssertionError((momentum, nesterov))


def _small_section(found: dict[str, Any]) -> list[str]:
    kinds = [(float(m), bool(nesterov)) for m, nesterov in found["settings"]["momenta"]]
    listed = "; ".join(
        f"m = {m:g}{', Nesterov' if nesterov else ''}: {_first_off(m, nesterov):.2g}"
        for m, nesterov in kinds
    )
    return [
        "## Where ε stops being small",
        "",
        (
            f"ε·h from which the exact variance is more than {ROUGH:.0%} from g's, samples drawn "
            f"independently: {listed}. Heavy ball: V = 1/(1 − εh/(2(1+m))) times g's, so the "
            "variance rises, and momentum allows a larger step. Nesterov's momentum damps steep "
            "directions, its variance falls, and what counts is ε·h against 1 − m."
        ),
        "",
    ]


def _batch_section(found: dict[str, Any]) -> list[str]:
    rows = []
    for momentum in (0.0, 0.9, 0.95):
        for x in (1.0, 10.0):
            index = found["settings"]["relaxations"].index(x)
            cells = []
            for point in _select(found, sampling="epoch", momentum=momentum, nesterov=False):
                shares, errors = _against_g(found, point)
                exact = _exact_against_g(found, point, np.array([x]))[0]
                cells.append(
                    "diverges"
                    if np.isnan(shares[index])
                    else f"{shares[index]:.3f} ± {errors[index]:.3f} ({exact:.3f})"
                )
            rows.append(f"| {momentum:g} | {x:g} | {' | '.join(cells)} |")
    batches = found["settings"]["batches"]
    limits = {m: _largest_batch(m, relaxations=1.0) for m in (0.0, 0.9, 0.95, 0.98)}
    listed = ", ".join(f"N/{1 / share:,.0f} for m = {m:g}" for m, share in limits.items())
    return [
        "## Does it explain B ≪ N?",
        "",
        (
            "In part: for momentum. Share of the planned g's variance, measured ± 95 % (exact), "
            "every sample once an epoch, heavy ball, at equal g:"
        ),
        "",
        "| m | g·h | " + " | ".join(f"B/N {batch / TRAIN_SAMPLES:g}" for batch in batches) + " |",
        "|---|---|" + "---|" * len(batches),
        *rows,
        "",
        (
            "Without momentum the order of the samples takes nearly the same share at every B: at "
            "equal g it makes no difference between a small and a large batch while ε·h is small. "
            "With momentum the noise of an update lasts B/(N(1−m)) epochs, and equal g is equal "
            "noise only while that is a small part of an epoch: the condition is B ≪ N(1−m), not "
            "B ≪ N. For g·h = 1 the variance is within a tenth of that of a very small batch at "
            f"equal g up to B = {listed} (predicted by the exact form), where an update's noise "
            f"lasts {limits[0.9] / 0.1:.2g} epochs for m = 0.9."
        ),
        "",
        (
            "What it does not show: that less noise at equal g costs accuracy. These are "
            "stationary variances on a quadratic loss; trainings are not stationary, and their "
            "curvatures are not known. The direction fits what `momentum_settling` and the batch "
            "near N found; a proof it is not."
        ),
        "",
    ]


def _largest_batch(momentum: float, relaxations: float) -> float:
    """B/N up to which the exact variance is within ROUGH of that of B = N/10,000, at equal g."""
    samples = 100_000

    def variance(batch: int) -> float:
        return stationary_variance(
            lr=SCALE / noise_scale(1, momentum, samples, batch),
            momentum=momentum,
            train_samples=samples,
            global_batch=batch,
            curvature=relaxations / SCALE,
        )

    small = variance(10)
    batches = np.unique(np.geomspace(10, samples // 2, 400).round().astype(int)).tolist()
    within = [batch for batch in batches if abs(variance(batch) / small - 1) <= ROUGH]
    return max(within) / samples


def _table(found: dict[str, Any]) -> list[str]:
    rows = ["| B | m | ε | " + " | ".join(f"{s}: / g | / exact" for s in SAMPLINGS) + " |"]
    rows.append("|---|---|---|" + "---|---|" * len(SAMPLINGS))
    for point in _select(found, sampling=SAMPLINGS[0]):
        same = {key: point[key] for key in ("global_batch", "momentum", "nesterov")}
        cells = [
            "{:.3f} ± {:.3f}".format(*_select(found, sampling=sampling, **same)[0][key])
            for sampling in SAMPLINGS
            for key in ("of_g", "of_exact")
        ]
        kind = f"{point['momentum']:g}{', Nesterov' if point['nesterov'] else ''}"
        rows.append(f"| {point['global_batch']} | {kind} | {point['lr']:g} | {' | '.join(cells)} |")
    return rows
