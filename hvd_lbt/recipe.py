"""A recipe: all settings of a run, typed and checked.

A recipe is a YAML file, shipped in `hvd_lbt/recipes` or the user's own; `--set section.key=value`
changes single settings. With `base: NAME` a file takes everything it does not say from another
recipe, so that recipes to be compared differ only in what they say. An unknown key or an impossible
value is a UserError that names the key, the value, and what is allowed.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hvd_lbt import plain_yaml
from hvd_lbt.errors import RenamedWarning, UserError, did_you_mean, shown
from hvd_lbt.no_secrets import refuse_secrets
from hvd_lbt.own import EXAMPLE, is_object_name
from hvd_lbt.schedule.phases import phases
from hvd_lbt.schedule.settings import Schedule, SettingError

SHIPPED = Path(__file__).parent / "recipes"
MAX_REASONS = 8  # errors of one recipe that are written out

# The upper bounds are far beyond any training: within them nothing overflows or takes for ever.
MAX_MICRO_BATCHES = 65_536  # of one update, on all workers together
MAX_MICRO_BATCH = 2**20
MAX_PROFILED = 200  # updates: a profile has some thousand events each
LOGGERS = ("tensorboard", "mlflow", "wandb")
Update = Annotated[int, Field(ge=0, le=10**10)]
Count = Annotated[int, Field(ge=1, le=10**10)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Threads = Annotated[int, Field(ge=1, le=1024)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Colour = Annotated[float, Field(ge=-1e6, le=1e6)]
Triple = tuple[Colour, Colour, Colour]

# Settings that were renamed in 0.2; the old name works until 0.3, with a warning.
RENAMED = {
    ("data", "resident"): "cache_on_device",
    ("schedule", "raised"): "scaled_start",
}

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass

# Settings with which a run may be resumed otherwise: they change speed, memory, rounding or what is
# logged of the run, not what is computed.
FREE_AT_RESUME: dict[str, Any] = {
    "name": True,
    "data": {
        "train_samples",
        "threads",
        "prefetch",
        "readers",
        "timeout",
        "on_bad_sample",
        "cache_on_device",
        "stage",
    },
    "model": {"pretrained", "pretrained_skip"},  # of the start: the checkpoint has the weights
    "layout": {"micro_batch"},
    "wire": {"bucket_mb"},
    "run": {
        *("eval_every", "keep_checkpoints", "checkpoint_minutes"),
        *("channels_last", "compile", "noise_every", "max_bad_updates"),
        *("loggers", "profile", "profile_rank"),
    },
    "elastic": True,
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(_Section):
    """How images are made."""

    train_samples: Count | None = None
    """N for the plan where no data folder is at hand; when training, the images are counted."""
    image_size: Pixels
    """Side of the square training image, in pixels; schedule.milestones may change it."""
    test_image_size: Pixels | None = None
    """Side of a test image; None: that of the training images at the time."""
    augment: Literal["none", "pad_crop", "random_resized_crop"]
    pad: Annotated[int, Field(ge=0, le=16_384)] = 4
    """pad_crop only: pixels of padding on each side."""
    flip: bool = False
    """Mirror every second image, left to right."""
    eval_resize: Pixels | None = None
    """The shorter side before the centre is cut out, for test images of test_image_size, else of
    image_size, and in proportion at other sizes; None: resized as a whole.
    """
    mean: Triple
    """Subtracted from red, green and blue, in 0..255."""
    std: Triple
    """Then divided by, in 0..255."""
    classes: Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)] | None = None
    """A file with one class name a line, label 0 first; None: DATA/classes.txt, else sorted
    names.
    """
    on_bad_sample: Literal["error", "skip"] = "error"
    """skip: an image that cannot be decoded is left out and listed; its update keeps its
    divisor.
    """
    threads: Threads | None = None
    """DALI's threads on each worker; None: the node's cores, shared out among its workers."""
    prefetch: Threads = 2
    """Micro-batches made ahead."""
    readers: Threads = 4
    """Threads on each worker that read files."""
    shuffle_block: Annotated[int, Field(ge=2, le=10**9)] | None = None
    """Shuffle blocks of so many samples that lie together, then the samples of shuffle_window
    blocks in a row, so that reads are sequential; None: shuffle all samples.
    """
    shuffle_window: Count | None = None
    """Blocks of shuffle_block samples that are shuffled together; None: 16."""
    cache_on_device: bool = False
    """Decode all images at the start and keep them on the device, without DALI: for small
    images.
    """
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training labels that are random, the same ones in every epoch: for studies."""
    stage: Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)] | None = None
    """A folder on each node's own disk: shards are copied there once, and read from there."""
    timeout: Positive = 300.0
    """Seconds after which a read without an answer ends the run with the file's name."""

    @field_validator("std")
    @classmethod
    def _positive(cls, std: Triple) -> Triple:
        if min(std) < 1e-6:
            raise ValueError("each of the three must be greater than 0, at least 1e-06")
        return std

    @model_validator(mode="after")
    def _window_of_blocks(self) -> "DataRecipe":
        if self.shuffle_window is not None and self.shuffle_block is None:
            raise ValueError(
                f"data.shuffle_window: {self.shuffle_window} has no effect without "
                "data.shuffle_block; set it too, or leave both out."
            )
        return self

    @property
    def blocks_in_window(self) -> int:
        """Blocks that are shuffled together, where data.shuffle_block is set."""
        return self.shuffle_window or 16

    @model_validator(mode="after")
    def _cached_as_they_are(self) -> "DataRecipe":
        for key, allowed in {
            "augment": ("none", "pad_crop"),
            "eval_resize": (None,),
            "on_bad_sample": ("error",),
            "test_image_size": (None, self.image_size),
        }.items():
            value = getattr(self, key)
            if self.cache_on_device and value not in allowed:
                raise ValueError(
                    f"data.{key}: {value!r} does not go with data.cache_on_device, which keeps "
                    f"whole images of data.image_size; it must be {' or '.join(map(str, allowed))}."
                )
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> "DataRecipe":
        key = "test_image_size" if self.test_image_size else "image_size"
        size = getattr(self, key)
        if self.eval_resize is not None and self.eval_resize < size:
            raise ValueError(
                f"data.eval_resize: {self.eval_resize} is smaller than data.{key} "
                f"({size}), which is cut out of it; it must be at least that."
            )
        return self

    def at(self, image_size: int | None) -> "DataRecipe":
        """The same with training images of that size, None: of its own."""
        return self if image_size is None else self.model_copy(update={"image_size": image_size})

    def for_evaluation(self, image_size: int | None) -> "DataRecipe":
        """The settings of test images while the training images are of that size, None: its own.

        eval_resize is rounded to a whole pixel, and is at least the size.
        """
        size = self.test_image_size or image_size or self.image_size
        resize = self.eval_resize
        if resize is not None:
            resize = max(size, round(resize * size / (self.test_image_size or self.image_size)))
        return self.model_copy(update={"image_size": size, "eval_resize": resize})


