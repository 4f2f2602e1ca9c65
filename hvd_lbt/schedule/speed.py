"""How long an update takes on N workers: compute, the exposed part of the sum, the input (pure).

    from hvd_lbt.schedule.speed import Link, SpeedProfile, Work, update_time

    profile = SpeedProfile(
        name="mine", workers_per_node=8, update_seconds=0.002, sample_seconds={224: 1.2e-3},
        gradient_bytes=51_114_064, overlap=0.5,
        within_node=Link(bandwidth=100e9), between_nodes=Link(bandwidth=10e9),
    )
    work = Work(workers=64, samples=128, micro_batches=1, last_micro_batch=128, image_size=224)
    update_time(profile, work).total

The formula and how well it predicts published tables: docs/time.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from types import MappingProxyType
from typing import Any

from hvd_lbt.errors import UserError, shown

FIXED_UNKNOWN = (
    "the fixed seconds of an update (update_seconds is not measured), so that what a larger batch "
    "saves is underestimated"
)
LARGEST = 1e18  # of any number of a profile: nothing overflows below it
LEAST = 1e-12  # of a number that is divided by


class SpeedError(UserError):
    """A profile with a value that cannot be; `problem` begins with its key."""

    def __init__(self, problem: str):
        super().__init__(f"speed profile: {problem}")
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Link:
    """The network between workers, as `hvd_lbt bench allreduce` measures it.

    bandwidth: bus bandwidth in bytes/s, which for N members is 2(N−1)/N · bytes / seconds, measured
    with two members; latency: seconds of each of the 2(N−1) hops of one message; overhead: seconds
    of a sum over two members or more, whatever its size (negotiation, copies to the host).
    congestion: κ, with which the bandwidth falls as (2/N)^κ where the members share switches; 0 for
    a network that gives each member its own, 1/3 on the Amazon EC2 nodes of docs/time.md.
    """

    bandwidth: float
    latency: float = 0.0
    overhead: float = 0.0
    congestion: float = 0.0

    def __post_init__(self) -> None:
        _check("bandwidth", self.bandwidth, least=LEAST)
        _check("latency", self.latency)
        _check("overhead", self.overhead)
        _check("congestion", self.congestion, most=1)

    def seconds(self, members: int, size: float, messages: int) -> float:
        """Of a ring's sum of `size` bytes in `messages` messages over `members` members."""
        if members < 2:
            return 0.0
        hops = 2 * (members - 1)
        bandwidth = self.bandwidth * (2 / members) ** self.congestion
        return self.overhead + hops / members * size / bandwidth + hops * messages * self.latency


