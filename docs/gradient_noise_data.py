"""Measure docs/gradient_noise.json, which docs/gradient_noise_picture.py draws.

`python docs/gradient_noise_data.py` takes about ten minutes on two cores.

Each measurement of the digits' gradient noise, from parts and from differences of the same
gradients, while the weights move and while they do not; and the spread of the estimates for
Gaussian gradients, whose Σ and G are known. On one rank, by `hvd_lbt train`.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import torch
from torch import nn

from hvd_lbt import cli, training
from hvd_lbt.log.provenance import versions
from hvd_lbt.measure.gradient_noise import MEMORY, GradientNoise, noise_of_parts
from hvd_lbt.reducer import GradientReducer

DOCS = Path(__file__).parent
COUNTS = (1, 2, 3, 5, 10, 20, 30, 50, 100)  # measurements that are averaged
QUANTILES = (0.05, 0.16, 0.5, 0.84, 0.95)
SEEDS = range(1, 4)
EXACT = (*("wire.form=fp32", "layout.micro_batch=16", "run.noise_every=1", "run.eval_every=1000"),)
HALF = "schedule.milestones=[{epoch: 4, factor: 4}, {epoch: 6, factor: 4}, {epoch: 8, factor: 4}]"
FROZEN = (("epoch 2", 32, 600), ("epoch 8", 32, 600), ("epoch 12", 128, 200))
FOUND: list[tuple[int, int, list[float]]] = []  # of each update: index, batch, what both say


class Both(GradientNoise):
    """Measures the same gradients a second time, as if each update were one part."""

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model, every)
        self.second = GradientNoise(model, every)

    def begin(self, update: int, global_batch: int, **options: Any) -> None:
        """As GradientNoise's, of both."""
        super().begin(update, global_batch, **options)
        self.second.begin(update, global_batch, one_part=True)

    def end(self, reducer: GradientReducer) -> None:
        """As GradientNoise's, of both; notes this update's two measurements."""
        for noise in (self, self.second):
            noise._averages.zero_()  # this update's alone
        super().end(reducer)
        self.second.end(reducer)
        told = torch.cat([self.averages, self.second.averages]).tolist()
        FOUND.append((self._update, self._global_batch, told))


def train(words: list[str], file: Path) -> int:
    """Train with both, and write what they found."""
    training.GradientNoise = Both  # type: ignore[misc]
    code = cli.main(["train", *words])
    rows = [[index, batch, *(float(f"{v:.5g}") for v in told)] for index, batch, told in FOUND]
    file.write_text(json.dumps([row for row in rows if all(np.isfinite(row))]))
    return code


def rows_of(folder: Path, name: str, recipe: str, *settings: str) -> list[list[float]]:
    """Train in a process of its own; (update, batch, tr Σ and |G|² of parts and of differences)."""
    out = folder / name
    words = [recipe, "--out", str(out), *(w for s in (*EXACT, *settings) for w in ("--set", s))]
    file = folder / f"{name}.json"
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # two trainings at a time
    run([sys.executable, __file__, "--rows", file, *words], check=True, env=one)
    rows: list[list[float]] = json.loads(file.read_text())
    return rows


def moving(folder: Path) -> dict[str, Any]:
    """digits_decay_lr in half its epochs, three seeds, with momentum and without: the same g."""
    settings = {"0.9": (), "0": ("schedule.momentum=0", "schedule.lr=1.0")}

    def one(momentum: str, seed: int) -> list[list[float]]:
        own = ("schedule.epochs=10", HALF, f"run.seed={seed}", *settings[momentum])
        return rows_of(folder, f"m{momentum}_{seed}", "digits_decay_lr", *own)

    with ThreadPoolExecutor(2) as pool:
        jobs = {m: [pool.submit(one, m, seed) for seed in SEEDS] for m in settings}
        return {m: [job.result() for job in its] for m, its in jobs.items()}


