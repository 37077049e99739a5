"""Models of known sizes for pre-training, by name: `deltanet-340m`. The sizes are in presets.toml beside this file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from statetrack.config import from_data
from statetrack.mixers.mixer import WidenedMixerConfig
from statetrack.model import ModelConfig
from statetrack.transition import EigenvalueRange

REFERENCE_VOCABULARY = 32_000
"""The vocabulary with which the number of parameters of a preset is stated, where that includes the embeddings."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model of a known size.

    Attributes:
        name: mixer and size, `deltanet-340m`.
        parameters: about how many parameters the model has.
        with_embeddings: whether these include the embeddings, of 32,000 tokens, which are the output layer as well.
    """

    name: str
    parameters: int
    with_embeddings: bool


def presets() -> tuple[Preset, ...]:
    """All presets, mixer by mixer from the smallest to the largest."""
    return tuple(
        Preset(name=f"{mixer}-{size}", **_file()["sizes"][size])
        for mixer, sizes in _file()["models"].items()
        for size in sizes
    )


def preset(
    name: str, *, vocab_size: int, eigenvalue_range: EigenvalueRange | tuple[float, float] | None = None
) -> ModelConfig:
    """The model of a preset.

    Args:
        name: mixer and size, `deltanet-340m`.
        vocab_size: number of token ids.
        eigenvalue_range: that of the mixer; None for the mixer's own, which is (-1, 1).

    Raises:
        ValueError: if there is no such preset, or the mixer can't have the range.
    """
    mixer_name, _, size = name.rpartition("-")
    try:
        options: dict[str, Any] = _file()["models"][mixer_name][size]
    except KeyError:
        known = ", ".join(there.name for there in presets())
        raise ValueError(f"unknown preset {name!r}; there are {known}") from None
    mixer = {"name": mixer_name, **options["mixer"]}
    model = from_data(
        ModelConfig,
        {
            "vocab_size": vocab_size,
            "tie_embeddings": True,
            "initializer_range": 0.02,
            **options["model"],
            "mixer": mixer,
        },
    )
    if eigenvalue_range is None:
        return model
    assert isinstance(model.mixer, WidenedMixerConfig)
    return replace(model, mixer=replace(model.mixer, eigenvalue_range=EigenvalueRange.of(eigenvalue_range)))


@cache
def _file() -> dict[str, Any]:
    file = resources.files("statetrack.pretraining") / "presets.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
