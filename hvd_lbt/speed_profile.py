"""Read and write speed profiles: YAML files that say how fast a cluster is.

Shipped ones are in `hvd_lbt/speeds`; `hvd_lbt bench profile --out mine.yaml` measures one.
"""

from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import yaml

from hvd_lbt import plain_yaml
from hvd_lbt.errors import UserError, did_you_mean, shown
from hvd_lbt.schedule.speed import Link, SpeedError, SpeedProfile, keys_of

SHIPPED = Path(__file__).parent / "speeds"


def shipped_profiles() -> list[str]:
    """The names of the profiles in this package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> SpeedProfile:
    """The shipped profile of that name, else that YAML file. Raises UserError."""
    shipped = str(name_or_path) in shipped_profiles()
    file = SHIPPED / f"{name_or_path}.yaml" if shipped else Path(name_or_path)
    what = f"Speed profile {name_or_path}"
    return profile_of(plain_yaml.load(file, what, "profile", shipped_profiles()), what)


def profile_of(settings: Any, what: str) -> SpeedProfile:
    """The profile of plain settings; `what` begins a UserError."""
    try:
        values = _checked_keys(settings, SpeedProfile, "the file")
        for key in ("within_node", "between_nodes"):
            if values.get(key) is not None:
                values[key] = _link(values[key], key)
        if isinstance(values["sample_seconds"], dict):
            values["sample_seconds"] = {
                _size(size): seconds for size, seconds in values["sample_seconds"].items()
            }
        for key in ("name", "source", "model"):
            if values.get(key) is not None and not isinstance(values[key], str):
                raise SpeedError(f"{key}: {shown(values[key])} is not allowed; it must be text.")
        return SpeedProfile(**values)
    except SpeedError as error:
        raise UserError(f"{what}: {error.problem}") from None


def profile_text(profile: SpeedProfile) -> str:
    """The profile as YAML, as `load_profile` reads it."""
    settings = {entry.name: getattr(profile, entry.name) for entry in fields(profile)}
    settings["sample_seconds"] = dict(profile.sample_seconds)
    for key in ("within_node", "between_nodes"):
        settings[key] = None if settings[key] is None else asdict(settings[key])
    return yaml.dump(
        settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )


class _Dumper(yaml.SafeDumper):
    """Writes 1.0e-05, which YAML 1.1 and 1.2 both read as a number."""


def _float_node(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    digits, mark, exponent = repr(value).partition("e")
    text = f"{digits}{'' if '.' in digits else '.0'}{mark}{exponent}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float_node)


def _link(settings: Any, key: str) -> Link:
    try:
        return Link(**_checked_keys(settings, Link, key))
    except SpeedError as error:
        raise SpeedError(f"{key}.{error.problem}") from None


def _checked_keys(settings: Any, kind: type, where: str) -> dict[str, Any]:
    """`settings` if they are a mapping with the keys of `kind`; without a None for a default."""
    allowed = keys_of(kind)
    if not isinstance(settings, dict):
        raise SpeedError(
            f"{where}: it must hold the keys {', '.join(allowed)}, and holds {shown(settings)}."
        )
    for key in settings:
        if key not in allowed:
            raise SpeedError(
                f"{key[:60]}: there is no such key.{did_you_mean(key, allowed)} Allowed: "
                f"{', '.join(allowed)}."
            )
    for entry in fields(kind):
        if entry.default is MISSING and entry.name not in settings:
            raise SpeedError(f"{entry.name}: it is missing and must be given.")
    return dict(settings)


def _size(text: Any) -> Any:
    """An image size is a key, which YAML gives as text."""
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 7 else text