class ModelRecipe(_Section):
    """Which network."""

    name: Annotated[str, Field(max_length=500)]
    """One of ours, timm:NAME, torchvision:NAME, or package.module:function."""
    num_classes: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """None: as many as the data has."""
    arguments: dict[str, Any] = {}
    """What else the function that makes a network of others is called with."""
    pretrained: Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)] | None = None
    """A file of weights to start from, .safetensors or a state_dict by torch.save."""
    pretrained_skip: tuple[str, ...] = ()
    """Layers whose weights are drawn anew all the same, such as a classifier of other classes."""
    stem: Literal["imagenet", "cifar"] | None = None
    """Of our residual networks. imagenet: 7×7 stride 2 and max pooling; cifar: 3×3 stride 1."""
    width: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Channels of a residual network's first stage, hidden units of the perceptron."""
    zero_init_residual: bool = False
    """The last batch norm of each block of our ResNets begins with gamma 0 (Goyal et al. 2017)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if is_object_name(name) or re.fullmatch(r"(timm|torchvision):[\w.-]+", name, re.ASCII):
            return name
        wide = re.fullmatch(r"wide_resnet([1-9]\d{1,2})_([1-9]\d?)", name)
        if re.fullmatch(r"resnet(18|34|50|101|152)|inception_resnet_v2|perceptron", name) or (
            wide and int(wide[1]) % 6 == 4 and int(wide[1]) > 4
        ):
            return name
        raise ValueError(
            "it must be resnet18, resnet34, resnet50, resnet101, resnet152, inception_resnet_v2, "
            "perceptron, wide_resnet<depth>_<k> with depth = 6·blocks + 4, such as "
            "wide_resnet16_4, or timm:NAME, torchvision:NAME, package.module:function"
        )

    @field_validator("arguments")
    @classmethod
    def _plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if wrong := [name for name in arguments if not name.isidentifier()]:
            raise ValueError(f"{wrong[0][:100]!r} cannot be the name of an argument")
        if "num_classes" in arguments:
            raise ValueError("num_classes is a setting of its own, model.num_classes")
        return arguments

    @model_validator(mode="after")
    def _have_an_effect(self) -> "ModelRecipe":
        if self.arguments and ":" not in self.name:
            raise ValueError(
                f"model.arguments: {self.arguments} would have no effect on {self.name}, a network "
                "of ours; leave it out."
            )
        if self.stem is None and re.fullmatch(r"resnet\d+", self.name):
            raise ValueError(
                f"model.stem: {self.name} needs it; it must be imagenet (7×7 stride 2 and max "
                "pooling) or cifar (3×3 stride 1)."
            )
        if self.pretrained_skip and self.pretrained is None:
            raise ValueError(
                "model.pretrained_skip: it would have no effect without model.pretrained, the file "
                "of weights; leave it out or give the file."
            )
        return self


class OptimizerRecipe(_Section):
    """SGD's other settings."""

    weight_decay: NotNegative
    nesterov: bool = False
    decay_norm_and_bias: bool = False
    """Weight decay on batch norm's parameters and on biases too."""
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Scale the world's gradient down to this norm where it is longer, before the update."""


