"""Weights from a file for a new training: all of them fit, or the error lists what does not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lbt.errors import UserError, one_line

# Where training programs keep the weights within their checkpoints.
NESTS = ("state_dict", "model", "model_state_dict")
SHOWN = 8  # names of each kind in an error


def load_pretrained(model: nn.Module, file: Path, skip: Sequence[str] = ()) -> str:
    """Load the weights in `file` into `model`; a sentence that says what was loaded.

    file: safetensors, or what torch.save made of a state_dict; also a checkpoint that has one under
    `state_dict`, `model` or `model_state_dict`. Names that all begin with `module.` lose that.
    skip: layers and parameters, by name, that keep the values they have, such as a classifier
    of other classes. Raises UserError that lists what is missing, unexpected, or of other sizes.
    """
    found, notes = _read(file)
    wanted = model.state_dict()
    skipped = _skipped(skip, wanted, file)
    aliases = _aliases(wanted)
    missing, shapes, bad = [], [], []
    for name, value in wanted.items():
        if name in skipped:
            continue
        if name not in found:
            if not name.endswith("num_batches_tracked") and not aliases[name] & found.keys():
                missing.append(name)
        elif found[name].shape != value.shape:
            sizes = f"{tuple(found[name].shape)} in the file, {tuple(value.shape)} in the network"
            shapes.append(f"{name} is {sizes}")
        elif value.is_floating_point() and not found[name].isfinite().all():
            bad.append(name)
    own = {name for name in found if _is_in(name, skip)}
    unexpected = [name for name in found if name not in wanted and name not in own]
    faults = [
        _listed("missing in the file", missing),
        _listed("not in the network", unexpected),
        _listed("of another size", shapes),
        _listed("infinite or NaN", bad),
    ]
    if any(faults):
        advice = ""
        if shapes or missing:
            layer = (missing or [shapes[0].split()[0]])[-1].rpartition(".")[0] or "LAYER"
            advice = (
                f" To leave layers at their new values, such as a classifier of other classes: "
                f"--set model.pretrained_skip=[{layer}]."
            )
        raise UserError(
            f"model.pretrained: the weights in {file} do not fit the network: "
            f"{'; '.join(filter(None, faults))}.{advice}"
        )
    taken = {name: value for name, value in found.items() if name in wanted and name not in skipped}
    if not taken:
        raise UserError(
            f"model.pretrained: model.pretrained_skip leaves nothing of {file} to be loaded. Leave "
            "model.pretrained out, or skip less."
        )
    with torch.no_grad():
        for name, value in taken.items():
            wanted[name].copy_(value)
    kept = f", {len(skipped)} kept as they were drawn" if skipped else ""
    return f"model.pretrained: {len(taken)} tensors of {file}{notes}{kept}."


def _is_in(name: str, layers: Sequence[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def _skipped(layers: Sequence[str], wanted: Mapping[str, Tensor], file: Path) -> set[str]:
    """The tensors of these layers. Raises UserError for a layer that is not there."""
    for layer in layers:
        if not any(_is_in(name, [layer]) for name in wanted):
            tops = dict.fromkeys(name.rpartition(".")[0] for name in wanted)
            raise UserError(
                f"model.pretrained_skip: the network has no {layer!r}, so it would have no effect. "
                f"Its last layers: {', '.join([*tops][-6:])}."
            )
    return {name for name in wanted if _is_in(name, layers)}


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """For each name, the others of the very same tensor: files may hold tied weights once."""
    names: dict[tuple[Any, ...], set[str]] = {}
    keys = {}
    for name, value in tensors.items():
        keys[name] = (value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,)
        names.setdefault(keys[name], set()).add(name)
    return {name: names[key] - {name} for name, key in keys.items()}


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", … {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})"


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """The named tensors in a file, and what was done to find them."""
    if not file.is_file():
        raise UserError(
            f"model.pretrained: there is no file {file}. Give a .safetensors file, or a .pt or "
            ".pth file of a state_dict."
        )
    content = _safetensors(file) if file.suffix == ".safetensors" else _torch_save(file)
    notes = ""
    if isinstance(content, Mapping) and not _is_state_dict(content):
        inner = [key for key in NESTS if _is_state_dict(content.get(key))]
        if len(inner) == 1:
            notes, content = f" ({inner[0]!r} in it)", content[inner[0]]
        else:
            keys = ", ".join(repr(key) for key in [*content][:SHOWN]) or "nothing"
            raise UserError(
                f"model.pretrained: {file} holds no state_dict, names with tensors, and none or "
                f"several under {', '.join(NESTS)}; it holds {keys}. Save model.state_dict() alone."
            )
    if not _is_state_dict(content):
        raise UserError(
            f"model.pretrained: {file} holds a {type(content).__name__}; it must hold a "
            "state_dict, names with tensors."
        )
    weights = dict(content)
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
        notes += " (without module. in their names)"
    return weights, notes


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _safetensors(file: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"model.pretrained: {file} needs the package safetensors ({error}). Install it: pip "
            "install 'hvd_lbt[timm]'."
        ) from error
    try:
        return load_file(file)
    except Exception as error:  # of the library: its own types, by what is wrong with the file
        raise UserError(
            f"model.pretrained: {file} cannot be read as safetensors "
            f"({one_line(error, 200)}). Download it again."
        ) from error


def _torch_save(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a file that holds something else makes the reader raise
        reason = " ".join(str(error).split())
        with file.open("rb") as stream:
            saved = stream.read(2) in (b"PK", b"\x80\x02")  # a zip archive; before 1.6 a pickle
        holds_code = saved and ("weights_only" in reason or "Unsupported" in reason)
        advice = (
            "it holds more than tensors, which would run code of the file. In the program that "
            "wrote it: torch.save(model.state_dict(), FILE)"
            if holds_code
            else f"it is no file of torch.save ({reason[:200] or type(error).__name__}); give a "
            "state_dict of torch.save, or a .safetensors file"
        )
        raise UserError(f"model.pretrained: {file} cannot be read: {advice}.") from error
