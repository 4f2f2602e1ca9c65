"""Trainings under `hvd_lbt elastic` for the tests: begun, watched, and what they left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from trainings import train

from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan

PROGRAM = Path(__file__).with_name("elastic_ranks.py")


class Elastic:
    """A training under `hvd_lbt elastic`, its hosts file, and the workers' own notes."""

    def __init__(
        self,
        folder: Path,
        *settings: str,
        slots: int,
        maximum: int,
        pause: str,
        die: str = "",
        resume: bool = False,
    ):
        self.out, self.notes, self.hosts = folder / "run", folder / "notes", folder / "hosts"
        self.notes.mkdir()
        self.offer(slots)
        words = train(*settings, out=self.out, resume=resume)[2:]  # without `-m hvd_lbt`
        options = ["--max-workers", str(maximum), "--network-interface", "lo"]
        options += ["--discover", f"cat {self.hosts}", "--patience", "200"]
        self.output = (folder / "output").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "elastic", *options, *words],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HVD_LBT_TEST_LOG": str(self.notes)}
            | {"HVD_LBT_TEST_PAUSE": pause, "HVD_LBT_TEST_DIE": die},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def offer(self, slots: int) -> None:
        scratch = self.hosts.with_suffix(".part")
        scratch.write_text(f"localhost:{slots}\n")
        scratch.replace(self.hosts)

    def lines(self) -> list[dict]:
        """All workers' notes; a line cut off by a kill is none."""
        found = []
        for file in self.notes.glob("*.jsonl"):
            text = file.read_text()
            found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return found

    def members(self) -> dict[int, int]:
        """rank → pid of the present world."""
        joined = [line for line in self.lines() if "joined" in line]
        newest = max((line["generation"] for line in joined), default=0)
        return {line["rank"]: line["pid"] for line in joined if line["generation"] == newest}

    def until(self, condition, what: str, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended, not {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"not {what}:\n{self.said()}"
            time.sleep(0.05)

    def size(self) -> int:
        """Workers of the present world, once all of them have noted that they joined."""
        joined = [line for line in self.lines() if "joined" in line]
        newest = max((line["generation"] for line in joined), default=0)
        sizes = [line["size"] for line in joined if line["generation"] == newest]
        return sizes[0] if sizes and len(sizes) == sizes[0] else 0

    def committed(self) -> int:
        return max((line["update"] for line in self.lines() if "committed" in line), default=-1)

    def end(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs:\n{self.said()}")

    def said(self) -> str:
        return Path(self.output.name).read_text()[-6000:]

    def workers(self) -> set[int]:
        """The processes that have noted something and live."""
        alive = set()
        for pid in {line["pid"] for line in self.lines()}:
            with suppress(ProcessLookupError, FileNotFoundError):
                if "elastic_ranks" in Path(f"/proc/{pid}/cmdline").read_text():
                    alive.add(pid)
        return alive

    def kill_all(self) -> None:
        for pid in self.workers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.terminate()
            self.process.terminate()
            self.process.wait(60)


def kept(out: Path) -> list[dict]:
    """The update lines that later parts of the run did not take back."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates: list[dict] = []
    for line in lines:
        if line["event"] == "run":
            updates = [old for old in updates if old["update"] < line["resumed_at_update"]]
        elif line["event"] == "update":
            updates.append(line)
    return updates


def samples_used(lines: list[dict], samples: int) -> dict[int, Counter]:
    """epoch → how often each sample was used, by the updates that count."""
    counted: dict[int, int] = {}
    sent: dict[tuple[int, int], dict[int, dict]] = defaultdict(dict)
    for line in lines:
        if "committed" in line:
            counted[line["update"]] = max(
                counted.get(line["update"], line["generation"]), line["generation"]
            )
        elif "samples" in line:
            sent[line["update"], line["generation"]][line["rank"]] = line
    used: dict[int, Counter] = defaultdict(Counter)
    for update, generation in counted.items():
        parts = sent[update, generation]
        size = next(iter(parts.values()))["size"]
        assert sorted(parts) == list(range(size)), (
            f"update {update}: notes of ranks {sorted(parts)}"
        )
        for part in parts.values():
            for first, indices in part["samples"]:
                for place, index in enumerate(indices, start=first):
                    used[place // samples][index] += 1
    return used


def check_whole(run: Elastic, settings: tuple[str, ...], before: Sequence[dict] = ()) -> None:
    """Each sample once an epoch, each update once in the metrics, as planned.

    before: the notes of the workers of the run that this one has resumed.
    """
    plan = make_plan(load_recipe("digits", settings).schedule, 1437)
    lines = [*before, *run.lines()]
    counted = {line["update"] for line in lines if "committed" in line}
    assert counted == set(range(plan.updates))
    used = samples_used(lines, plan.train_samples)
    assert set(used) == {0, 1}
    for epoch, counter in used.items():
        assert counter == Counter(range(plan.train_samples)), f"epoch {epoch}"
    for update in kept(run.out):
        planned = plan.at(update["update"])
        assert (update["global_batch"], update["lr"]) == (planned.global_batch, planned.lr)
