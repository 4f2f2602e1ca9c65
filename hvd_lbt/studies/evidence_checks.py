"""How far Laplace's evidence is from the true one, and what a rescaling of the weights changes.

For the study `bayesian_evidence`, on the images of its drawn pair. Up to three weights (the first
principal components of the training images) the integral is known by quadrature; the pair's 65
weights, and 785 on the same images enlarged to the paper's 28×28 pixels, are sampled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hvd_lbt.measure.evidence import null_evidence
from hvd_lbt.measure.evidence_integrals import Integral, integrate, sample_evidence
from hvd_lbt.measure.logistic_evidence import Evidences, logistic_evidences
from hvd_lbt.studies.paired import interval

Floats = NDArray[np.float64]
Split = tuple[Floats, Floats]  # inputs (n, features + 1), with a column of ones; targets (n,)

QUADRATURE = (1, 2, 3)  # weights
SHOWN = tuple(float(10**power) for power in (3, 2, 1, 0, -1, -2, -3))  # λ
SPLITS = 5
TEMPERATURES = 600
PIXELS = 28  # of an enlarged image's side
FACTORS = (0.01, 1.0, 100.0)  # of the weights


def check(
    split: Callable[[int, str], Split], labels: Sequence[str], lambdas: Sequence[float]
) -> dict[str, Any]:
    """All checks. split: (seed, labels) → its training images; lambdas: of the study's sweep."""
    sampled = []
    for kind in labels:
        for seed in range(SPLITS):
            sampled.append(_sampled(split(seed, kind), lambdas, kind, seed))
    images, targets = split(0, labels[0])
    sampled += [_one_sampled(images, targets, value, labels[0], 0) for value in SHOWN[1:-1]]
    sampled.append(_sampled((enlarged(images), targets), lambdas, labels[0], 0))
    return {
        "quadrature": [
            _by_quadrature(split(seed, kind), size, kind, seed)
            for kind in labels
            for size in QUADRATURE
            for seed in range(SPLITS)
        ],
        "sampled": sampled,
        "rescaled": rescaled(images, targets, lambdas),
    }


def enlarged(inputs: Floats) -> Floats:
    """8×8 images with a column of ones → 28×28 ones, by linear interpolation: (n, 785)."""
    side = round((inputs.shape[1] - 1) ** 0.5)
    images = inputs[:, :-1].reshape(-1, side, side)
    larger = ndimage.zoom(images, (1, PIXELS / side, PIXELS / side), order=1)
    return np.c_[larger.reshape(len(inputs), -1), np.ones(len(inputs))]


def components(inputs: Floats, count: int) -> Floats:
    """The images (without the column of ones) along their first principal components."""
    centred = inputs[:, :-1] - inputs[:, :-1].mean(0)
    return np.asarray(centred @ np.linalg.svd(centred, full_matrices=False)[2][:count].T)


def _evidences(inputs: Floats, targets: Floats, lambdas: Sequence[float]) -> list[Evidences]:
    return list(logistic_evidences(inputs[None], targets[None], lambdas))


def _by_quadrature(split: Split, size: int, labels: str, seed: int) -> dict[str, Any]:
    inputs, targets = components(split[0], size), split[1]
    laplace = _evidences(inputs, targets, SHOWN)
    truth = [
        integrate(inputs, targets, value, one.weights[0])
        for value, one in zip(SHOWN, laplace, strict=True)
    ]
    # The sampler on the same integral, to see its own error.
    middle = SHOWN.index(1.0)
    own = _sample(inputs, targets, 1.0, seed)
    return {
        "weights": size,
        "labels": labels,
        "seed": seed,
        "laplace": [float(one.negative_log[0]) for one in laplace],
        "truth": [one.negative_log for one in truth],
        "error": max(one.error for one in truth),
        "sampler_off": own.negative_log - truth[middle].negative_log,
        "sampler_error": own.error,
    }


def _sample(inputs: Floats, targets: Floats, precision: float, seed: int) -> Integral:
    chains = 16 if inputs.shape[1] < 100 else 8
    temperatures = TEMPERATURES if inputs.shape[1] > max(QUADRATURE) else TEMPERATURES // 4
    return sample_evidence(
        inputs, targets, precision, seed=seed, chains=chains, temperatures=temperatures
    )


def _sampled(split: Split, lambdas: Sequence[float], labels: str, seed: int) -> dict[str, Any]:
    """At the λ of the greatest evidence by Laplace's method."""
    evidences = _evidences(*split, lambdas)
    best = int(np.argmin([one.negative_log[0] for one in evidences]))
    return _one_sampled(*split, lambdas[best], labels, seed) | {"best": True}


def _one_sampled(
    inputs: Floats, targets: Floats, precision: float, labels: str, seed: int
) -> dict[str, Any]:
    # From strong to weak, as the study's sweep: a minimum is near the one before.
    path = [value for value in SHOWN if value > precision]
    laplace = _evidences(inputs, targets, [*path, precision])[-1]
    sampled = _sample(inputs, targets, precision, seed)
    return {
        "weights": inputs.shape[1],
        "samples": len(inputs),
        "labels": labels,
        "seed": seed,
        "precision": precision,
        "best": False,
        "laplace": float(laplace.negative_log[0]),
        "truth": sampled.negative_log,
        "error": sampled.error,
        "accepted": sampled.accepted,
    }


