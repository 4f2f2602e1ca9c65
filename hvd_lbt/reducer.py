"""From backward to update: accumulate in fp32, sum over the ranks in fp16, lose nothing.

The losses of one update, over all its micro-batches and ranks, sum to the mean loss over the global
batch; so their gradients are only ever summed, and unequal shares weigh as they should. Gradients
accumulate in fp32, in `.grad`, where autograd puts them. During the last backward each bucket of them
is packed into its wire buffer and leaves when its last gradient is there; the update reads the
world's sum out of the wire buffers.

The gradients outlive the sending. If a scaled gradient does not fit the wire, on any rank, or if
the ranks' sum might not, the update is sent again in fp32 before the optimizer moves. If a gradient itself is
infinite or NaN, no scale helps: all ranks skip the update.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt import ops
from hvd_lbt.errors import BadUpdatesError, UserError
from hvd_lbt.optim import FusedSGD, StepGradients
from hvd_lbt.world import World

WIRE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_BUCKET_BYTES = 1 << 20  # small, so that the first sum starts early in the last backward
ALIGNMENT = 32  # elements; a parameter begins at 64 bytes in fp16 and at 128 in fp32
FIRST_SCALE = 2.0**10  # 2^5 of head room for gradients near 1, and 2^-24 · 2^-10 still counts
LARGEST_SCALE = 2.0**24
SMALLEST_SCALE = 2.0**-64
GROWTH_INTERVAL = 200  # good updates after which the scale doubles: an overflow costs one resend


@dataclass(eq=False, kw_only=True)
class _Slot:
    """One parameter's place in its bucket."""

    name: str
    parameter: Tensor
    offset: int
    wire: Tensor = field(init=False)  # view of the bucket's, with the parameter's sizes and strides
    gradient: Tensor | None = None  # fp32, this rank's of this update so far; laid out as the wire


@dataclass(eq=False, kw_only=True)
class _Bucket:
    """Parameters whose gradients travel together."""

    name: str
    slots: list[_Slot]
    wire: Tensor  # flat, in wire form: the scaled gradients, then the world's sum
    missing: int = 0  # gradients of the last backward that have not come
    handle: Any = None  # of the sum under way


