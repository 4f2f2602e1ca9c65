"""Predict the time of an update on 3, 4 and 8 nodes from 1 and 2, on a network of our own.

    python tests/campaigns/network_of_nodes.py --nodes 1 2 3 4 8 --rate 50 --out FILE

Needs root and iproute2. Each node is a network namespace with a host name of its own, joined to a
switch (a bridge) by a link of --rate Mbit/s in each direction (tc tbf). One rank a node sums the
bytes of ResNet-50's gradients in fp16, 51 MB, by GradientReducer and FusedSGD over Horovod with
Gloo, whose sum is a ring and which waits without using a core. Forward and backward are replaced by
a sleep, so that the cores of this machine are not the limit; the gradients arrive one after the
other during the backward sleep, as autograd's do, so the sums overlap with it. For the same reason
the bytes are half as many fp32 numbers: Gloo's fp16 sum takes a core's time of its own.

Calibrated is on 1 and 2 nodes only: t(1), and t(2) with and without overlap. Predicted with
t(N) = t(1) + max(0, S·2(N-1)/N - h): S = t(2, no overlap) - t(1) is the ring's time for two nodes,
h = t(2, no overlap) - t(2) the part of it that backward hides.

Prints a table and one JSON line; the exit code is 1 if a prediction errs by more than 10 %.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from namespaces import start_gloo_ranks, switch_script, write_hosts

ROOT = Path(__file__).parents[2]
FORWARD, BACKWARD = 0.3, 0.6  # seconds of sleep: as 96 samples at 107 images/s
WARMUPS = 1  # update that is not counted: connections are made
ALLOWED = 0.10

PREFIX = "10.78.0"  # of the network's addresses
# both directions: a node sends at this rate, and is sent to at this rate
LINK = """\
nsenter --target $! --net tc qdisc add dev net0 root tbf rate {rate}mbit burst 64k limit 512k
  tc qdisc add dev port$node root tbf rate {rate}mbit burst 64k limit 512k"""


def run_nodes(nodes: int, rate: float, words: Sequence[str]) -> str:
    """Run `python THIS --rank *words` with one rank on each of so many nodes; what rank 0 prints.

    rate: of each link, Mbit/s. Raises RuntimeError with all output unless it ends with 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_hosts(scratch, PREFIX, nodes)
        script = switch_script(PREFIX, each=LINK.format(rate=f"{rate:g}"))
        apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        apart += ["--mount-proc", "bash", "-c", script, "bash", scratch, str(nodes)]
        done = subprocess.run(
            [*apart, sys.executable, __file__, "--launch", str(nodes), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )
    if done.returncode:
        raise RuntimeError(
            f"{nodes} nodes: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def launch(nodes: int, words: Sequence[str]) -> int:
    """Start one rank in each node's namespaces, and give them the addresses of each other."""
    command = [sys.executable, __file__, "--rank", *words]
    ranks = start_gloo_ranks(PREFIX, nodes, nodes, command)
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.2)
    return max(abs(rank.poll() or 0) for rank in ranks)  # the others end with this namespace


# ------------------------------------------------------------------------------------- one rank


def rank(args: argparse.Namespace) -> None:
    """Do the updates; rank 0 prints the seconds of each as JSON."""
    import torch

    from hvd_lbt import comm
    from hvd_lbt.models import build_model
    from hvd_lbt.optim import FusedSGD
    from hvd_lbt.recipe import ModelRecipe
    from hvd_lbt.reducer import GradientReducer

    world = comm.init()
    with torch.device("meta"):
        recipe = ModelRecipe(name="resnet50", num_classes=1000, stem="imagenet")
        shapes = [(name, p.shape) for name, p in build_model(recipe, 1000, 32).named_parameters()]
    share = args.megabytes * 2**20 / sum(2 * shape.numel() for _, shape in shapes)
    share = share or 1.0  # of the bytes, for a quick look
    named = [
        (name, torch.nn.Parameter(torch.zeros(max(1, int(share * shape.numel() / 2)))))
        for name, shape in shapes
    ]
    gradients = [torch.full_like(p, 1e-3) for _, p in named]
    optimizer = FusedSGD([p for _, p in named], lr=0.0, momentum=0.9)
    reducer = GradientReducer(
        named, optimizer, world=world, wire="fp32", overlap=not args.no_overlap
    )

    seconds, began_cpu, began = [], 0.0, 0.0
    for update in range(WARMUPS + args.updates):
        if update == WARMUPS:
            comm.barrier()
            began_cpu, began = busy_seconds(), time.perf_counter()
        start = time.perf_counter()
        loss = slept_forward(named, gradients)
        reducer.backward(loss)
        optimizer.step()
        if update >= WARMUPS:
            seconds.append(time.perf_counter() - start)
    for _, parameter in named:  # what was summed is right: momentum of the sum, in order
        expected = 1e-3 * world.size * sum(0.9**power for power in range(WARMUPS + args.updates))
        found = float(optimizer.state[parameter]["momentum_buffer"].flatten()[0])
        assert abs(found - expected) < 1e-2 * expected, (found, expected)
    spent = busy_seconds() - began_cpu
    share = spent / (time.perf_counter() - began) / (os.cpu_count() or 1)
    comm.shutdown()
    if world.rank == 0:
        wire = sum(4 * p.numel() for _, p in named)
        print(json.dumps({"seconds": seconds, "wire_bytes": wire, "cores_busy": share}))


def slept_forward(named: Sequence[tuple[str, Any]], gradients: Sequence[Any]) -> Any:
    """Sleep for a forward pass; a loss whose backward sleeps, and gives each parameter its gradient
    in turn, the last one first.
    """
    import torch

    time.sleep(FORWARD)
    clock: dict[str, float] = {}
    each = BACKWARD / len(named)

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, parameter: Any, number: int) -> Any:
            ctx.number = number
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            began = clock.setdefault("began", time.perf_counter())
            place = len(named) - ctx.number
            # until a moment, not for a while: what this machine's cores do is part of the time
            time.sleep(max(0.0, began + place * each - time.perf_counter()))
            return grad, gradients[ctx.number].clone(), None

    x = torch.zeros((), requires_grad=True)
    for number, (_, parameter) in enumerate(named):
        x = Layer.apply(x, parameter, number)
    return x


