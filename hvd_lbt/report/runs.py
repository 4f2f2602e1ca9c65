"""The runs of a report: read from RUN/metrics.jsonl, and grouped where only the seed differs."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.errors import UserError
from hvd_lbt.measure.rank_times import PARTS
from hvd_lbt.measure.slow_ranks import CAUSES
from hvd_lbt.report.colours import COLOURS, DASHES, assign
from hvd_lbt.report.lines import KEYS, Line, read_lines

Floats = NDArray[np.float64]
NAMED = 5  # damaged lines that are named, of all that are counted


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run's metrics.jsonl says, a resumed run's parts put together.

    updates: a float64 array a key, one element an update, in order; evals: the event lines, in
    order; reason: of the end, empty if the last part has none; seconds: of all parts together.
    """

    folder: Path
    about: dict[str, Any]
    updates: dict[str, Floats]
    evals: list[dict[str, Any]]
    reason: str
    seconds: float
    peak_memory_bytes: int
    workers: list[int]
    notes: list[str]
    parts: int = 1
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """The lines with all ranks' times, in order."""
    slow_ranks: list[dict[str, Any]] = field(default_factory=list)
    """The lines that name a rank that became slow."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """The lines of what was decided about the batch, with policy measured."""

    @property
    def seed(self) -> int:
        return int(self.about["recipe"]["run"]["seed"])

    @property
    def data_wait(self) -> float | None:
        """The share of all updates' time that rank 0 waited for images."""
        seconds = self.updates["global_batch"] / self.updates["images_per_second"]
        total = float(seconds.sum())
        return float(seconds @ self.updates["data_wait"]) / total if total else None

    @property
    def hours(self) -> Floats:
        """Where each update ends, in hours of the updates before it and its own."""
        seconds = self.updates["global_batch"] / self.updates["images_per_second"]
        return np.cumsum(seconds) / 3600

    @property
    def policy(self) -> str:
        return str(self.about["recipe"]["schedule"]["policy"])

    @property
    def planned(self) -> int:
        """Updates of the plan."""
        return int(self.about["plan"]["updates"])

    @property
    def done(self) -> int:
        """Updates done: the last line's, counted from 1."""
        return int(self.updates["update"][-1]) + 1 if len(self.updates["update"]) else 0

    @property
    def final(self) -> float | None:
        """Test accuracy after the last planned update, 0..1; None before that."""
        whole = self.evals and self.evals[-1]["update"] == self.planned
        return float(self.evals[-1]["top1"]) if whole else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one recipe, data set and world size, which differ by the seed only."""

    label: str
    runs: list[Run]
    style: dict[str, Any] = field(default_factory=dict)
    """Of its line in matplotlib's words."""
    colour: int = 0
    """Its place in the palette."""

    def finals(self) -> list[float]:
        """Final test accuracies, 0..1, of the runs that reached the end of the plan."""
        return [run.final for run in self.runs if run.final is not None]


