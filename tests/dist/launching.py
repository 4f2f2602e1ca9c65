"""Starts this program, or a script, on real ranks under the launcher of Open MPI."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest
from preloaded import FOLDER, Loaders

ROOT = Path(__file__).parents[2]
RANK = (sys.executable, "-I", "-S", str(Path(__file__).with_name("preloaded.py")))
VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # a rank that waits leaves its core to one that computes, as under launch/local
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@dataclass(frozen=True)
class Ended:
    """How a launch ended; `output` has what all ranks wrote."""

    code: int
    output: str


@dataclass
class Launch:
    """Ranks that run. `wait` ends them, and fails, when they take longer than `timeout` seconds."""

    process: subprocess.Popen[str]
    timeout: float

    def wait(self) -> Ended:
        try:
            output, _ = self.process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            output, _ = self.process.communicate()
            pytest.fail(f"the ranks hang after {self.timeout} s:\n{output[-4000:]}")
        return Ended(self.process.returncode, output)

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for it while the ranks run; fail when they end, or 100 seconds pass, before."""
        deadline = time.monotonic() + 100
        while not happened():
            assert self.process.poll() is None, self.wait().output[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def until_logged(self, out: Path, text: str) -> None:
        """Wait until the metrics of the run in `out` have this text."""
        metrics = out / "metrics.jsonl"
        self.until(lambda: metrics.exists() and text in metrics.read_text())

    def kill(self) -> None:
        """Kill the launcher and all that it has started, in whatever process group."""
        for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@cache
def loaders() -> Loaders:
    """Those of this process, which end with it."""
    folder = tempfile.mkdtemp(prefix="loaders-")
    os.environ[FOLDER] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = Loaders(Path(folder), os.environ | VARIABLES)
    atexit.register(found.end)
    return found


def command(
    ranks: int, words: Sequence[str | Path], python: Sequence[str] = (sys.executable,)
) -> list[str]:
    """mpirun, as horovodrun calls it; one rank needs no launcher."""
    program = [*python, *map(str, words)]
    if ranks == 1:
        return program
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *program]


def begin(
    ranks: int,
    *words: str | Path,
    timeout: float = 300,
    launcher: str | None = None,
    python: Sequence[str] = (sys.executable,),
) -> Launch:
    """Begin `python *words` on that many ranks, or `hvd_lbt *words` by one of the scripts in
    launch/.

    launcher: the script, or another launcher's words up to the number of ranks. python: what runs
    the words.
    """
    if launcher:
        name, *options = launcher.split()
        program = [ROOT / name if "/" in name else name, *options, str(ranks), *words]
    process = subprocess.Popen(
        program if launcher else command(ranks, words, python),
        env=os.environ | VARIABLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    return Launch(process, timeout)


def run_ranks(ranks: int, *words: str | Path, timeout: float = 300) -> str:
    """Run `python *words` on that many ranks; they must end with 0. Gives what they wrote.

    The ranks are forks (preloaded.py); those of `begin` are not.
    """
    loaders().need(ranks)
    ended = begin(ranks, *words, timeout=timeout, python=RANK).wait()
    assert ended.code == 0, f"exit code {ended.code}:\n{ended.output[-4000:]}"
    return ended.output
