"""Models and mixers as plain data, dicts, lists, strings and numbers: written out, and read back strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite

from statetrack.mixers import MixerConfig, mixer_config
from statetrack.mixers.mixer import refuse_absent
from statetrack.model import Mixers, NormPlacements
from statetrack.transition import EigenvalueRange

Config = TypeVar("Config")

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def to_data(config: Any) -> Any:
    """A config as dicts, lists, strings and numbers; `from_data` reads it back."""
    if isinstance(config, EigenvalueRange):
        return [config.lo, config.hi]
    if is_dataclass(config):
        name = {"name": config.name} if isinstance(config, MixerConfig) else {}
        return name | {f.name: to_data(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple):
        return [to_data(value) for value in config]
    return config


def from_data(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """Reads a config.

    Raises:
        ValueError: for unknown, missing or ill-typed keys and for values that a config refuses, in one sentence.
    """
    hooks = {
        EigenvalueRange: EigenvalueRange.of,
        Mixers: read_mixers,
        NormPlacements: lambda data: tuple(data) if isinstance(data, list) else data,
        float: _read_float,
        int: _read_int,
    }
    try:
        return dacite.from_dict(kind, data, dacite.Config(strict=True, type_hooks=hooks))  # type: ignore[type-var]
    except dacite.UnexpectedDataError as error:
        known = ", ".join(f.name for f in fields(kind))  # type: ignore[arg-type]
        raise ValueError(f"unknown key {', '.join(sorted(error.keys))}; the keys here are {known}") from None
    except dacite.WrongTypeError as error:
        raise ValueError(f"{error.field_path} must be {_wanted(error.field_type)}, got {error.value!r}") from None
    except dacite.DaciteError as error:
        raise ValueError(str(error)) from None


def difference(there: Any, here: Any, prefix: str = "") -> str:
    """The first field in which two configs differ, in words; `prefix` is what the fields are fields of."""
    if type(there) is type(here) and is_dataclass(there) and not isinstance(there, EigenvalueRange):
        for field in fields(there):
            if (a := getattr(there, field.name)) != (b := getattr(here, field.name)):
                return difference(a, b, f"{prefix}.{field.name}" if prefix else field.name)
    if isinstance(there, tuple) and isinstance(here, tuple) and len(there) == len(here):
        index = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        return difference(there[index], here[index], f"{prefix}[{index}]")
    there, here = (_written(value) for value in (there, here))
    return f"{prefix} is {there} there, not {here}"


def _wanted(kind: Any) -> str:
    """What a field of a type must be, in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is dict:
        _, values = get_args(kind)
        if values is Any:
            return "a table"
        return f"a table, in which each value is {_wanted(values)}"
    parts = [part for part in get_args(kind) if part is not type(None)]
    if parts and get_origin(kind) is not tuple:
        return " or ".join(map(_wanted, parts))
    return "a table" if is_dataclass(kind) else _WORDS.get(kind, f"of the type {kind}")


def _written(value: Any) -> Any:
    """A value of a config as a message has it: mixers by their names."""
    if isinstance(value, tuple):
        return "+".join(str(_written(part)) for part in value)
    return value.name if isinstance(value, MixerConfig) else value


def read_mixer(data: Any) -> MixerConfig:
    """A mixer's config from plain data, `{"name": ..., option: value, ...}`; a config is passed on as it is."""
    if isinstance(data, MixerConfig):
        return data
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ValueError(f"a mixer is a table with a name, for example {{name = 'deltanet'}}; got {data!r}")
    kind, options = mixer_config(data["name"]), {key: value for key, value in data.items() if key != "name"}
    refuse_absent(kind, options)
    return from_data(kind, options)


def read_mixers(data: Any) -> Mixers:
    """A mixer's config from plain data, as `read_mixer` reads it; or a list of them, the pattern of a hybrid."""
    return tuple(map(read_mixer, data)) if isinstance(data, (list, tuple)) else read_mixer(data)


def _read_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_int(value: Any) -> Any:
    # A bool is an int to Python, so `steps: true` would pass for 1.
    return repr(value) if isinstance(value, bool) else value
