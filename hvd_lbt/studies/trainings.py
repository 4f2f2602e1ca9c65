"""A study that is a set of trainings: recipes × seeds, their curves, a figure, a table, a verdict.

`Study` is data. `run_study` trains what is missing by `hvd_lbt train`, collects the numbers into
one JSON file, and makes figure and page from that file alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hvd_lbt import plain_yaml
from hvd_lbt.data.digits import cache_folder, write_digits
from hvd_lbt.data.order import other_version
from hvd_lbt.data.teacher import TEACHER
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe, load_recipe, recipe_of
from hvd_lbt.report.curves import Band, evaluated, measured
from hvd_lbt.report.runs import Group, Run, read_run
from hvd_lbt.rounding import five_digits
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.stop import EXIT_STOPPED
from hvd_lbt.studies.paired import Outcome
from hvd_lbt.studies.pictures import write_report
from hvd_lbt.whole_file import write_whole

MAX_BYTES = 64 * 2**20  # of a study's JSON
Results = dict[str, Any]  # what a study measured, plain enough for JSON


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The built-in digits, split anew: so many images to train on, all others to test on."""

    train_samples: int

    def write(self) -> Path:
        """The folder of these images, made once."""
        folder = cache_folder() / f"digits-{self.train_samples}"
        if folder.is_dir():
            return folder
        files = sorted(write_digits().glob("*/*/*.png"), key=lambda file: file.name)
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
        for place, index in enumerate(np.random.default_rng(0).permutation(len(files))):
            file, split = files[index], "train" if place < self.train_samples else "test"
            copy = scratch / split / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another study was faster: its files are the same
                raise
            shutil.rmtree(scratch)
        return folder


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """`--data teacher`: as many images as the arm's data.train_samples says, made as needed."""

    def write(self) -> Path:
        """The name of the data set; nothing is stored."""
        if TEACHER.exists():
            raise UserError(
                f"There is a file or folder {TEACHER} here, and --data {TEACHER} would be that: "
                "start the study in another folder."
            )
        return TEACHER


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of a study: a recipe with overrides, trained once for each seed.

    name: of its folders; label: in figure and table; panel, x: where a study draws it.
    data: None takes the images of --data. paper: its test accuracy in the paper.
    """

    name: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    panel: str = ""
    x: float | None = None
    data: Digits | Teacher | None = None
    paper: str = "–"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the claim held, and the sentence that says so with its numbers."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained, and how it is drawn and judged.

    claim: the papers' sentence and numbers; setting: how this differs from the papers, and what was
    tuned. draw and judge see the collected numbers only.
    """

    name: str
    scale: str
    title: str
    claim: str
    setting: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    draw: Callable[[Results], Figure] = field(repr=False)
    judge: Callable[[Results], Verdict] = field(repr=False)
    curves: bool = True
    """Whether it draws loss and accuracy on the way."""

    @property
    def stem(self) -> str:
        """Of the names of its files and of its folder."""
        return self.name if self.scale == "laptop" else f"{self.name}_{self.scale}"


class Stopped(Exception):
    """A signal ended the trainings; what they had done is saved."""


def shortened(study: Study, updates: int, train_samples: int) -> Study:
    """A dry run of `study`: epochs and milestones shrunk in proportion, to about `updates` each.

    It is another study, with a folder and a report of its own. train_samples: of the images at
    hand.
    """

    def shorten(arm: Arm) -> Arm:
        schedule = load_recipe(arm.recipe, arm.overrides).schedule
        factor = updates * schedule.first_global_batch / (schedule.epochs * train_samples)
        overrides = [f"schedule.epochs={factor * schedule.epochs}"]
        if schedule.milestones:
            milestones = [asdict(milestone) for milestone in schedule.milestones]
            scaled = [one | {"epoch": factor * one["epoch"]} for one in milestones]
            overrides.append(f"schedule.milestones={json.dumps(scaled)}")
        if schedule.warm_up is not None:
            overrides.append(f"schedule.warm_up.epochs={factor * schedule.warm_up.epochs}")
        return replace(arm, overrides=(*arm.overrides, *overrides))

    arms = tuple(shorten(arm) for arm in study.arms)
    return replace(study, name=f"{study.name}_dry_run", arms=arms, seeds=study.seeds[:1])


