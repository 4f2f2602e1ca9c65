"""Does weight decay need another λ where the batch grows instead of a decaying lr?

Sources: S. L. Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size", ICLR 2018
(arXiv:1711.00489), and P. Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677): both
keep λ as it is. Weights shrink by λ·g an epoch (`schedule.weight_decay`), so that policies of equal
noise agree in that without any change; but all of them shrink the weights less in each stage.
"""

import io
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from hvd_lbt.data.store import Store, open_test_split, open_train_split
from hvd_lbt.errors import UserError
from hvd_lbt.report.colours import COLOURS
from hvd_lbt.report.colours import POLICIES as PLACES
from hvd_lbt.report.pictures import FONTS
from hvd_lbt.schedule.plan import Plan, Update, make_plan
from hvd_lbt.schedule.settings import Milestone, Schedule
from hvd_lbt.schedule.weight_decay import decay_of_equal_epochs, stage_decays
from hvd_lbt.studies.cells import Cell, find_cell, kept_cells
from hvd_lbt.studies.paired import Outcome, all_of, paired
from hvd_lbt.studies.pictures import write_report
from hvd_lbt.studies.side_by_side import Task, train_side_by_side
from hvd_lbt.studies.trainings import made_with, spread

NAME = "weight_decay"
SIDE, WIDTH = 8, 128  # pixels, hidden units
SEEDS = tuple(range(5))
LAMBDA = 0.002
MOST_IMAGES = 20_000
SAME = 1.0  # points within which two accuracies count as the same
POLICIES = {"decay_lr": "decay the lr", "grow_batch": "grow the batch"}
TREATMENTS = {
    "none": "λ = 0",
    "kept": "λ kept",
    "equal_epochs": "λ·g₁/g: equal decay an epoch",
}


def schedule(policy: str) -> Schedule:
    """The noise falls 16× in two steps, by lr or by batch."""
    return Schedule(
        policy=policy,  # type: ignore[arg-type]
        epochs=20,
        lr=0.05,
        momentum=0.9,
        global_batch=32,
        milestones=(Milestone(epoch=10, factor=4), Milestone(epoch=15, factor=4)),
    )


def study(out: Path, jobs: int, data: Path | None = None) -> str:
    """Train what is missing on the images of `data`; write OUT/weight_decay.{json,png,md}.

    jobs: processes; 0 trains nothing and draws OUT/weight_decay.json anew, without images.
    """
    images = _images(str(data)) if jobs else None
    wanted = cells(images.identity, images.train_samples) if images else None
    found = kept_cells(out, NAME, wanted, partial(train_cell, data=str(data)), jobs)
    write_report(out, NAME, draw(found), page(found))
    return finding(found)


def cells(images: str, train_samples: int) -> list[Cell]:
    """Every policy with every treatment; images: what tells these from others."""
    return [
        {
            "policy": policy,
            "treatment": treatment,
            "images": images,
            "train_samples": train_samples,
            "width": WIDTH,
            "lambda": LAMBDA,
            "schedule": asdict(schedule(policy)),
            "seeds": [*SEEDS],
        }
        for policy in POLICIES
        for treatment in TREATMENTS
    ]


def train_cell(cell: Cell, data: str) -> dict[str, Any]:
    """The networks of all seeds with this policy and treatment."""
    plan = make_plan(schedule(cell["policy"]), cell["train_samples"])
    images = _images(data)
    count = len(cell["seeds"])
    task = Task(
        inputs=images.inputs.expand(count, -1, -1),
        labels=images.labels.expand(count, -1),
        test_inputs=images.test_inputs,
        test_labels=images.test_labels,
        classes=images.classes,
    )
    outcomes = train_side_by_side(
        task,
        plan,
        width=WIDTH,
        seeds=cell["seeds"],
        weight_decay=partial(_decay, plan, cell["treatment"]),
    )
    return {"updates": plan.updates, **vars(outcomes)}


def _decay(plan: Plan, treatment: str, update: Update) -> float:
    if treatment == "equal_epochs":
        return decay_of_equal_epochs(plan, update, LAMBDA)
    return LAMBDA if treatment == "kept" else 0.0


