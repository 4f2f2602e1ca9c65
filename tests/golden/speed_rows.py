"""Published speeds, which of their rows calibrate the model of an update's time, and the others.

The rules by which rows are chosen look at no error:

- speed_tables.csv holds every collected table of one model on one kind of hardware with a fixed
  batch a worker, and with rows on one full node, on two, and on more. 1, R and 2R workers calibrate
  (R a node); rows beyond two nodes are held out; other rows on a part of a node are `inside`.
  Tables of parameter servers have no ring and no published line rate: they are kept in the file
  and left out.
- speed_line_rate.csv: Horovod's own tables with NCCL, of 1 GPU and of 16 or 64. Only the GPU alone
  calibrates: the network is a ring at 0.8 of the line rate, and nothing hides.
- speed_traces.csv: AdaptDL's traces (Apache-2.0, github.com/petuum/adaptdl, branch osdi21-artifact,
  commit c793c708, simulator/traces), all placements with equal workers a node (but for one). Rows
  of at most 4 workers calibrate; the others are held out.
- speed_growing_run.csv: cybertronai/imagenet18 (Unlicense), commit 218ef7e6, dawn/logs: 64 V100 on
  8 nodes. The stages with the first batch, 8,192, calibrate; the two larger batches are held out.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from scipy.optimize import least_squares

from hvd_lbt.schedule.calibrate import HOP_SECONDS, LINE_SHARE, MESSAGE_BYTES, calibrate
from hvd_lbt.schedule.speed import Link, SpeedProfile, Work, fit_line, update_time

HERE = Path(__file__).parent
CONGESTION = 1 / 3  # of the traces' cluster; docs/time.md says where it comes from
TRACE_BYTES = 102_228_128  # of ResNet-50 in fp32


Role = Literal["calibrates", "inside", "held out"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row: what was published, what the calibrated model says, and the row's role."""

    what: str
    workers: int
    published: float
    predicted: float
    role: Role

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def read(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table_rows() -> list[Prediction]:
    """Seconds of an update in each row of each table that is not left out."""
    tables: dict[str, list[dict[str, str]]] = {}
    for row in read("speed_tables.csv"):
        if not row["left_out"]:
            tables.setdefault(row["table"], []).append(row)
    return [prediction for rows in tables.values() for prediction in _table(rows)]


def _table(rows: list[dict[str, str]]) -> list[Prediction]:
    first = rows[0]
    on_node, local_batch = int(first["workers_per_node"]), int(first["local_batch"])
    seconds = {
        int(row["workers"]): int(row["workers"]) * local_batch / float(row["images_per_second"])
        for row in rows
    }
    profile = calibrate(
        {count: seconds[count] for count in (1, on_node, 2 * on_node)},
        name="table",
        workers_per_node=on_node,
        local_batch=local_batch,
        gradient_bytes=int(first["gradient_bytes"]),
        line_rate=float(first["line_rate_gbit"]) * 1e9 / 8,
    )
    what = f"{first['table']}: {first['framework']}, {first['precision']}, {local_batch} a GPU"
    return [
        Prediction(
            what=what,
            workers=workers,
            published=published,
            predicted=seconds_of(profile, workers, local_batch),
            role=_role(workers, on_node),
        )
        for workers, published in seconds.items()
    ]


def line_rate_rows() -> list[Prediction]:
    """Seconds of an update of many GPUs from one GPU and the line rate alone."""
    rows = []
    for row in read("speed_line_rate.csv"):
        local_batch, size = int(row["local_batch"]), int(row["gradient_bytes"])
        profile = SpeedProfile(
            name="line rate",
            workers_per_node=int(row["workers_per_node"]),
            update_seconds=None,
            sample_seconds={224: float(row["seconds_alone"]) / local_batch},
            gradient_bytes=size,
            messages=-(-size // int(MESSAGE_BYTES)),
            within_node=Link(bandwidth=1e15),
            between_nodes=Link(
                bandwidth=LINE_SHARE * float(row["line_rate_gbit"]) * 1e9 / 8, latency=HOP_SECONDS
            ),
        )
        rows.append(
            Prediction(
                what=f"{row['model']}, {row['network'].removesuffix(' NCCL')}",
                workers=int(row["workers"]),
                published=float(row["seconds"]),
                predicted=seconds_of(profile, int(row["workers"]), local_batch),
                role="held out",
            )
        )
    return rows


def _role(workers: int, on_node: int) -> Role:
    if workers in (1, on_node, 2 * on_node):
        return "calibrates"
    return "held out" if workers > 2 * on_node else "inside"


def seconds_of(
    profile: SpeedProfile,
    workers: int,
    local_batch: int,
    *,
    nodes: int | None = None,
    image_size: int = 224,
) -> float:
    """The predicted update of one micro-batch on each worker."""
    work = Work(
        workers=workers,
        nodes=nodes,
        samples=local_batch,
        micro_batches=1,
        last_micro_batch=local_batch,
        image_size=image_size,
    )
    total = update_time(profile, work).total
    assert total is not None
    return total


def growth_steps() -> list[Prediction]:
    """Images/s after each growth of the batch in the log, over images/s before it.

    A stage's seconds are the median of its epochs after the first, which holds its start.
    """
    stages: dict[tuple[int, int], list[float]] = {}
    hours, updates = 0.0, 0
    for row in read("speed_growing_run.csv"):
        passed = (float(row["hours"]) - hours) * 3600 / (int(row["updates"]) - updates)
        hours, updates = float(row["hours"]), int(row["updates"])
        key = int(row["global_batch"]), int(row["image_size"])
        stages.setdefault(key, []).append(passed)
    seconds = {key: median(times[1:]) for key, times in stages.items()}
    profile = _growing_profile(seconds)
    return [
        Prediction(
            what=f"images/s, {before:,} → {after:,} at {size} px",
            workers=64,
            published=after / seconds[after, size] / (before / seconds[before, size]),
            predicted=after
            / seconds_of(profile, 64, after // 64, image_size=size)
            / (before / seconds_of(profile, 64, before // 64, image_size=size)),
            role="held out",
        )
        for before, after, size in ((8_192, 16_384, 128), (8_192, 14_336, 224))
    ]


def _growing_profile(seconds: dict[tuple[int, int], float]) -> SpeedProfile:
    """a and b, b in proportion to the pixels, from the stages with a batch of 8,192."""
    points = [
        (batch / 64 * size**2, passed)
        for (batch, size), passed in seconds.items()
        if batch == 8_192
    ]
    fixed, per_pixel = fit_line(points)
    return SpeedProfile(
        name="growing",
        workers_per_node=64,  # the sum is in a: its part behind backward was not published
        update_seconds=fixed,
        sample_seconds={size: per_pixel * size**2 for _, size in seconds},
        gradient_bytes=1,
        within_node=Link(bandwidth=1e15),
    )


def trace_rows(congestion: float = CONGESTION) -> list[Prediction]:
    """ResNet-50's traces, the model fitted to the rows of at most 4 workers."""
    rows = [
        (int(row["nodes"]), int(row["workers"]), int(row["local_batch"]), float(row["seconds"]))
        for row in read("speed_traces.csv")
        if row["network"] == "imagenet"
    ]
    profile = fit_trace([row for row in rows if row[1] <= 4], congestion)
    return [
        Prediction(
            what=f"{nodes} nodes, {local_batch} a GPU",
            workers=workers,
            published=published,
            predicted=seconds_of(profile, workers, local_batch, nodes=nodes),
            role="calibrates" if workers <= 4 else "held out",
        )
        for nodes, workers, local_batch, published in rows
    ]


def fit_trace(rows: Sequence[tuple[int, int, int, float]], congestion: float) -> SpeedProfile:
    """The profile of least robust relative error; rows: nodes, workers, local batch, seconds."""

    def profile(values: Sequence[float]) -> SpeedProfile:
        fixed, per_sample, overlap, within, between, hidden_share = map(float, values)
        return SpeedProfile(
            name="trace",
            workers_per_node=4,
            update_seconds=fixed,
            sample_seconds={224: per_sample},
            gradient_bytes=TRACE_BYTES,
            overlap=overlap,
            hidden_share=hidden_share,
            within_node=Link(bandwidth=TRACE_BYTES / within),
            between_nodes=Link(bandwidth=TRACE_BYTES / between, congestion=congestion),
        )

    def errors(values: Sequence[float]) -> list[float]:
        made = profile(values)
        return [seconds_of(made, w, b, nodes=n) / seconds - 1 for n, w, b, seconds in rows]

    fits = [
        least_squares(
            errors,
            [0.06, 0.0045, overlap, 0.04, 0.1, 0.85],
            bounds=([0, 1e-6, 0, 1e-6, 1e-6, 0], [1.0] * 6),
            loss="soft_l1",
            f_scale=0.05,
        )
        for overlap in (0.3, 0.6)
    ]
    return profile(min(fits, key=lambda fit: fit.cost).x)