def run_study(
    study: Study, out: Path, *, data: Path | None, jobs: int, launcher: Sequence[str]
) -> str:
    """Train what is missing, write OUT/STEM.{json,png,md}; the verdict's sentence.

    jobs: trainings at a time; launcher: what begins each one's command. Raises UserError.
    """
    began = time.monotonic()
    folder = out / study.stem
    tasks = {
        folder / f"{arm.name}-{seed}": (arm, load_recipe(arm.recipe, _overrides(arm, seed)))
        for arm in study.arms
        for seed in study.seeds
    }
    images = _image_folders(study, data)
    missing = [path for path, (_, recipe) in tasks.items() if not _is_finished(path, recipe)]
    print(f"{study.stem}: {len(tasks)} trainings, {len(tasks) - len(missing)} of them are done.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: {folder} cannot be made ({error.strerror}). Give a folder that can be "
            "made or written to."
        ) from error
    # The longest first, dealt out in turn, so that all workers end at about the same time.
    order = sorted(missing, key=lambda path: -_updates(*tasks[path]))
    work = [
        {
            "recipe": tasks[path][0].recipe,
            "overrides": _overrides(tasks[path][0], tasks[path][1].run.seed),
            "data": str(images[tasks[path][0].data]),
            "out": str(path),
        }
        for path in order
    ]
    _train([work[place::jobs] for place in range(min(jobs, len(work)))], folder, launcher)

    runs = {path: read_run(path) for path in tasks}
    found = collect(study, runs)
    seconds = time.monotonic() - began
    found["seconds"] = {"trainings": sum(run.seconds for run in runs.values())}
    if len(missing) == len(tasks):
        found["seconds"]["this command"] = seconds
    write_whole(out / f"{study.stem}.json", compact_json(found))
    sentence = redraw(study, out)
    print(f"Wrote {out / study.stem}.md, .png and .json after {seconds:.0f} s.")
    return sentence


def redraw(study: Study, out: Path) -> str:
    """Write OUT/STEM.{png,md} from OUT/STEM.json alone; the verdict's sentence.

    Raises UserError if there is no such file, or if it is not of this study.
    """
    file = out / f"{study.stem}.json"
    try:
        found = json.loads(plain_yaml.read_text(file, str(file), MAX_BYTES))
        names = [arm["name"] for arm in found["arms"]]
    except FileNotFoundError:
        raise UserError(
            f"There is no {file} to draw from. `hvd_lbt study {study.name}` makes it."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} does not hold the numbers of a study ({type(error).__name__}: "
            f"{str(error)[:80]}). `hvd_lbt study {study.name}` makes it anew."
        ) from error
    if names != [arm.name for arm in study.arms]:
        raise UserError(
            f"{file} holds the numbers of other trainings than {study.name} has today. "
            f"`hvd_lbt study {study.name}` makes it anew."
        )
    write_report(out, study.stem, study.draw(found), page(study, found))
    verdict = study.judge(found)
    return f"The claim {verdict.outcome}. {verdict.sentence}"


def _overrides(arm: Arm, seed: int) -> tuple[str, ...]:
    return (*arm.overrides, f"run.seed={seed}", f"name={arm.name}")


def _image_folders(study: Study, data: Path | None) -> dict[Digits | Teacher | None, Path]:
    kinds = dict.fromkeys(arm.data for arm in study.arms)
    if None in kinds and data is None:
        raise UserError(
            f"--data: the {study.scale} scale of {study.name} needs the images of "
            f"{study.arms[0].recipe}: give the folder that has train/CLASS/FILE."
        )
    if None not in kinds and data is not None:
        raise UserError(
            f"--data {data}: the {study.scale} scale of {study.name} has its own images."
        )
    folders = {kind: data if kind is None else kind.write() for kind in kinds}
    return {kind: folder for kind, folder in folders.items() if folder is not None}