class LossRecipe(_Section):
    """What is minimised, and the mixing of samples; `loss: package.module:function` is short for
    loss.function.
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """This share of each label is spread over all classes (Szegedy et al. 2016)."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """α of mixup (Zhang et al. 2018), partners within the ghost batch; 0: off."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """α of CutMix (Yun et al. 2019); with mixup each ghost batch has one of the two; 0: off."""
    function: Annotated[str, Field(max_length=4096)] | None = None
    """Your own loss instead of cross-entropy, package.module:function, called with (logits,
    labels) for (n,) losses.
    """

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @field_validator("function")
    @classmethod
    def _names_an_object(cls, function: str | None) -> str | None:
        if function is not None and not is_object_name(function):
            raise ValueError(f"it must read {EXAMPLE}")
        return function

    @model_validator(mode="after")
    def _smooths_cross_entropy(self) -> "LossRecipe":
        if self.function is not None and self.label_smoothing:
            raise ValueError(
                f"loss.label_smoothing: {self.label_smoothing:g} has no effect with loss.function, "
                "which takes the place of the cross-entropy; leave one of the two out."
            )
        return self


class EmaRecipe(_Section):
    """A moving average of the weights, evaluated and saved beside them."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of an update of schedule.global_batch samples; of B samples it is decay^(B / that). None:
    no average.
    """


def _number_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_MICRO_BATCH):
        return value
    raise ValueError(f"it must be a number from 1 to {MAX_MICRO_BATCH:,}, or auto")


class LayoutRecipe(_Section):
    """How a global batch is cut."""

    micro_batch: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)]
    """Samples of one forward, at most; auto: the fastest that leaves memory, tried at the start."""
    ghost_batch: Annotated[int, Field(ge=1, le=2**20)]
    """Samples that share batch-norm statistics."""

    @model_validator(mode="after")
    def _whole_ghost_batches(self) -> "LayoutRecipe":
        if self.micro_batch != "auto" and self.micro_batch % self.ghost_batch:
            raise ValueError(
                f"layout.micro_batch: {self.micro_batch} is no multiple of layout.ghost_batch = "
                f"{self.ghost_batch}; it must be, since ghost batches are not cut."
            )
        return self


class WireRecipe(_Section):
    """The form of gradients on the network."""

    form: Literal["fp16", "fp32"] = "fp16"
    """Of gradients on the network. No bf16: Horovod 0.28.1 cannot sum it for PyTorch."""
    bucket_mb: Annotated[float, Field(ge=0.001, le=65_536)] = 25.0
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
    loggers: tuple[str, ...] = ("tensorboard",)
    """tensorboard, mlflow, wandb, or a class of your own as package.module:Class; only rank 0
    logs.
    """
    max_bad_updates: Count = 10
    """Give up after so many updates in a row whose gradients are not finite."""
    profile: tuple[Update, Update] | None = None
    """First and last update, counted from 0, of which torch's and Horovod's profiles are written to
    RUN/profile.
    """
    profile_rank: Annotated[int, Field(ge=0)] = 0
    """The rank that torch's profile is of."""
    speed: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """With policy measured: the speed profile, a shipped one's name or a file, whose fixed seconds
    of an update and seconds a sample count instead of those of this run."""

    @field_validator("loggers")
    @classmethod
    def _known(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        for name in loggers:
            if name not in LOGGERS and not is_object_name(name):
                raise ValueError(f"each must be {', '.join(LOGGERS)}, or {EXAMPLE}")
        if len(set(loggers)) < len(loggers):
            raise ValueError("each must be named once")
        return loggers

    @model_validator(mode="after")
    def _profile_is_a_range(self) -> "RunRecipe":
        if self.profile is None:
            if self.profile_rank:
                raise ValueError(
                    f"run.profile_rank: {self.profile_rank} has no effect without run.profile; "
                    "leave it out, or set run.profile to [first update, last update]."
                )
            return self
        first, last = self.profile
        if first > last or last - first >= MAX_PROFILED:
            raise ValueError(
                f"run.profile: [{first}, {last}] is not allowed; it must be [first update, last "
                f"update], the first not after the last, and of {MAX_PROFILED} updates at most."
            )
        return self


class ElasticRecipe(_Section):
    """Workers that come and go (`hvd_lbt elastic`)."""

    local_batch: Count | None = None
    """Samples per worker. A stage asks for ceil(global_batch / local_batch) workers."""
    commit_every: Count = 1
    """Updates between two copies of the state in memory: so many are done again after a loss."""


class Recipe(_Section):
    """All settings of a run; a module is handed its own section only."""

    name: str
    """Of the run's folder, runs/NAME, where --out does not give one."""
    data: DataRecipe
    model: ModelRecipe
    schedule: Schedule
    optimizer: OptimizerRecipe
    loss: LossRecipe = LossRecipe()
    ema: EmaRecipe = EmaRecipe()
    layout: LayoutRecipe
    wire: WireRecipe = WireRecipe()
    run: RunRecipe = RunRecipe()
    elastic: ElasticRecipe = ElasticRecipe()

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, settings: Any) -> Any:
        return with_new_names(settings) if isinstance(settings, Mapping) else settings

    @field_validator("loss", mode="before")
    @classmethod
    def _short_for_a_function(cls, loss: Any) -> Any:
        return {"function": loss} if isinstance(loss, str) else loss

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name) or not name.strip(".") or len(name.encode()) > 200:
            raise ValueError(
                "it must be 1 to 200 letters, digits, _, - and ., and not only dots, since the "
                "run's folder is called so"
            )
        return name

    @model_validator(mode="after")
    def _whole_ghost_batches_in_all_stages(self) -> "Recipe":
        micro_batch = self.layout.micro_batch
        if micro_batch == "auto":
            return self
        for place, milestone in enumerate(self.schedule.milestones):
            if milestone.ghost_batch and micro_batch % milestone.ghost_batch:
                raise ValueError(
                    f"schedule.milestones[{place}].ghost_batch: {milestone.ghost_batch} does not "
                    f"divide layout.micro_batch = {micro_batch}; it must."
                )
        largest = max(phase.global_batch for phase in phases(self.schedule))
        if largest > MAX_MICRO_BATCHES * micro_batch:
            raise ValueError(
                f"layout.micro_batch: {micro_batch} cuts the largest global batch, "
                f"{largest:,}, into more than {MAX_MICRO_BATCHES:,} micro-batches; it must be at "
                f"least {-(-largest // MAX_MICRO_BATCHES)}."
            )
        return self

    @model_validator(mode="after")
    def _measures_what_the_batch_grows_by(self) -> "Recipe":
        if self.schedule.policy != "measured":
            if self.run.speed is not None:
                raise ValueError(
                    f"run.speed: {self.run.speed} has no effect with policy "
                    f"{self.schedule.policy}; leave it out, or set schedule.policy to measured."
                )
        elif not self.run.noise_every:
            raise ValueError(
                "run.noise_every: 0 measures no gradient noise, by which schedule.policy measured "
                "grows the batch; it must be at least 1."
            )
        elif self.run.speed is not None and self.schedule.overhead is not None:
            raise ValueError(
                f"run.speed: {self.run.speed} and schedule.overhead = {self.schedule.overhead:g} "
                "both say what an update costs beside its samples; leave one of them out."
            )
        return self

    @model_validator(mode="after")
    def _images_change_their_size(self) -> "Recipe":
        before = self.data.image_size
        for place, milestone in enumerate(self.schedule.milestones):
            if milestone.image_size is None:
                continue
            where = f"schedule.milestones[{place}].image_size: {milestone.image_size}"
            if self.data.cache_on_device:
                raise ValueError(
                    f"{where} does not go with data.cache_on_device, which keeps the images at "
                    "data.image_size; leave one of the two out."
                )
            if milestone.image_size == before:
                raise ValueError(
                    f"{where} is what data.image_size says already; leave it out, or begin with "
                    "another data.image_size."
                )
            break  # schedule/ compares the later ones
        return self

    @model_validator(mode="after")
    def _mixes_with_a_partner(self) -> "Recipe":
        ghosts = {"layout.ghost_batch": self.layout.ghost_batch} | {
            f"schedule.milestones[{place}].ghost_batch": milestone.ghost_batch
            for place, milestone in enumerate(self.schedule.milestones)
            if milestone.ghost_batch
        }
        for key, ghost_batch in ghosts.items():
            if self.loss.mixes and ghost_batch == 1:
                which = "mixup" if self.loss.mixup else "cutmix"
                raise ValueError(
                    f"{key}: 1 leaves no partner for loss.{which},"
                    " which mixes the samples of a ghost batch; it must be at least 2."
                )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; Recipe.model_validate reads them back."""
        return self.model_dump(mode="json")

    def changes_since(self, old: Mapping[str, Any]) -> str:
        """Where an older recipe (of `to_dict`) computes something else: `section.key was …, is …`.

        Settings that the older recipe does not have yet count with their default.
        """
        try:
            before: Mapping[str, Any] = Recipe.model_validate(old)._bound()
        except ValidationError:  # of a program that allowed something else: compare what is there
            before = old
        return "; ".join(
            f"{section}.{key} was {shown(before.get(section, {}).get(key))}, is {shown(value)}"
            for section, settings in self._bound().items()
            for key, value in settings.items()
            if before.get(section, {}).get(key) != value
        )

    def _bound(self) -> dict[str, dict[str, Any]]:
        return self.model_dump(mode="json", exclude=FREE_AT_RESUME)


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the present name of each renamed one; says so by a RenamedWarning.

    Raises UserError if the old and the new name are both there.
    """
    renamed = dict(settings)
    for (section, old), new in RENAMED.items():
        inside = renamed.get(section)
        if not isinstance(inside, Mapping) or old not in inside:
            continue
        if new in inside:
            raise UserError(
                f"{section}.{old} is the old name of {section}.{new}, and both are set; leave out "
                f"{section}.{old}."
            )
        warnings.warn(
            f"{section}.{old} is called {section}.{new} now; the old name works until hvd_lbt 0.3.",
            RenamedWarning,
            stacklevel=2,
        )
        renamed[section] = {new if key == old else key: value for key, value in inside.items()}
    return renamed


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
    return recipe_of(settings, f"Recipe {name_or_path}")


