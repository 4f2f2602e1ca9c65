"""What a report says first: what each group did, and what it saved against another one."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import ValidationError

from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe
from hvd_lbt.report.runs import Group, Run, settings_of
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.schedule.plan_time import with_policy

NAME = 90  # characters of a group's name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the finished runs of a group did. seconds: mean, of the updates alone; untimed: updates
    without a line; accuracies: 0..1, of those that were evaluated at the end.
    """

    group: Group
    runs: int
    updates: int
    seconds: float
    untimed: int
    accuracies: list[float]

    @property
    def accuracy(self) -> float | None:
        """Mean final test accuracy in percent."""
        return 100 * float(np.mean(self.accuracies)) if self.accuracies else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """sentences: of the page, first the results; notes: what limits the comparison."""

    sentences: list[str]
    notes: list[str] = field(default_factory=list)


def summarise(groups: Sequence[Group]) -> Summary:
    """Compare each group with the one whose lr decays, else with the first.

    Only finished runs are compared; what was planned is called so.
    """
    outcomes = [outcome for group in groups if (outcome := _outcome(group))]
    unfinished = [group for group in groups if all(run.done < run.planned for run in group.runs)]
    notes = [
        f"{_name(group)}: no run is finished, so nothing is compared with it."
        for group in unfinished
    ]
    if not outcomes:
        progress = (f"{_name(group)}: {_done(group)}." for group in groups)
        return Summary(sentences=[*progress], notes=["No run is finished, so nothing is compared."])
    base = _base(outcomes)
    others = [outcome for outcome in outcomes if outcome is not base]
    sentences = [_alone(base)]
    if not others:
        sentences.extend(_against_the_plan(base))
    for other in others:
        sentences.append(_against(other, base))
    for outcome in outcomes:
        if outcome.untimed:
            notes.append(
                f"{_name(outcome.group)}: {outcome.untimed:,} updates have no line, so its time is "
                "too short."
            )
    if others:
        notes.append(
            "Times are those of the updates, as measured; evaluations, start-up and what was done "
            "again after a resume are not in them."
        )
        if differ := _other_differences([outcome.group for outcome in outcomes]):
            notes.append(f"The groups differ in more than the schedule: {', '.join(differ)}.")
        if all(outcome.runs == 1 for outcome in outcomes):
            notes.append(
                "One run each: how much of a difference in accuracy is chance is not known. "
                "More seeds (run.seed) tell."
            )
    return Summary(sentences=sentences, notes=notes)


def _outcome(group: Group) -> Outcome | None:
    finished = [run for run in group.runs if run.done == run.planned]
    if not finished:
        return None
    return Outcome(
        group=group,
        runs=len(finished),
        updates=finished[0].planned,
        seconds=3600 * float(np.mean([run.hours[-1] for run in finished])),
        untimed=sum(run.planned - len(run.updates["update"]) for run in finished),
        accuracies=[run.final for run in finished if run.final is not None],
    )


def _base(outcomes: Sequence[Outcome]) -> Outcome:
    decaying = [outcome for outcome in outcomes if outcome.group.runs[0].policy == "decay_lr"]
    return (decaying or outcomes)[0]


def _done(group: Group) -> str:
    done = ", ".join(f"{run.done:,}" for run in group.runs)
    return f"{done} of {group.runs[0].planned:,} updates are done"


def _alone(outcome: Outcome) -> str:
    return (
        f"{_name(outcome.group)}: {outcome.updates:,} updates in {duration(outcome.seconds)}, "
        f"final test accuracy {_accuracy(outcome)}."
    )


def _accuracy(outcome: Outcome) -> str:
    if outcome.accuracy is None:
        return "not evaluated"
    runs = f" (mean of {len(outcome.accuracies)} runs)" if len(outcome.accuracies) > 1 else ""
    return f"{outcome.accuracy:.2f} %{runs}"


def _against(other: Outcome, base: Outcome) -> str:
    """One sentence: updates, time and accuracy against the base's."""
    parts = [
        (
            f"{other.updates:,} updates instead of {base.updates:,} "
            f"({_change(other.updates, base.updates, 'fewer')})"
        ),
        (
            f"{duration(other.seconds)} instead of {duration(base.seconds)} "
            f"({_change(other.seconds, base.seconds, 'less')})"
        ),
    ]
    if other.accuracy is None or base.accuracy is None:
        parts.append(f"final test accuracy {_accuracy(other)}")
    else:
        parts.append(
            f"final test accuracy {_accuracy(other)} instead of {_accuracy(base)} "
            f"({other.accuracy - base.accuracy:+.2f} points)"
        )
    return f"{_name(other.group)}, against {_name(base.group)}: {'; '.join(parts)}."


def _change(value: float, base: float, less: str) -> str:
    if not base or value == base:
        return "no change"
    share = abs(1 - value / base)
    percent = f"{share:.0%}" if share >= 0.01 else f"{share:.1g}"
    return f"{percent} {less if value < base else 'more'}"


def _against_the_plan(outcome: Outcome) -> list[str]:
    """What the same schedule would take with a decaying lr: planned, not measured."""
    run = outcome.group.runs[0]
    planned = _updates_with_decaying_lr(run)
    if run.policy == "decay_lr" or planned is None:
        return []
    return [
        (
            f"With a decaying lr (policy decay_lr) the same schedule has {planned:,} updates, so "
            f"growing the batch took {_change(outcome.updates, planned, 'fewer')} (planned, not "
            "trained). Give a second run to compare time and accuracy."
        )
    ]


def _updates_with_decaying_lr(run: Run) -> int | None:
    """None where the recipe is not one of this program, or has settings that need its policy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names of settings that were renamed
            schedule = Recipe.model_validate(run.about["recipe"]).schedule
        decaying = with_policy(schedule, "decay_lr")
        return make_plan(decaying, run.about["plan"]["train_samples"]).updates
    except (ValidationError, UserError, ValueError, TypeError):
        return None


def _other_differences(groups: Sequence[Group]) -> list[str]:
    """Settings beside the schedule's policy and batches in which the groups differ."""
    settings = [settings_of(group.runs[0]) for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    free = ("schedule.epochs", "schedule.warm_up")
    return [
        key
        for key in keys
        if key not in ("name", "run.noise_every", "run.speed")  # what is measured, and how
        and (not key.startswith("schedule.") or key.startswith(free))
        and len({repr(each.get(key)) for each in settings}) > 1
    ]


def _name(group: Group) -> str:
    return group.label if len(group.label) <= NAME else f"{group.label[:NAME]}…"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:,.4g} hours"