def _is_finished(path: Path, recipe: Recipe) -> bool:
    """Whether `path` holds the whole run; UserError if it is one of other settings."""
    if not (path / "recipe.yaml").is_file():
        return False
    what = str(path / "recipe.yaml")
    old = plain_yaml.parse(plain_yaml.read_text(path / "recipe.yaml", what), what)
    # What has become a setting since then had its default.
    if changes := recipe.changes_since(recipe_of(old, what).to_dict()):
        raise UserError(
            f"{path} was trained with other settings: {changes}. Give another --out, or remove it."
        )
    if not (path / "metrics.jsonl").is_file():
        return False
    run = read_run(path)
    if run.reason == "finished" and other_version(run.about):
        raise UserError(
            f"{path} was trained in another order of samples than this hvd_lbt has, so that seeds "
            "would not pair. Give another --out, or remove it."
        )
    return run.reason == "finished"


def _updates(arm: Arm, recipe: Recipe) -> int:
    """How long a training is, to deal them out: exact where the number of images is known."""
    return make_plan(recipe.schedule, train_samples(arm, recipe) or 50_000).updates


def train_samples(arm: Arm, recipe: Recipe) -> int | None:
    """How many images it trains on, as far as that is known beforehand."""
    return arm.data.train_samples if isinstance(arm.data, Digits) else recipe.data.train_samples


def _train(lists: Sequence[list[dict[str, Any]]], folder: Path, launcher: Sequence[str]) -> None:
    """One worker for each list of trainings; UserError if one failed, Stopped after a signal."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if len(lists) > 1 else {})
    files = [folder / f"worker-{place}.json" for place in range(len(lists))]
    for file, tasks in zip(files, lists, strict=True):
        file.write_text(json.dumps(tasks), encoding="utf-8")
    workers = [
        # In a session of its own: a Ctrl-C reaches it once, from here, and not twice.
        subprocess.Popen(
            [*launcher, sys.executable, "-m", "hvd_lbt", "study-trainings", str(file)],
            env=environment,
            start_new_session=True,
        )
        for file in files
    ]
    stopped = False
    while True:
        try:
            codes = [worker.wait() for worker in workers]
            break
        except KeyboardInterrupt:
            stopped = True
            for file in files:
                file.unlink(missing_ok=True)
            for worker in workers:
                worker.send_signal(signal.SIGUSR1)
    for file in files:
        file.unlink(missing_ok=True)
    if stopped or EXIT_STOPPED in codes:
        raise Stopped
    if any(codes):
        raise UserError(
            f"A training failed (exit codes of the workers: {codes}); the reason is above. The "
            "same command continues from here."
        )


# --------------------------------------------------------------------------------------- numbers


def collect(study: Study, runs: dict[Path, Run]) -> Results:
    """The numbers that are drawn and judged, of all arms."""
    arms = []
    for arm in study.arms:
        own = [run for path, run in runs.items() if path.name.rpartition("-")[0] == arm.name]
        group = Group(label=arm.label, runs=own)
        recipe = load_recipe(arm.recipe, arm.overrides)
        arms.append(
            {
                "name": arm.name,
                "label": arm.label,
                "panel": arm.panel,
                "x": arm.x,
                "paper": arm.paper,
                "recipe": arm.recipe,
                "overrides": list(arm.overrides),
                "global_batches": [s["global_batch"] for s in own[0].about["plan"]["stages"]],
                "first_noise_scale": own[0].about["plan"]["stages"][0]["noise_scale"],
                "first_lr": recipe.schedule.first_lr,
                "momentum": recipe.schedule.first_momentum,
                "train_samples": own[0].about["plan"]["train_samples"],
                "updates": round(np.mean([run.planned for run in own])),
                "seeds": [run.seed for run in own],
                "finals": [100 * run.final for run in own if run.final is not None],
                "final_losses": [_last_loss(run) for run in own],
            }
        )
        if study.curves:
            arms[-1] |= {
                "loss": _curve(measured(group, "loss")),
                "accuracy": _curve(evaluated(group)),
            }
    abouts = [run.about for run in runs.values()]
    return {
        "study": study.name,
        "scale": study.scale,
        "arms": arms,
        "versions": abouts[0]["versions"],
        "revision": ", ".join(dict.fromkeys(about["revision"] for about in abouts)),
    }


def _last_loss(run: Run) -> float:
    """Training loss over the last epoch, as it was before each update."""
    late = run.updates["epoch"] > run.updates["epoch"][-1] - 1
    return float(np.average(run.updates["loss"][late], weights=run.updates["global_batch"][late]))


def _curve(band: Band) -> dict[str, list[float]]:
    return {
        key: getattr(band, key).tolist() for key in ("epochs", "updates", "mean", "low", "high")
    }


def compact_json(found: Results) -> str:
    """JSON with one line for each list of numbers, five digits each."""

    def written(value: Any, indent: str) -> str:
        inner = indent + "  "
        if isinstance(value, dict):
            lines = [f"{inner}{json.dumps(k)}: {written(v, inner)}" for k, v in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return "[\n" + ",\n".join(inner + written(v, inner) for v in value) + f"\n{indent}]"
        return json.dumps(value, ensure_ascii=False)

    return written(five_digits(found), "") + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation (n − 1); three digits where training diverged."""
    form = f".{digits}f" if not values or max(map(abs, values)) < 1e5 else ".3g"
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "–"
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"


