"""Settings that look like a secret: a recipe is written into logs, checkpoints and dashboards."""

import re
from typing import Any

from hvd_lbt.errors import UserError

WORDS = r"(?:api|access|private|secret)_?key(?:_id)?|(?:auth|access|api|bearer|hf)_?token"
NAME = re.compile(
    rf"(?:^|[_\W])(?:{WORDS}|token|secret|password|passwd|pwd|credentials?)$", re.IGNORECASE
)
SHORTEST = 8  # characters: `token` may also be a way of pooling
# A password in an address, and the forms of well-known keys.
VALUE = re.compile(
    r"\w+://[^\s/:@]*:[^\s/@]+@"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abp]-|dapi|wandb_v1_)[\w-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
MAX_DEPTH = 64


def refuse_secrets(settings: Any, what: str) -> None:
    """Raise UserError for a setting that looks like a secret, by its name or its form.

    what: begins the error, which does not show the value.
    """
    place = _find(settings, "", 0)
    if place is not None:
        raise UserError(
            f"{what}: {place or 'a value'} looks like a secret (a key, token or password), and a "
            "recipe is written into metrics.jsonl, checkpoints and dashboards. Leave it out and "
            "set it in the environment, such as WANDB_API_KEY or MLFLOW_TRACKING_TOKEN."
        )


def _find(value: Any, place: str, depth: int) -> str | None:
    """The dotted place of the first one."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, dict):
        inside = [(f"{place}.{key}" if place else str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{place}[{index}]", part) for index, part in enumerate(value)]
    else:
        return place if _is_secret(place, value) else None
    # a secret may also be typed as a key: its place is then shown without it
    if isinstance(value, dict) and any(VALUE.search(str(key)) for key in value):
        return place
    found = (_find(part, where, depth + 1) for where, part in inside)
    return next((where for where in found if where is not None), None)


def _is_secret(place: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    name = re.sub(r"\[\d+\]$", "", place)
    return bool(VALUE.search(value) or (len(value) >= SHORTEST and NAME.search(name)))
