"""Networks of timm, of torchvision, and of the user's own, by their recipe name."""

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt.errors import UserError, one_line
from hvd_lbt.own import load_object, place_of
from hvd_lbt.recipe import ModelRecipe

LIBRARIES = ("timm", "torchvision")
# What would fetch weights from elsewhere: the run has model.pretrained for that.
FETCHING = {"timm": ("pretrained",), "torchvision": ("weights", "weights_backbone", "pretrained")}


def is_foreign(name: str) -> bool:
    """Whether this network is not one of ours."""
    return ":" in name


def unused_settings(settings: ModelRecipe) -> list[str]:
    """A line that names the settings of our own networks that a recipe has for another's."""
    plain = ModelRecipe(name=settings.name)
    names = [
        f"model.{name}"
        for name in ("stem", "width", "zero_init_residual")
        if getattr(settings, name) != getattr(plain, name)
    ]
    if not names:
        return []
    return [f"Not used by {settings.name}: {', '.join(names)}; its settings are model.arguments."]


def build_foreign(settings: ModelRecipe, outputs: int, image_size: int) -> nn.Module:
    """The network that `model.name` names, called with num_classes=outputs and model.arguments.

    Layers that take their sizes from the first input (nn.LazyLinear …) are given an image of
    `image_size`. Raises UserError if it cannot be made, or cannot be trained.
    """
    library, _, name = settings.name.partition(":")
    arguments = dict(settings.arguments)
    for fetching in FETCHING.get(library, ()):
        if arguments.get(fetching):
            raise UserError(
                f"model.arguments: {fetching}={arguments[fetching]!r} would fetch weights over the "
                "network on every worker. Download them once, and give the file by "
                "model.pretrained."
            )
    if library == "timm":
        model = _of_timm(settings.name, name, outputs, arguments)
    elif library == "torchvision":
        model = _of_torchvision(settings.name, name, outputs, arguments)
    else:
        make = load_object(settings.name, "model.name")
        if not callable(make):
            raise UserError(
                f"model.name: {settings.name} is a {type(make).__name__}; it must be a function or "
                "class that is called with num_classes and model.arguments and returns a network."
            )
        model = _called(settings.name, make, {"num_classes": outputs, **arguments})
    _check_module(settings.name, model)
    _fill_lazy(settings.name, model, image_size)
    _check_parameters(settings.name, model)
    return model


def _of_timm(what: str, name: str, outputs: int, arguments: dict[str, Any]) -> nn.Module:
    timm = _library("timm")
    if "." in name:
        raise UserError(
            f"model.name: {what}: the tag {name.partition('.')[2]!r} names weights, which are not "
            f"downloaded. Write timm:{name.partition('.')[0]}, and give the file by "
            "model.pretrained."
        )
    if not timm.is_model(name):
        raise UserError(_unknown(what, name, timm.list_models(), "timm"))
    return _called(
        what, timm.create_model, {"model_name": name, "num_classes": outputs} | arguments
    )


def _of_torchvision(what: str, name: str, outputs: int, arguments: dict[str, Any]) -> nn.Module:
    models = _library("torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise UserError(_unknown(what, name, names, "torchvision"))
    return _called(what, models.get_model, {"name": name, "num_classes": outputs} | arguments)


def _unknown(what: str, name: str, names: list[str], library: str) -> str:
    near = difflib.get_close_matches(name, names, 4, 0.5)
    meant = f" Did you mean {', '.join(near)}?" if near else ""
    return (
        f"model.name: {what}: {library} has no network {name!r} for classification.{meant} "
        f"It has {len(names):,}: {library}{'' if library == 'timm' else '.models'}.list_models()."
    )


def _called(what: str, make: Any, arguments: Mapping[str, Any]) -> Any:
    """What `make` returns; its error in one paragraph."""
    try:
        return make(**arguments)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"model.name: {what} could not be made with {shown[:500]} ({_reason(error)}). Correct "
            "model.arguments, or the function."
        ) from error


