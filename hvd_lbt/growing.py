"""A run whose batch grows by measurement (schedule.policy: measured): what was decided is data.

Rank 0 decides, since times are measured; all ranks take its decision, and the plan follows from the
decisions alone. They are in the checkpoint and in RUN/decisions.jsonl, by which another run takes
the same updates again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, lcm
from pathlib import Path
from typing import Any

from hvd_lbt.errors import UserError, shown
from hvd_lbt.plain_yaml import read_text
from hvd_lbt.recipe import Recipe, recipe_of
from hvd_lbt.schedule.growth import (
    MEASUREMENTS,
    PART_OF_DATA,
    PER_EPOCH,
    Bounds,
    Choice,
    Costs,
    Growth,
    Measured,
    choose,
    is_due,
)
from hvd_lbt.schedule.plan import Plan, Update, make_plan
from hvd_lbt.schedule.plan_time import Cluster, work_of
from hvd_lbt.schedule.settings import Schedule
from hvd_lbt.schedule.speed import SpeedProfile, update_time
from hvd_lbt.whole_file import write_whole

FILE = "decisions.jsonl"
LONGEST_FILE = 64_000_000  # bytes; a decision has about 500
MAX_SAMPLES = 10**12  # of a run, far beyond any; each number of a decision is at most that
# What a line of a decision must have for a replay.
FIELDS = ("update", "samples_seen", "global_batch_before", "global_batch", "multiple")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What `GradientNoise` has measured: its averages, and how many measurements there were."""

    variance: float
    squared: float
    measurements: int
    source: str = "parts"  # or "differences", as `GradientNoise.source`

    @property
    def samples(self) -> float | None:
        """φ = tr(Σ)/|G|²; inf where |G|² is not distinguishable from 0, None before a measurement.

        None too where |G|² of differences is not positive: they make it too small, without momentum
        negative for good, and a batch that grew by that would grow by a fault.
        """
        if not self.measurements or not isfinite(self.variance + self.squared):
            return None
        if self.source == "differences" and self.squared <= 0:
            return None
        if self.variance <= 0:
            return 0.0
        return self.variance / self.squared if self.squared > 0 else inf