# ---------------------------------------------------------------------------------------- images


@dataclass(frozen=True, kw_only=True)
class _Images:
    """inputs: (1, N, features), labels: (1, N); test_…: without the first dimension."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    identity: str

    @property
    def train_samples(self) -> int:
        return self.labels.shape[1]


@lru_cache(maxsize=1)
def _images(data: str) -> _Images:
    """All images of a data set at SIDE × SIDE pixels, in memory."""
    train = open_train_split(Path(data))
    test = open_test_split(Path(data), train.classes)
    if len(train) > MOST_IMAGES:
        raise UserError(
            f"--data {data}: {NAME} is made for a subset of CIFAR-10 and takes at most "
            f"{MOST_IMAGES:,} training images; this data set has {len(train):,}."
        )
    inputs, test_inputs = (
        torch.stack([_pixels(store, index) for index in range(len(store))])
        for store in (train, test)
    )
    labels, test_labels = (torch.as_tensor(np.array(s.labels[:])).long() for s in (train, test))
    bytes_seen = inputs.numpy().tobytes() + labels.numpy().tobytes()
    mean, std = inputs.mean(), inputs.std()
    return _Images(
        inputs=((inputs - mean) / std)[None],
        labels=labels[None],
        test_inputs=(test_inputs - mean) / std,
        test_labels=test_labels,
        classes=len(train.classes),
        identity=f"{zlib.crc32(bytes_seen):08x}",
    )


def _pixels(store: Store, index: int) -> Tensor:
    """One image, averaged down, as a vector of 0..255."""
    with Image.open(io.BytesIO(store.image(index).data.tobytes())) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32).flatten())


# --------------------------------------------------------------------------------------- numbers


def find(found: dict[str, Any], policy: str, treatment: str) -> Cell:
    """The cell of this policy and treatment."""
    return find_cell(found, {"policy": policy, "treatment": treatment})


def finding(found: dict[str, Any]) -> str:
    """What held, with its numbers."""
    grown, decayed = (find(found, policy, "kept") for policy in ("grow_batch", "decay_lr"))
    same = paired(grown, decayed, "accuracy")
    matters, changes, outcomes, seen = [], [], [same.within(SAME)], False
    for policy, title in POLICIES.items():
        none, kept, equal = (find(found, policy, treatment) for treatment in TREATMENTS)
        effect = paired(kept, none, "accuracy")
        matters.append(f"{effect} ({title})")
        seen = seen or effect.low > 0 or effect.high < 0
        change = paired(equal, kept, "accuracy")
        changes.append(f"{change} ({title})")
        outcomes.append(
            Outcome.NO
            if change.low > 0
            else Outcome.HELD
            if change.high <= SAME
            else Outcome.UNDECIDED
        )
    if not seen:
        outcomes.append(Outcome.UNDECIDED)
    return (
        f"The claim that λ may stay as it is {all_of(outcomes)}. Test accuracy, in points and "
        f"paired by seed: growing the batch against decaying the lr with the same λ {same}; the "
        f"same decay in every epoch (λ·g₁/g) against λ kept {', '.join(changes)}; λ kept against "
        f"no weight decay {', '.join(matters)}. Brackets are 95 % intervals. (Held: the policies "
        f"are within {SAME:g} point of each other, and equal decay an epoch is at most {SAME:g} "
        "point better than λ kept; did not hold: it is better beyond its interval; undecided where "
        "weight decay has no effect that is seen.)"
    )


# ---------------------------------------------------------------------------------- figure, page


def draw(found: dict[str, Any]) -> Figure:
    """Accuracy of each policy and treatment, and what weight decay does in each epoch."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, (policy, title) in enumerate(POLICIES.items()):
            colour = COLOURS[PLACES[policy]]
            for step, treatment in enumerate(TREATMENTS):
                values = np.array(find(found, policy, treatment)["accuracy"])
                at = step + 0.3 * (place - 0.5)
                error = values.std(ddof=1) / np.sqrt(len(values))
                left.plot([at] * len(values), values, ".", color=colour, alpha=0.35)
                label = title if step == 0 else None
                left.errorbar(
                    at, values.mean(), error, fmt="o", color=colour, capsize=4, label=label
                )
            plan = make_plan(schedule(policy), found["cells"][0]["train_samples"])
            decays = stage_decays(plan, LAMBDA)
            edges = [one.first_sample / plan.train_samples for one in plan.stages]
            edges.append(plan.schedule.epochs)
            for quantity, style in (("an_epoch", "-"), ("an_update", "--")):
                heights = [getattr(one, quantity) for one in decays]
                right.stairs(
                    heights,
                    edges,
                    baseline=None,
                    color=colour,
                    linestyle=style,
                    linewidth=3.0 - 1.4 * place,
                    label=f"{title}, {quantity.replace('_', ' ')}",
                )
        left.set_xticks(range(len(TREATMENTS)), ["λ = 0", "λ kept", "λ·g₁/g"])
        left.set_ylabel("test accuracy, %")
        left.set_title("dots: seeds, bars: standard error", loc="left", fontsize="medium")
        left.legend(frameon=False)
        right.set_yscale("log")
        right.set_xlabel("epochs")
        right.set_title("share by which a weight shrinks", loc="left", fontsize="medium")
        right.legend(frameon=False, fontsize="small")
    return figure


