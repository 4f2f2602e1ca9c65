"""Campaign: mutated recipes, command lines and metrics; none may hang or end in a traceback.

    python tests/campaigns/mutate_recipes.py --cases 2000 --seed 0

Not in CI's time. Each case runs in this process under an alarm of --limit seconds. A case is good
if it ends with exit code 0, or with 2 and one paragraph of printable text on the standard error.
Prints one line for each kind, `cases, accepted, refused, failed`, the slowest case, and every
failure with the seed of its case. tests/unit/test_mutations.py runs a few cases of each kind.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import string
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from hvd_lbt.cli import COMMANDS, main
from hvd_lbt.recipe import load_recipe, shipped_recipes

CONFUSING = (
    *("", "~", "null", "true", "no", "0", "-1", "1e5", "1e-320", "1e400", ".inf", "-.inf", ".nan"),
    *("1_000", "017", "0o17", "0x1F", "1:30", "2024-13-45", "9" * 30, "9" * 5000, "-0.0", "1.5"),
    *("[]", "{}", "[1]", "{a: 1}", "[[[[]]]]", "'", '"', "|", "&a 1", "*a", "!!binary aGk=", "<<"),
    *(
        "!!python/name:os.system",
        "é",
        "\u202e",
        "\x1b[31m",
        "[/b]",
        "<script>",
        "$x$",
        "\0",
        "\udcff",
    ),
    *(
        "..",
        "a/b",
        "/dev/zero",
        "- - -",
        "? a",
        "#",
        "---",
        "...",
        "%YAML 9.9",
        "\t",
        "\r",
        "\ufeff",
    ),
    *(
        "1000000000000",
        "99999999999999999999",
        "16",
        "64",
        "4096",
        "1000000",
        "grow_batch",
        "hybrid",
    ),
)


class HungError(Exception):
    """A case took longer than its limit."""


def _alarm(number: int, frame: object) -> None:
    raise HungError


def keys_of(settings: dict, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a recipe, sections too."""
    for key, value in settings.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


KEYS = [
    *keys_of(load_recipe("digits").to_dict()),
    *(f"schedule.scaled_start.{key}" for key in ("lr", "momentum")),
    *(f"schedule.warm_up.{key}" for key in ("epochs", "first_lr")),
    *(f"schedule.momentum_ramp.{key}" for key in ("epochs", "compensate")),
    "schedule.cosine.batch_factor",
]


