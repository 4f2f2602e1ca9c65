"""The claims of the papers that are sets of trainings: what is trained, and when a claim held.

Smith et al. 2018: "Don't Decay the Learning Rate, Increase the Batch Size", ICLR (arXiv
1711.00489). Smith & Le 2018: "A Bayesian Perspective on Generalization and Stochastic Gradient
Descent", ICLR (arXiv 1710.06451). Goyal et al. 2017: "Accurate, Large Minibatch SGD" (arXiv
1706.02677).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from hvd_lbt.studies import equal_noise, imagenet_schedules, momentum_settling, shuffle_block
from hvd_lbt.studies.paired import Difference, all_of, held_if, paired
from hvd_lbt.studies.pictures import draw_curves
from hvd_lbt.studies.trainings import Arm, Digits, Results, Study, Verdict

SAME = 1.0  # percentage points within which two mean accuracies count as the same
DIGITS = Digits(train_samples=1200)


def find(found: Results, name: str) -> Results:
    """The arm of this name."""
    return next(arm for arm in found["arms"] if arm["name"] == name)


def mean(arm: Results) -> float:
    """Mean final test accuracy in percent."""
    return float(np.mean(arm["finals"]))


INTERVALS = "by 95 % intervals, paired by seed,"


def _needed(differences: Sequence[Difference]) -> str:
    """How many seeds it would take."""
    counts = [one.needed for one in differences if one.needed is not None]
    return f"{max(counts)} seeds would show 0.3 points" if counts else "one seed shows nothing"


# ------------------------------------------------------------------------------- three schedules

OPTIMIZERS = {
    "momentum": ("SGD with momentum 0.9", ()),
    "nesterov": ("Nesterov's momentum 0.9", ("optimizer.nesterov=true",)),
    # lr / (1 − m) as with momentum: the same noise scale
    "plain": ("SGD without momentum", ("schedule.momentum=0",)),
}
POLICIES = ("decay_lr", "hybrid", "grow_batch")


def _three_schedules(
    recipe: str, data: Digits | None, plain_lr: str, overrides: tuple[str, ...] = ()
) -> tuple[Arm, ...]:
    return tuple(
        Arm(
            name=f"{optimizer}_{policy}",
            label=policy,
            panel=title,
            recipe=recipe,
            data=data,
            overrides=(
                *overrides,
                f"schedule.policy={policy}",
                *settings,
                *((plain_lr,) if optimizer == "plain" else ()),
            ),
        )
        for optimizer, (title, settings) in OPTIMIZERS.items()
        for policy in POLICIES
    )


def judge_three_schedules(found: Results) -> Verdict:
    """Same accuracy and loss, at the end and before; fewer updates the more the batch grows."""
    outcomes, parts = [], []
    for optimizer in OPTIMIZERS:
        decay, hybrid, grow = (find(found, f"{optimizer}_{policy}") for policy in POLICIES)
        differences = [paired(arm, decay) for arm in (hybrid, grow)]
        ratio = loss_ratio(grow, decay)
        at_its_end = np.interp(grow["updates"], decay["loss"]["updates"], decay["loss"]["mean"])
        behind = float(at_its_end / grow["loss"]["mean"][-1])
        outcomes += [one.within(SAME) for one in differences]
        outcomes.append(held_if(1 / 1.5 <= ratio <= 1.5))
        outcomes.append(held_if(decay["updates"] > hybrid["updates"] > grow["updates"]))
        parts.append(
            f"{optimizer}: {differences[0]} points for hybrid and {differences[1]} for grow_batch "
            f"against decay_lr's {mean(decay):.2f} %, training loss of grow_batch {ratio:.2f} "
            f"times decay_lr's at equal epochs (geometric mean), in {grow['updates']:,} instead of "
            f"{decay['updates']:,} updates, after which decay_lr's loss is still {behind:.1f} "
            f"times as high; {_needed(differences)}"
        )
    return Verdict(
        outcome=all_of(outcomes),
        sentence=f"Test accuracy after equal epochs: {'. '.join(parts)}. "
        f"(Held: {INTERVALS} all within ±{SAME:g} point, loss within a factor of 1.5, fewer "
        "updates.)",
    )


def loss_ratio(arm: Results, other: Results) -> float:
    """Geometric mean over the epochs of one training-loss curve divided by another."""
    epochs = np.array(arm["loss"]["epochs"])
    theirs = np.interp(epochs, other["loss"]["epochs"], other["loss"]["mean"])
    return float(np.exp(np.mean(np.log(arm["loss"]["mean"] / theirs))))


# --------------------------------------------------------------------------------- fewer updates


def judge_fewer_updates(found: Results) -> Verdict:
    """Each schedule has fewer updates than the one before; only the last may lose accuracy."""
    first, *others = arms = found["arms"]
    updates = [arm["updates"] for arm in arms]
    differences = [paired(arm, first) for arm in others]
    listed = ", ".join(f"{arm['label']} {arm['updates']:,} ({mean(arm):.2f} %)" for arm in arms)
    return Verdict(
        outcome=all_of(
            [
                held_if(updates == sorted(set(updates), reverse=True)),
                *(one.above(-SAME) for one in differences[:-1]),
            ]
        ),
        sentence=f"Updates (test accuracy): {listed}. Against the first in points: "
        f"{', '.join(map(str, differences))}; {_needed(differences)}. (Held: fewer updates each "
        f"time, and, {INTERVALS} only the last may lose more than {SAME:g} point.)",
    )


# -------------------------------------------------------------------------------- warm-up or not


def judge_warmup_or_not(found: Results) -> Verdict:
    """Linear scaling needs the warm-up; a batch that grows does without it."""
    small, cold, warm, grown = (find(found, n) for n in ("small", "no_warm_up", "warm_up", "grown"))
    helps = paired(warm, cold)
    losses = {arm["name"]: paired(arm, small) for arm in (cold, warm, grown)}
    return Verdict(
        outcome=all_of([helps.above(0.0), losses["grown"].above(-SAME)]),
        sentence=f"Against the small batch's {mean(small):.2f} % ({small['updates']:,} updates), "
        f"in points: linear scaling without warm-up {losses['no_warm_up']}, with it "
        f"{losses['warm_up']} ({warm['updates']:,} updates), the grown batch without warm-up "
        f"{losses['grown']} ({grown['updates']:,} updates). The warm-up is worth {helps}; without "
        "it the training loss ends "
        f"{np.mean(cold['final_losses']) / np.mean(warm['final_losses']):.1f} times as high; "
        f"{_needed([helps, *losses.values()])}. (Held: {INTERVALS} the warm-up is worth more than "
        f"0, and the grown batch loses at most {SAME:g} point without it.)",
    )


# ---------------------------------------------------------------------------------- all of them

LAPTOP = (
    "Here: scikit-learn's 8×8 digits shrunk to 4×4 pixels so that they are not all classified "
    "right, "
    "{images}, a WRN-10-1 with ghost batches of {ghost}; the papers have CIFAR-10 and a WRN-16-4"
    "{theirs}. {more}"
)
SPLIT = "1,200 to train on and the other 597 to test on"
CIFAR = "CIFAR-10 and a WRN-16-4, as the paper has it."
CIFAR10 = "cifar10_decay_lr"
# All images in the GPU's memory, tensor cores, compiled, and an evaluation every five epochs.
ON_A_GPU = (
    "data.cache_on_device=true",
    "run.precision=bf16",
    "run.channels_last=true",
    "run.compile=true",
    "run.eval_every=5",
)


def _four_schedules() -> tuple[Arm, ...]:
    policy = "schedule.policy=grow_batch"
    settings = {
        "decay_lr": ("decay the lr", ()),
        "grow_batch": ("grow the batch", (policy,)),
        "grow_batch_lr": ("+ larger lr", (policy, "schedule.scaled_start={lr: 0.8}")),
        "grow_batch_lr_momentum": (
            "+ larger momentum",
            (policy, "schedule.scaled_start={lr: 0.8, momentum: 0.95}"),
        ),
    }
    return tuple(
        Arm(
            name=name,
            label=label,
            recipe="digits_4px",
            data=DIGITS,
            overrides=("schedule.max_global_batch=240", *overrides),
        )
        for name, (label, overrides) in settings.items()
    )


def _shipped(*arms: tuple[str, str, str], overrides: tuple[str, ...] = ()) -> tuple[Arm, ...]:
    """Shipped recipes as (recipe, label, the paper's accuracy), with settings for a GPU."""
    return tuple(
        Arm(name=name, label=label, recipe=name, paper=paper, overrides=overrides)
        for name, label, paper in arms
    )


def _warmup_or_not(
    recipe: str, data: Digits | None, *, lr: float, batch: int, times: int, epochs: int
) -> tuple[Arm, ...]:
    large = f"B {batch * times:,}, lr {lr * times:g}"
    scaled = (f"schedule.global_batch={batch * times}", f"schedule.lr={lr * times:g}")
    warm_up = f"schedule.warm_up={{epochs: {epochs}, first_lr: {lr:g}}}"
    settings = {
        "small": (f"B {batch}, lr {lr:g}", ()),
        "no_warm_up": (f"{large}, no warm-up", scaled),
        "warm_up": (f"{large}, warm-up", (*scaled, warm_up)),
        "grown": (f"B grows from {batch}, lr {lr:g}", ("schedule.policy=grow_batch",)),
    }
    return tuple(
        Arm(name=name, label=label, recipe=recipe, data=data, overrides=overrides)
        for name, (label, overrides) in settings.items()
    )


# ------------------------------------------------------------------------------- measured growth


def judge_measured_growth(found: Results) -> Verdict:
    """The measured batch is as accurate as the planned one, in as many updates or fewer."""
    planned, own = (find(found, name) for name in ("planned_grow_batch", "measured"))
    constant = [arm for arm in found["arms"] if arm["name"].startswith("constant")]
    against = paired(own, planned)
    # The constant batch with the fewest updates that is at most half a point below the smallest.
    as_good = [arm for arm in constant if paired(arm, constant[0]).mean >= -SAME / 2]
    best = min(as_good, key=lambda arm: float(arm["updates"]))
    return Verdict(
        outcome=all_of([against.above(-SAME), held_if(own["updates"] <= planned["updates"])]),
        sentence=f"The measured batch: {mean(own):.2f} % in {own['updates']:,} updates (mean over "
        f"the seeds), against the planned one {against} points and "
        f"{planned['updates']:,} updates. The best constant batch, {best['label']}: "
        f"{mean(best):.2f} % in {best['updates']:,} updates; the measured one against it "
        f"{paired(own, best)} points; {_needed([against])}. (Held: {INTERVALS} at most "
        f"{SAME:g} point below the planned recipe, in as many updates or fewer.)",
    )


def _measured_growth(
    recipe: str, data: Digits | None, batches: Sequence[int], lr: float, *overrides: str
) -> tuple[Arm, ...]:
    """batches: constant ones, the first that of the recipe; their lr is in proportion."""
    measured = (
        "schedule.policy=measured",
        f"schedule.max_lr={2 * lr:g}",
        f"schedule.overhead={OVERHEAD}",
        "run.noise_every=1",
    )
    settings = {
        **{
            f"constant_{batch}_decay_lr": (
                f"B {batch}, lr {lr * batch / batches[0]:g}, decay the lr",
                (
                    "schedule.policy=decay_lr",
                    f"schedule.global_batch={batch}",
                    f"schedule.lr={lr * batch / batches[0]:g}",
                ),
            )
            for batch in batches
        },
        "planned_grow_batch": ("grow the batch at the milestones", ("schedule.policy=grow_batch",)),
        "measured": ("grow the batch by measurement", measured),
    }
    return tuple(
        Arm(
            name=name,
            label=label,
            recipe=recipe,
            data=data,
            overrides=(*overrides, *own),
        )
        for name, (label, own) in settings.items()
    )


def _both_scales(
    name: str,
    title: str,
    claim: str,
    laptop: str,
    arms: tuple[tuple[Arm, ...], tuple[Arm, ...]],
    judge: Callable[[Results], Verdict],
    seeds: int = 5,
) -> tuple[Study, Study]:
    """The study on the digits, and on CIFAR-10 with three seeds."""
    small, large = (
        partial(Study, name=name, title=title, claim=claim, draw=draw_curves, judge=judge),
    ) * 2
    return (
        small(scale="laptop", setting=laptop, arms=arms[0], seeds=tuple(range(seeds))),
        large(scale="gpu", setting=CIFAR, arms=arms[1], seeds=(0, 1, 2)),
    )


OVERHEAD = 256  # samples
MEASURED_GROWTH = partial(
    Study,
    name="measured_growth",
    claim="Pollux (Qiao et al., OSDI 2021, eq. 4 and 6): the batch that takes least time follows "
    "from the gradient's noise and the cost of an update, B* = √(φ·a/b); no milestone has to say "
    "how large it may be.",
    seeds=(0, 1, 2, 3, 4),
    draw=draw_curves,
    judge=judge_measured_growth,
)
LR_CAP = (
    "The measured batch starts as the planned one and may raise the lr to twice the first. An "
    f"update's overhead is set to that of {OVERHEAD} samples, so that no time of this machine "
    "decides; it was chosen once, before the first run."
)

ALL = (
    *_both_scales(
        "three_schedules",
        "Three schedules, one curve",
        "Smith et al. 2018, section 5.1, figures 1 and 2: whether the lr decays, the batch grows, "
        "or one after the other, loss and accuracy are the same after equal epochs, in fewer "
        "updates; with momentum, Nesterov's momentum and plain SGD.",
        LAPTOP.format(
            images=SPLIT,
            ghost=16,
            theirs=", noise that falls 5× at epochs 60, 120 and 160 of 200",
            more="Noise falls 4× at epochs 9, 18 and 24 of 30. lr and network were chosen by "
            "hand, by trial runs on these same images that were not kept; there was no sweep. All "
            "three schedules of an optimizer have the same settings.",
        ),
        (
            _three_schedules("digits_4px", DIGITS, "schedule.lr=2.0"),
            _three_schedules(
                CIFAR10, None, "schedule.lr=1.0", ("schedule.max_global_batch=16000",)
            ),
        ),
        judge_three_schedules,
        seeds=10,
    ),
    Study(
        name="fewer_updates",
        scale="laptop",
        title="The same accuracy in fewer updates",
        claim="Smith et al. 2018, section 5.2: 94.3 % in 78,125 updates, 94.4 % in 29,140, 94.5 % "
        "in 6,406, and, with the larger momentum, 93.3 % in 2,305.",
        setting=LAPTOP.format(
            images=SPLIT,
            ghost=16,
            theirs=", lr 0.5 instead of 0.1, momentum 0.98 instead of 0.9, batches of at most N/10",
            more="Noise falls 4× at epochs 9, 18 and 24 of 30; lr 0.8 instead of 0.2, momentum "
            "0.95 instead of 0.9, batches of at most 240 (N/5), since those of N/10 leave no "
            "room.",
        ),
        arms=_four_schedules(),
        seeds=tuple(range(10)),
        draw=draw_curves,
        judge=judge_fewer_updates,
    ),
    Study(
        name="fewer_updates",
        scale="gpu",
        title="The same accuracy in fewer updates",
        claim="Smith et al. 2018, section 5.2.",
        setting=CIFAR,
        arms=_shipped(
            ("cifar10_decay_lr", "decay the lr", "94.3 %"),
            ("cifar10_grow_batch", "grow the batch", "94.4 %"),
            ("cifar10_grow_batch_lr", "+ larger lr", "94.5 %"),
            ("cifar10_grow_batch_lr_momentum", "+ larger momentum", "93.3 %"),
            overrides=ON_A_GPU,
        ),
        seeds=(0,),
        draw=draw_curves,
        judge=judge_fewer_updates,
    ),
    Study(
        name="fewer_updates",
        scale="cluster",
        title="The same accuracy in fewer updates",
        claim="Smith et al. 2018, section 5.3: 77 % in under 2,500 updates.",
        setting="ImageNet and Inception-ResNet-V2, as the paper has it.",
        arms=_shipped(
            ("imagenet_inception_m090", "m 0.9", "–"),
            ("imagenet_inception_m095", "m 0.95", "–"),
            ("imagenet_inception_m0975", "m 0.975", "77 %"),
        ),
        seeds=(0,),
        draw=draw_curves,
        judge=judge_fewer_updates,
    ),
    *momentum_settling.STUDIES,
    *equal_noise.STUDIES,
    *_both_scales(
        "warmup_or_not",
        "Linear scaling with and without warm-up, and a batch that grows",
        "Goyal et al. 2017, section 2.2: an lr scaled with the batch needs a warm-up (ImageNet, "
        "batches of 8,192: error 24.84 % without, 23.74 % with gradual warm-up, 23.60 % for the "
        "small batch). Smith et al. 2018: a batch that grows needs none.",
        LAPTOP.format(
            images=SPLIT,
            ghost=16,
            theirs=" (Goyal et al.: ImageNet and ResNet-50)",
            more="The batch is 8 times as large, the warm-up 3 of 30 epochs.",
        ),
        (
            _warmup_or_not("digits_4px", DIGITS, lr=0.2, batch=16, times=8, epochs=3),
            _warmup_or_not(CIFAR10, None, lr=0.1, batch=128, times=16, epochs=10),
        ),
        judge_warmup_or_not,
        seeds=10,
    ),
    MEASURED_GROWTH(
        scale="laptop",
        title="The batch that the gradient asks for",
        setting=LAPTOP.format(
            images=SPLIT,
            ghost=16,
            theirs="",
            more="Noise falls 4× at epochs 9, 18 and 24 of 30; batches of at most 120 (N/10). "
            + LR_CAP,
        ),
        arms=_measured_growth(
            "digits_4px",
            DIGITS,
            (16, 32, 64),
            0.2,
            "schedule.max_global_batch=120",
            "layout.micro_batch=16",
        ),
    ),
    MEASURED_GROWTH(
        scale="cifar10",
        title="The batch that the gradient asks for, on CIFAR-10",
        setting="Here: the CIFAR-10 images of --data at 16×16 pixels, a ResNet-18 of width 8 with "
        "ghost batches of 64, 10 epochs in which the noise falls 4× at epochs 6 and 8. The page "
        "is of the first 500 images of each class to train on, and 300 to test on. " + LR_CAP,
        arms=_measured_growth(
            "cifar10_small",
            None,
            (128, 256),
            0.1,
            "data.image_size=16",
            "data.pad=2",
            "model.width=8",
            "schedule.epochs=10",
            "schedule.milestones=[{epoch: 6, factor: 4}, {epoch: 8, factor: 4}]",
            "schedule.max_global_batch=512",
            "layout.micro_batch=64",
            "run.eval_every=5",
        ),
    ),
    *imagenet_schedules.STUDIES,
    *shuffle_block.STUDIES,
)
STUDIES: dict[str, dict[str, Study]] = {}
for _study in ALL:
    STUDIES.setdefault(_study.name, {})[_study.scale] = _study
