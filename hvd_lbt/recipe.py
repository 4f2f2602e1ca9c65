"""A recipe: all settings of a run, typed and checked.

A recipe is a YAML file, shipped in `hvd_lbt/recipes` or the user's own; `--set section.key=value`
changes single settings. With `base: NAME` a file takes everything it does not say from another
recipe, so that recipes to be compared differ only in what they say. An unknown key or an impossible
value is a UserError that names the key, the value, and what is allowed.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hvd_lbt import plain_yaml
from hvd_lbt.errors import UserError
from hvd_lbt.noise import batch_of_equal_noise

SHIPPED = Path(__file__).parent / "recipes"
MAX_REASONS = 8  # errors of one recipe that are written out

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Triple = tuple[float, float, float]

# Settings with which a run may be resumed otherwise: they change speed, memory, rounding or what is
# told of the run, not what is computed.
FREE_AT_RESUME: dict[str, Any] = {
    "name": True,
    "data": {
        "train_samples",
        "threads",
        "prefetch",
        "readers",
        "timeout",
        "on_bad_sample",
        "resident",
    },
    "layout": {"micro_batch"},
    "wire": {"bucket_mb"},
    "run": {
        *("eval_every", "keep_checkpoints", "checkpoint_minutes"),
        *("channels_last", "compile", "noise_every", "max_bad_updates"),
    },
    "elastic": True,
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(_Section):
    """How images are made."""

    train_samples: Count | None = None
    """N for the plan where no data folder is at hand; when training, the images are counted."""
    image_size: Count
    """Side of the square image the network sees, in pixels."""
    augment: Literal["none", "pad_crop", "random_resized_crop"]
    pad: Annotated[int, Field(ge=0)] = 4
    """pad_crop only: pixels of padding on each side."""
    flip: bool = False
    """Mirror every second image, left to right."""
    eval_resize: Count | None = None
    """The shorter side before the centre is cut out; None: resized to image_size as a whole."""
    mean: Triple
    """Subtracted from red, green and blue, in 0..255."""
    std: Triple
    """Then divided by, in 0..255."""
    classes: str | None = None
    """A file with one class name a line, label 0 first; None: DATA/classes.txt, else sorted names."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """skip: an image that cannot be decoded is left out and listed; its update keeps its divisor."""
    threads: Count | None = None
    """DALI's threads on each worker; None: the node's cores, shared out among its workers."""
    prefetch: Count = 2
    """Micro-batches made ahead."""
    readers: Count = 4
    """Threads on each worker that read files."""
    resident: bool = False
    """Decode all images at the start and keep them on the device, without DALI: for small images."""
    timeout: Positive = 300.0
    """Seconds after which a read without an answer ends the run with the file's name."""

    @field_validator("std")
    @classmethod
    def _positive(cls, std: Triple) -> Triple:
        if min(std) <= 0:
            raise ValueError("each of the three must be greater than 0")
        return std

    @model_validator(mode="after")
    def _resident_as_they_are(self) -> "DataRecipe":
        for key, allowed in {
            "augment": ("none", "pad_crop"),
            "eval_resize": (None,),
            "on_bad_sample": ("error",),
        }.items():
            value = getattr(self, key)
            if self.resident and value not in allowed:
                raise ValueError(
                    f"data.{key}: {value!r} does not go with data.resident, which keeps whole images "
                    f"of data.image_size; it must be {' or '.join(map(str, allowed))}."
                )
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> "DataRecipe":
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"data.eval_resize: {self.eval_resize} is smaller than data.image_size "
                f"({self.image_size}), which is cut out of it; it must be at least that."
            )
        return self


