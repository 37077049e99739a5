"""Token mixers, one file a family; a file's `MIXERS` puts its configs into the registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from statetrack.mixers.mixer import Mixer, MixerConfig, State

__all__ = ["Mixer", "MixerConfig", "State", "mixer_config", "mixer_configs"]


@cache
def mixer_configs() -> dict[str, type[MixerConfig]]:
    """All mixers by name: the registry. A new file in this folder with a `MIXERS` tuple is found by itself."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    configs = [config for module in modules for config in getattr(module, "MIXERS", ())]
    return {config.name: config for config in sorted(configs, key=lambda config: config.name)}


def mixer_config(name: str) -> type[MixerConfig]:
    """The config class of the mixer called `name`.

    Raises:
        ValueError: if there is none; the message names the closest.
    """
    configs = mixer_configs()
    if name not in configs:
        close = difflib.get_close_matches(name, configs, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown mixer {name!r}; {hint}the mixers are {', '.join(configs)}")
    return configs[name]