def page(found: dict[str, Any]) -> str:
    """The study's page, in Markdown."""
    rows = []
    samples = found["cells"][0]["train_samples"]
    for policy, title in POLICIES.items():
        plan = make_plan(schedule(policy), samples)
        an_epoch = " → ".join(f"{one.an_epoch:.3f}" for one in stage_decays(plan, LAMBDA))
        for treatment, words in TREATMENTS.items():
            cell = find(found, policy, treatment)
            first = stage_decays(plan, LAMBDA)[0].an_epoch
            share = {"none": "0", "kept": an_epoch, "equal_epochs": f"{first:.3f}"}[treatment]
            rows.append(
                f"| {title} | {words} | {cell['updates']:,} | {share} | "
                f"{spread(cell['accuracy'])} % | {spread(cell['test_loss'], 3)} | "
                f"{spread(cell['train_loss'], 3)} |"
            )
    base = schedule("decay_lr")
    return "\n".join(
        [
            "# Weight decay while the batch grows",
            "",
            (
                f"`hvd_lbt study {NAME} --data FOLDER`. Smith et al. 2018 (arXiv:1711.00489) and "
                "Goyal et al. 2017 (arXiv:1706.02677) change batch and lr and keep the weight "
                "decay λ."
            ),
            "",
            finding(found),
            "",
            f"![Test accuracy by treatment of weight decay]({NAME}.png)",
            "",
            (
                "An update shrinks a weight by ελ/(1−m), an epoch by that times N/B, which is λ·g: "
                "the same for all policies of equal noise, and it falls as the noise falls. Only "
                "the share of an update differs, and a weight knows no updates, only sums."
            ),
            "",
            (
                f"Here: {samples:,} images of CIFAR-10 averaged down to {SIDE}×{SIDE} pixels, a "
                f"perceptron of {WIDTH} hidden units, {base.epochs:g} epochs, lr {base.lr:g}, m "
                f"{base.momentum:g}, B {base.global_batch}, noise that falls 4× at epochs 10 and "
                f"15, λ {LAMBDA:g}; {len(SEEDS)} seeds. The network has no batch norm: with it λ "
                "acts by another way, as it raises the lr of weights whose length has no meaning, "
                "and this study says nothing about that. λ is so large that weights "
                "shrink by a factor of e some one and a half times in the first stage; nothing was "
                "tuned, and the rule was written before the first run."
            ),
            "",
            (
                "| policy | weight decay | updates | share of decay an epoch | test accuracy | "
                "test cross-entropy | train cross-entropy |"
            ),
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "± is the standard deviation over the seeds (n − 1).",
            "",
            made_with(found),
            "",
        ]
    )