class ModelRecipe(_Section):
    """Which network."""

    name: str
    num_classes: Count | None = None
    """None: as many as the data has."""
    stem: Literal["imagenet", "cifar"]
    """imagenet: 7×7 stride 2 and max pooling; cifar: 3×3 stride 1."""
    width: Count = 64
    """Channels of a residual network's first stage, hidden units of the perceptron."""
    zero_init_residual: bool = False
    """The last batch norm of each block starts with gamma = 0 (Goyal et al. 2017)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        wide = re.fullmatch(r"wide_resnet([1-9]\d*)_([1-9]\d*)", name)
        if re.fullmatch(r"resnet(18|34|50|101|152)|inception_resnet_v2|perceptron", name) or (
            wide and int(wide[1]) % 6 == 4 and int(wide[1]) > 4
        ):
            return name
        raise ValueError(
            "it must be resnet18, resnet34, resnet50, resnet101, resnet152, inception_resnet_v2, "
            "perceptron, or wide_resnet<depth>_<k> with depth = 6·blocks + 4, such as wide_resnet16_4"
        )


class Milestone(_Section):
    """At `epoch` the noise scale falls by `factor`."""

    epoch: Positive
    factor: Annotated[float, Field(gt=1)]
    momentum: Momentum | None = None
    """The momentum from here on; batch or lr pay for it, so that the noise scale is as planned."""
    ghost_batch: Count | None = None
    """The ghost batch from here on; None: as before."""


class WarmUp(_Section):
    """The lr rises linearly over the first epochs, then is schedule.lr (Goyal et al. 2017, 2.2)."""

    epochs: Positive
    first_lr: Positive
    """Of the first update; Goyal et al.: that of one worker, 0.1."""


class Cosine(_Section):
    """The noise scale falls as (1 + cos πt)/2, t from 0 (after the warm-up) to 1 (the end).

    With policy decay_lr the lr pays, as is common; with grow_batch the batch rises in steps, and
    within a step the lr follows, so that each update has exactly the noise scale of the curve.
    """

    batch_factor: Annotated[float, Field(gt=1)] | None = None
    """grow_batch only: by how much the batch rises at each step [2]."""


class Raised(_Section):
    """An lr or a momentum to start with instead, paid for by a larger first batch."""

    lr: Positive | None = None
    momentum: Momentum | None = None


class ScheduleRecipe(_Section):
    """When the noise scale falls, and who pays."""

    policy: Literal["decay_lr", "hybrid", "grow_batch"]
    epochs: Positive
    lr: Positive
    momentum: Momentum
    global_batch: Count
    max_global_batch: Count = 65_536
    milestones: tuple[Milestone, ...] = ()
    cosine: Cosine | None = None
    """Instead of milestones."""
    raised: Raised | None = None
    warm_up: WarmUp | None = None
    batch_multiple: Count = 1
    """Each global batch is the nearest multiple of this; the lr makes up for the rounding."""
    batch_milestones: Count | None = None
    """hybrid only: so many first milestones are paid by the batch [1], the rest by the lr."""
    momentum_change: Literal["keep", "rescale"] = "keep"
    """rescale: the momentum buffer is multiplied by (1−m_old)/(1−m_new) when m changes."""
    momentum_start: Literal["zero", "corrected"] = "zero"
    """corrected: the first updates are as long as if the buffer, which is zero, had settled.

    In our study it lost accuracy: SGD without momentum must bear an lr of lr/(1−m) (docs/studies)."""

    @property
    def first_lr(self) -> float:
        """The lr the run starts with."""
        return self.lr if self.raised is None or self.raised.lr is None else self.raised.lr

    @property
    def first_momentum(self) -> float:
        """The momentum the run starts with."""
        raised = self.raised
        return self.momentum if raised is None or raised.momentum is None else raised.momentum

    @property
    def first_global_batch(self) -> int:
        """The global batch the run starts with: g is that of lr, momentum and global_batch."""
        return self.rounded(self.wanted_global_batch)

    @property
    def wanted_global_batch(self) -> float:
        """The same before it is rounded."""
        return batch_of_equal_noise(
            self.global_batch,
            lr=self.lr,
            momentum=self.momentum,
            new_lr=self.first_lr,
            new_momentum=self.first_momentum,
        )

    def rounded(self, global_batch: float) -> int:
        """The nearest multiple of batch_multiple, at least one, at most max_global_batch."""
        largest = self.max_global_batch // self.batch_multiple
        nearest = max(1, round(global_batch / self.batch_multiple))
        return self.batch_multiple * min(nearest, largest)

    @model_validator(mode="after")
    def _in_order(self) -> "ScheduleRecipe":
        epochs = [milestone.epoch for milestone in self.milestones]
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            raise ValueError(
                f"schedule.milestones: their epochs are {_listed(epochs)}; each must be later than "
                "the one before it."
            )
        if epochs and epochs[-1] >= self.epochs:
            raise ValueError(
                f"schedule.milestones: the last is at epoch {epochs[-1]:g}; it must be before the "
                f"end, schedule.epochs = {self.epochs:g}."
            )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> "ScheduleRecipe":
        if self.global_batch > self.max_global_batch:
            raise ValueError(
                f"schedule.global_batch: {self.global_batch} is more than "
                f"schedule.max_global_batch = {self.max_global_batch}; it must not be."
            )
        if self.global_batch % self.batch_multiple:
            raise ValueError(
                f"schedule.batch_multiple: {self.batch_multiple} does not divide "
                f"schedule.global_batch = {self.global_batch}; it must."
            )
        wanted = round(self.wanted_global_batch)
        if not self.batch_multiple <= wanted <= self.max_global_batch:
            raise ValueError(
                f"schedule.raised: with lr {self.first_lr:g} and momentum {self.first_momentum:g} "
                f"the noise scale is kept by a first global batch of {wanted}; it must be from "
                f"{self.batch_multiple} to schedule.max_global_batch = {self.max_global_batch}."
            )
        return self

    @model_validator(mode="after")
    def _warm_up_rises_and_ends(self) -> "ScheduleRecipe":
        if self.warm_up is None:
            return self
        if self.warm_up.first_lr >= self.first_lr:
            raise ValueError(
                f"schedule.warm_up.first_lr: {self.warm_up.first_lr:g} must be smaller than the lr "
                f"that it rises to, {self.first_lr:g}."
            )
        end = self.milestones[0].epoch if self.milestones else self.epochs
        if self.warm_up.epochs >= end:
            raise ValueError(
                f"schedule.warm_up.epochs: {self.warm_up.epochs:g} must be fewer than "
                + (
                    f"the epoch of the first of schedule.milestones, {end:g}."
                    if self.milestones
                    else f"schedule.epochs = {end:g}."
                )
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_fall(self) -> "ScheduleRecipe":
        if self.cosine is None:
            return self
        if self.milestones:
            raise ValueError(
                "schedule.cosine: the noise scale falls along the curve or at "
                "schedule.milestones; leave out one of the two."
            )
        if self.policy == "hybrid":
            raise ValueError(
                "schedule.policy: 'hybrid' shares milestones out, and schedule.cosine has none; it "
                "must be decay_lr or grow_batch."
            )
        if self.policy == "decay_lr" and self.cosine.batch_factor is not None:
            raise ValueError(
                f"schedule.cosine.batch_factor: {self.cosine.batch_factor:g} has no effect with "
                "policy decay_lr; leave it out, or set schedule.policy to grow_batch."
            )
        return self

    @model_validator(mode="after")
    def _correction_has_an_effect(self) -> "ScheduleRecipe":
        if self.momentum_start == "corrected" and self.first_momentum == 0:
            raise ValueError(
                "schedule.momentum_start: 'corrected' has no effect with schedule.momentum = 0; "
                "leave it out."
            )
        return self

    @model_validator(mode="after")
    def _rescale_has_a_change(self) -> "ScheduleRecipe":
        changes = any(milestone.momentum is not None for milestone in self.milestones)
        if self.momentum_change == "rescale" and not changes:
            raise ValueError(
                "schedule.momentum_change: 'rescale' has no effect where momentum never changes; "
                "leave it out, or give a milestone a momentum."
            )
        return self

    @model_validator(mode="after")
    def _hybrid_only(self) -> "ScheduleRecipe":
        if self.policy != "hybrid":
            if self.batch_milestones is not None:
                raise ValueError(
                    f"schedule.batch_milestones: {self.batch_milestones} has no effect with policy "
                    f"{self.policy}; leave it out, or set schedule.policy to hybrid."
                )
        elif (self.batch_milestones or 1) > len(self.milestones):
            raise ValueError(
                f"schedule.batch_milestones: {self.batch_milestones or 1} milestones are to be paid "
                f"by the batch, and schedule.milestones has {len(self.milestones)}; "
                "it must have at least as many."
            )
        return self


class OptimizerRecipe(_Section):
    """SGD's other settings."""

    weight_decay: NotNegative
    nesterov: bool = False
    decay_norm_and_bias: bool = False
    """Weight decay on batch norm's parameters and on biases too."""