def frozen(folder: Path) -> list[dict[str, Any]]:
    """Measurements at the weights of three ages of `digits`, with an lr that moves none of them."""
    rows_of(folder, "young", "digits", "schedule.epochs=2", "schedule.milestones=[]")
    rows_of(folder, "old", "digits", "run.keep_checkpoints=9")
    young = sorted((folder / "young/checkpoints").glob("*.pt"))[-1]
    old = sorted((folder / "old/checkpoints").glob("*.pt"))

    def one(file: Path, batch: int, updates: int) -> list[list[float]]:
        return rows_of(
            folder,
            f"frozen_{file.parent.parent.name}_{file.stem}",
            "digits",
            f"model.pretrained={file}",
            *("schedule.lr=1e-12", "schedule.milestones=[]", f"schedule.global_batch={batch}"),
            f"schedule.epochs={updates * batch / 1437:.3f}",
            "run.checkpoint_minutes=1000",
        )

    with ThreadPoolExecutor(2) as pool:
        files = (young, old[0], old[1])
        jobs = [pool.submit(one, f, *of[1:]) for f, of in zip(files, FROZEN, strict=True)]
        return [
            {"state": state, "global_batch": batch, "rows": job.result()}
            for (state, batch, _), job in zip(FROZEN, jobs, strict=True)
        ]


def known() -> list[dict[str, Any]]:
    """Spread of the ratio for gradients of 100 elements with Σ = 1 and |G|² = 100/φ, K = 2 and 8.

    K parts of B/K samples have Gaussian means, drawn without drawing the samples.
    """
    generator = torch.Generator().manual_seed(0)
    draws, size = 2000, 100
    found = []
    for share in (0.1, 0.3, 1.0):  # B / φ
        for parts in (2, 8):
            batch, longest = 1000 * share, max(COUNTS)
            mean = torch.full((size,), (1 / 1000) ** 0.5, dtype=torch.float64)  # φ = 1000
            spread = (parts / batch) ** 0.5
            singles = []
            for _ in range(longest):
                means = torch.randn(draws, parts, size, generator=generator) * spread + mean
                among = means.square().sum(-1).mean(1)
                squared = means.mean(1).square().sum(-1)
                count = torch.full_like(among, parts)
                singles.append(noise_of_parts(among, squared, count, batch))  # type: ignore[arg-type]
            values = torch.stack(singles, -1).numpy()  # (2, draws, longest)
            found.append({"share": share, "parts": parts, **spread_of(values, 1000.0)})
    return found


def spread_of(values: np.ndarray, true: float) -> dict[str, Any]:
    """Quantiles of tr(Σ)/|G|² over `true`, by how many measurements are averaged, and by MEMORY.

    values: (2, draws, measurements). A |G|² that is not positive counts as an infinite ratio; none:
    the share of those. mean: null if there is one.
    """

    def mean(means: np.ndarray) -> float | None:
        return (
            None if (means[1] <= 0).any() else round(float((means[0] / means[1]).mean() / true), 4)
        )

    def quantiles(means: np.ndarray) -> list[float]:
        ratio = np.where(means[1] > 0, means[0] / np.maximum(means[1], 1e-300), np.inf) / true
        return [
            float(f"{min(float(q), 1e3):.4g}")
            for q in np.quantile(ratio, QUANTILES, method="lower")
        ]

    weights = MEMORY ** np.arange(values.shape[2])
    return {
        "averaged": {str(n): quantiles(values[..., :n].mean(-1)) for n in COUNTS},
        "mean": {str(n): mean(values[..., :n].mean(-1)) for n in COUNTS},
        "none": {str(n): round(float((values[1, :, :n].mean(-1) <= 0).mean()), 4) for n in COUNTS},
        "memory": quantiles((values * weights).sum(-1) / weights.sum()),
    }


def main() -> None:
    """Measure, or train once for that."""
    if "--rows" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--rows", type=Path)
        args, words = parser.parse_known_args()
        raise SystemExit(train(words, args.rows))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {"versions": versions(), "moving": moving(folder), "frozen": frozen(folder)}
    result["known"] = known()
    file = DOCS / "gradient_noise.json"
    file.write_text(json.dumps(result).replace('], "', '],\n"').replace("], [", "],\n[") + "\n")


if __name__ == "__main__":
    main()