def rescaled(
    inputs: Floats, targets: Floats, lambdas: Sequence[float]
) -> list[dict[str, float | int]]:
    """The same model with weights c·w: inputs/c, and the prior's precision λ/c².

    At the λ of the greatest evidence: −ln P, and two measures of flatness that have no prior.
    """
    evidences = _evidences(inputs, targets, lambdas)
    best = lambdas[int(np.argmin([one.negative_log[0] for one in evidences]))]
    rows: list[dict[str, float | int]] = []
    for factor in FACTORS:
        x, precision = inputs / factor, best / factor**2
        path = [value / factor**2 for value in SHOWN if value > best]
        one = _evidences(x, targets, [*path, precision])[-1]
        right = 1 / (1 + np.exp(-x @ one.weights[0]))
        hessian = x.T @ (x * (right * (1 - right))[:, None]) + precision * np.eye(x.shape[1])
        values = np.linalg.eigvalsh(hessian)
        rows.append(
            {
                "factor": factor,
                "negative_log": float(one.negative_log[0]),
                "half_log_determinant": float(0.5 * np.log(values).sum()),
                "largest_eigenvalue": float(values[-1]),
            }
        )
    return rows


# --------------------------------------------------------------------------- page


def section(checks: dict[str, Any]) -> list[str]:
    """The page's part about Laplace's error and rescaling, in Markdown."""
    own = [row["sampler_off"] for row in checks["quadrature"]]
    large = next(row for row in checks["sampled"] if row["weights"] > 100)
    return [
        "## Laplace's evidence against the true one",
        "",
        (
            "−ln P by Laplace's method minus the true −ln P, in nats: above 0 where Laplace's "
            "method finds too little evidence. One to three weights: the first principal "
            "components of the training images, by quadrature (error below "
            f"{_rounded_up(max(row['error'] for row in checks['quadrature']))} nats); mean and "
            f"range over {SPLITS} splits."
        ),
        "",
        "| weights | labels | " + " | ".join(f"λ = {value:g}" for value in SHOWN) + " |",
        "|---|---|" + "---|" * len(SHOWN),
        *_quadrature_rows(checks["quadrature"]),
        "",
        (
            "More weights: by annealed importance sampling with Hamiltonian transitions "
            f"({TEMPERATURES:,} temperatures), ± its standard error. On the integrals of one to "
            f"three weights at λ = 1 the sampler is {interval(own)} nats off (mean and 95 % "
            f"interval of {len(own)})."
        ),
        "",
        "| weights | labels | λ | Laplace | true, sampled | Laplace − true |",
        "|---|---|---|---|---|---|",
        *_sampled_rows(checks["sampled"]),
        "",
        _summary(checks["sampled"], large),
        "",
        "## Weights that are rescaled",
        "",
        (
            "The same model with the weights c·w (images divided by c, the prior's precision "
            "λ/c²), at the λ of the greatest evidence. The evidence does not change; flatness "
            "without the prior does, and could be made anything:"
        ),
        "",
        "| c | −ln P | ½ ln det of the Hessian | largest eigenvalue |",
        "|---|---|---|---|",
        *(
            f"| {row['factor']:g} | {row['negative_log']:.6f} | "
            f"{row['half_log_determinant']:.2f} | {row['largest_eigenvalue']:.4g} |"
            for row in checks["rescaled"]
        ),
        "",
    ]


def _rounded_up(value: float) -> str:
    return f"{10.0 ** np.ceil(np.log10(value)):.0e}"


def _quadrature_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for size in QUADRATURE:
        for labels in dict.fromkeys(row["labels"] for row in rows):
            chosen = [r for r in rows if r["weights"] == size and r["labels"] == labels]
            off = np.array([np.subtract(r["laplace"], r["truth"]) for r in chosen])
            cells = [
                f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
                for mean, low, high in zip(off.mean(0), off.min(0), off.max(0), strict=True)
            ]
            lines.append(f"| {size} | {labels} | {' | '.join(cells)} |")
    return lines


def _sampled_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"| {row['weights']} | {row['labels']}, split {row['seed']} | {row['precision']:.3g}"
        f"{' (greatest)' if row['best'] else ''} | {row['laplace']:.2f} | "
        f"{row['truth']:.2f} ± {row['error']:.2f} | {row['laplace'] - row['truth']:+.2f} |"
        for row in rows
    ]


def _summary(rows: Sequence[dict[str, Any]], large: dict[str, Any]) -> str:
    parts = []
    for labels in dict.fromkeys(row["labels"] for row in rows):
        chosen = [r for r in rows if r["best"] and r["labels"] == labels and r["weights"] < 100]
        off = interval([row["laplace"] - row["truth"] for row in chosen])
        won = interval([null_evidence(row["samples"], 2) - row["truth"] for row in chosen])
        parts.append(
            f"{off} nats with {labels} labels, whose true evidence there is {won} nats above the "
            f"null model's ({len(chosen)} splits)"
        )
    return (
        "At the λ of the greatest evidence Laplace's −ln P of the 65 weights is off by "
        f"{', and by '.join(parts)}, means and 95 % intervals; that of the {large['weights']} "
        f"weights by {large['laplace'] - large['truth']:+.2f} ± {large['error']:.2f}. The error "
        "grows as λ falls, so the λ of the greatest true evidence can only be smaller than "
        "Laplace's."
    )