class LayoutRecipe(_Section):
    """How a global batch is cut."""

    micro_batch: Count
    """Samples of one forward, at most; what fits into a worker's memory."""
    ghost_batch: Count
    """Samples that share batch-norm statistics."""

    @model_validator(mode="after")
    def _whole_ghost_batches(self) -> "LayoutRecipe":
        if self.micro_batch % self.ghost_batch:
            raise ValueError(
                f"layout.micro_batch: {self.micro_batch} is no multiple of layout.ghost_batch = "
                f"{self.ghost_batch}; it must be, since ghost batches are not cut."
            )
        return self


class WireRecipe(_Section):
    """The form of gradients on the network."""

    form: Literal["fp16", "fp32"] = "fp16"
    """Of gradients on the network. No bf16: Horovod 0.28.1 cannot sum it for PyTorch."""
    bucket_mb: Positive = 25.0
    """Size of one message on the wire, in MB."""


class RunRecipe(_Section):
    """The run itself."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: Count = 1
    """Evaluate after so many epochs, and at the end."""
    keep_checkpoints: Count = 3
    """So many newest ones, and the best."""
    checkpoint_minutes: Positive = 10.0
    """Between checkpoints, beside those at the end of a stage: what a lost node may cost."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward; weights and their update are fp32."""
    channels_last: bool = False
    compile: bool = False
    """Forward and backward by torch.compile: once a size of micro-batch, some minutes at first."""
    noise_every: Annotated[int, Field(ge=0)] = 10
    """Measure the gradient's noise in every so many updates; 0: never."""
    max_bad_updates: Count = 10
    """Give up after so many updates in a row whose gradients are not finite."""


