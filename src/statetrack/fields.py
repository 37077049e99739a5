"""The types of a config's fields, checked where it is made: Python alone would let `steps=2.5` pass."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

MAX_INTEGER = 2**63 - 1
"""Larger whole numbers are no size, seed or count of anything."""

_KINDS: dict[type, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    float: ((float, int), "a number"),
    str: (str, "a string"),
    int: (int, "an integer"),
}


def check_types(config: Any, owner: str = "") -> None:
    """Raises ValueError for a field that is no bool, number or string where its type says that it is one.

    Args:
        config: a dataclass.
        owner: what the message calls it; empty for a field whose name says enough.
    """
    hints = get_type_hints(type(config))
    for option in fields(config):
        hint, value = hints[option.name], getattr(config, option.name)
        kinds = get_args(hint) or (hint,)
        if value is None and type(None) in kinds:
            continue
        for kind, (accepted, wanted) in _KINDS.items():
            if kind not in kinds or (kind is int and float in kinds):
                continue
            wrong = not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))
            name = f"{option.name} of {owner}" if owner else option.name
            if wrong:
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise ValueError(f"{name} must be below 2^63, got {value:,}")
