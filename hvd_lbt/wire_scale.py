"""What gradients are multiplied by on the fp16 wire, from one update to the next (pure).

An update whose gradients do not fit is sent again in fp32, so a scale that is too large costs time
and never an update. A scale that is too small costs small gradients, in every update. Therefore one
update that does not fit lowers the scale only if that harms nothing; two in a row lower it anyway,
and it comes back as soon as the largest gradients of recent updates allow.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

FIRST_SCALE = 2.0**10  # 2^5 of head room for gradients near 1, and 2^-24 · 2^-10 still counts
LARGEST_SCALE = 2.0**24
SMALLEST_SCALE = 2.0**-126  # fits the largest float32 on 2^11 ranks
GROWTH_INTERVAL = 200  # updates that fit, after which the scale doubles
RECOVERY = 3  # updates that must allow a larger scale, after two in a row did not fit
# The same where the lower scale was harmless: so spikes every 16 updates or more often fit it.
HARMLESS_RECOVERY = 16
HARMLESS = 2.0**-13  # share of the gradient's norm, or of its elements, that a lower scale may lose
TRIALS = 3  # updates that fit, whose gradients a lower scale must not harm: a burst may fade
LOOK_INTERVAL = (
    8  # updates from one look at the largest gradient to the next, after GROWTH_INTERVAL
)


@dataclass
class WireScale:
    """The scale and what it depends on, the same on all ranks: a function of the updates so far.

    scale: always a power of two. ceiling: what it had grown to, and where recovery ends. trial: a
    lower scale that would have fitted the update that was sent again last; the next ones that fit
    show whether it is harmless, `passed` of them have. missed: the largest gradient of the update
    before, if that was sent again, else 0. recent: the largest gradients of the last updates, known
    while the scale is below its ceiling; patience: how many of them recovery looks at.
    """

    world_size: int
    scale: float = FIRST_SCALE
    ceiling: float = FIRST_SCALE
    good_updates: int = 0  # since the scale changed
    trial: float = 0.0
    passed: int = 0
    missed: float = 0.0
    patience: int = RECOVERY
    recent: list[float] = field(default_factory=list)

    @property
    def recovers(self) -> bool:
        """Whether `fitted` needs the update's largest gradient."""
        steady = self.good_updates >= GROWTH_INTERVAL
        return self.scale < self.ceiling and not (steady and self.good_updates % LOOK_INTERVAL)

    def fitting(self, largest: float) -> float:
        """A power of two with which the sum of so many ranks takes half of the range, or less."""
        room = 2.0**15 / (2 * self.world_size)
        exponent = math.floor(math.log2(room / max(largest, 2.0**-100)))
        return min(max(2.0**exponent, SMALLEST_SCALE), LARGEST_SCALE)

    def sent_again(self, largest: float) -> None:
        """Note an update that did not fit. largest: magnitude of any rank's gradient in it."""
        self.good_updates = 0
        self.recent.clear()
        lower = min(self.scale / 2, self.fitting(largest), self.trial or LARGEST_SCALE)
        if self.missed:
            # The smaller of the two: one spike beside a true rise must not set the scale.
            fits_one = self.fitting(min(largest, self.missed))
            self.scale = max(min(self.scale / 2, fits_one), SMALLEST_SCALE)
            self.trial, self.passed, self.patience = 0.0, 0, RECOVERY
        else:
            self.trial = max(lower, SMALLEST_SCALE)
        self.missed = largest

    def fitted(self, largest: float, *, harmless: bool = False) -> None:
        """Note an update that fitted. largest: where `recovers`; harmless: of `trial`, where
        set.
        """
        recovers, self.missed = self.recovers, 0.0
        self.good_updates += 1
        if self.trial and not harmless:
            self.trial, self.passed = 0.0, 0
        elif self.trial and self.passed + 1 < TRIALS:
            self.passed += 1
        elif self.trial:
            if self.scale == self.ceiling:
                self.patience = HARMLESS_RECOVERY
            self.scale, self.trial, self.passed, self.good_updates = self.trial, 0.0, 0, 0
        elif recovers:
            self.recent = [*self.recent, largest][-self.patience :]
            allowed = min(self.fitting(max(self.recent)), self.ceiling)
            if len(self.recent) == self.patience and allowed > self.scale:
                self.scale, self.good_updates = allowed, 0
        elif self.scale == self.ceiling and self.good_updates >= GROWTH_INTERVAL:
            self.scale = self.ceiling = min(2 * self.scale, LARGEST_SCALE)
            self.good_updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything but the number of ranks, which may change."""
        state = asdict(self)
        state["wire_scale"] = state.pop("scale")
        del state["world_size"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        A checkpoint of hvd_lbt before 0.2 has wire_scale and good_updates only. Its scale may have
        been lowered by one spike, so it may recover to the first scale.
        """
        self.scale = state["wire_scale"]
        self.good_updates = state["good_updates"]
        self.ceiling = max(self.scale, state.get("ceiling", 0.0), FIRST_SCALE)
        self.trial, self.missed = state.get("trial", 0.0), state.get("missed", 0.0)
        self.passed = state.get("passed", 0)
        self.patience, self.recent = state.get("patience", RECOVERY), [*state.get("recent", ())]