def read_run(folder: Path) -> Run:
    """Read RUN/metrics.jsonl.

    A resume takes back what came after the update it starts at. A line that cannot be used, as the
    last one of a run that was killed, is left out, counted and named in the notes. Raises UserError
    if there is nothing to read.
    """
    file = folder / "metrics.jsonl"
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give the folder that `hvd_lbt train` wrote.")
    if not os.path.lexists(file):
        raise UserError(f"{folder} holds no run: there is no metrics.jsonl in it.")
    read = _Reading()
    for line in read_lines(file):
        read.take(line)
    if not read.parts:
        what = "has no line of the event `run` that can be used" if read.lines else "is empty"
        damage = f"; {read.named_damage()}" if read.damaged else ""
        raise UserError(
            f"{file} {what}{damage}. The run ended before it began, or this is another file."
        )
    return read.run(folder)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One start of a run: its run line, its end line, the time of its last line."""

    run: dict[str, Any]
    end: dict[str, Any] | None = None
    time: float

    @property
    def seconds(self) -> float:
        if self.end is not None:
            return float(self.end["seconds"])
        return max(0.0, self.time - self.run.get("time", 0.0))


class _Reading:
    """The events of a file so far."""

    def __init__(self) -> None:
        self.lines = 0
        self.parts: list[_Part] = []
        self.damaged = 0
        self.unusable: list[Line] = []  # the first of them
        self._updates: dict[int, tuple[Line, dict[str, Any]]] = {}
        self._evals: dict[int, tuple[Line, dict[str, Any]]] = {}
        self._ranks: dict[int, dict[str, Any]] = {}
        self._slow: list[dict[str, Any]] = []
        self._decisions: dict[int, dict[str, Any]] = {}
        self._repeated = 0

    def take(self, line: Line) -> None:
        """Note one line."""
        self.lines += 1
        if line.reason:
            self._leave_out(line.number, line.reason)
        if (record := line.record) is None:
            return
        match record["event"]:
            case "run":
                start = record.get("resumed_at_update", 0)
                self._updates = {k: v for k, v in self._updates.items() if k < start}
                self._evals = {k: v for k, v in self._evals.items() if k <= start}
                self._ranks = {k: v for k, v in self._ranks.items() if k < start}
                self._slow = [slow for slow in self._slow if slow["update"] < start]
                self._decisions = {k: v for k, v in self._decisions.items() if k <= start}
                self.parts.append(_Part(run=record, time=record.get("time", 0.0)))
            case "update":
                self._repeated += record["update"] in self._updates
                self._updates[record["update"]] = line, record
            case "eval":
                self._evals[record["update"]] = line, record
            case "plan" if self.parts:  # of a batch that grows by measurement, from here on
                self.parts[-1].run["plan"] = record["plan"]
            case "decision":
                self._decisions[record["update"]] = record
            case "ranks" if len({len(record[part]) for part in PARTS}) == 1:
                self._ranks[record["first_update"]] = record
            case "ranks":
                self._leave_out(line.number, "ranks: the lists are of unequal length")
            case "slow_rank" if not record["ended"]:
                self._slow.append(record)
            case "end" if self.parts:
                self.parts[-1] = replace(self.parts[-1], end=record)
        if self.parts and "time" in record:
            self.parts[-1] = replace(self.parts[-1], time=record["time"])

    def _leave_out(self, number: int, reason: str) -> None:
        self.damaged += 1
        if len(self.unusable) < 1000:
            self.unusable.append(Line(number=number, reason=reason))

    def named_damage(self) -> str:
        """How many lines are damaged, and the first of them with the reason; empty if none is."""
        if not self.damaged:
            return ""
        first = sorted(self.unusable, key=lambda line: line.number)[:NAMED]
        lines = ", ".join(f"line {line.number}: {line.reason}" for line in first)
        more = ", …" if self.damaged > NAMED else ""
        count = "1 line is" if self.damaged == 1 else f"{self.damaged:,} lines are"
        return f"{count} damaged and left out, wholly or in part ({lines}{more})"

    def run(self, folder: Path) -> Run:
        """What the lines say together."""
        about = self.parts[-1].run
        updates, evals = self._planned_updates(about["plan"]), self._planned_evals(about["plan"])
        columns = {key: np.array([r[key] for r in updates], np.float64) for key in KEYS["update"]}
        noise = [record.get("gradient_noise") for record in updates]  # not in old runs' lines
        columns["gradient_noise"] = np.array(noise, np.float64)
        sources = [record.get("gradient_noise_from") for record in updates]
        columns["from_differences"] = np.array([s == "differences" for s in sources], np.float64)
        for key in ("seconds", "seconds_left"):
            columns[key] = np.array([record.get(key) for record in updates], np.float64)
        end = self.parts[-1].end
        run = Run(
            folder=folder,
            about=about,
            updates=columns,
            evals=evals,
            reason=end["reason"] if end else "",
            seconds=sum(part.seconds for part in self.parts),
            peak_memory_bytes=max(
                (part.end["peak_memory_bytes"] for part in self.parts if part.end), default=0
            ),
            workers=list(dict.fromkeys(part.run["world_size"] for part in self.parts)),
            notes=[],
            parts=len(self.parts),
            ranks=[line for _, line in sorted(self._ranks.items())],
            slow_ranks=self._slow,
            decisions=[line for _, line in sorted(self._decisions.items())],
        )
        run.notes.extend(
            self._notes(
                run,
                sum(record.get("skipped_samples", record.get("left_out", 0)) for record in updates),
            )
        )
        return run

    def _planned_updates(self, plan: dict[str, Any]) -> list[dict[str, Any]]:
        """The updates in order; a line that the plan cannot have is one that cannot be used."""
        total = _samples_of(plan)
        seen, kept = 0, []
        for index, (line, record) in sorted(self._updates.items()):
            if index >= plan["updates"] or not seen < record["samples_seen"] <= total:
                reason = (
                    f"update {index:,} after {record['samples_seen']:,} samples is none of a plan "
                    f"of {plan['updates']:,} updates and {total:,} samples"
                )
                self._leave_out(line.number, reason)
                continue
            seen = record["samples_seen"]
            kept.append(record)
        return kept

    def _planned_evals(self, plan: dict[str, Any]) -> list[dict[str, Any]]:
        kept = []
        for index, (line, record) in sorted(self._evals.items()):
            if index > plan["updates"]:
                reason = f"an evaluation after {index:,} updates of {plan['updates']:,}"
                self._leave_out(line.number, reason)
            else:
                kept.append(record)
        return kept

    def _notes(self, run: Run, skipped_samples: int) -> Iterator[str]:
        """What a reader has to know beside the numbers."""
        if damage := self.named_damage():
            yield f"metrics.jsonl: {damage}."
        if self._repeated:
            yield f"{self._repeated:,} updates have several lines; the last of each counts."
        if run.done < run.planned:
            why = {"": "it has no end line", "stopped": "it was stopped by a signal"}
            yield (
                f"unfinished: {run.done:,} of {run.planned:,} updates are done "
                f"({why.get(run.reason, run.reason)})."
            )
        elif run.final is None:
            yield "there is no evaluation after the last update."
        if run.slow_ranks:
            yield _slow_note(run.slow_ranks)
        if skipped_samples:
            yield f"{skipped_samples:,} samples were skipped; RUN/skipped_samples.*.txt lists them."
        if missing := run.done - len(run.updates["update"]):
            yield f"{missing:,} updates have no line."
        if bad := int(np.sum(~np.isfinite(run.updates["loss"]))):
            yield f"{bad:,} updates have a loss that is not finite; the curves leave them out."
        if any(part.run["versions"] != run.about["versions"] for part in self.parts):
            yield "versions changed at a resume; the table shows the last."


def _slow_note(lines: Sequence[dict[str, Any]]) -> str:
    """Which ranks were slow, the slowest first."""
    worst: dict[tuple[int, str, str], dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: -float(line["ratio"])):
        worst.setdefault((line["rank"], line["host"], line["cause"]), line)
    named = [
        f"rank {rank} on {host} from update {line['update']:,} ({line['ratio']:.1f} × the others, "
        f"{CAUSES.get(cause, cause)})"
        for (rank, host, cause), line in list(worst.items())[:NAMED]
    ]
    return f"slow ranks: {'; '.join(named)}{'; …' if len(worst) > NAMED else ''}."


def _samples_of(plan: dict[str, Any]) -> int:
    last = plan["stages"][-1]
    return int(last["first_sample"] + last["samples"])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ only by run.seed, in the order given, each group labelled."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    looks = assign([members[0].policy for members in groups.values()])
    return [
        Group(
            label=label,
            runs=members,
            colour=looks[place][0],
            style={
                "color": COLOURS[looks[place][0]],
                "linestyle": DASHES[looks[place][1]],
                # Curves that lie on each other are all seen if the later ones are thinner.
                "linewidth": max(1.4, 3.0 - 0.7 * place),
                "zorder": 3 + place,
            },
        )
        for place, (label, members) in enumerate(zip(labels, groups.values(), strict=True))
    ]


def settings_of(run: Run) -> dict[str, Any]:
    """All that makes a run but its seed, as a flat dictionary of dotted keys."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", run.about["recipe"])
    flat.pop("run.seed")
    plan = run.about["plan"]
    return flat | {"training images": plan["train_samples"], "workers": run.workers[-1]}


def _labels(runs: Sequence[Run]) -> list[str]:
    """A short name of each run: recipe and policy where they tell runs apart, else what does."""
    names = [run.about["name"] for run in runs]
    if len(set(names)) == len(runs):
        return [f"{run.about['name']} ({run.policy})" for run in runs]
    labels = [
        run.policy if len(set(names)) == 1 else f"{run.about['name']} {run.policy}" for run in runs
    ]
    settings = [settings_of(run) for run in runs]
    for label in {label for label in labels if labels.count(label) > 1}:
        places = [place for place, other in enumerate(labels) if other == label]
        keys = dict.fromkeys(key for place in places for key in settings[place])
        differ = [
            key
            for key in keys
            if len({json.dumps(settings[place].get(key)) for place in places}) > 1
        ]
        for place in places:
            values = (f"{key.split('.')[-1]} {settings[place].get(key)}" for key in differ[:3])
            labels[place] = f"{label}, {', '.join(values)}"
    return [
        f"{label} [{place + 1}]" if labels.count(label) > 1 else label
        for place, label in enumerate(labels)
    ]
