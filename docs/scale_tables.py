"""Make the tables of docs/scale.md: what was measured, and what is calculated from it.

    python docs/scale_tables.py            # writes them into the page
    python docs/scale_tables.py --check    # exit code 1 if the page has others

Measured numbers are those of docs/scale_ranks.json (tests/campaigns/many_ranks.py). Calculated ones
follow from the code's own constants, the plan, and the time model of hvd_lbt/schedule/speed.py with
a published speed profile.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvd_lbt.measure.rank_times import PARTS, ROWS
from hvd_lbt.recipe import load_recipe
from hvd_lbt.reducer import FROZEN_BITS, PLACES
from hvd_lbt.schedule.plan import Plan, make_plan
from hvd_lbt.schedule.plan_time import Cluster, StageTime, stage_times, total_seconds
from hvd_lbt.speed_profile import load_profile

HERE = Path(__file__).parent
PAGE, MEASURED = HERE / "scale.md", HERE / "scale_ranks.json"
WORKERS = (1, 64, 512, 4096)
IMAGES = {
    "1,281,167 (ImageNet)": 1_281_167,
    "14,197,122 (ImageNet-21k)": 14_197_122,
    "1,000,000,000": 1_000_000_000,
}
RECIPE, LARGEST_BATCH = "imagenet_resnet50", 65_536
PROFILE = "v100_infiniband"
PARAMETERS = 25_557_032  # of ResNet-50
WIRE_BYTES = 2 * PARAMETERS  # wire.form fp16
STATE_BYTES = (4 + 4 + 4) * PARAMETERS + WIRE_BYTES  # weights, gradients, momentum; wire
IMAGE_BYTES = 147_897_477_120 / 1_281_167  # published: the size of ILSVRC2012_img_train.tar
INDEX_BYTES = (
    4 + 3 * 8
)  # a sample of a shard, mapped by a node's ranks: token; shard, offset, length
PER_NODE = 8  # ranks
DESCRIPTORS = 1024  # Linux's usual `ulimit -n`


def table(heads: list[str], rows: list[list[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    lines = [heads, ["--", *["-:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of(rows: list[dict[str, Any]], controller: str, cycle_ms: float = 1.0) -> list[dict[str, Any]]:
    """The rows of one controller."""
    return [r for r in rows if (r["controller"], r["cycle_ms"]) == (controller, cycle_ms)]


# --------------------------------------------------------------------------------------- measured


def start_table(rows: list[dict[str, Any]]) -> str:
    """Seconds since the launch until the last rank had come so far."""
    parts = ("process", "imported", "mpi", "connected", "first_update")
    heads = ["controller", "ranks", "process", "imports", "MPI", "Horovod", "first update"]
    return table(
        heads,
        [
            [row["controller"], str(row["ranks"]), *(f"{row['start'][part]:.1f}" for part in parts)]
            for row in rows
        ],
    )


def rank_table(rows: list[dict[str, Any]]) -> str:
    """What one rank holds."""
    heads = ["controller", "ranks", "connections", "descriptors", "threads", "memory, MB"]
    heads += ["rendezvous requests"]
    return table(
        heads,
        [
            [
                row["controller"],
                str(row["ranks"]),
                *(str(row["rank"][part]) for part in ("connections", "descriptors", "threads")),
                f"{row['pss_of_all'] / row['ranks'] / 1e6:.0f}",
                f"{sum(row['rendezvous_requests'].values()):,}"
                if row["rendezvous_requests"]
                else "",
            ]
            for row in rows
        ],
    )


def update_table(rows: list[dict[str, Any]]) -> str:
    """What an update, and a second without one, cost."""
    heads = ["controller", "ranks", "cycle, ms", "update, ms", "CPU ms a rank", "sums"]
    heads += ["messages a rank", "bytes a rank", "one sum of 1 kB: messages a rank"]
    heads += ["idle: messages a rank a second", "idle: share of a core"]
    lines = []
    for row in rows:
        update, idle, ranks = row["update"], row["idle_second"], row["ranks"]
        lines.append(
            [
                row["controller"],
                str(ranks),
                f"{row['cycle_ms']:g}",
                f"{1000 * update['seconds']:.0f}",
                f"{1000 * update['processor_seconds'] / ranks:.1f}",
                f"{sum(n for name, n in update['sums'].items() if 'noise' not in name):g}",
                f"{update['messages'] / ranks:.0f}",
                f"{update['bytes'] / ranks:,.0f}",
                f"{row['bare_sum']['messages'] / ranks:.0f}",
                f"{idle['messages'] / ranks:,.0f}",
                f"{idle['processor_seconds'] / ranks:.1%}",
            ]
        )
    return table(heads, lines)


def run_table(rows: list[dict[str, Any]]) -> str:
    """The whole runs."""
    heads = ["controller", "ranks", "updates", "stopped after", "resumed on", "largest difference"]
    return table(
        heads,
        [
            [
                row["controller"],
                str(row["ranks"]),
                str(row["run"]["updates"]),
                str(row["run"]["stopped_after"]),
                str(row["ranks"] // 2),
                f"{row['run']['difference']:.1e}",
            ]
            for row in rows
        ],
    )


def rank_0_table(found: dict[str, Any]) -> str:
    """What rank 0 spends on the others' times."""
    heads = ["ranks", "rows of times an update", "bytes of them", "CPU ms of rank 0 an update"]
    return table(
        heads,
        [
            [
                f"{row['ranks']:,}",
                f"{row['numbers_an_update'] / len(PARTS):.0f}",
                f"{4 * row['numbers_an_update']:,.0f}",
                f"{row['update_ms']:.2f}",
            ]
            for row in found["rank_0"]
        ],
    )