# ------------------------------------------------------------------------------------------ page


def made_with(found: Results) -> str:
    """The last line of a study's page: the versions and the revision behind its numbers."""
    made = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Made with {made}" + (f", revision {found['revision']}." if found["revision"] else ".")


def page(study: Study, found: Results) -> str:
    """The study's page, in Markdown."""
    scale = "" if study.scale == "laptop" else f" --scale {study.scale}"
    if any(arm.data is None for arm in study.arms):
        scale += " --data FOLDER"
    verdict = study.judge(found)
    rows = [
        f"| {_row_label(arm)} | {_batches(arm)} | {arm['first_lr']:g} | {arm['momentum']:g} | "
        f"{arm['first_noise_scale']:.4g} | {arm['updates']:,} | {spread(arm['final_losses'], 4)} | "
        f"{spread(arm['finals'])} % | {arm['paper']} |"
        for arm in found["arms"]
    ]
    seconds = found["seconds"]
    took = f"The trainings took {seconds['trainings']:,.0f} s together"
    if "this command" in seconds:
        took += f", the command {seconds['this command']:,.0f} s"
    bases = " and ".join(f"`{name}`" for name in dict.fromkeys(a["recipe"] for a in found["arms"]))
    seeds = ", ".join(map(str, found["arms"][0]["seeds"]))
    how = (
        f"Seeds {seeds}; ± is the standard deviation over them (n − 1). "
        f"Each line is {bases} with the overrides in `{study.stem}.json`. {took}."
    )
    return "\n".join(
        [
            f"# {study.title}",
            "",
            f"`hvd_lbt study {study.name}{scale}`. {study.claim}",
            "",
            f"**The claim {verdict.outcome}.** {verdict.sentence}",
            "",
            f"![{study.title}]({study.stem}.png)",
            "",
            study.setting,
            "",
            (
                "| schedule | global batch | first lr | first m | first g | updates | train loss "
                "of the last epoch | test accuracy | paper's |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            how,
            "",
            made_with(found),
            "",
        ]
    )


def _row_label(arm: Results) -> str:
    return arm["label"] if arm["panel"] in arm["label"] else f"{arm['panel']}: {arm['label']}"


def _batches(arm: Results) -> str:
    return " → ".join(f"{batch:,}" for batch in dict.fromkeys(arm["global_batches"]))