class GradientReducer:
    """Sums the gradients of an update over micro-batches and ranks, and hands them to the optimizer.

        reducer = GradientReducer(model, optimizer)  # after hvd_lbt.init()
        reducer.backward(loss, last=False)  # any number of micro-batches: nothing is sent
        reducer.backward(loss, last=True)  # the sums start while this runs
        optimizer.step()

    model: a module or (name, parameter) pairs. optimizer: FusedSGD, which reads the wire directly,
    or any torch optimizer, which finds the sum in `.grad` during its step. Reduced is what the
    optimizer has and requires a gradient now; what a backward does not reach counts as a gradient of
    zero (weight decay and momentum go on). allreduce_async(tensor, name) → handle begins the
    in-place *sum* over the ranks; synchronize(handle) waits for it. They and world are those of
    Horovod, after `hvd_lbt.init()`, unless given. wire: fp16, fp32, or bf16 where
    the allreduce can sum it (Horovod 0.28.1 cannot).
    bucket_mb: size of a bucket on the wire in 2^20 bytes. max_bad_updates: raise BadUpdatesError at
    that many updates in a row with infinite or NaN gradients. overlap: False sends after the last
    backward instead of during it (needed when one backward reaches a parameter several times, as
    with reentrant checkpointing). name: begins the names of the collectives; a second reducer needs
    another one.

    Every rank must make its reducer, and each update's last backward, in the same order. Raises
    UserError if the ranks' parameters or settings differ.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        *,
        world: World | None = None,
        allreduce_async: Callable[[Tensor, str], Any] | None = None,
        synchronize: Callable[[Any], Any] | None = None,
        wire: str = "fp16",
        bucket_mb: float = 25.0,
        max_bad_updates: int = 10,
        overlap: bool = True,
        name: str = "gradient",
    ) -> None:
        if wire not in WIRE_TYPES:
            raise UserError(f"wire: {wire!r} is no wire form. Allowed: {', '.join(WIRE_TYPES)}.")
        if not bucket_mb > 0:
            raise UserError(f"bucket_mb: {bucket_mb} is no size; it must be above 0.")
        if max_bad_updates < 1:
            raise UserError(f"max_bad_updates: {max_bad_updates} must be at least 1.")
        if (allreduce_async is None) != (synchronize is None):
            raise UserError("allreduce_async and synchronize belong together: give both or none.")
        if world is None or allreduce_async is None or synchronize is None:
            from hvd_lbt import comm  # not needed, nor Horovod, where all three are given

            world = world or comm.world()
            allreduce_async = allreduce_async or comm.allreduce_async_
            synchronize = synchronize or comm.synchronize
        self.world, self.wire, self.name, self.overlap = world, wire, name, overlap
        self.max_bad_updates = max_bad_updates
        self.allreduce_async, self.synchronize = allreduce_async, synchronize
        self._optimizer = optimizer
        self._optimizer_size = _size(optimizer)

        named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
        trained = _trained(named, optimizer)
        self._device = trained[0][1].device
        settings = f"{wire} {bucket_mb} {overlap}"
        _compare_ranks(trained, settings, world, self._sum, f"{name}.model", self._device)
        self._buckets = _make_buckets(trained, WIRE_TYPES[wire], int(bucket_mb * 2**20), name)
        self._slots = [slot for bucket in self._buckets for slot in bucket.slots]
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(self._make_hook(bucket, slot))

        self._scale = self._scalar(FIRST_SCALE if wire == "fp16" else 1.0)
        self._one = self._scalar(1.0)
        self._overflow = torch.zeros(1, device=self._device)
        self._codes = torch.tensor([1.0, 2.0], device=self._device)  # as pack_wire_ raises them
        self._flags = torch.zeros(2, device=self._device)  # ranks that overflowed, ranks gone bad
        self._flags_handle: Any = None
        self._backwards = 0  # of this update
        self._is_last = False
        self._sent = False
        self._applied: Tensor | None = None  # the scale of the sum that lies in the wire buckets

        self._wire_scale = float(self._scale)
        self._good_updates = 0  # since the scale changed
        self._overflows = 0
        self._skipped = 0
        self._bad_in_a_row = 0
        self._bad_parameter = ""

        if isinstance(optimizer, FusedSGD):
            optimizer.set_gradient_source(self._step_gradients)
        else:
            optimizer.register_step_pre_hook(lambda *_: self._before_step())
            optimizer.register_step_post_hook(lambda *_: self._release())

    def backward(self, loss: Tensor | None, *, last: bool = True) -> None:
        """Backpropagate one micro-batch of the update; `last` sends the sums.

        loss: this micro-batch's share of the update's mean loss (Σ of its losses / global batch),
        or None, with last=True, on a rank that has no samples in this update.
        Raises UserError if the step of the update before is missing.
        """
        if self._sent:
            raise UserError(
                "backward() was called after the update's last backward. Call optimizer.step() "
                "first, and pass last=True only with the last micro-batch of an update."
            )
        self._attach()
        self._is_last = last
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)
        if loss is not None:
            loss.backward()
        self._backwards += 1
        if last:
            for bucket in self._buckets:
                if bucket.handle is None:
                    self._send(bucket)
            self._flags.copy_(self._overflow == self._codes)
            self._flags_handle = self.allreduce_async(self._flags, f"{self.name}.flags")
            self._sent = True

    @torch.no_grad()
    def squared_norm(self) -> Tensor | None:
        """|g|² of the gradient that the last step applied, fp32 on the device; the same on all ranks.

        It is read from the wire: one more pass, for who measures now and then. None if that update
        was skipped, or sent again in fp32 (its sum is not on the wire).
        """
        if self._applied is None:
            return None
        norms = [
            torch.linalg.vector_norm(bucket.wire, dtype=torch.float32) for bucket in self._buckets
        ]
        return (torch.stack(norms) / self._applied).square().sum()

    def stats(self) -> dict[str, Any]:
        """Counts since the start: the same on all ranks.

        wire_scale: what gradients are multiplied by on the wire; overflows: updates sent again in
        fp32; skipped: updates dropped for a bad gradient; bad_in_a_row, bad_parameter: the last
        such, and the name of its first bad gradient ("" if there was none).
        """
        return {
            "wire_scale": self._wire_scale,
            "overflows": self._overflows,
            "skipped": self._skipped,
            "bad_in_a_row": self._bad_in_a_row,
            "bad_parameter": self._bad_parameter,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, the same on all ranks; between updates nothing else is state."""
        return {"good_updates": self._good_updates, **self.stats()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale and the counts of `state_dict()`, on every rank."""
        self._overflows, self._skipped = state["overflows"], state["skipped"]
        self._bad_in_a_row, self._bad_parameter = state["bad_in_a_row"], state["bad_parameter"]
        if self.wire == "fp16":  # another form has no scale to go on with
            self._set_scale(state["wire_scale"])
            self._good_updates = state["good_updates"]

    # -- backward: accumulate, and send what is complete ------------------------------------------

    def _attach(self) -> None:
        """Make every `.grad` this update's gradient so far, whatever the caller did to it.

        Before the update's first gradient that is None: nothing old is read or cleared.
        """
        first = self._backwards == 0
        for slot in self._slots:
            parameter = slot.parameter
            if first:
                if parameter.grad is slot.gradient:  # left over from an update that failed
                    parameter.grad = None
                slot.gradient = None
            if parameter.dtype == torch.float32 and parameter.grad is not slot.gradient:
                slot.gradient = None  # zero_grad() between micro-batches: begin again
                if parameter.grad is not None:  # the caller's own: it counts
                    parameter.grad = slot.gradient = _laid_out_as(parameter.grad, slot)

    def _make_hook(self, bucket: _Bucket, slot: _Slot) -> Callable[[Tensor], None]:
        low_precision = slot.parameter.dtype != torch.float32

        def gradient_is_there(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if low_precision:
                if slot.gradient is None:
                    slot.gradient = _laid_out_as(parameter.grad, slot)
                else:
                    slot.gradient.add_(parameter.grad)
                parameter.grad = None  # torch wants it in the parameter's type
            elif parameter.grad is not slot.gradient:  # else autograd has added to it
                parameter.grad = slot.gradient = _laid_out_as(parameter.grad, slot)
            if not (self._is_last and self.overlap):
                return
            if bucket.missing == 0:
                raise UserError(
                    f"the gradient of {slot.name} came twice in one backward, and its bucket had "
                    "left. Make the reducer with overlap=False."
                )
            bucket.missing -= 1
            if bucket.missing == 0:
                self._send(bucket)

        return gradient_is_there

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        wires, gradients = [], []
        for slot in bucket.slots:
            if slot.gradient is None:  # no backward of this update reached it
                slot.wire.zero_()
            else:
                wires.append(slot.wire)
                gradients.append(slot.gradient)
        ops.pack_wire_(wires, gradients, self._scale, self._overflow, summands=self.world.size)
        bucket.handle = self.allreduce_async(bucket.wire, bucket.name)

    # -- step: the world's sum --------------------------------------------------------------------

    @torch.no_grad()
    def _receive(self) -> str:
        """Wait for the sums and judge them: "wire", "fp32" (sent again) or "bad", on all ranks alike.

        Reading the flags is the one point in an update where the host waits for the device.
        """
        if not self._sent:
            raise UserError(
                "optimizer.step() was called before the update's last backward. Call "
                "reducer.backward(loss, last=True) with the last micro-batch."
            )
        if _size(self._optimizer) != self._optimizer_size:
            raise UserError(
                "parameters were added to the optimizer after its reducer was made. Make the "
                "reducer after the last add_param_group()."
            )
        for bucket in self._buckets:
            self.synchronize(bucket.handle)
            bucket.handle = None
        self.synchronize(self._flags_handle)
        overflowed, bad = self._flags.tolist()
        self._overflow.zero_()
        self._sent = False
        self._backwards = 0
        self._applied = None
        if bad:
            return self._skip()
        if overflowed:
            self._overflows += 1
            return self._send_again()
        self._bad_in_a_row = 0
        self._applied = self._scale
        self._good_updates += 1
        if self._good_updates >= GROWTH_INTERVAL and self.wire == "fp16":
            self._set_scale(min(2 * self._wire_scale, LARGEST_SCALE))
        return "wire"

    def _send_again(self) -> str:
        """Sum the gradients themselves, in fp32, and lower the scale to what would have fitted."""
        flats = []
        for bucket in self._buckets:
            flats.append(torch.zeros_like(bucket.wire, dtype=torch.float32))
            for slot in bucket.slots:
                place = _view(flats[-1], slot)
                if slot.gradient is not None:
                    place.copy_(slot.gradient)
                slot.gradient, slot.parameter.grad = place, None  # not two copies of all
        own = torch.stack([flat.abs().max() for flat in flats]).max()
        largest_by_rank = torch.zeros(self.world.size, device=self._device)
        largest_by_rank[self.world.rank] = own
        self._sum(largest_by_rank, f"{self.name}.largest")
        handles = [
            self.allreduce_async(flat, f"{bucket.name}.again")
            for bucket, flat in zip(self._buckets, flats, strict=True)
        ]
        for handle in handles:
            self.synchronize(handle)
        if not all(bool(flat.isfinite().all()) for flat in flats):
            return self._skip()  # finite in every rank, not in sum: 2^128 is reached
        self._bad_in_a_row = 0
        if self.wire == "fp16":
            room = 2.0**15 / (2 * self.world.size)
            largest = max(float(largest_by_rank.max()), 2.0**-100)
            fitting = 2.0 ** math.floor(math.log2(room / largest))
            self._set_scale(max(min(self._wire_scale / 2, fitting), SMALLEST_SCALE))
        return "fp32"

    def _skip(self) -> str:
        """Drop the update; at the last one allowed raise BadUpdatesError, on all ranks the same."""
        # In the order of buckets: a bad gradient spreads from its layer to all that come later.
        bad = torch.zeros(len(self._slots), device=self._device)
        for number, slot in enumerate(self._slots):
            if slot.gradient is not None:
                bad[number] = ~slot.gradient.isfinite().all()
        self._sum(bad, f"{self.name}.bad")
        names = [slot.name for slot, count in zip(self._slots, bad.tolist(), strict=True) if count]
        self._skipped += 1
        self._bad_in_a_row += 1
        self._bad_parameter = names[0]
        if self._bad_in_a_row >= self.max_bad_updates:
            raise BadUpdatesError(
                f"{self._bad_in_a_row} updates in a row had infinite or NaN gradients and were "
                f"skipped. The first parameter that went bad is {names[0]} (of {len(names)}; there "
                f"are {len(self._slots)}). Lower the learning rate or look at the data."
            )
        return "bad"

    def _step_gradients(self) -> StepGradients:
        """What FusedSGD asks for at the start of its step."""
        scale = self._scale
        verdict = self._receive()
        sums = {slot.parameter: slot.wire for slot in self._slots}
        if verdict == "fp32":
            sums |= {s.parameter: s.gradient for s in self._slots if s.gradient is not None}
        self._release()
        return StepGradients(
            grads=sums,
            grad_scale=None if verdict == "fp32" else scale,
            found_inf=self._one if verdict == "bad" else None,
        )

    @torch.no_grad()
    def _before_step(self) -> None:
        """Give another optimizer the sum in `.grad`; without one it leaves a parameter alone."""
        given = self._step_gradients()
        if given.found_inf is not None:
            return
        sums, wires = dict(given.grads), list(given.grads.values())
        if given.grad_scale is not None:
            sums = {p: torch.empty_like(wire, dtype=torch.float32) for p, wire in sums.items()}
            ops.unpack_wire_(list(sums.values()), wires, given.grad_scale)
        for slot in self._slots:  # both: if the step fails, the next backward drops it
            slot.gradient = slot.parameter.grad = sums[slot.parameter].to(slot.parameter.dtype)

    def _release(self) -> None:
        """Let go of the gradients, and leave `.grad` as zero_grad() does."""
        for slot in self._slots:
            slot.gradient = slot.parameter.grad = None

    def _set_scale(self, scale: float) -> None:
        # A new tensor: a step under way still divides by the old one.
        self._wire_scale, self._scale, self._good_updates = scale, self._scalar(scale), 0

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self._device)

    def _sum(self, tensor: Tensor, name: str) -> None:
        self.synchronize(self.allreduce_async(tensor, name))


def _size(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _trained(
    named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
) -> list[tuple[str, Tensor]]:
    """The parameters to reduce, each once, in the model's order."""
    wanted = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    trained = list({p: (name, p) for name, p in reversed(named) if p in wanted}.values())[::-1]
    if len(trained) < len(wanted):
        shapes = sorted({str(tuple(p.shape)) for p in wanted.difference(p for _, p in trained)})
        raise UserError(
            f"{len(wanted) - len(trained)} of the optimizer's parameters are not in the model "
            f"(shapes {', '.join(shapes)}). Give the reducer the model the optimizer was made for."
        )
    if not trained:
        raise UserError("the optimizer has no parameter that requires a gradient.")
    for name, p in trained:
        if p.device != trained[0][1].device:
            raise UserError(
                f"{name} is on {p.device}, {trained[0][0]} on {trained[0][1].device}. One reducer "
                "serves one device."
            )
        if not p.is_floating_point() or p.dtype == torch.float64:
            raise UserError(f"{name} is {p.dtype}: gradients are accumulated in float32.")
    return trained


def _make_buckets(
    trained: Sequence[tuple[str, Tensor]], wire: torch.dtype, size: int, name: str
) -> list[_Bucket]:
    """Cut the parameters into buckets, last parameter first, as backward reaches them."""
    groups: list[list[_Slot]] = []
    end = 0
    limit = 0
    for parameter_name, parameter in reversed(trained):
        if not groups or (end + parameter.numel()) * wire.itemsize > limit:
            limit = size if groups else min(size, FIRST_BUCKET_BYTES)
            groups.append([])
            end = 0
        groups[-1].append(_Slot(name=parameter_name, parameter=parameter, offset=end))
        end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    buckets = []
    for index, slots in enumerate(groups):
        end = slots[-1].offset + -(-slots[-1].parameter.numel() // ALIGNMENT) * ALIGNMENT
        flat = torch.zeros(end, device=slots[0].parameter.device, dtype=wire)
        bucket = _Bucket(name=f"{name}.{index}", slots=slots, wire=flat)
        for slot in slots:
            slot.wire = _view(flat, slot)
        buckets.append(bucket)
    return buckets


def _view(flat: Tensor, slot: _Slot) -> Tensor:
    """The slot's part of a flat tensor, laid out as the parameter (channels_last stays so)."""
    like = torch.empty_like(
        slot.parameter, device="meta"
    )  # dense, the parameter's strides if it is
    return flat.as_strided(like.shape, like.stride(), slot.offset)


def _laid_out_as(gradient: Tensor, slot: _Slot) -> Tensor:
    """`gradient`, copied only if it is not fp32 or its memory is not in the wire's order."""
    if gradient.layout != torch.strided:
        raise UserError(
            f"the gradient of {slot.name} is sparse; every weight is updated here. Make its layer "
            "with sparse=False."
        )
    like = slot.wire
    if gradient.dtype == torch.float32 and all(  # strides of size 1 do not matter
        own == its or size == 1
        for own, its, size in zip(gradient.stride(), like.stride(), like.shape, strict=True)
    ):
        return gradient
    with torch.no_grad():
        return torch.empty_like(like, dtype=torch.float32).copy_(gradient)


def _compare_ranks(
    trained: Sequence[tuple[str, Tensor]],
    settings: str,
    world: World,
    sum_: Callable[[Tensor, str], None],
    name: str,
    device: torch.device,
) -> None:
    """Raise UserError, on all ranks, unless all have the same parameters and settings."""
    lines = [f"{n} {tuple(p.shape)} {p.stride()} {p.dtype}" for n, p in trained]
    # Every rank fills its own row; the sum is everyone's. 16-bit numbers are exact in fp32.
    table = torch.zeros(world.size, 10, device=device)
    own = [1, len(lines), *_hash(settings, 4), *_hash("\n".join(lines), 4)]
    table[world.rank] = torch.tensor(own, dtype=torch.float32)
    sum_(table, name)
    rows = table.tolist()
    if any(row[0] != 1 for row in rows):
        raise UserError(
            f"allreduce_async does not sum over the {world.size} ranks of `world`: a one of each "
            f"rank came back as {[row[0] for row in rows]}. Give a sum (op=Sum), not an average."
        )
    counts = [int(row[1]) for row in rows]
    if len(set(counts)) > 1:
        raise UserError(f"the ranks' models differ: by rank they have {counts} parameters.")
    if any(row[2:6] != rows[0][2:6] for row in rows):
        raise UserError(
            "the ranks' reducers differ in wire, bucket_mb or overlap. This rank has: " + settings
        )
    if any(row[6:] != rows[0][6:] for row in rows):
        hashes = torch.zeros(world.size, len(lines), device=device)
        hashes[world.rank] = torch.tensor([_hash(line, 1)[0] for line in lines])
        sum_(hashes, f"{name}.parameters")
        first = int((hashes != hashes[0]).any(0).float().argmax())
        other = int((hashes[:, first] != hashes[0, first]).float().argmax())
        raise UserError(
            f"the ranks' models differ: parameter {first} on rank {world.rank} is {lines[first]}, "
            f"and ranks 0 and {other} do not agree on it."
        )


def _hash(text: str, words: int) -> list[int]:
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[2 * i : 2 * i + 2]) for i in range(words)]
