"""Does the evidence find the regulariser that generalises, and does it see through random labels?

Source: S. L. Smith, Q. V. Le, "A Bayesian Perspective on Generalization and Stochastic Gradient
Descent", ICLR 2018 (arXiv:1710.06451), section 3, figures 1 and 2: L2-regularised logistic
regression on two classes of digits, with their labels and with shuffled ones, over a sweep of the
regulariser. Theirs: MNIST, 0 and 1, 784 weights and a bias, 800 training images. Here: 8×8 digits,
64 weights and a bias, 80 training images (the same number of images a weight), and every pair of
digits besides the one that is drawn. Laplace's evidence against the true one: `evidence_checks`.
"""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from hvd_lbt.log.provenance import revision, versions
from hvd_lbt.measure.evidence import null_evidence
from hvd_lbt.measure.logistic_evidence import cross_entropies, logistic_evidences
from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.rounding import five_digits
from hvd_lbt.studies import evidence_checks
from hvd_lbt.studies.kept_numbers import kept_or_measured
from hvd_lbt.studies.paired import LEVEL, Outcome, all_of, interval
from hvd_lbt.studies.trainings import made_with

Floats = NDArray[np.float64]
Curves = dict[str, list[float]]

NAME = "bayesian_evidence"
DRAWN = (1, 8)  # of the pairs the hardest to tell apart: 0 and 1 are separable even for λ → 0
TRAIN_SAMPLES = 80
LAMBDAS = tuple(float(10**power) for power in np.linspace(3, -5, 33))  # nats a unit of ½|w|²
DRAWN_SPLITS, OTHER_SPLITS = 30, 10
LABELS = ("true", "shuffled")
CURVES = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "evidence_ratio")
PART = 0.1  # of what the smallest λ costs, or of what true labels win: the rules of `judge_pair`
EXACT = ("negative_log", "laplace", "truth")  # whose small differences are shown
SETTINGS = {
    "drawn": list(DRAWN),
    "train_samples": TRAIN_SAMPLES,
    "lambdas": list(LAMBDAS),
    "splits": {"drawn pair": DRAWN_SPLITS, "every other pair": OTHER_SPLITS},
    "checks": {
        "splits": evidence_checks.SPLITS,
        "lambdas": list(evidence_checks.SHOWN),
        "temperatures": evidence_checks.TEMPERATURES,
    },
}


def study(out: Path, *, redraw: bool = False) -> str:
    """Measure, unless OUT has the numbers of these settings; draw, write, sum up in a sentence.

    Writes OUT/bayesian_evidence.json, .png and .md. redraw: from the numbers in OUT, or UserError.
    """
    found = kept_or_measured(out / f"{NAME}.json", SETTINGS, measure, _compact, redraw=redraw)
    draw(found["drawn"], out / f"{NAME}.png")
    (out / f"{NAME}.md").write_text(report(found), encoding="utf-8")
    return finding(found)


def load() -> tuple[Floats, NDArray[np.int64]]:
    """Images (n, 64) in 0..1 and classes (n,)."""
    from sklearn.datasets import load_digits  # slow to import, needed once

    digits = load_digits()
    return digits.data / 16, digits.target


def measure() -> dict[str, Any]:
    """Sweep every pair of digits: the drawn pair's curves, a summary of every other pair; then the
    checks of Laplace's method on the drawn pair.
    """
    images, classes = load()
    pairs = {}
    for pair in combinations(range(10), 2):
        seeds = range(DRAWN_SPLITS if pair == DRAWN else OTHER_SPLITS)
        curves = {labels: sweep(images, classes, pair, seeds, labels) for labels in LABELS}
        pairs[_name(pair)] = {labels: [summary(one) for one in curves[labels]] for labels in LABELS}
        if pair == DRAWN:
            drawn = curves

    def split(seed: int, labels: str) -> evidence_checks.Split:
        return split_images(images, classes, DRAWN, seed, labels)[0]

    return {
        "settings": SETTINGS,
        "versions": versions(),
        "revision": revision(),
        "pairs": pairs,
        "drawn": drawn,
        "checks": evidence_checks.check(split, LABELS, LAMBDAS),
    }


