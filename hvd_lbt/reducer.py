"""From backward to update: accumulate in fp32, sum over the ranks in fp16, lose nothing.

The losses of one update, over all its micro-batches and ranks, sum to the mean loss over the global
batch; so their gradients are only ever summed, and unequal shares weigh as they should. Gradients
accumulate in fp32, in `.grad`, where autograd puts them. During the last backward each bucket of
them is packed into its wire buffer and leaves when its last gradient is there; the update reads the
world's sum out of the wire buffers.

The gradients outlive the sending. If a scaled gradient does not fit the wire, on any rank, or if
the ranks' sum might not, the update is sent again in fp32 before the optimizer moves. If a gradient
itself is infinite or NaN, no scale helps: all ranks skip the update. If a rank runs out of memory,
it takes part in all sums all the same, with zeros, and says so among the flags: all ranks drop the
update.

What a training loop can do that would be lost without a word is refused: see `_check_model` and
`_check_gradients`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt import ops
from hvd_lbt.errors import BadUpdatesError, OutOfMemoryError, UserError
from hvd_lbt.optim import FusedSGD, StepGradients
from hvd_lbt.out_of_memory import is_out_of_memory, reason
from hvd_lbt.rank_agreement import compare_models, compare_weights, hash_words, parameters_of
from hvd_lbt.wire_scale import HARMLESS, WireScale
from hvd_lbt.world import World

WIRE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_BUCKET_BYTES = 1 << 20  # small, so that the first sum starts early in the last backward
ALIGNMENT = 32  # elements; a parameter begins at 64 bytes in fp16 and at 128 in fp32
SMALLEST_NORMAL = 2.0**-14  # of fp16; what is smaller has fewer bits, below 2^-25 none
ANEW = (
    "Call reducer.close() and make a new GradientReducer after the change, on every rank and with "
    "an optimizer that has all parameters."
)
# Where a rank can run out of memory, as it tells the others: the number of the place, from 1.
PLACES = (
    *("its data", "its forward pass", "a backward pass", "its last backward pass", "the sums"),
    "its momentum",
)
# What ranks freeze is compared by the bits of a hash: each is counted, and none or all have it.
FROZEN_BITS = 16
MEASURE_INTERVAL = 100  # updates from one look at what falls below it to the next


@dataclass(eq=False, kw_only=True)
class _Slot:
    """One parameter's place in its bucket."""

    name: str
    parameter: Tensor
    offset: int
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)  # where the model has it
    form: tuple[Any, ...] = field(init=False)  # dtype, device, sizes, strides
    frozen: bool = False  # in this update
    version: int = -1  # of the gradient when it was packed
    wire: Tensor = field(init=False)  # view of the bucket's, with the parameter's sizes and strides
    gradient: Tensor | None = None  # fp32, this rank's of this update so far; laid out as the wire

    def __post_init__(self) -> None:
        self.form = _form(self.parameter)


@dataclass(eq=False, kw_only=True)
class _Bucket:
    """Parameters whose gradients travel together."""

    name: str
    slots: list[_Slot]
    wire: Tensor  # flat, in wire form: the scaled gradients, then the world's sum
    missing: int = 0  # gradients of the last backward that have not come
    sent: bool = False  # the sum is under way
    handle: Any = None  # of that sum, whatever allreduce_async gave


def _check_settings(wire: str, bucket_mb: float, max_bad_updates: int) -> None:
    if wire not in WIRE_TYPES:
        raise UserError(f"wire: {wire!r} is no wire form. Allowed: {', '.join(WIRE_TYPES)}.")
    if not bucket_mb > 0:
        raise UserError(f"bucket_mb: {bucket_mb} is no size; it must be above 0.")
    if max_bad_updates < 1:
        raise UserError(f"max_bad_updates: {max_bad_updates} must be at least 1.")