class ElasticRecipe(_Section):
    """Workers that come and go (`hvd_lbt elastic`)."""

    local_batch: Count | None = None
    """Samples of an update that are worth a worker; a stage wishes for global batch / this, rounded up."""
    commit_every: Count = 1
    """Updates between two copies of the state in memory: so many are done again after a loss."""


class Recipe(_Section):
    """All settings of a run; a module is handed its own section only."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    data: DataRecipe
    model: ModelRecipe
    schedule: ScheduleRecipe
    optimizer: OptimizerRecipe
    layout: LayoutRecipe
    wire: WireRecipe = WireRecipe()
    run: RunRecipe = RunRecipe()
    elastic: ElasticRecipe = ElasticRecipe()

    @model_validator(mode="after")
    def _whole_ghost_batches_in_all_stages(self) -> "Recipe":
        for place, milestone in enumerate(self.schedule.milestones):
            if milestone.ghost_batch and self.layout.micro_batch % milestone.ghost_batch:
                raise ValueError(
                    f"schedule.milestones[{place}].ghost_batch: {milestone.ghost_batch} does not "
                    f"divide layout.micro_batch = {self.layout.micro_batch}; it must."
                )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; Recipe.model_validate reads them back."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings that change what is computed; equal = may be resumed."""
        return hashlib.sha256(json.dumps(self._bound(), sort_keys=True).encode()).hexdigest()

    def changes_since(self, old: Mapping[str, Any]) -> str:
        """Where an older recipe (of `to_dict`) computes something else: `section.key was …, is …`."""
        return "; ".join(
            f"{section}.{key} was {_shown(old.get(section, {}).get(key))}, is {_shown(value)}"
            for section, settings in self._bound().items()
            for key, value in settings.items()
            if old.get(section, {}).get(key) != value
        )

    def _bound(self) -> dict[str, dict[str, Any]]:
        return self.model_dump(mode="json", exclude=FREE_AT_RESUME)