# ------------------------------------------------------------------------------------- calculated


def plan_of(images: int) -> Plan:
    """The recipe's plan on so many images."""
    words = [f"data.train_samples={images}", f"schedule.max_global_batch={LARGEST_BATCH}"]
    return make_plan(load_recipe(RECIPE, words).schedule, images)


def times_of(plan: Plan, workers: int) -> tuple[StageTime, ...]:
    """The predicted time of its stages."""
    recipe = load_recipe(RECIPE, [])
    profile = replace(load_profile(PROFILE), gradient_bytes=WIRE_BYTES)
    micro_batch = recipe.layout.micro_batch
    assert isinstance(micro_batch, int)
    cluster = Cluster(
        workers=workers,
        micro_batch=micro_batch,
        ghost_batch=recipe.layout.ghost_batch,
        image_size=recipe.data.image_size,
    )
    return stage_times(plan, profile, cluster)


def small_sum_bytes(workers: int) -> int:
    """Of the one small sum of an update, on average: flags, losses, two votes, rows of times."""
    every = -(-workers // ROWS)
    return 4 * (7 + FROZEN_BITS + len(PLACES) + 3 + 2) + 4 * len(PARTS) * workers // every


def sent(workers: int, size: float) -> float:
    """Bytes that a worker sends of a ring's sum of `size` bytes."""
    return 2 * (workers - 1) / workers * size


def size_text(value: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def hours_text(value: float) -> str:
    """Hours."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def run_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each number of images and workers."""
    base = max(row["pss_of_all"] / row["ranks"] for row in found["rows"])
    rows = []
    for name, images in IMAGES.items():
        plan = plan_of(images)
        for workers in WORKERS:
            times = times_of(plan, workers)
            seconds = total_seconds(times)
            assert seconds is not None
            exposed = sum(t.update.exposed_sum * t.stage.updates for t in times)  # type: ignore[operator]
            rate = plan.samples / seconds
            network = plan.updates * sent(workers, WIRE_BYTES + small_sum_bytes(workers))
            memory = base + STATE_BYTES + INDEX_BYTES * images / min(workers, PER_NODE)
            rows.append(
                [
                    name if workers == WORKERS[0] else "",
                    f"{workers:,}",
                    f"{plan.updates:,}",
                    hours_text(seconds / 3600),
                    f"{exposed / seconds:.0%}",
                    f"{max(t.idle for t in times):,}",
                    size_text(network) if workers > 1 else "0",
                    f"{rate:,.0f}",
                    f"{size_text(rate * IMAGE_BYTES)}/s",
                    size_text(memory),
                ]
            )
    return rows


def calculated_table(found: dict[str, Any]) -> str:
    """Hours, updates, network, reads and memory."""
    heads = ["images", "workers", "updates", "hours", "of it sums", "idle workers at most"]
    heads += ["a worker sends", "images read a second", "bytes read a second", "memory a rank"]
    return table(heads, run_rows(found))


def tree_seconds(workers: int) -> float:
    """Of a sum that runs as a ring within each node, and as a tree between the nodes."""
    profile = load_profile(PROFILE)
    within, between = profile.within_node, profile.between_nodes
    assert within is not None
    assert between is not None
    nodes = -(-workers // profile.workers_per_node)
    hops = 2 * math.ceil(math.log2(nodes))
    return (
        within.seconds(min(workers, profile.workers_per_node), WIRE_BYTES, profile.messages)
        + between.overhead
        + 2 * WIRE_BYTES / between.bandwidth
        + hops * profile.messages * between.latency
    )


def sums_table() -> str:
    """The sum of the gradients, as rings and as a tree."""
    heads = ["workers", "compute of an update of 8,192, ms", "of 65,536, ms"]
    heads += ["sum as rings, ms", "as a tree between nodes, ms"]
    lines = []
    for workers in WORKERS[1:]:
        times = times_of(plan_of(IMAGES["1,281,167 (ImageNet)"]), workers)
        first, last = times[0].update, times[-1].update
        assert first.sum is not None
        milliseconds = (first.compute, last.compute, first.sum, tree_seconds(workers))
        lines.append([f"{workers:,}", *(f"{1000 * value:.3g}" for value in milliseconds)])
    return table(heads, lines)


def control_table() -> str:
    """What does not depend on the images."""
    heads = ["workers", "sum of gradients, a worker sends", "the small sum, a worker sends"]
    heads += ["hops of a ring", "Gloo connections a rank", "rendezvous requests, at least"]
    lines = []
    for workers in WORKERS[1:]:
        lines.append(
            [
                f"{workers:,}",
                size_text(sent(workers, WIRE_BYTES)),
                size_text(sent(workers, small_sum_bytes(workers))),
                f"{2 * (workers - 1):,}",
                f"{gloo_connections(workers, 8):,}",
                f"{rendezvous_requests(workers, 8):,}",
            ]
        )
    return table(heads, lines)


def breaks_table(found: dict[str, Any]) -> str:
    """The first thing that breaks at each step, and what would replace it."""
    plan = plan_of(IMAGES["1,281,167 (ImageNet)"])
    at = {workers: times_of(plan, workers) for workers in WORKERS}
    needed = max(t.needed_images_per_second or 0 for t in at[64]) / 8
    idle = max(t.idle for t in at[512])
    share = at[512][0].update
    assert share.exposed_sum is not None
    assert share.total is not None
    rings = [at[workers][0].update.sum or 0.0 for workers in (512, 4096)]
    ranks = [row["rank"] for row in of(found["rows"], "Gloo")]
    others = max(rank["descriptors"] - rank["connections"] for rank in ranks)
    most = max(n for n in range(8, 4097, 8) if gloo_connections(n, 8) + others <= DESCRIPTORS)
    over = gloo_connections(most + 8, 8), rendezvous_requests(most + 8, 8)
    index = INDEX_BYTES * IMAGES["1,000,000,000"]
    breaks = {
        "1 → 64 workers": f"the input: a node of 8 workers must decode {needed:,.0f} images/s",
        "64 → 512 workers": f"the batch: of 8,192 in ghost batches of 32, {idle} of 512 workers "
        f"have nothing to do, and the sum is {share.exposed_sum / share.total:.0%} of an update",
        f"beyond {most} workers": f"Gloo: with {over[0]:,} connections, a rank is at the usual "
        f"`ulimit -n` of {DESCRIPTORS:,}; one HTTP server answers {over[1]:,} requests",
        "512 → 4,096 workers": f"the ring between nodes: {1000 * rings[0]:.0f} → "
        f"{1000 * rings[1]:.0f} ms a sum, nearly all latency: more workers take longer",
        "→ 1 billion images": f"the index: {size_text(index)} of each node's memory, compared with "
        "its checksums by every rank at the start; a random read for each image",
    }
    tree = f"{1000 * tree_seconds(4096):.0f} ms"
    instead = (
        "more cores a node, `data convert --shorter-side`, decoding on the GPU",
        "a larger first batch (`schedule.scaled_start`), a smaller `layout.ghost_batch`",
        "MPI or srun, which connect when they first send; a larger `ulimit -n`",
        f"a tree between nodes ({tree}), as NCCL has; batches above 65,536",
        "checksums by one rank of a node; shards in random order and `data.shuffle_block`",
    )
    rows = [[*pair, other] for pair, other in zip(breaks.items(), instead, strict=True)]
    return table(["step", "breaks first (calculated)", "instead"], rows).replace(
        "| -- | -: | -: |", "| -- | -- | -- |"
    )


def gloo_connections(ranks: int, per_node: int) -> int:
    """TCP connections of a rank: two meshes of each of all ranks, its node's, and its local
    rank's.
    """
    return 2 * ((ranks - 1) + (ranks // per_node - 1) + (per_node - 1))


def rendezvous_requests(ranks: int, per_node: int) -> int:
    """HTTP requests to horovodrun's one rendezvous server until all ranks are connected, at least:
    who asks before a peer has answered asks again.
    """
    return ranks * (18 + 3 * gloo_connections(ranks, per_node))


def measured() -> dict[str, Any]:
    """What the campaign wrote."""
    return dict(json.loads(MEASURED.read_text(encoding="utf-8")))


def tables() -> dict[str, str]:
    """By the name of its place in the page."""
    found = measured()
    rows = found["rows"]
    usual = [row for row in rows if row["cycle_ms"] == 1.0]
    return {
        "start": start_table(usual),
        "ranks": rank_table(usual),
        "updates": update_table(rows),
        "runs": run_table(usual),
        "rank 0": rank_0_table(found),
        "calculated": calculated_table(found),
        "sums": sums_table(),
        "control": control_table(),
        "breaks": breaks_table(found),
    }


def with_tables(text: str) -> str:
    """The page with the tables as they are now."""
    for name, its in tables().items():
        begin, end = f"<!-- table: {name} -->", "<!-- end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        assert re.search(pattern, text, re.DOTALL), f"{PAGE} has no {begin}"
        put = f"{begin}\n\n{its}\n\n{end}"
        text = re.sub(pattern, lambda _, put=put: put, text, flags=re.DOTALL)
    return text


def words(text: str) -> list[str]:
    """Without what formatting changes."""
    return re.sub(r"\|[ :|-]*\|\n", "", text).split()


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    made = with_tables(text)
    if args.check:
        return int(words(text) != words(made))
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
