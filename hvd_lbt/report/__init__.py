"""Draw one or more runs: a self-contained HTML page and its pictures, from RUN/metrics.jsonl.

Runs that differ only by their seed are one group: one colour, the mean as a line and the range from
the lowest to the highest run as a band.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hvd_lbt.errors import UserError
from hvd_lbt.report.page import render, spread, updates_done
from hvd_lbt.report.pictures import PICTURES
from hvd_lbt.report.predictions import time_left_line
from hvd_lbt.report.published import check_comparable, draw_published, published_lines
from hvd_lbt.report.runs import Group, group_runs, read_run
from hvd_lbt.terminal import printable
from hvd_lbt.whole_file import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--published",
        action="store_true",
        help="for ResNet-50 on ImageNet: draw the updates to 75.9 %% among published ones too",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write [report]")


def main(args: argparse.Namespace) -> int:
    """Write OUT/report.html and OUT/*.png, and print the accuracies."""
    path, groups = write_report(args.runs, args.out, published=args.published)
    for group in groups:
        accuracy = f"test accuracy {spread(group)}, {updates_done(group.runs)} updates"
        print(printable(f"{group.label}: {accuracy}"))
    for run in (run for group in groups for run in group.runs):
        if line := time_left_line(run):
            print(printable(f"{run.folder}: {line}"))
        for note in run.notes:
            print(printable(f"{run.folder}: {note}"))
    for line in published_lines(groups) if args.published else ():
        print(printable(line))
    print(printable(f"Wrote {path}"))
    return 0


def write_report(
    folders: Sequence[Path], out: Path, *, published: bool = False
) -> tuple[Path, list[Group]]:
    """Read the runs, draw them, write the page; the page's path and the groups in it.

    published: with published.png, which is not on the page.

    Raises UserError for a run that can't be read and for an `out` that can't be written.
    """
    runs = [read_run(folder) for folder in folders]
    seen: dict[tuple[int, int], Path] = {}
    for folder in folders:
        about = os.stat(folder)
        if (twin := seen.setdefault((about.st_dev, about.st_ino), folder)) is not folder:
            raise UserError(f"{folder} is the same run as {twin}: give each run once.")
    groups = group_runs(runs)
    if published:
        check_comparable(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = {name: draw(groups) for name, (draw, _) in PICTURES.items()}
        pictures = {name: png for name, png in drawn.items() if png is not None}
        page = render(groups, pictures).encode()
        extra = {"published.png": draw_published(groups)} if published else {}
        for name, data in {**pictures, **extra, "report.html": page}.items():
            write_whole(out / name, data)
    except OSError as error:
        raise UserError(
            f"--out {out}: the report can't be written there ({error.strerror}). Give a folder "
            "that can be made or written to."
        ) from error
    return out / "report.html", groups
