"""The lines of a metrics.jsonl: each is checked before it is used, since files get damaged."""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from hvd_lbt.errors import UserError

MAX_LINE = 2**20  # bytes; the longest, a run's settings and plan, has some ten thousand
MAX_DEPTH = 16
LARGEST = 1e40  # sums of numbers up to this are finite
LARGEST_COUNT = 2**53  # whole numbers up to this are exact as float64

Fits = Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line. record: its event, None if it cannot be used; reason: why, or what was left out."""

    number: int
    record: dict[str, Any] | None = None
    reason: str = ""


def whole(least: int) -> Fits:
    """Whether a value is a whole number of at least `least`."""
    return lambda value: type(value) is int and least <= value <= LARGEST_COUNT


def number(least: float = -LARGEST, most: float = LARGEST, *, none: bool = False) -> Fits:
    """Whether a value is a finite number from `least` to `most`, or with `none` null."""

    def fits(value: Any) -> bool:
        if value is None:
            return none
        return type(value) in (int, float) and least <= value <= most and isfinite(value)

    return fits


def text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(map(text, value))


def noise_source(value: Any) -> bool:
    """Whether a value says how the gradient's noise was measured; null: it was not."""
    return value in (None, "parts", "differences")


def seconds_by_rank(value: Any) -> bool:
    """Whether a value is a list of seconds, one a rank."""
    return isinstance(value, list) and len(value) > 1 and all(map(number(0), value))


def bounds(value: Any) -> bool:
    """Whether a value is a mapping of numbers, or null where there is no bound."""
    return isinstance(value, dict) and all(map(number(0, none=True), value.values()))


def versions(value: Any) -> bool:
    """Whether a value is a mapping of texts."""
    return isinstance(value, dict) and all(map(text, value.values()))


def recipe(value: Any) -> bool:
    """Whether a value is a recipe's settings, as far as a report needs them."""
    return (
        _is_no_deeper(value, MAX_DEPTH)
        and _has(value, {"run": dict, "schedule": dict})
        and type(value["run"].get("seed")) is int
        and text(value["schedule"].get("policy"))
    )


STAGE: dict[str, Fits] = {
    **dict.fromkeys(("index", "first_sample"), whole(0)),
    **dict.fromkeys(("samples", "updates", "global_batch"), whole(1)),
    **dict.fromkeys(("lr", "momentum", "noise_scale", "exact_noise_scale"), number(0)),
}
OPTIONAL_OF_STAGE: dict[str, Fits] = dict.fromkeys(("last_lr", "last_noise_scale"), number(0))


def plan(value: Any) -> bool:
    """Whether a value is a plan: its updates, training images and stages."""
    return (
        _has(value, {"stages": list})
        and whole(1)(value.get("updates"))
        and whole(1)(value.get("train_samples"))
        and len(value["stages"]) > 0
        and all(
            isinstance(stage, dict) and not _unfit(stage, STAGE, OPTIONAL_OF_STAGE)
            for stage in value["stages"]
        )
    )


# What a line of each event must have to be drawn, and what it may have.
KEYS: dict[str, dict[str, Fits]] = {
    "run": {
        "name": text,
        "recipe": recipe,
        "plan": plan,
        "world_size": whole(1),
        "versions": versions,
    },
    "update": {
        "update": whole(0),
        "epoch": number(0),
        "samples_seen": whole(1),
        "stage": whole(0),
        "global_batch": whole(1),
        "lr": number(0),
        "momentum": number(0, 1),
        "noise_scale": number(0),
        "loss": number(none=True),
        "images_per_second": number(1e-9),
        "data_wait": number(0, 1),
    },
    "eval": {
        "update": whole(1),
        "epoch": number(0),
        "samples": whole(1),
        "loss": number(none=True),
        "top1": number(0, 1),
        "top5": number(0, 1),
    },
    "plan": {"plan": plan},
    "decision": {
        **dict.fromkeys(
            ("update", "samples_seen", "global_batch", "global_batch_before"), whole(1)
        ),
        "epoch": number(0),
        **dict.fromkeys(("noise", "overhead", "fastest"), number(0, none=True)),
        "bounds": bounds,
        "bound": text,
    },
    "ranks": {
        "first_update": whole(0),
        "updates": whole(1),
        **dict.fromkeys(("compute", "data", "sums", "delayed"), seconds_by_rank),
    },
    "slow_rank": {
        "update": whole(0),
        "rank": whole(0),
        "host": text,
        "ratio": number(0),
        "cause": text,
        "ended": flag,
    },
    "end": {
        "reason": text,
        "update": whole(0),
        "seconds": number(0),
        "peak_memory_bytes": whole(0),
    },
}
OPTIONAL: dict[str, dict[str, Fits]] = {
    "run": {"hosts": texts, "revision": text, "resumed_at_update": whole(0), "time": number(0)},
    "update": {
        "gradient_noise": number(none=True),
        "gradient_noise_from": noise_source,
        "seconds": number(0),
        "seconds_left": number(0, none=True),
        "skipped_samples": whole(0),
        "left_out": whole(0),
        "time": number(0),
    },
    "plan": {"time": number(0)},
    "decision": {"time": number(0)},
    "eval": {"time": number(0)},
    "ranks": {"time": number(0)},
    "slow_rank": {"excess": number(0), "time": number(0)},
    "end": {"time": number(0)},
}


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of `file` that are not empty, in order.

    Raises UserError for what is not a regular file or cannot be read.
    """
    try:
        # a FIFO would be waited for
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UserError(f"{file} is not a regular file.")
            place = 0
            while data := stream.readline(MAX_LINE + 1):
                place += 1
                if data.endswith(b"\n") or len(data) <= MAX_LINE:
                    if data.strip():
                        yield _line(place, data)
                    continue
                while data and not data.endswith(b"\n"):
                    data = stream.readline(MAX_LINE)
                yield Line(number=place, reason=f"it is longer than {MAX_LINE:,} bytes")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error


def _line(place: int, data: bytes) -> Line:
    try:
        line = data.decode()
    except UnicodeDecodeError:
        return Line(number=place, reason="it is not UTF-8")
    # A run that was killed in the middle of a line may have been resumed behind that half line.
    begin = max(0, line.rfind('{"event"'))
    try:
        record = json.loads(line[begin:], parse_constant=_no_json)
    except (ValueError, RecursionError):
        unfinished = not data.endswith(b"\n")
        return Line(number=place, reason="it is unfinished" if unfinished else "it is not JSON")
    event = record.get("event") if isinstance(record, dict) else None
    if not isinstance(event, str) or event not in KEYS:
        return Line(number=place, reason="it has no event that a report knows")
    if unfit := _unfit(record, KEYS[event], OPTIONAL[event]):
        return Line(number=place, reason=f"{event}: {unfit}")
    half = "half a line stands before its event" if line[:begin].strip() else ""
    return Line(number=place, record=record, reason=half)


def _unfit(record: Mapping[str, Any], keys: dict[str, Fits], optional: dict[str, Fits]) -> str:
    """What is wrong with the first of the keys that is missing or has an impossible value."""
    for key, fits in (keys | optional).items():
        if key not in record:
            if key in keys:
                return f"{key} is missing"
        elif not fits(record[key]):
            value = record[key]
            plain = value is None or isinstance(value, bool | int | float | str)
            return f"{key} is {json.dumps(value)[:40]}" if plain else f"{key} is incomplete"
    return ""


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def _has(value: Any, kinds: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), kind) for key, kind in kinds.items()
    )


def _is_no_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_no_deeper(part, levels - 1) for part in inner)
