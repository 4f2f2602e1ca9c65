"""Five digits: no measurement here knows more, and none is written with more."""

from collections.abc import Collection, Mapping
from typing import Any


def five_digits(value: Any, *, exact: Collection[str] = ()) -> Any:
    """`value` with all floats in it rounded to five significant digits.

    exact: keys whose values are left as they are. Tuples become lists.
    """
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {
            key: inner if key in exact else five_digits(inner, exact=exact)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [five_digits(inner, exact=exact) for inner in value]
    return value