def split_images(
    images: Floats, classes: NDArray[np.int64], pair: Sequence[int], seed: int, labels: str
) -> tuple[evidence_checks.Split, evidence_checks.Split]:
    """Training and test images with a column of ones, and their targets.

    images: (n, features) in 0..1. Half of the training images are of each class; all others are
    test images. labels: true, or shuffled within the training and within the test images.
    """
    generator = np.random.default_rng([seed, *pair])
    found = [generator.permutation(np.flatnonzero(classes == digit)) for digit in pair]
    half = TRAIN_SAMPLES // 2
    parts = []
    for span in (slice(half), slice(half, None)):
        chosen = np.concatenate([members[span] for members in found])
        answers = (classes[chosen] == pair[1]).astype(np.float64)
        if labels == "shuffled":
            answers = generator.permutation(answers)
        parts.append((np.c_[images[chosen], np.ones(len(chosen))], answers))
    return parts[0], parts[1]


def sweep(
    images: Floats,
    classes: NDArray[np.int64],
    pair: Sequence[int],
    seeds: Sequence[int],
    labels: str,
) -> list[Curves]:
    """Curves over LAMBDAS, for each seed: accuracy, mean cross-entropy, −ln of the evidence ratio.

    All splits of a pair are minimised together, from strong λ to weak. Splits: `split_images`.
    """
    splits = [split_images(images, classes, pair, seed, labels) for seed in seeds]
    stacked = [
        (np.stack([one[part][0] for one in splits]), np.stack([one[part][1] for one in splits]))
        for part in (0, 1)
    ]
    columns: dict[str, list[Floats]] = {name: [] for name in CURVES}
    for evidence in logistic_evidences(stacked[0][0], stacked[0][1], LAMBDAS):
        for name, (x, y) in zip(("train", "test"), stacked, strict=True):
            logits = (x @ evidence.weights[:, :, None])[:, :, 0]
            columns[f"{name}_accuracy"].append(((logits > 0) == (y > 0.5)).mean(1))
            columns[f"{name}_loss"].append(cross_entropies(logits, y).mean(1))
        columns["evidence_ratio"].append(evidence.negative_log - null_evidence(TRAIN_SAMPLES, 2))
    return [
        {name: [float(at[place]) for at in values] for name, values in columns.items()}
        for place in range(len(splits))
    ]


def summary(curves: Curves) -> dict[str, float]:
    """What one split comes down to.

    best_ratio: the lowest −ln of the evidence ratio, below 0 where the model beats the null model.
    chosen_loss: test loss at the λ of that; best_loss: the lowest test loss of any λ; apart:
    decades between the two λ; weakest_loss: test loss at the smallest λ; memorised: accuracy on the
    training images at the smallest λ.
    """
    loss = np.array(curves["test_loss"])
    chosen, best = int(np.argmin(curves["evidence_ratio"])), int(loss.argmin())
    return {
        "best_ratio": curves["evidence_ratio"][chosen],
        "chosen_loss": float(loss[chosen]),
        "best_loss": float(loss[best]),
        "weakest_loss": float(loss[-1]),
        "apart": float(np.log10(LAMBDAS[chosen] / LAMBDAS[best])),
        "memorised": curves["train_accuracy"][-1],
    }


# ------------------------------------------------------------------------------------- verdicts


def judge_pair(pair: dict[str, list[dict[str, float]]]) -> tuple[Outcome, Outcome]:
    """Whether the evidence finds the regulariser, and whether it sees through random labels.

    Finds: the evidence's λ costs less than a tenth of what the smallest λ costs, in test
    cross-entropy above the best λ. Sees: shuffled labels win less than a tenth of what true labels
    win over the null model. Each by the 95 % interval of the mean over the splits.
    """
    true, shuffled = _columns(pair["true"]), _columns(pair["shuffled"])
    excess = true["chosen_loss"] - true["best_loss"]
    weakest = true["weakest_loss"] - true["best_loss"]
    won, won_shuffled = (np.maximum(0, -one["best_ratio"]) for one in (true, shuffled))
    return (
        interval(PART * weakest - excess).above(0),
        interval(PART * won - won_shuffled).above(0),
    )


def count_pairs(found: dict[str, Any], half: int) -> str:
    """In how many pairs that half of the claim held, with an interval of the share."""
    outcomes = [judge_pair(pair)[half] for pair in found["pairs"].values()]
    held = outcomes.count(Outcome.HELD)
    share = stats.binomtest(held, len(outcomes)).proportion_ci(LEVEL, "exact")
    return (
        f"held for {held} of {len(outcomes)} pairs (95 % interval of the share {share.low:.0%} to "
        f"{share.high:.0%}), did not for {outcomes.count(Outcome.NO)}, is undecided for "
        f"{outcomes.count(Outcome.UNDECIDED)}"
    )


