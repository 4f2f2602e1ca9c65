"""Objects of the user's own, named in a recipe or on the command line as `package.module:name`."""

import importlib
import re
import sys
from typing import Any

from hvd_lbt.errors import UserError, one_line

PATTERN = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
EXAMPLE = "package.module:name, such as my_code.networks:small_net"


def is_object_name(text: str) -> bool:
    """Whether `text` reads as the name of an object of one's own, `package.module:name`."""
    return re.fullmatch(PATTERN, text, re.ASCII) is not None


def load_object(text: str, what: str) -> Any:
    """Import what `package.module:name` names, with the current directory on sys.path.

    As `python -m` and `hvd_lbt` from a source tree do, modules beside the current directory are
    found first. what: the setting or option that names it; begins a UserError.
    Raises UserError if the text is no such name, the module does not import or has no such name.
    """
    if not is_object_name(text):
        raise UserError(f"{what}: {text[:200]!r} is no object; it must read {EXAMPLE}.")
    module_name, _, path = text.partition(":")
    if module_name.split(".")[0] in sys.stdlib_module_names or module_name == "torch.hub":
        raise UserError(
            f"{what}: {text!r} is not of your own: recipes may not call Python's own modules or "
            f"torch.hub, which run commands or fetch code. It must read {EXAMPLE}."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    importlib.invalidate_caches()  # the file may be newer than this process
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        if _is_missing(error, module_name):
            raise UserError(
                f"{what}: {text!r}: there is no module {error.name!r}. It is looked for in the "  # type: ignore[attr-defined]
                "current directory first, then among the installed packages; start from the "
                "folder that has it, or install it."
            ) from error
        raise UserError(
            f"{what}: {text!r}: the module {module_name} cannot be imported "
            f"({type(error).__name__}: {one_line(error) or 'no message'}){place_of(error)}. "
            f"Correct it; `python -c 'import {module_name}'` shows the whole traceback."
        ) from error
    for depth, name in enumerate(path.split(".")):
        try:
            found = getattr(found, name)
        except AttributeError:
            inside = ".".join([module_name, *path.split(".")[:depth]])
            names = sorted(n for n in vars(found) if not n.startswith("_")) if depth == 0 else []
            near = f" It has: {', '.join(names[:12])}." if names else ""
            raise UserError(
                f"{what}: {text!r}: {inside} has no {name!r}; it must be a name that the module "
                f"defines.{near}"
            ) from None
    return found


def _is_missing(error: Exception, module_name: str) -> bool:
    """Whether the module itself, or a package above it, is not there; not one that it imports."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return False
    return module_name == error.name or module_name.startswith(f"{error.name}.")


def place_of(error: Exception) -> str:
    """The innermost line that raised, as far as it lies outside of Python's import system."""
    place = error.__traceback__
    lines = []
    while place is not None:
        file = place.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and file != __file__:
            lines.append(f", {file}:{place.tb_lineno}")
        place = place.tb_next
    return next((line for line in reversed(lines) if "importlib" not in line), "")