class Growing:
    """The plan of a run, and with policy measured the decisions that it follows from.

    state: of `state_dict()`, None for a new run. replay: decisions of another run, which this one
    takes instead of deciding. Raises UserError if the two do not go together.
    """

    def __init__(
        self,
        recipe: Recipe,
        train_samples: int,
        state: Mapping[str, Any] | None = None,
        replay: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.schedule, self._ghost_batch = recipe.schedule, recipe.layout.ghost_batch
        self._train_samples, self._recipe = train_samples, recipe.to_dict()
        self.replays = replay is not None
        self.decisions = list(replay or ())
        if state is not None:
            if replay is not None and (not state["replays"] or state["decisions"] != replay):
                raise UserError(
                    "--replay: the run that is resumed has other decisions; resume it without "
                    "--replay, or replay into another --out."
                )
            self.replays, self.decisions = state["replays"], list(state["decisions"])
        self.plan = self._plan(self.decisions)

    def state_dict(self) -> dict[str, Any]:
        """All decisions so far, for a checkpoint."""
        return {"replays": self.replays, "decisions": list(self.decisions)}

    @property
    def undecided(self) -> bool:
        """Whether the batch was to be decided, and never was."""
        measures = self.schedule.policy == "measured" and not self.replays
        return measures and not self.decisions

    def is_due(self, update: Update) -> bool:
        """Whether after this update there is something to decide: the same on all ranks."""
        done = update.index + 1
        return (
            self.schedule.policy == "measured"
            and not self.replays
            and done < self.plan.updates
            and self.plan.stages[update.stage].shape != "warm_up"
            and is_due(
                update.samples_seen, update.samples_seen + update.global_batch, self._train_samples
            )
        )

    def decide(self, update: Update, noise: Noise, costs: Costs | None) -> dict[str, Any] | None:
        """What is decided after this update; None where too little has been measured.

        costs: of updates as they are now, not needed with schedule.overhead.
        """
        since = noise.measurements - self._measured_before()
        overhead = self.schedule.overhead or (costs.overhead if costs else None)
        if since < MEASUREMENTS or noise.samples is None or overhead is None:
            return None
        measured = Measured(noise=noise.samples, overhead=overhead, measurements=since)
        step = _Step.after(self.plan, update, measured, self._ghost_batch)
        if step.changes and step.grown(self.plan) is None:
            return None
        return step.to_dict() | {
            "gradient_variance": noise.variance,
            "gradient_squared": noise.squared,
            "gradient_noise_from": noise.source,
            "all_measurements": noise.measurements,
            "seconds_fixed": costs.fixed if costs else None,
            "seconds_a_sample": costs.a_sample if costs else None,
        }

    def take(self, decision: dict[str, Any]) -> bool:
        """Note a decision; whether the plan changes."""
        self.decisions.append(decision)
        if decision["global_batch"] == decision["global_batch_before"]:
            return False
        self.plan = self._plan(self.decisions)
        return True

    def write(self, folder: Path, name: str, end: str | None = None) -> None:
        """RUN/decisions.jsonl: what the run is, and a line for each decision. Raises OSError.

        end: finished or stopped.
        """
        head = {"event": "run", "name": name, **self._identity(), "replays": self.replays}
        head["recipe"] = self._recipe
        lines = [head, *({"event": "decision", **one} for one in self.decisions)]
        if end is not None:
            lines.append({"event": "end", "reason": end})
        write_whole(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines))

    def _identity(self) -> dict[str, Any]:
        return {
            "schedule": plain(self.schedule),
            "train_samples": self._train_samples,
            "ghost_batch": self._ghost_batch,
        }

    def _measured_before(self) -> int:
        changes = [one for one in self.decisions if one["global_batch"] != _before(one)]
        return int(changes[-1]["all_measurements"]) if changes else 0

    def _plan(self, decisions: Iterable[Mapping[str, Any]]) -> Plan:
        return make_plan(self.schedule, self._train_samples, growth_of(decisions))


def _before(decision: Mapping[str, Any]) -> int:
    return int(decision["global_batch_before"])


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What is chosen after an update of a plan. before: the batch there; following: next update."""

    update: Update
    following: Update
    before: int
    multiple: int
    measured: Measured
    bounds: Bounds
    choice: Choice

    @classmethod
    def after(cls, plan: Plan, update: Update, measured: Measured, ghost_batch: int) -> "_Step":
        """ghost_batch: of the layout."""
        following = plan.at(update.index + 1)
        stage = plan.stages[following.stage]
        multiple = multiple_of(plan.schedule, stage.ghost_batch or ghost_batch)
        bounds = bounds_of(plan.schedule, plan.train_samples, stage.global_batch, following.lr)
        choice = choose(
            stage.global_batch,
            measured,
            bounds,
            first=plan.schedule.first_global_batch,
            multiple=multiple,
        )
        return cls(
            update=update,
            following=following,
            before=stage.global_batch,
            multiple=multiple,
            measured=measured,
            bounds=bounds,
            choice=choice,
        )

    @property
    def changes(self) -> bool:
        """Whether the batch is another from here on."""
        return self.choice.global_batch != self.before

    def grown(self, plan: Plan) -> Plan | None:
        """The plan with this step; None at a milestone that falls within an update, where the
        plan's past would change.
        """
        change = Growth(
            samples_seen=self.following.samples_seen,
            global_batch=self.choice.global_batch,
            multiple=self.multiple,
        )
        grown = make_plan(plan.schedule, plan.train_samples, (*(plan.growth or ()), change))
        at = self.following
        same = grown.at(self.update.index) == self.update
        return grown if same and grown.at(at.index).samples_seen == at.samples_seen else None

    def to_dict(self) -> dict[str, Any]:
        """A line of decisions.jsonl. JSON has no infinity: null is no bound, or beyond what can be
        measured.
        """
        return {
            "update": self.following.index,
            "epoch": self.following.epoch,
            "samples_seen": self.following.samples_seen,
            "global_batch_before": self.before,
            "global_batch": self.choice.global_batch,
            "bound": self.choice.bound,
            "noise": _finite(self.measured.noise),
            "measurements": self.measured.measurements,
            "overhead": _finite(self.measured.overhead),
            "fastest": _finite(self.choice.fastest),
            "bounds": {name: _finite(value) for name, value in asdict(self.bounds).items()},
            "multiple": self.multiple,
        }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def plain(settings: Schedule) -> dict[str, Any]:
    """A schedule as JSON gives it back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return values