def finding(found: dict[str, Any]) -> str:
    """Whether the claim held for the drawn pair, and what the other pairs say, with the numbers."""
    drawn = found["pairs"][_name(DRAWN)]
    own, finds = _columns(drawn["true"]), judge_pair(drawn)
    excess, weakest = (own[key] - own["best_loss"] for key in ("chosen_loss", "weakest_loss"))
    outcome = all_of(finds)
    halves = "" if outcome is Outcome.HELD else f" (finds: {finds[0]}; sees: {finds[1]})"
    every = _all_pairs(found, "true")
    lost = every["chosen_loss"] - every["best_loss"]
    memorised = _all_pairs(found, "shuffled")["memorised"]
    return (
        f"The claim {outcome} for {_name(DRAWN)}{halves}: with true labels the λ of the greatest "
        f"evidence has a test cross-entropy {excess.mean():.4f} nats above that of the best λ (at "
        f"the most {excess.max():.4f} in {len(excess)} splits; the smallest λ: "
        f"{weakest.mean():.3f}), and beats the null model by {-own['best_ratio'].mean():.1f} nats. "
        "With shuffled labels no λ beats the null model by more than "
        f"{_won(_columns(drawn['shuffled'])):.2f} nats, though the smallest learns "
        f"{100 * np.mean([row['memorised'] for row in drawn['shuffled']]):.0f} % of them by "
        f"heart. Over all {len(found['pairs'])} pairs of digits, that random labels lose "
        f"{count_pairs(found, 1)}: true labels beat the null model by "
        f"{-every['best_ratio'].max():.0f} to {-every['best_ratio'].min():.0f} nats, shuffled ones "
        f"by at the most {_won(_all_pairs(found, 'shuffled')):.1f}, and the smallest λ learns "
        f"{100 * memorised.min():.0f} to {100 * memorised.max():.0f} % of the shuffled labels (all "
        f"of them in {(memorised == 1).sum()} of {len(memorised)} splits). "
        f"That the evidence finds the regulariser {count_pairs(found, 0)}: its λ costs "
        f"{np.median(lost):.4f} nats (median; at the most {lost.max():.3f}), but lies "
        f"{np.median(every['apart']):.1f} decades (median) above the test set's: where the digits "
        "are easy to tell apart the smallest λ is the best one, and the evidence's is larger."
    )


def _won(columns: dict[str, Floats]) -> float:
    """What the most evident λ of any split wins over the null model, in nats."""
    return max(0.0, float((-columns["best_ratio"]).max()))


def draw(drawn: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """Accuracy, cross-entropy and evidence over λ; left: shuffled labels, right: true ones."""
    rows: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("accuracy, %", ("train_accuracy", "test_accuracy")),
        ("mean cross-entropy, nats", ("train_loss", "test_loss")),
        ("−ln evidence ratio, nats", ("evidence_ratio",)),
    )
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9, 9), layout="constrained")
        panels = figure.subplots(3, 2, sharex=True, sharey="row")
        for column, labels in enumerate(("shuffled", "true")):
            curves = {name: np.array([one[name] for one in drawn[labels]]) for name in CURVES}
            chosen = LAMBDAS[int(curves["evidence_ratio"].mean(0).argmin())]
            for axes, (title, names) in zip(panels[:, column], rows, strict=True):
                for name in names:
                    values = 100 * curves[name] if "accuracy" in name else curves[name]
                    colour = COLOURS[("train", "test", "evidence").index(name.split("_")[0])]
                    label = {"evidence": "model against null model"}.get(
                        name.split("_")[0], name.split("_")[0]
                    )
                    axes.plot(LAMBDAS, values.mean(0), color=colour, label=label, linewidth=2)
                    band = (values.min(0), values.max(0))
                    axes.fill_between(LAMBDAS, *band, color=colour, alpha=0.2, linewidth=0)
                axes.axvline(chosen, color="#666666", linestyle=":", label="greatest mean evidence")
                if column == 0:
                    axes.set_ylabel(title)
            panels[0, column].set_title(f"{labels} labels")
            panels[1, column].axhline(np.log(2), color="#000000", linewidth=0.8)
            panels[2, column].axhline(0, color="#000000", linewidth=0.8)
            panels[2, column].set_xlabel("regulariser λ")
        panels[0, 0].set_xscale("log")
        # Weakly regularised, shuffled labels cost 15 nats: the axis ends where the null model is
        # shown.
        panels[1, 0].set_ylim(0, 1.6)
        panels[1, 0].annotate(
            "null model, ln 2", (LAMBDAS[-1], np.log(2)), (0, 4), textcoords="offset points"
        )
        panels[2, 0].annotate("null model", (LAMBDAS[-1], 0), (0, -14), textcoords="offset points")
        for axes in panels[:, 1]:
            axes.legend(loc="best", frameon=False)
        count = len(drawn["true"])
        figure.suptitle(
            f"Digits {DRAWN[0]} and {DRAWN[1]}, {TRAIN_SAMPLES} training images, 65 weights: mean "
            f"and range of {count} splits"
        )
        figure.savefig(path, dpi=100)


