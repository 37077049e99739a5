"""Weights in safetensors files: how they are read, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from statetrack.model import LanguageModel, ModelConfig


class WeightsError(ValueError):
    """A file of weights that can't be read, and why."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        WeightsError: if the file is cut short or is not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the handle itself can't be iterated over
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or cut short ({error})") from None


def expected_shapes(config: ModelConfig, found: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes that a config gives to a model's tensors, by name, before any memory is taken for them.

    Args:
        config: of the model.
        found: tensors that may be its weights.

    Raises:
        WeightsError: for a config with more layers than there are tensors, or sizes that no memory holds.
    """
    if config.num_layers > len(found):
        raise WeightsError(f"its config asks for {config.num_layers:,} layers, and there are {len(found):,} tensors")
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in LanguageModel(config).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(f"its config asks for sizes that no memory holds ({str(error).splitlines()[0]})") from None


def misfit(expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> str:
    """The missing, extra and misshapen tensors in words, a few of each; empty if they are exactly the expected ones.

    Args:
        expected: shapes by name.
        found: tensors by name.
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    problems = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    return "; ".join(f"{kind} {_some(names)}" for kind, names in problems if names)


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
