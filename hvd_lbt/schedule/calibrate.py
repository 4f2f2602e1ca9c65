"""A speed profile from a published table: seconds of an update on one worker, one node, two nodes.

The tables of docs/time.md are read so, and the shipped profiles that come from one were.
"""

from collections.abc import Mapping

from hvd_lbt.schedule.speed import LARGEST, Link, SpeedProfile

# A ring between nodes reaches about this share of the line rate.
LINE_SHARE = 0.8
HOP_SECONDS = 50e-6
# Network frameworks pack gradients into messages of about this size (PyTorch's DDP: 25 MB).
MESSAGE_BYTES = 25e6


def calibrate(
    seconds: Mapping[int, float],
    *,
    name: str,
    workers_per_node: int,
    local_batch: int,
    gradient_bytes: int,
    line_rate: float | None,
    image_size: int = 224,
    source: str = "",
    model: str | None = None,
) -> SpeedProfile:
    """The profile that reproduces the update's seconds on 1, R and 2R workers, R on a node.

    line_rate: bytes/s of a node's network. With one local batch a and b cannot be told apart: all
    of t(1) counts as per sample. t(R) − t(1) is the sum within a node. Of x = t(2R) − t(R) the ring
    between two nodes explains at most D/(0.8 · line_rate), since each of the n nodes sends
    2(n−1)/n · D; the rest of x is an overhead that no further node adds to. With line_rate None all
    of x is the ring. Without t(2R) the link between nodes is None. Raises KeyError without t(1) or
    t(R).
    """
    alone, on_node = seconds[1], seconds[workers_per_node]
    messages = -(-gradient_bytes // int(MESSAGE_BYTES))
    between = None
    if 2 * workers_per_node in seconds:
        step = max(0.0, seconds[2 * workers_per_node] - on_node)
        ring = step if line_rate is None else gradient_bytes / (LINE_SHARE * line_rate)
        visible = min(step, ring)
        between = Link(
            bandwidth=gradient_bytes / visible if visible > 0 else LARGEST,
            latency=HOP_SECONDS,
            overhead=max(0.0, step - ring - 2 * messages * HOP_SECONDS),
        )
    return SpeedProfile(
        name=name,
        source=source,
        model=model,
        workers_per_node=workers_per_node,
        update_seconds=None,
        sample_seconds={image_size: alone / local_batch},
        gradient_bytes=gradient_bytes,
        messages=messages,
        within_node=_ring(on_node - alone, gradient_bytes, workers_per_node),
        between_nodes=between,
    )


def _ring(seconds: float, size: int, members: int) -> Link:
    """The link on which a ring's sum takes `seconds`."""
    if seconds <= 0:
        return Link(bandwidth=LARGEST)
    return Link(bandwidth=2 * (members - 1) / members * size / seconds)