def report(found: dict[str, Any]) -> str:
    """The study's page, in Markdown."""
    rows = []
    for labels in LABELS:
        own = _columns(found["pairs"][_name(DRAWN)][labels])
        for name, columns in ((_name(DRAWN), own), ("all pairs", _all_pairs(found, labels))):
            cells = [labels, name, _spread(columns["best_ratio"], 1)]
            cells += [
                _spread(columns[key], 3) for key in ("best_loss", "chosen_loss", "weakest_loss")
            ]
            rows.append(f"| {' | '.join([*cells, _spread(columns['apart'], 1)])} |")
    hardest = max(
        found["pairs"], key=lambda pair: _columns(found["pairs"][pair]["true"])["best_loss"].mean()
    )
    how = (
        f"Logistic regression on 8×8 digits, {TRAIN_SAMPLES} training images, 64 weights and a "
        "bias, cost C = Σ cross-entropy + ½ λ |w|². Each minimum is found by Newton steps, until "
        "C is within 1e-9 nats; the evidence is −ln P = C(w₀) + ½ Σ ln(λᵢ/λ) from the exact "
        "Hessian, against N ln 2 of the null model. Shuffled labels are shuffled among the "
        "training and among the test images, so both classes stay equally frequent. "
        f"{DRAWN_SPLITS} splits of {_name(DRAWN)}, {OTHER_SPLITS} of every other pair; numbers are "
        "median (lowest to highest) over the splits, in nats."
    )
    unlike = (
        "Where it is not like the paper: there the digits are 0 and 1 of MNIST. At 8×8 pixels "
        "those two are so far apart that the test loss falls down to the smallest λ. "
        f"{_name(DRAWN)} are drawn instead (the pair with the highest test loss: {hardest}). Where "
        "test loss has no minimum within the sweep the evidence's λ is not the best one: the "
        "table's last column."
    )
    return "\n".join(
        [
            "# The evidence and the regulariser",
            "",
            (
                "`hvd_lbt study bayesian_evidence`, after Smith & Le 2018 (arXiv:1710.06451), "
                "section 3, figures 1 and 2."
            ),
            "",
            finding(found),
            "",
            f"![Accuracy, cross-entropy and evidence over the regulariser]({NAME}.png)",
            "",
            how,
            "",
            (
                "| labels | digits | lowest −ln evidence ratio | lowest test loss | at the λ of "
                "the greatest evidence | at the smallest λ | decades from the best λ to the "
                "evidence's |"
            ),
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            unlike,
            "",
            (
                "A pair's outcome is that of the mean over its splits, by its 95 % interval: the "
                "evidence finds the regulariser if its λ costs less than a tenth of what the "
                "smallest λ costs; it sees through random labels if they win less than a tenth of "
                "what true labels win. Pairs share digits, so the interval of the share of pairs "
                "is narrower than it should be. The rules are those of the first version of this "
                "study, which had no intervals."
            ),
            "",
            *evidence_checks.section(found["checks"]),
            made_with(found),
            "",
        ]
    )


def _name(pair: Sequence[int]) -> str:
    return "{} and {}".format(*pair)


def _all_pairs(found: dict[str, Any], labels: str) -> dict[str, Floats]:
    """As many splits of every pair: the drawn pair has more."""
    return _columns(
        [row for pair in found["pairs"].values() for row in pair[labels][:OTHER_SPLITS]]
    )


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, Floats]:
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _spread(values: Floats, digits: int) -> str:
    low, middle, high = (f"{v:.{digits}f}" for v in (values.min(), np.median(values), values.max()))
    return f"{middle} ({low} to {high})"


def _compact(found: dict[str, Any]) -> str:
    """JSON with a line for each curve, and numbers of five digits."""
    settings = found["settings"]
    text = json.dumps(five_digits(found, exact=EXACT) | {"settings": settings}, ensure_ascii=False)
    return (
        text.replace('"pairs"', '\n"pairs"').replace("}], ", "}],\n").replace("], ", "],\n") + "\n"
    )