@dataclass(frozen=True, kw_only=True)
class SpeedProfile:
    """What was measured of a cluster and a network; None is not measured.

    A YAML file has the same keys; `within_node` and `between_nodes` are mappings with the keys of
    `Link`. Times are seconds, sizes bytes.
    """

    name: str
    source: str = ""
    """Where the numbers come from: a paper, or the command that measured them."""
    model: str | None = None
    """The recipe's model.name that was measured."""
    workers_per_node: int
    update_seconds: float | None
    """a: of an update, whatever its samples: the optimizer, the launch of kernels. None counts as 0
    and is said: from one batch size a and b cannot be told apart."""
    micro_batch_seconds: float = 0.0
    """Of each micro-batch, whatever its samples."""
    sample_seconds: Mapping[int, float]
    """b: of one sample's forward and backward on one worker, by image size in pixels."""
    gradient_bytes: int | None = None
    """Of all gradients on the wire: 2 bytes a parameter with wire.form fp16."""
    messages: int = 1
    """Messages that they travel in (gradient_bytes / wire.bucket_mb)."""
    overlap: float = 0.0
    """Seconds of the sum that can hide behind one second of the last micro-batch's compute."""
    hidden_share: float = 1.0
    """Largest share of the sum that can hide: the last message never does."""
    within_node: Link | None = None
    between_nodes: Link | None = None
    input_images_per_second: float | None = None
    """Decoded images of one node."""

    def __post_init__(self) -> None:
        _check_whole("workers_per_node", self.workers_per_node)
        if self.update_seconds is not None:
            _check("update_seconds", self.update_seconds)
        _check("micro_batch_seconds", self.micro_batch_seconds)
        if not isinstance(self.sample_seconds, Mapping) or not self.sample_seconds:
            raise SpeedError(
                f"sample_seconds: {self.sample_seconds!r} is not allowed; it must map each image "
                "size to seconds, such as {224: 0.0012}."
            )
        for size, seconds in self.sample_seconds.items():
            _check_whole("sample_seconds: image size", size)
            _check(f"sample_seconds[{size}]", seconds, least=LEAST)
        if self.gradient_bytes is not None:
            _check_whole("gradient_bytes", self.gradient_bytes)
        _check_whole("messages", self.messages)
        _check("overlap", self.overlap, most=1)
        _check("hidden_share", self.hidden_share, most=1)
        if self.input_images_per_second is not None:
            _check("input_images_per_second", self.input_images_per_second, least=LEAST)
        by_size = MappingProxyType(dict(sorted(self.sample_seconds.items())))
        object.__setattr__(self, "sample_seconds", by_size)

    def seconds_a_sample(self, image_size: int) -> float:
        """b of an image size; of one that was not measured, from the nearest in pixels.

        Convolutions work in proportion to the pixels, so b of the nearest size is scaled by them;
        `unmeasured_size` says when.
        """
        nearest = min(self.sample_seconds, key=lambda size: abs(size - image_size))
        return self.sample_seconds[nearest] * (image_size / nearest) ** 2

    def unmeasured_size(self, image_size: int) -> int | None:
        """The measured image size that stands in for `image_size`; None if that was measured."""
        if image_size in self.sample_seconds:
            return None
        return min(self.sample_seconds, key=lambda size: abs(size - image_size))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one update asks of the busiest worker.

    samples: of this worker, in `micro_batches` forwards, the last of `last_micro_batch` samples;
    image_size in pixels; nodes: None is as few as the profile's workers_per_node allows.
    """

    workers: int
    samples: int
    micro_batches: int
    last_micro_batch: int
    image_size: int
    nodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """Predicted seconds of one update, by part; None is a part the profile cannot predict.

    compute: forward, backward and optimizer; sum: the gradients' sum as a whole; exposed_sum: the
    part that does not hide behind backward; input: the images of the busiest node, made beside the
    rest. unknown: what a prediction lacks, in words.
    """

    compute: float
    sum: float | None
    exposed_sum: float | None
    input: float | None
    unknown: tuple[str, ...] = field(default=())

    @property
    def total(self) -> float | None:
        """Of the update; None if its sum is not known. An unknown input counts as fast enough."""
        if self.exposed_sum is None:
            return None
        return max(self.compute + self.exposed_sum, self.input or 0.0)

    @property
    def bottleneck(self) -> str:
        """`input`, `sums` or `compute`: what an update mainly waits for."""
        exposed = self.exposed_sum or 0.0
        if self.input is not None and self.input > self.compute + exposed:
            return "input"
        return "sums" if exposed > self.compute else "compute"


def update_time(profile: SpeedProfile, work: Work) -> UpdateTime:
    """The seconds of one update: compute = a + c·k + b·L, and what of the sum is exposed.

    L samples in k micro-batches on the busiest worker. The sum is a ring of the r workers of a node
    (Patarasuk & Yuan 2009), then one of the n nodes: each takes 2(n−1)/n · D/β for D bytes, and
    what `Link` adds. It starts with the last micro-batch's backward and hides behind it for
    overlap · b · (its samples), but never more than hidden_share of it.
    """
    per_sample = profile.seconds_a_sample(work.image_size)
    compute = (
        (profile.update_seconds or 0.0)
        + profile.micro_batch_seconds * work.micro_batches
        + per_sample * work.samples
    )
    on_node, nodes = _shape(profile, work)
    whole, unknown = _sum_seconds(profile, on_node, nodes)
    exposed = None
    if whole is not None:
        window = profile.overlap * per_sample * work.last_micro_batch
        exposed = whole - min(window, profile.hidden_share * whole)
    images = None
    if profile.input_images_per_second is not None:
        images = on_node * work.samples / profile.input_images_per_second
    else:
        unknown = (*unknown, "the input (input_images_per_second is not measured)")
    if profile.update_seconds is None:
        unknown = (*unknown, FIXED_UNKNOWN)
    return UpdateTime(
        compute=compute, sum=whole, exposed_sum=exposed, input=images, unknown=unknown
    )


def fit_line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of seconds = a + b·samples by least squares, neither below 0.

    points: (samples, seconds). With one number of samples only, a is 0: nothing tells them apart.
    Raises ValueError without points or with samples that are not above 0.
    """
    pairs = list(points)
    if not pairs or any(samples <= 0 for samples, _ in pairs):
        raise ValueError(f"a line needs points with samples above 0, not {pairs[:3]}")
    number = len(pairs)
    mean_x = sum(x for x, _ in pairs) / number
    mean_y = sum(y for _, y in pairs) / number
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    through_zero = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    if spread <= 1e-12 * mean_x**2 * number:
        return 0.0, max(0.0, mean_y / mean_x)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    if slope < 0:
        return max(0.0, mean_y), 0.0
    fixed = mean_y - slope * mean_x
    return (fixed, slope) if fixed >= 0 else (0.0, max(0.0, through_zero))


def _shape(profile: SpeedProfile, work: Work) -> tuple[int, int]:
    """Workers of the fullest node, and nodes."""
    nodes = work.nodes or -(-work.workers // profile.workers_per_node)
    if work.nodes is None:
        return min(work.workers, profile.workers_per_node), nodes
    return -(-work.workers // nodes), nodes


def _sum_seconds(
    profile: SpeedProfile, on_node: int, nodes: int
) -> tuple[float | None, tuple[str, ...]]:
    """The gradients' sum, or None and what is not measured."""
    if on_node * nodes == 1:
        return 0.0, ()
    unknown = []
    if profile.gradient_bytes is None:
        unknown.append("the sums (gradient_bytes is not measured)")
    if on_node > 1 and profile.within_node is None:
        unknown.append("the sums within a node (within_node is not measured)")
    if nodes > 1 and profile.between_nodes is None:
        unknown.append("the sums between nodes (between_nodes is not measured)")
    if unknown:
        return None, tuple(unknown)
    assert profile.gradient_bytes is not None
    return sum(
        link.seconds(members, profile.gradient_bytes, profile.messages)
        for link, members in ((profile.within_node, on_node), (profile.between_nodes, nodes))
        if link is not None
    ), ()


def keys_of(kind: type) -> dict[str, Any]:
    """The keys of a profile's section, each with its annotation."""
    return {entry.name: entry.type for entry in fields(kind)}


def _check(key: str, value: Any, *, least: float = 0.0, most: float = LARGEST) -> None:
    """A finite number from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not isfinite(value) or not least <= value <= most:
        raise SpeedError(
            f"{key}: {shown(value)} is not allowed; it must be a number from {least:g} to {most:g}."
        )


def _check_whole(key: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= LARGEST:
        raise SpeedError(
            f"{key}: {shown(value)} is not allowed; it must be a whole number of at least 1."
        )
