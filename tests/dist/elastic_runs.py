"""Trainings under `hvd_lbt elastic` for the tests: begun, watched, and what they left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from trainings import train

PROGRAM = Path(__file__).with_name("elastic_ranks.py")


class Elastic:
    """A training under `hvd_lbt elastic`, its hosts file, and the workers' own notes."""

    def __init__(
        self, folder: Path, *settings: str, slots: int, maximum: int, pause: str, die: str = ""
    ):
        self.out, self.notes, self.hosts = folder / "run", folder / "notes", folder / "hosts"
        self.notes.mkdir()
        self.offer(slots)
        words = train(*settings, out=self.out)[2:]  # without `-m hvd_lbt`
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