def recipe_of(settings: Any, what: str) -> Recipe:
    """The recipe of plain settings, as `to_dict` gives them; `what` begins a UserError."""
    refuse_secrets(settings, what)
    _refuse_truth_for_numbers(settings, Recipe, what)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        # an unknown key is often the misspelt one that is missing: it comes first
        found = sorted(error.errors(), key=lambda details: details["type"] not in UNKNOWN_KEY)
        reasons = list(dict.fromkeys(_reason(details) for details in found[:MAX_REASONS]))
        if len(found) > MAX_REASONS:
            reasons.append(f"There are {len(found) - MAX_REASONS:,} more errors.")
        raise UserError(f"{what}: {' '.join(reasons)}") from None


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
            f"Recipe {file}: base: {shown(base)} is not allowed; it must be the name or the file "
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
    settings = plain_yaml.load(file, what, "recipe", shipped_recipes())
    if not isinstance(settings, dict):
        raise UserError(
            f"Recipe {file}: the file must hold sections of settings "
            f"({', '.join(Recipe.model_fields)}), and holds {shown(settings)}."
        )
    return with_new_names(settings)


def _set(settings: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into `settings`; whether the key exists is checked later."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(map(_is_key, keys)) or len(keys) > plain_yaml.MAX_DEPTH:
        raise UserError(
            f"--set {override[:100]}: it must read section.key=value, such as --set "
            "schedule.lr=0.05."
        )
    value = plain_yaml.parse(text, f"--set {override[:100]}")
    if tuple(keys[:2]) in RENAMED:  # beside the new name of a file it must win, not be a second one
        keys[1:2] = [*with_new_names({keys[0]: {keys[1]: None}})[keys[0]]]
    for depth, key in enumerate(keys[:-1], start=1):
        if settings.get(key) is None:
            settings[key] = {}
        settings = settings[key]
        if not isinstance(settings, dict):
            raise UserError(
                f"--set {override[:100]}: {'.'.join(keys[:depth])} is {shown(settings)}, which "
                "has no keys of its own; set it as a whole."
            )
    settings[keys[-1]] = value


def _is_key(word: str) -> bool:
    return word != "" and word.isprintable()


def _reason(details: Any) -> str:
    """One sentence for one of pydantic's errors: section.key, the value, what is allowed."""
    location = details["loc"]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in location)
    where = "".join(parts)[1:]
    kind, value = details["type"], details["input"]
    if kind in UNKNOWN_KEY:
        allowed = _keys_at(location[:-1])
        hint = did_you_mean(str(location[-1]), allowed)
        return f"{where}: there is no such key.{hint} Allowed: {', '.join(allowed)}."
    if kind == "missing":
        return f"{where}: it is missing and must be given."
    if kind == "value_error":
        error = details["ctx"]["error"]
        message = error.at(where) if isinstance(error, SettingError) else str(error)
        # a section's own check names its keys itself
        checks_section = isinstance(value, Mapping) or not location
        return message if checks_section else f"{where}: {shown(value)} is not allowed; {message}."
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        keys = ", ".join(_keys_at(location))
        return f"{where}: {shown(value)} is no section; allowed keys: {keys}."
    message = details["msg"].replace("Input should be", "it must be", 1)
    message = message.replace("a valid tuple", "a list")
    message = message[0].lower() + message[1:]
    return f"{where}: {shown(value)} is not allowed; {message}."


