"""What every benchmark shares: equality before time, interleaved timing, JSON lines."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import ValidationError
from torch import Tensor

from hvd_lbt.arguments import count
from hvd_lbt.errors import UserError, shortened
from hvd_lbt.log.provenance import revision, versions
from hvd_lbt.recipe import ModelRecipe
from hvd_lbt.rounding import five_digits


def _nothing() -> None:
    pass


def add_common_arguments(parser: argparse.ArgumentParser, *, repetitions: int) -> None:
    """The arguments of every benchmark; repetitions: the default."""
    parser.add_argument(
        "--repetitions", type=count, default=repetitions, help=f"of each [{repetitions}]"
    )
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """The network whose shapes are used."""
    parser.add_argument("--model", default="resnet50", help="whose shapes [resnet50]")


def model_recipe(name: str) -> ModelRecipe:
    """ImageNet's network of this name. Raises UserError for a name that is none."""
    try:
        return ModelRecipe(name=name, num_classes=1000, stem="imagenet")
    except ValidationError as error:
        details = error.errors()[0]
        reason = details.get("ctx", {}).get("error") or details["msg"]  # of its own check, or not
        raise UserError(f"--model {shortened(name)}: {reason}.") from error


def device_of(name: str) -> torch.device:
    """cpu or cuda. Raises UserError where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here.")
    return torch.device(name)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One way to do the work: `run` is timed; `prepare` comes before each run and is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition, in order: repetition i of all subjects ran side by side."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, Any]:
        """The fields of a JSON line: milliseconds (median, fastest, quartiles), repetitions."""
        low, _, high = _quartiles(self.seconds)
        return {
            "ms": 1e3 * self.median,
            "ms_best": 1e3 * min(self.seconds),
            "ms_quartiles": [1e3 * low, 1e3 * high],
            "repetitions": len(self.seconds),
        }


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speedup(ours: Times, peer: Times) -> dict[str, Any]:
    """How many times faster `ours` is: the median of peer / ours over repetitions, and quartiles.

    Paired by repetition: what disturbs the machine for a while disturbs both sides of a pair.
    """
    low, middle, high = _quartiles(
        [theirs / own for own, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    )
    return {"ratio": middle, "ratio_quartiles": [low, high]}


def time_interleaved(
    subjects: Mapping[str, Subject | Callable[[], object]],
    *,
    repetitions: int,
    warmups: int = 3,
    synchronize: Callable[[], object] = _nothing,
) -> dict[str, Times]:
    """Run all subjects once per repetition, the first one changing; a fixed number of repetitions.

    synchronize: waits for the device (torch.cuda.synchronize) before the clock starts and stops.
    With several ranks every rank must call this with the same arguments: the order is the same.
    """
    work = {
        name: subject if isinstance(subject, Subject) else Subject(run=subject)
        for name, subject in subjects.items()
    }
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-warmups, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            work[name].prepare()
            synchronize()
            start = time.perf_counter()
            work[name].run()
            synchronize()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def check_equal(
    what: str, ours: Iterable[Tensor], peer: Iterable[Tensor], *, tolerance: float
) -> float:
    """Raise AssertionError unless |ours - peer| ≤ tolerance · max|peer| in every tensor.

    Returns the largest difference found, as a share of the tensor's largest magnitude. NaN fails.
    """
    worst = 0.0
    for index, (own, theirs) in enumerate(zip(ours, peer, strict=True)):
        if own.numel() == 0:
            continue
        expected = theirs.detach().double()
        size = expected.abs().max().item()
        distance = (own.detach().double() - expected).abs().max().item()
        share = distance / size if size else distance
        if not share <= tolerance:
            raise AssertionError(
                f"{what}: tensor {index} is off by {share:.3g} of its largest magnitude; "
                f"allowed {tolerance:.3g}. Nothing is timed."
            )
        worst = max(worst, share)
    return worst


def machine() -> dict[str, Any]:
    """Names what ran: processor, its cores and threads used, GPUs, system."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Lines:
    """Writes results as JSON lines to standard output and, with `path`, at the end of a file.

    The first line {"event": "bench", "bench": name, "settings", "versions", "revision", "machine",
    "time"} says what made the others; they are {"event": "result", "bench": name, …}. `speaks`:
    False on all ranks but 0, where nothing is written.
    """

    def __init__(
        self,
        bench: str,
        *,
        settings: Mapping[str, Any],
        path: Path | None = None,
        speaks: bool = True,
    ) -> None:
        self._bench = bench
        self._speaks = speaks
        self._path = path
        if path is not None and speaks:
            _check_appendable(path)
        self._write(
            {
                "event": "bench",
                "bench": bench,
                "settings": dict(settings),
                "versions": versions(),
                "revision": revision(),
                "machine": machine(),
                "time": time.time(),
            }
        )

    def result(self, **fields: Any) -> None:
        """Write one result."""
        self._write({"event": "result", "bench": self._bench, **fields})

    def _write(self, record: dict[str, Any]) -> None:
        if not self._speaks:
            return
        line = json.dumps(five_digits(record, exact=("time",)), default=str)
        _put(sys.stdout, line)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                _put(file, line)


def _check_appendable(path: Path) -> None:
    """Make the folder of `path`; UserError unless lines can be added to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError(f"--out {path}: it is not a regular file; give another name.")
        path.open("a").close()
    except OSError as error:
        raise UserError(
            f"--out {path}: it cannot be written to ({error.strerror}). Give another file."
        ) from error


def _put(file: TextIO, line: str) -> None:
    file.write(line + "\n")
    file.flush()