def _reason(error: Exception) -> str:
    message = one_line(error, 400)
    return f"{type(error).__name__}: {message}{place_of(error)}"


def _library(name: str) -> ModuleType:
    """timm or torchvision, imported. Raises UserError naming the extra that installs it."""
    try:
        _import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        reason = f"there is no package {missing}" if missing else str(error)
        raise UserError(
            f"model.name: {name}:… needs {name}, and it cannot be imported ({reason}). Install it: "
            f"pip install 'hvd_lbt[{name}]'."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"model.name: {name}:… needs {name}, which does not go with this torch "
            f"({torch.__version__}): {one_line(error, 200)}. Install the builds of "
            f"torch and torchvision that belong together: pip install 'hvd_lbt[{name}]'."
        ) from error


def _import_torchvision() -> None:
    """Import torchvision; where its compiled operators do not load, without them.

    A CUDA build of torchvision beside a CPU build of torch cannot load its operators, and the
    import fails where it describes them (nms and others of object detection). No network for
    classification uses one, and calling one stays an error of torch's. timm needs torchvision too.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if not re.search(r"operator torchvision::\w+ does not exist", str(error)):
            raise
        for loaded in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise
        source = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
        described = dict.fromkeys(re.findall(r'register_fake\("torchvision::(\w+)"\)', source))
        for operator in described:
            _OPERATORS.define(f"{operator}(Tensor x) -> Tensor")
        importlib.import_module("torchvision")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def _check_module(what: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name: {what} returned a {type(model).__name__}; it must return a torch "
            "nn.Module."
        )
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise UserError(
            f"model.name: {what} returned a {type(model).__name__}; it must return the bare "
            "network: hvd_lbt distributes it, and compiles it with run.compile=true."
        )
    frozen = [name for name, module in model.named_modules() if name and not module.training]
    if model.training and frozen:
        raise UserError(
            f"model.name: {what} returned a network with layers in eval mode ({_some(frozen)}), "
            "which training would put back into train mode. Freeze batch norm by "
            "torchvision.ops.FrozenBatchNorm2d, and parameters by requires_grad=False."
        )
    model.train()


def _fill_lazy(what: str, model: nn.Module, image_size: int) -> None:
    """Give lazy layers their sizes by a forward of two empty images, in eval mode."""
    lazy = [name for name, value in _tensors(model) if nn.parameter.is_lazy(value)]
    if not lazy:
        return
    model.eval()
    with torch.no_grad():
        _called(what, lambda: model(torch.zeros(2, 3, image_size, image_size)), {})
    model.train()
    if lazy := [name for name, value in _tensors(model) if nn.parameter.is_lazy(value)]:
        raise UserError(
            f"model.name: {what}: {_some(lazy)} has no size after a forward: that layer is never "
            "called. Remove it."
        )


def _check_parameters(what: str, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(
            f"model.name: {what} has no parameter that requires a gradient: there is nothing to "
            "train."
        )
    for name, value in _tensors(model):
        if value.is_meta:
            raise UserError(
                f"model.name: {what}: {name} is on the meta device and has no values. Make the "
                "network on the CPU."
            )
        if name in parameters and value.dtype != torch.float32:
            raise UserError(
                f"model.name: {what}: the parameter {name} is {value.dtype}; it must be float32. "
                "Weights are kept in fp32; run.precision=bf16 computes in bf16."
            )
        if name in parameters and not torch.ops.aten.is_non_overlapping_and_dense(value):
            raise UserError(
                f"model.name: {what}: the parameter {name} has gaps in its memory (strides "
                f"{value.stride()}), so that it cannot be updated in place. Make it contiguous."
            )
    if len(devices := {p.device for p in parameters.values()}) > 1:
        raise UserError(
            f"model.name: {what} has parameters on {len(devices)} devices "
            f"({', '.join(sorted(map(str, devices)))}); each worker has one. Make the network on "
            "the CPU; it is moved to the worker's device."
        )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