class GradientReducer:
    """Sums the gradients of an update over micro-batches and ranks, and hands them to the
    optimizer.

        reducer = GradientReducer(model, optimizer)  # after hvd_lbt.init()
        reducer.backward(loss, last=False)  # any number of micro-batches: nothing is sent
        reducer.backward(loss, last=True)  # the sums start while this runs
        optimizer.step()

    model: a module or (name, parameter) pairs. optimizer: FusedSGD, which reads the wire directly,
    or any torch optimizer, which finds the sum in `.grad` during its step. Reduced is what the
    optimizer has and requires a gradient now; what a backward does not reach counts as a gradient
    of zero (weight decay and momentum act on it). A parameter that is frozen later stays as it is.
    allreduce_async(tensor, name) → handle begins the in-place *sum* over the ranks;
    synchronize(handle) waits for it. They and world are those of Horovod, after `hvd_lbt.init()`,
    unless given. wire: fp16, fp32, or bf16 where
    the allreduce can sum it (Horovod 0.28.1 cannot).
    bucket_mb: size of a bucket on the wire in 2^20 bytes. max_bad_updates: raise BadUpdatesError at
    that many updates in a row with infinite or NaN gradients. overlap: False sends after the last
    backward instead of during it (needed when one backward reaches a parameter several times, as
    with reentrant checkpointing). name: begins the names of the collectives; a second reducer needs
    another one.

    Every rank must make its reducer, and each update's last backward, in the same order. Raises
    UserError if the ranks' parameters or settings differ, and at the end of the first update's last
    backward if the ranks' weights or the optimizer's state do.
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
    ) -> None:  # long: all of a reducer's state, with what each part is for
        _check_settings(wire, bucket_mb, max_bad_updates)
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
        self._optimizer_parameters = parameters_of(optimizer)
        self._frozen = [p for p in self._optimizer_parameters if not p.requires_grad]

        self._named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
        trained = _trained(self._named, optimizer)
        self._device = trained[0][1].device
        settings = f"{wire} {bucket_mb} {overlap}"
        compare_models(trained, settings, world, self._sum, f"{name}.model", self._device)
        self._buckets = _make_buckets(trained, WIRE_TYPES[wire], int(bucket_mb * 2**20), name)
        self._slots = [slot for bucket in self._buckets for slot in bucket.slots]
        # Their first elements show a change that counts no version, as GradScaler's and `.data`'s.
        self._sampled = self._slots[:: max(1, len(self._slots) // 6)]
        self._samples: list[Tensor] = []
        owners = _owners(model) if isinstance(model, nn.Module) else {}
        self._hooks = []
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.owners = owners.get(slot.parameter, [])
                hook = _Hook(self, bucket, slot)
                self._hooks.append(slot.parameter.register_post_accumulate_grad_hook(hook))

        self._wire_scale = WireScale(world.size)
        if wire != "fp16":
            self._wire_scale.scale = self._wire_scale.ceiling = 1.0
        self._scale = self._scalar(self._wire_scale.scale)
        self._one = self._scalar(1.0)
        self._overflow = torch.zeros(1, device=self._device)
        self._codes = torch.tensor([1.0, 2.0], device=self._device)  # as pack_wire_ raises them
        # Summed over the ranks, with what else an update has to sum (`room`): how many overflowed,
        # how many have gone bad, `_measure`'s five, ranks by FROZEN_BITS of what they have frozen,
        # and by PLACES where their memory ran out. Its length does not depend on the ranks, but
        # where the largest gradient of each is asked for: then that follows, by rank.
        self._flags: Tensor | None = None  # of the update under way, or the next
        self._room = 0  # numbers of the caller's, before the reducer's own
        # Of each rank its own number, summed where the counts say that ranks differ.
        self._by_rank = torch.zeros(world.size, device=self._device)
        self._ran_out = 0  # of memory, in this update on this rank: the number of the place
        self._frozen_now = 0  # what this rank has frozen in this update, as a hash; 0: nothing
        self._reason = ""  # of that, in one line
        self._flags_handle: Any = None
        self._backwards = 0  # of this update
        # Called in each update when the ranks' sums are there, before the optimizer moves.
        self.on_received: Callable[[], None] = _nothing
        self._compared = world.size == 1  # the ranks' weights
        self._is_inside = self._is_last = False
        self._sent = False
        self._verdict = ""  # on the sums, between their coming and the end of the step
        self._clip: Tensor | None = None  # what this update's sum is divided by
        self._applied: Tensor | None = None  # the scale of the sum that lies in the wire buckets

        self._until_measured = 0
        self._underflow = 0.0
        self._overflows = 0
        self._skipped = 0
        self._bad_in_a_row = 0
        self._bad_parameter = ""

        if isinstance(optimizer, FusedSGD):
            optimizer.set_gradient_source(self._step_gradients)
        else:
            self._hooks += [
                optimizer.register_step_pre_hook(lambda _, *call: self._before_step(*call)),
                optimizer.register_step_post_hook(lambda *_: self._release()),
            ]

    def backward(
        self, loss: Tensor | None, *, last: bool = True, retain_graph: bool | None = None
    ) -> None:
        """Backpropagate one micro-batch of the update; `last` sends the sums.

        loss: this micro-batch's share of the update's mean loss (Σ of its losses / global batch),
        or None, with last=True, on a rank that has no samples in this update. Gradients of a plain
        `loss.backward()` before this call are part of the update. retain_graph: as torch's.
        If memory runs out in it, nothing is raised here: this rank drops the update, its later
        backwards do nothing but send, and the step raises OutOfMemoryError on all ranks.
        Raises UserError if the step of the update before is missing, or if the model or optimizer
        changed in a way that the reducer cannot follow.
        """
        if self._sent or self._verdict:
            raise UserError(
                "backward() was called after the update's last backward. Call optimizer.step() "
                "first, and pass last=True only with the last micro-batch of an update."
            )
        if self._backwards == 0:
            self._check_model()
        self._is_inside, self._is_last = True, last
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)
        try:
            if not self._ran_out:
                self._attach()
            if loss is not None and not self._ran_out:
                loss.backward(retain_graph=retain_graph)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.drop_update(PLACES[3 if last else 2], error)
        finally:
            self._is_inside = False
        self._backwards += 1
        if last:
            for bucket in self._buckets:
                if not bucket.sent:
                    self._send(bucket)
            self._send_flags()
            self._samples = [_sample(slot).clone() for slot in self._sampled]
            self._sent = True
            if not self._compared:  # before the first update moves them
                compare_weights(
                    self._named, self._optimizer, self.world, self._sum, self.name, self._device
                )
                self._compared = True

    def drop_update(self, place: str = PLACES[1], error: BaseException | None = None) -> None:
        """Drop this update on all ranks, because this one ran out of memory: for a forward's error.

        Then end the update as usual: `backward(None, last=True)` and the step, which raises
        OutOfMemoryError on every rank. place: one of PLACES, for the message; error: what was met.
        """
        if self._sent or self._verdict:
            raise UserError(
                "drop_update() was called after the update's last backward, when its gradients had "
                "been sent already."
            )
        self._ran_out = PLACES.index(place) + 1
        self._reason = reason(error) if error is not None else ""
        for slot in self._slots:
            slot.gradient = slot.parameter.grad = None

    def room(self, count: int) -> Tensor:
        """(count,) fp32 zeros on the device, which travel with this update's own small sum.

        Call it before the update's first backward, on all ranks, and fill it before the last; after
        `optimizer.step()` it holds the sums over the ranks, and no later update touches it. So what
        else a loop has to sum (losses, a flag to stop) costs no message of its own.
        """
        if self._sent or self._verdict or self._backwards:
            raise UserError("room() was called after the update's first backward; call it before.")
        return self._make_flags(count)[:count]

    def _make_flags(self, room: int) -> Tensor:
        """New flags for the next update; those of an update are its caller's afterwards."""
        own = 7 + FROZEN_BITS + len(PLACES)
        by_rank = self.world.size if self._wire_scale.recovers else 0
        self._flags = torch.zeros(room + own + by_rank, device=self._device)
        self._room = room
        return self._flags

    @property
    def dropped(self) -> bool:
        """Whether this rank has dropped the present update, and need not do more of it."""
        return self._ran_out > 0

    @property
    def sent(self) -> bool:
        """Whether the sums of the present update are under way."""
        return self._sent

    def forget(self) -> None:
        """Forget the gradients of backwards with last=False, as if they had not been."""
        assert not self._sent
        self._backwards = self._ran_out = 0
        self._flags = None  # whoever had room in them has to ask for it anew
        self._release()

    def first_sum(self) -> None:
        """Sum the wire buffers once, as they are: zeros. Horovod and NCCL then have their memory.

        Before the first update, on all ranks.
        """
        assert self._backwards == 0
        for bucket in self._buckets:
            self._sum(bucket.wire.zero_(), bucket.name)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale this update's gradient, the sum over all ranks, down to a norm of `max_norm`.

        For `torch.nn.utils.clip_grad_norm_`, between the last backward and optimizer.step(); waits
        for the sums. Returns the norm before clipping, the same on all ranks; NaN if this update
        will be skipped for an infinite or NaN gradient. Raises UserError at any other time.
        """
        if not max_norm > 0:
            raise UserError(f"max_norm: {max_norm} must be above 0.")
        if self._received() == "bad":
            return self._scalar(float("nan"))
        if self._verdict == "fp32":
            sums = [slot.gradient for slot in self._slots if slot.gradient is not None]
            scale = self._one
        else:
            sums, scale = [bucket.wire for bucket in self._buckets], self._sent_scale
        norms = [torch.linalg.vector_norm(total, dtype=torch.float32) for total in sums]
        norm = torch.linalg.vector_norm(torch.stack(norms) / scale)
        self._clip = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        return norm

    def close(self) -> None:
        """Let go of model and optimizer, so that another reducer can be made for them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if isinstance(self._optimizer, FusedSGD):
            self._optimizer.set_gradient_source(None)
        self._release()

    @torch.no_grad()
    def squared_norm(self) -> Tensor | None:
        """|g|² of the gradient of the last step, before clipping; fp32 on the device, the same on
        all ranks.

        It is read from the wire: one more pass, for who measures now and then. None if that update
        was skipped, or sent again in fp32 (its sum is not on the wire).
        """
        if self._applied is None:
            return None
        norms = [
            torch.linalg.vector_norm(bucket.wire, dtype=torch.float32) for bucket in self._buckets
        ]
        return (torch.stack(norms) / self._applied).square().sum()

    @property
    def applied_scale(self) -> Tensor | None:
        """What the sum in `wire_buffers` is multiplied by, after a step and until the next last
        backward; None if that update was skipped, or sent again in fp32.
        """
        return self._applied

    @property
    def wire_buffers(self) -> tuple[Tensor, ...]:
        """The flat tensors whose sums travel, one a bucket, in the order of sending."""
        return tuple(bucket.wire for bucket in self._buckets)

    def stats(self) -> dict[str, Any]:
        """Counts since the start: the same on all ranks.

        wire_scale: what gradients are multiplied by on the wire; underflow: the share of gradients
        that are not zero and lie below fp16's smallest normal number there, where they have fewer
        bits or none (measured in every 100th update, and after the scale changed); overflows:
        updates sent again in fp32; skipped: updates dropped for a bad gradient; bad_in_a_row,
        bad_parameter: the last such, and the name of its first bad gradient ("" if there was none).
        """
        return {
            "wire_scale": self._wire_scale.scale,
            "underflow": self._underflow,
            "overflows": self._overflows,
            "skipped": self._skipped,
            "bad_in_a_row": self._bad_in_a_row,
            "bad_parameter": self._bad_parameter,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, the same on all ranks; between updates nothing else is
        state.
        """
        own = {"until_measured": self._until_measured}
        return {**self._wire_scale.state_dict(), **own, **self.stats()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the scale and the counts of `state_dict()`, on every rank."""
        self._flags = None  # their length depends on the scale
        self._overflows, self._skipped = state["overflows"], state["skipped"]
        self._bad_in_a_row, self._bad_parameter = state["bad_in_a_row"], state["bad_parameter"]
        if self.wire == "fp16":  # another form has no scale to continue with
            self._wire_scale.load_state_dict(state)
            self._scale = self._scalar(self._wire_scale.scale)
            self._until_measured = state.get("until_measured", 0)
            self._underflow = state.get("underflow", 0.0)

    # -- backward: accumulate, and send what is complete ------------------------------------------

    def _check_model(self) -> None:
        """Refuse what has happened to model and optimizer since the reducer was made."""
        if not self._hooks:
            raise UserError("this reducer is closed: make a new one.")
        parameters = parameters_of(self._optimizer)
        if len(parameters) != len(self._optimizer_parameters) or any(
            own is not its for own, its in zip(parameters, self._optimizer_parameters, strict=True)
        ):
            raise UserError(
                "the optimizer's parameters changed after its reducer was made (add_param_group()?)"
                f". {ANEW}"
            )
        for parameter in self._frozen:
            if parameter.requires_grad:
                names = [name for name, p in self._named if p is parameter]
                raise UserError(
                    f"{' '.join(names)} requires a gradient now, and was frozen when the reducer "
                    f"was made. {ANEW}"
                )
        for slot in self._slots:
            if any(
                owner._parameters.get(name) is not slot.parameter for owner, name in slot.owners
            ):
                raise UserError(
                    f"{slot.name} is another tensor in the model than in the optimizer "
                    "(load_state_dict(assign=True)?). Make the optimizer and the reducer after it."
                )
            if _form(slot.parameter) != slot.form:
                raise UserError(
                    f"{slot.name} was {slot.form} when the reducer was made (type, device, sizes, "
                    f"strides) and is {_form(slot.parameter)}. {ANEW}"
                )

    def _check_gradients(self) -> None:
        """Refuse gradients that were changed after they were sent: it would have no effect."""
        samples = dict(zip(self._sampled, self._samples, strict=True))
        for slot in self._slots:
            grad = slot.parameter.grad
            if slot.frozen:
                continue
            if slot.parameter.dtype != torch.float32:
                same = grad is None
            elif grad is None:
                same = slot.gradient is None
            else:
                same = grad is slot.gradient and grad._version == slot.version
                if same and slot in samples:
                    same = torch.equal(_sample(slot), samples[slot])
            if not same:
                raise UserError(
                    f"the gradient of {slot.name} was changed after the update's last backward, "
                    "when it had been sent already (clip_grad_norm_, clip_grad_value_, zero_grad, "
                    "a GradScaler, another backward?). Clip with "
                    "reducer.clip_grad_norm_(max_norm), which clips the sum over all ranks; scale "
                    "the loss instead of gradients."
                )

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
                    parameter.grad = slot.gradient = _fp32(parameter.grad, slot)
            elif parameter.grad is not None:  # the caller's own, in half precision
                self._accumulate(slot)

    def _accumulate(self, slot: _Slot) -> None:
        """Add a `.grad` in half precision to its fp32 gradient; torch wants it in that type."""
        assert slot.parameter.grad is not None
        if slot.parameter.dtype == torch.float32:
            return
        if slot.gradient is None:
            slot.gradient = _fp32(slot.parameter.grad, slot)
        else:
            slot.gradient.add_(slot.parameter.grad)
        slot.parameter.grad = None

    def _gradient_is_there(self, bucket: _Bucket, slot: _Slot) -> None:
        """A gradient was accumulated; in the last backward its bucket may be complete."""
        parameter = slot.parameter
        if not self._is_inside:  # a plain backward(): `_attach` or `_check_gradients` will see it
            return
        assert parameter.grad is not None
        if parameter.dtype != torch.float32:
            self._accumulate(slot)
        elif parameter.grad is not slot.gradient:  # else autograd has added to it
            parameter.grad = slot.gradient = _fp32(parameter.grad, slot)
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

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        wires, gradients = [], []
        for slot in bucket.slots:
            if slot.gradient is None:  # no backward of this update reached it
                slot.wire.zero_()
            else:
                wires.append(slot.wire)
                gradients.append(slot.gradient)
                slot.version = slot.gradient._version  # what changes it from here on is too late
        ops.pack_wire_(wires, gradients, self._scale, self._overflow, summands=self.world.size)
        bucket.sent = True
        bucket.handle = self.allreduce_async(bucket.wire, bucket.name)

    @torch.no_grad()
    def _send_flags(self) -> None:
        """Begin the sum of what all ranks must know of each other before the optimizer moves."""
        flags = self._make_flags(0) if self._flags is None else self._flags
        own = flags[self._room :]
        own[:2] = self._overflow == self._codes
        recovers = len(own) > 7 + FROZEN_BITS + len(PLACES)
        try:
            if self.wire == "fp16" and (self._until_measured == 0 or self._wire_scale.trial):
                own[2:7] = self._measure()
            if recovers:
                largest = _largest(slot.gradient for slot in self._slots)
                own[self.world.rank - self.world.size] = largest
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.drop_update(PLACES[4], error)
        if self._ran_out:
            own[7 + FROZEN_BITS + self._ran_out - 1] = 1.0
        for slot in self._slots:
            slot.frozen = not slot.parameter.requires_grad
        self._frozen_now = 0
        frozen = "\n".join(slot.name for slot in self._slots if slot.frozen)
        if frozen:
            self._frozen_now = hash_words(frozen, 1)[0] or 1
            bits = [float(self._frozen_now >> bit & 1) for bit in range(FROZEN_BITS)]
            own[7 : 7 + FROZEN_BITS] = torch.tensor(bits)
        # another length has another name: the ranks agree on both, and Horovod keeps each's reply
        name = f"{self.name}.flags.{len(flags)}"
        self._flags_handle = self.allreduce_async(flags, name)

    def _measure(self) -> Tensor:
        """(5,): what fp16 keeps of this rank's gradients, at the scale and at the trial scale.

        Elements that are not zero; those below fp16's smallest normal number; those that only the
        trial scale makes zero; the squared error that it adds, and the squared norm.
        """
        scale, trial = self._wire_scale.scale, self._wire_scale.trial
        sums = []
        for slot in self._slots:
            if slot.gradient is None or slot.gradient.numel() == 0:
                continue
            gradient = slot.gradient
            not_zero = gradient.count_nonzero()
            scaled = gradient * scale
            below = (scaled.abs() < SMALLEST_NORMAL).sum() - (gradient.numel() - not_zero)
            parts = [not_zero, below]
            if trial:
                lower = scaled * (trial / scale)
                kept = lower.half().float()
                lost = torch.where(lower.abs() < SMALLEST_NORMAL, lower - kept, 0)
                zeroed = ((kept == 0) & (scaled.half() != 0)).sum()
                parts += [zeroed, lost.square().sum(), lower.square().sum()]
            sums.append(torch.stack([part.float() for part in parts]))
        total = torch.stack(sums).sum(0) if sums else torch.zeros(5, device=self._device)
        return torch.nn.functional.pad(total, (0, 5 - len(total)))

    # -- step: the world's sum --------------------------------------------------------------------

    @torch.no_grad()
    def _receive(self) -> str:
        """Wait for the sums and judge them: "wire", "fp32" (sent again) or "bad", on all ranks
        alike.

        Reading the flags is the one point in an update where the host waits for the device.
        """
        if not self._sent:
            raise UserError(
                "optimizer.step() was called before the update's last backward. Call "
                "reducer.backward(loss, last=True) with the last micro-batch."
            )
        self._check_gradients()
        for bucket in self._buckets:
            self.synchronize(bucket.handle)
            bucket.sent, bucket.handle = False, None
        self.synchronize(self._flags_handle)
        assert self._flags is not None
        overflowed, bad, *rest = self._flags[self._room :].tolist()
        self._flags = None
        measured, frozen, rest = rest[:5], rest[5 : 5 + FROZEN_BITS], rest[5 + FROZEN_BITS :]
        places, largest = rest[: len(PLACES)], rest[len(PLACES) :]
        self._overflow.zero_()
        self._sent = False
        self._backwards = 0
        self._applied = None
        if any(places):
            self._raise_out_of_memory(self._of_each_rank(self._ran_out, "memory"))
        if any(count not in (0, self.world.size) for count in frozen):
            its = self._of_each_rank(self._frozen_now, "frozen")
            raise UserError(
                "the ranks have frozen different parameters (requires_grad): rank 0 and rank "
                f"{next(r for r, f in enumerate(its) if f != its[0])} differ. Freeze the "
                "same ones on all ranks."
            )
        self._sent_scale = self._scale
        if bad:
            return self._skip()
        if overflowed:
            return self._send_again()
        self._bad_in_a_row = 0
        if self.wire == "fp16":
            self._note_fitted(measured, max(largest, default=0.0))
        return "wire"

    def _of_each_rank(self, own: float, name: str) -> list[float]:
        """By rank what each gives, where all ranks have seen that they differ."""
        self._by_rank.zero_()
        self._by_rank[self.world.rank] = own
        self._sum(self._by_rank, f"{self.name}.{name}")
        return self._by_rank.tolist()

    def _note_fitted(self, measured: list[float], largest: float) -> None:
        """Keep what was measured of an update that fitted, and choose the next one's scale."""
        not_zero, below, zeroed, lost, squared = measured
        self._until_measured -= 1
        if self._until_measured < 0 or self._wire_scale.trial:
            self._until_measured = MEASURE_INTERVAL - 1
            self._underflow = below / not_zero if not_zero else 0.0
        harmless = zeroed <= HARMLESS * not_zero and lost <= HARMLESS**2 * squared
        self._wire_scale.fitted(largest, harmless=harmless)
        self._take_scale()

    def _take_scale(self) -> None:
        if self._wire_scale.scale != float(self._sent_scale):
            # A new tensor: a step under way still divides by the old one.
            self._scale = self._scalar(self._wire_scale.scale)
            self._until_measured = 0

    def _send_again(self) -> str:
        """Sum the gradients themselves, in fp32."""
        flats = []
        by_rank = torch.zeros(2 * self.world.size, device=self._device)
        largest_by_rank, places = by_rank.chunk(2)
        try:
            for bucket in self._buckets:
                flats.append(torch.zeros_like(bucket.wire, dtype=torch.float32))
                for slot in bucket.slots:
                    place = _view(flats[-1], slot)
                    if slot.gradient is not None:
                        place.copy_(slot.gradient)
                    slot.gradient, slot.parameter.grad = place, None  # not two copies of all
            largest_by_rank[self.world.rank] = _largest(flats)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            places[self.world.rank] = PLACES.index("the sums") + 1
            self._reason = reason(error)
        self._sum(by_rank, f"{self.name}.largest")
        self._raise_out_of_memory(places.tolist())
        self._overflows += 1
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
            self._wire_scale.sent_again(float(largest_by_rank.max()))
            self._take_scale()
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

    def _raise_out_of_memory(self, places: Sequence[float]) -> None:
        """Raise OutOfMemoryError if the memory of any rank ran out; the update leaves no trace."""
        ranks = {rank: PLACES[int(place) - 1] for rank, place in enumerate(places) if place}
        if ranks:
            own, self._ran_out, self._reason = self._reason, 0, ""
            self._release()
            raise OutOfMemoryError(
                ranks,
                "All ranks have dropped this update, and their weights are those before it. Do it "
                "again with a smaller micro-batch, which gives the same update.",
                own,
            )

    def _received(self) -> str:
        """The verdict on this update's sums; the first call waits for them."""
        if not self._verdict:
            self._verdict = self._receive()
            self.on_received()
        return self._verdict

    def _step_gradients(self) -> StepGradients:
        """What FusedSGD asks for at the start of its step."""
        verdict = self._received()
        scale = self._clip
        if verdict == "wire":
            scale = self._sent_scale if self._clip is None else self._sent_scale * self._clip
            self._applied = self._sent_scale  # clipping is no part of what was measured
        again = verdict == "fp32"
        sums = {
            slot.parameter: slot.gradient if again and slot.gradient is not None else slot.wire
            for slot in self._slots
            if not slot.frozen
        }
        self._release()
        return StepGradients(
            grads=sums, grad_scale=scale, found_inf=self._one if verdict == "bad" else None
        )

    @torch.no_grad()
    def _before_step(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Give another optimizer the sum in `.grad`; without one it leaves a parameter alone."""
        if any(value is not None for value in (*args[1:], options.get("closure"))):
            raise UserError(
                "optimizer.step(closure): its backward would come after the sum over the ranks. "
                "Call reducer.backward(loss, last=True) first, then optimizer.step()."
            )
        if getattr(self._optimizer, "grad_scale", None) is not None:
            raise UserError(
                "a GradScaler steps this optimizer, and the reducer scales the wire already. Call "
                "optimizer.step() without the scaler; for half precision use torch.autocast with "
                "torch.bfloat16, which needs no scaler."
            )
        given = self._step_gradients()
        if given.found_inf is not None:
            return
        sums, wires = dict(given.grads), list(given.grads.values())
        if given.grad_scale is not None:
            sums = {p: torch.empty_like(wire, dtype=torch.float32) for p, wire in sums.items()}
            ops.unpack_wire_(list(sums.values()), wires, given.grad_scale)
        for slot in self._slots:  # both: if the step fails, the next backward drops it
            if slot.parameter in sums:
                slot.gradient = slot.parameter.grad = sums[slot.parameter].to(slot.parameter.dtype)

    def _release(self) -> None:
        """Let go of the gradients, and leave `.grad` as zero_grad() does."""
        self._verdict, self._clip = "", None
        for slot in self._slots:
            slot.gradient = slot.parameter.grad = None

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self._device)

    def _sum(self, tensor: Tensor, name: str) -> None:
        self.synchronize(self.allreduce_async(tensor, name))


def _nothing() -> None:
    """Nobody measures."""


@dataclass(eq=False)
class _Hook:
    """Called by autograd when a parameter's gradient is there."""

    reducer: GradientReducer
    bucket: _Bucket
    slot: _Slot

    def __call__(self, parameter: Tensor) -> None:
        self.reducer._gradient_is_there(self.bucket, self.slot)


def _form(parameter: Tensor) -> tuple[Any, ...]:
    return parameter.dtype, parameter.device, tuple(parameter.shape), parameter.stride()


def _sample(slot: _Slot) -> Tensor:
    """Up to 64 elements of its gradient, as bits, so that a NaN is equal to itself."""
    if slot.gradient is None:
        return slot.wire.new_zeros(0, dtype=torch.int32)
    count = min(64, slot.gradient.numel())
    return slot.gradient.as_strided((count,), (1,)).view(torch.int32)


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, and under which name."""
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, name))
    return owners


def _largest(tensors: Iterable[Tensor | None]) -> Tensor | float:
    """The largest magnitude in all of them; 0 if there is none."""
    found = [
        torch.linalg.vector_norm(tensor, float("inf"))
        for tensor in tensors
        if tensor is not None and tensor.numel()
    ]
    return torch.stack(found).max() if found else 0.0


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
        if any(isinstance(hook, _Hook) for hook in (p._post_accumulate_grad_hooks or {}).values()):
            raise UserError(
                f"{name} has a GradientReducer already. Call close() of that one first, or make "
                "one reducer for all parameters."
            )
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
        end = slots[-1].offset + max(1, -(-slots[-1].parameter.numel() // ALIGNMENT)) * ALIGNMENT
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


def _fp32(gradient: Tensor, slot: _Slot) -> Tensor:
    """`gradient`, copied only if it is not fp32 or its memory is not in the wire's order."""
    if gradient.layout != torch.strided:
        raise UserError(
            f"the gradient of {slot.name} is sparse; every weight is updated here. Make its layer "
            "with sparse=False."
        )
    return ops.laid_out_as(gradient, slot.wire, torch.float32)