def busy_seconds() -> float:
    """Seconds that all cores of this machine have worked since it started, for whomever."""
    user, nice, system, _, _, irq, softirq, *_ = (
        int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------- the table


def measure(nodes: int, args: argparse.Namespace, *, overlap: bool = True) -> dict[str, Any]:
    """The seconds of an update on so many nodes, measured: median, quickest and slowest."""
    words = ["--updates", str(args.updates), "--megabytes", str(args.megabytes)]
    printed = run_nodes(nodes, args.rate, words + ([] if overlap else ["--no-overlap"]))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    seconds = found["seconds"]
    return {
        "nodes": nodes,
        "overlap": overlap,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "wire_bytes": found["wire_bytes"],
        "cores_busy": found["cores_busy"],
    }


def predict(nodes: int, one: float, two: float, two_apart: float) -> float:
    """Seconds of an update on `nodes` nodes, from those on one and on two.

    one, two, two_apart: t(1); t(2); t(2) with the sums after the backward.
    """
    ring, hidden = two_apart - one, two_apart - two
    return one + max(0.0, ring * 2 * (nodes - 1) / nodes - hidden)


def campaign(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all, predict those beyond two nodes; what the JSON line says."""
    from hvd_lbt.bench.harness import machine
    from hvd_lbt.log.provenance import revision, versions
    from hvd_lbt.rounding import five_digits

    one, two = measure(1, args), measure(2, args)
    apart = measure(2, args, overlap=False)
    rows = [one, two, apart]
    for nodes in sorted(set(args.nodes) - {1, 2}):
        row = measure(nodes, args)
        row["predicted"] = predict(nodes, one["seconds"], two["seconds"], apart["seconds"])
        row["error"] = row["predicted"] / row["seconds"] - 1
        rows.append(row)
        print(f"{nodes} nodes: {row}", file=sys.stderr, flush=True)
    return five_digits(
        {
            "campaign": "network_of_nodes",
            "rate_mbit": args.rate,
            "forward_sleep": FORWARD,
            "backward_sleep": BACKWARD,
            "updates": args.updates,
            "rows": rows,
            "largest_error": max(
                (abs(row["error"]) for row in rows if "error" in row), default=0.0
            ),
            "versions": versions(),
            "revision": revision(),
            "machine": machine(),
            "time": time.time(),
        },
        exact=("time",),
    )


def table(found: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| nodes | measured, s (fastest to slowest) | predicted, s | error | cores busy |",
        "| --: | --: | --: | --: | --: |",
    ]
    for row in found["rows"]:
        name = str(row["nodes"]) + ("" if row["overlap"] else ", no overlap")
        measured = f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
        said = "calibrates | " if "predicted" not in row else f"{row['predicted']:.2f} | "
        said += f"{row['error']:+.1%}" if "error" in row else ""
        lines.append(f"| {name} | {measured} | {said} | {row['cores_busy']:.0%} |")
    return "\n".join(lines)


def main() -> int:
    """Run the campaign, or one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--rate", type=float, default=50.0, help="of a link, Mbit/s [50]")
    parser.add_argument("--updates", type=int, default=2, help="timed on each number of nodes [2]")
    parser.add_argument("--megabytes", type=float, default=0, help="of the wire [ResNet-50's, 51]")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--no-overlap", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.launch:
        return launch(args.launch, sys.argv[3:])
    if args.rank:
        rank(args)
        return 0
    found = campaign(args)
    print(table(found))
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["largest_error"] > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