def growth_of(decisions: Iterable[Mapping[str, Any]]) -> tuple[Growth, ...]:
    """The decisions that changed the batch, as a plan takes them."""
    return tuple(
        Growth(
            samples_seen=one["samples_seen"],
            global_batch=one["global_batch"],
            multiple=one["multiple"],
        )
        for one in decisions
        if one["global_batch"] != one["global_batch_before"]
    )


def multiple_of(schedule: Schedule, ghost_batch: int) -> int:
    """Of which a batch that grows by measurement is one: whole ghost batches."""
    return lcm(schedule.batch_multiple, ghost_batch)


def bounds_of(schedule: Schedule, train_samples: int, global_batch: int, lr: float) -> Bounds:
    """The bounds of the batch where an update of `global_batch` samples has this lr."""
    return Bounds(
        data=train_samples / PART_OF_DATA,
        max_lr=schedule.largest_lr / lr * global_batch,
        max_global_batch=schedule.max_global_batch,
    )


def profile_costs(
    profile: SpeedProfile, cluster: Cluster, global_batch: int, ghost_batch: int, image_size: int
) -> Costs:
    """a and b as a speed profile predicts them. Raises UserError where it cannot."""

    def seconds(batch: int) -> float:
        work = work_of(batch, cluster, ghost_batch=ghost_batch, image_size=image_size)
        predicted = update_time(profile, work)
        if predicted.total is None:
            raise UserError(
                f"run.speed: {profile.name} does not tell what an update takes on "
                f"{cluster.workers} workers: it lacks {', '.join(predicted.unknown)}."
            )
        return predicted.total

    return Costs.of(seconds, global_batch)