def shipped_recipes() -> list[str]:
    """The names of the recipes in this package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The shipped recipe of that name, else that YAML file, with `section.key=value` overrides.

    Values are YAML: `schedule.milestones=[{epoch: 3, factor: 5}]` works. Raises UserError.
    """
    settings = _read(name_or_path, Path())
    for override in overrides:
        _set(settings, override)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        # an unknown key is often the misspelt one that is missing: it comes first
        found = sorted(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        reasons = list(dict.fromkeys(_reason(details) for details in found[:MAX_REASONS]))
        if len(found) > MAX_REASONS:
            reasons.append(f"There are {len(found) - MAX_REASONS:,} more errors.")
        raise UserError(f"Recipe {name_or_path}: {' '.join(reasons)}") from None


def _read(name_or_path: str | Path, folder: Path, is_base: bool = False) -> dict[str, Any]:
    """The settings of a shipped recipe or of a file, seen from `folder`, laid over their base's."""
    shipped = str(name_or_path) in shipped_recipes()
    file = SHIPPED / f"{name_or_path}.yaml" if shipped else folder / name_or_path
    settings = _read_file(file)
    base = settings.pop("base", None)
    if base is None:
        return settings
    if is_base or not isinstance(base, str):
        raise UserError(
            f"Recipe {file}: base: {_shown(base)} is not allowed; it must be the name or the file "
            "of a recipe that has no base itself."
        )
    return _laid_over(_read(base, file.parent, is_base=True), settings)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the settings of `above`, section by section; lists are replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _laid_over(old, value)
        merged[key] = value
    return merged


def _read_file(file: Path) -> dict[str, Any]:
    what = f"Recipe {file}"
    try:
        settings = plain_yaml.parse(plain_yaml.read_text(file, what), what)
    except FileNotFoundError:
        raise UserError(
            f"{what}: there is no shipped recipe and no file of this name."
            f"{_did_you_mean(str(file), shipped_recipes())} "
            f"Shipped recipes: {', '.join(shipped_recipes())}."
        ) from None
    if not isinstance(settings, dict):
        raise UserError(
            f"Recipe {file}: the file must hold sections of settings "
            f"({', '.join(Recipe.model_fields)}), and holds {_shown(settings)}."
        )
    return settings


def _set(settings: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into `settings`; whether the key exists is checked later."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > plain_yaml.MAX_DEPTH:
        raise UserError(
            f"--set {override[:100]}: it must read section.key=value, such as --set schedule.lr=0.05."
        )
    value = plain_yaml.parse(text, f"--set {override[:100]}")
    for depth, key in enumerate(keys[:-1], start=1):
        if settings.get(key) is None:
            settings[key] = {}
        settings = settings[key]
        if not isinstance(settings, dict):
            raise UserError(
                f"--set {override[:100]}: {'.'.join(keys[:depth])} is {_shown(settings)}, which has no "
                "keys of its own; set it as a whole."
            )
    settings[keys[-1]] = value


def _reason(details: Any) -> str:
    """One sentence for one of pydantic's errors: section.key, the value, what is allowed."""
    location = details["loc"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:]
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        hint = _did_you_mean(str(location[-1]), allowed)
        return f"{where}: there is no such key.{hint} Allowed: {', '.join(allowed)}."
    if kind == "missing":
        return f"{where}: it is missing and must be given."
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        # a section's own check names its keys itself
        checks_section = isinstance(value, Mapping) or len(location) <= 1
        return message if checks_section else f"{where}: {_shown(value)} is not allowed; {message}."
    if kind in ("model_type", "model_attributes_type"):
        return f"{where}: {_shown(value)} is no section; allowed keys: {', '.join(_keys_at(location))}."
    message = details["msg"].replace("Input should be", "it must be", 1)
    message = message[0].lower() + message[1:]
    return f"{where}: {_shown(value)} is not allowed; {message}."


def _keys_at(location: Iterable[int | str]) -> list[str]:
    """The keys of the section at this place of a recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            section = next(_sections_in(section.model_fields[part].annotation))
    return list(section.model_fields)


def _sections_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _did_you_mean(word: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