def _keys_at(location: Iterable[int | str]) -> list[str]:
    """The keys of the section at this place of a recipe."""
    keys = _keys_of(Recipe)
    for part in location:
        if isinstance(part, str):
            keys = _keys_of(next(_sections_in(keys[part])))
    return list(keys)


def _refuse_truth_for_numbers(settings: Any, section: Any, what: str, where: str = "") -> None:
    """UserError for true or false where a number is wanted: Python takes them for 1 and 0."""
    if not isinstance(settings, Mapping):
        return
    for key, annotation in _keys_of(section).items():
        value = settings.get(key)
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise UserError(
                f"{what}: {where}{key}: {str(value).lower()} is not allowed; it must not be true "
                "or false."
            )
        for inner in _sections_in(annotation):
            parts = value if isinstance(value, list | tuple) else [value]
            for place, part in enumerate(parts):
                index = f"[{place}]" if parts is value else ""
                _refuse_truth_for_numbers(part, inner, what, f"{where}{key}{index}.")


def _keys_of(section: Any) -> dict[str, Any]:
    """The annotation of each key of a section: one of pydantic's models, or a dataclass."""
    if is_dataclass(section):
        return {field.name: field.type for field in fields(section)}
    return {name: field.annotation for name, field in section.model_fields.items()}


def _sections_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or is_dataclass(annotation)
    ):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