def read_decisions(
    path: Path, recipe: Recipe, train_samples: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The decisions of another run, for a replay, and what there is to say about them.

    path: RUN, or its decisions.jsonl. Raises UserError if there are none, if they are of another
    schedule or other data, or not as the run wrote them.
    """
    if recipe.schedule.policy != "measured":
        raise UserError(
            f"--replay: the recipe's schedule.policy is {recipe.schedule.policy}, which decides "
            "nothing while it trains; leave --replay out, or take the recipe of that run."
        )
    file = path / FILE if path.is_dir() else path
    what = f"--replay {file}"
    head, *lines = _lines_of(file, what)
    growing = Growing(recipe, train_samples)
    _check_head(head, growing._identity(), what)
    decisions = [
        {key: value for key, value in line.items() if key != "event"}
        for line in lines
        if line.get("event") == "decision"
    ]
    for number, one in enumerate(decisions, start=1):
        _check_decision(growing, one, f"{what}: decision {number}")
        growing.take(one)
    notes = []
    if not lines or lines[-1] != {"event": "end", "reason": "finished"}:
        until = f"update {decisions[-1]['update']:,}" if decisions else "its beginning"
        notes.append(
            f"{what}: that run did not finish, or has not yet. Its decisions end at {until}; from "
            "there on this run keeps its batch."
        )
    try:
        changes = recipe.changes_since(recipe_of(head.get("recipe"), what).to_dict())
    except UserError:
        changes = "its recipe cannot be read"
    if changes:
        notes.append(
            f"{what}: that run had other settings ({changes}): the same updates, other bits."
        )
    return decisions, notes


def _check_head(head: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    if head.get("event") != "run" or not wanted.keys() <= head.keys():
        raise UserError(f"{what}: its first line does not say of which run it is.")
    if head["schedule"] != wanted["schedule"]:
        names = sorted(
            name
            for name, value in wanted["schedule"].items()
            if not isinstance(head["schedule"], dict) or head["schedule"].get(name) != value
        )
        raise UserError(
            f"{what}: that run had another schedule (schedule.{', schedule.'.join(names)}). "
            "Replay it with its own recipe: its recipe.yaml has the settings."
        )
    for name in ("train_samples", "ghost_batch"):
        if head[name] != wanted[name]:
            raise UserError(
                f"{what}: that run had {name.replace('_', ' ')} {shown(head[name])}, and this one "
                f"has {wanted[name]:,}; the updates would be others."
            )


def _check_decision(growing: Growing, one: Mapping[str, Any], what: str) -> None:
    """That a run with the decisions before it could have decided this one, where it says."""
    for name in FIELDS:
        if type(one.get(name)) is not int or not 0 < one[name] <= MAX_SAMPLES:
            raise UserError(f"{what}: {name} is {shown(one.get(name))}; it must be a count.")
    plan, update = growing.plan, one["update"]
    if update >= plan.updates or plan.at(update).samples_seen != one["samples_seen"]:
        raise UserError(
            f"{what}: {one['samples_seen']:,} samples before update {update:,} are not what the "
            "plan has there; a line before it is missing, or was changed."
        )
    batch = plan.stages[plan.at(update).stage].global_batch
    if batch != one["global_batch_before"]:
        raise UserError(
            f"{what}: the global batch before it is {batch:,}, and it says "
            f"{one['global_batch_before']:,}; a line before it is missing, or was changed."
        )
    if not batch <= one["global_batch"] <= max(batch, growing.schedule.max_global_batch):
        raise UserError(
            f"{what}: a global batch of {one['global_batch']:,} after one of {batch:,} is none "
            "that a run decides on."
        )


def _lines_of(file: Path, what: str) -> list[dict[str, Any]]:
    try:
        text = read_text(file, what, LONGEST_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"{what}: there is no such file; a run with schedule.policy measured writes it."
        ) from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what}: line {number} is no JSON.") from error
        if not isinstance(found, dict):
            raise UserError(f"{what}: line {number} is no object.")
        lines.append(found)
    if not lines:
        raise UserError(f"{what} is empty.")
    return lines


def widest_plan(schedule: Schedule, train_samples: int, ghost_batch: int, every: int) -> Plan:
    """The plan of policy measured where the batch grows as fast as its bounds allow.

    Nothing that is measured keeps it from growing: the bounds alone do, and the steps. every: of
    how many updates one is measured.
    """
    plan, since, index = make_plan(schedule, train_samples), 0, 0
    unbounded = Measured(noise=inf, overhead=inf, measurements=MEASUREMENTS)
    while index + 1 < plan.updates:
        index = _next_due(plan, max(index, since + MEASUREMENTS * every - 1))
        if index + 1 >= plan.updates:
            break
        step = _Step.after(plan, plan.at(index), unbounded, ghost_batch)
        index += 1
        if step.changes and (grown := step.grown(plan)):
            plan, since = grown, index
    return plan


def _next_due(plan: Plan, index: int) -> int:
    """The first update from `index` on after which the batch is decided; plan.updates if none."""
    while index < plan.updates:
        update = plan.at(index)
        stage = plan.stages[update.stage]
        following = stage.first_update + stage.updates
        if stage.shape != "warm_up":
            parts = update.samples_seen * PER_EPOCH // plan.train_samples + 1
            border = -(-parts * plan.train_samples // PER_EPOCH)  # where the next part ends
            more = border - update.samples_seen - stage.global_batch
            due = index + max(0, -(-more // stage.global_batch))
            if due < following:
                return due
            last = plan.at(following - 1)  # of another batch at the end of the run
            if is_due(last.samples_seen, last.samples_seen + last.global_batch, plan.train_samples):
                return following - 1
        index = following
    return index