def word(rng: random.Random) -> str:
    """A value that is a number, a confusing one, or noise."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(CONFUSING)
    if kind < 0.8:
        return repr(rng.choice((1, -1)) * 10 ** rng.uniform(-20, 20))
    return "".join(rng.choices(string.printable, k=rng.randrange(12)))


def mutated_text(rng: random.Random) -> str:
    """A shipped recipe as a whole, with lines or characters changed."""
    recipe = load_recipe(rng.choice(shipped_recipes()))
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        match rng.randrange(7):
            case 0:
                lines[at] = lines[at].partition(":")[0] + ": " + word(rng)
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 2:
                del lines[at]
            case 3:
                lines[at] = " " * rng.randrange(6) + lines[at].strip()
            case 4:
                place = rng.randrange(len(lines[at]) + 1)
                lines[at] = lines[at][:place] + word(rng) + lines[at][place:]
            case 5:
                lines.insert(at, word(rng) * rng.choice((1, 100, 20_000)))
            case 6:
                rng.shuffle(lines)
        text = "\n".join(lines) + "\n"
        if not text.strip():
            return text
    return text


def recipe_file(rng: random.Random, folder: Path) -> list[str]:
    """`plan` of a mutated file, sometimes with other bytes in it, sometimes as a base."""
    data = bytearray(mutated_text(rng).encode("utf-8", "surrogateescape"))
    if rng.random() < 0.2 and data:
        for _ in range(rng.choice((1, 10))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    (folder / "x.yaml").write_bytes(data)
    if rng.random() < 0.1:
        (folder / "y.yaml").write_text(
            f"base: x.yaml\nname: y\n{rng.choice(KEYS)}: {word(rng)!r}\n"
        )
        return ["plan", str(folder / "y.yaml")]
    return ["plan", str(folder / "x.yaml"), "--set=data.train_samples=1000"]


def overrides(rng: random.Random, folder: Path) -> list[str]:
    """`plan` or `recipes` of a shipped recipe with settings that are mostly wrong."""
    words = [rng.choice(("plan", "recipes")), rng.choice(shipped_recipes())]
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice(KEYS) if rng.random() < 0.9 else word(rng)
        words += ["--set", f"{key}={word(rng)}" if rng.random() < 0.95 else word(rng)]
    return words


# These options would begin a training or a measurement if all words were right.
NEVER = {"--help", "-h", "--version"}
HARMLESS = ("plan", "recipes", "report", "evaluate", "export", "data check", "doctor --json x")


def command_line(rng: random.Random, folder: Path) -> list[str]:
    """Any command with options of its own and of others, and an argument that no command has."""
    name = rng.choice([*COMMANDS, "study-trainings", word(rng)])
    words = name.split(" ")
    for _ in range(rng.randrange(4)):
        option = rng.choice(OPTIONS)
        words += rng.choice(([option, word(rng)], [f"{option}={word(rng)}"], [option], [word(rng)]))
    return [*words, "--no-such-option" if rng.random() < 0.5 else f"--no-such-option={word(rng)}"]


OPTIONS = (
    *(
        "--set",
        "--out",
        "--data",
        "--resume",
        "--workers",
        "--repetitions",
        "--batches",
        "--accumulate",
    ),
    *("--threads", "--jobs", "--scale", "--launcher", "--model", "--device", "--only", "--format"),
    *("--min-workers", "--max-workers", "--discover", "--images-per-second", "--json", "--classes"),
    *("--speed", "--price"),
)


def paths(rng: random.Random, folder: Path) -> list[str]:
    """Commands that read, given what they cannot read."""
    os.makedirs(folder / "folder", exist_ok=True)
    if not (folder / "fifo").exists():
        os.mkfifo(folder / "fifo")
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "empty").touch()
        (folder / "text").write_text("no checkpoint\n" * 10)
        (folder / "text.sha256").write_text("0" * 64)
    names = (
        "fifo",
        "folder",
        "loop",
        "empty",
        "text",
        "nowhere",
        "\x1b[31m",
        "/dev/null/x",
        "a\0b",
    )
    command = rng.choice((["plan"], ["recipes"], ["report"], ["study-trainings"]))
    if rng.random() < 0.2:
        return ["plan", "digits", "--speed", str(folder / rng.choice(names))]
    return [
        *command,
        str(folder / rng.choice(names)),
        *rng.choice(([], ["--out", str(folder / "text")])),
    ][: 2 if command[0] != "report" else None]


def metrics(rng: random.Random, folder: Path) -> list[str]:
    """`report` of a run whose metrics have other bytes, values or lines; it ends before it
    draws.
    """
    record = {"event": rng.choice(("run", "update", "eval", "end", "x"))}
    values = [None, True, -1, 0, 3, 1e300, 10**30, "x", [], {}, [{}], {"a": 1}, "\x1b", "\ud800"]
    keys = ("name", "recipe", "plan", "world_size", "versions", "update", "loss", "top1", "time")
    lines = []
    for _ in range(rng.randrange(1, 8)):
        for key in rng.sample(keys, rng.randrange(len(keys))):
            record[key] = rng.choice(values)
        line = json.dumps(record)
        if rng.random() < 0.3:
            place = rng.randrange(len(line))
            line = line[:place] + rng.choice((word(rng), "[" * 100_000, "")) + line[place:]
        lines.append(line)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    return ["report", str(run), "--out", str(folder / "report")]


KINDS: dict[str, Callable[[random.Random, Path], list[str]]] = {
    "recipe files": recipe_file,
    "settings": overrides,
    "command lines": command_line,
    "paths": paths,
    "metrics": metrics,
}


def run(kind: str, seed: int, folder: Path, limit: float) -> tuple[str, float]:
    """One case: "accepted", "refused", or what went wrong with it; and its seconds."""
    said, told = io.StringIO(), io.StringIO()
    words: list[str] = []
    signal.signal(signal.SIGALRM, _alarm)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        words = KINDS[kind](random.Random(f"{kind} {seed}"), folder)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
            code = main(words)
    except HungError:
        return f"hangs: {words!r:.300}", limit
    except BaseException:  # a traceback is what is looked for
        return f"{words!r:.300}\n{traceback.format_exc()[-1500:]}", time.monotonic() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - began
    message = said.getvalue()
    if code == 0:
        return "accepted", seconds
    one_paragraph = message.count("\n") == 1 and message[:-1].isprintable()
    if code == 2 and one_paragraph and len(message) < 5000:
        return "refused", seconds
    return f"exit code {code}, {len(message)} characters: {words!r:.300}\n{message:.1500}", seconds


def campaign(kind: str, cases: int, seed: int, limit: float) -> list[str]:
    """Run `cases` of a kind and print the line that sums them up; the failures."""
    results = {"accepted": 0, "refused": 0}
    failures, slowest = [], (0.0, seed)
    with tempfile.TemporaryDirectory() as folder:
        for case in range(seed, seed + cases):
            result, seconds = run(kind, case, Path(folder), limit)
            slowest = max(slowest, (seconds, case))
            if result in results:
                results[result] += 1
            else:
                failures.append(f"{kind}, seed {case}: {result}")
    print(
        f"{kind}: {cases} cases, {results['accepted']} accepted, {results['refused']} refused, "
        f"{len(failures)} failed; slowest {slowest[0]:.2f} s (seed {slowest[1]})",
        flush=True,
    )
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of each kind [2000]")
    parser.add_argument("--seed", type=int, default=0, help="of the first case [0]")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a case may take [20]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    found = [
        failure
        for kind in args.kinds
        for failure in campaign(kind, args.cases, args.seed, args.limit)
    ]
    print("\n\n".join(found[:20]))
    sys.exit(bool(found))
