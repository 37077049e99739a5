"""Checkpoints of other projects, one file a source; a file's `SOURCES` puts them into the registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from statetrack.mixers.mixer import MixerConfig, WidenedMixerConfig
from statetrack.model import LanguageModel, ModelConfig
from statetrack.pretrained.files import model_directory, read_config, read_weights
from statetrack.pretrained.run import RunSource
from statetrack.pretrained.source import CheckpointError, Options, Rows, Source, chunk_lengths
from statetrack.transition import EigenvalueRange, EigenvalueRangeLike
from statetrack.weights import WeightsError, expected_shapes, misfit

__all__ = ["CheckpointError", "Options", "Rows", "Source", "from_pretrained", "sources"]

Widenings = Literal["reinterpret", "preserve"]


@cache
def sources() -> dict[str, Source]:
    """All sources by `model_type`: the registry. A new file here with a `SOURCES` tuple is found by itself."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = [source for module in modules for source in getattr(module, "SOURCES", ())]
    return {source.model_type: source() for source in sorted(found, key=lambda source: source.model_type)}


def from_pretrained(
    path: Path | str,
    *,
    eigenvalue_range: EigenvalueRangeLike | None = None,
    widening: Widenings = "reinterpret",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The model of a checkpoint of flash-linear-attention, transformers or `statetrack.hf`, or of a run directory.

    It is in evaluation mode, on the CPU.

    Args:
        path: a local directory with config.json and model.safetensors, or shards and model.safetensors.index.json; or
            the directory of a pre-training run that has ended.
        eigenvalue_range: range of the eigenvalues; None for that of the checkpoint.
        widening: how a range other than the checkpoint's comes about. "reinterpret" reads the same weights through the
            other map from gates to eigenvalues, as the paper does (arXiv 2411.12537): the function changes at once, and
            fine-tuning starts from there. "preserve" makes the lower end of the range a parameter of each head that
            starts where the checkpoint has it (`learn_lower_end`): the function is the checkpoint's at first, and
            fine-tuning can open the range down to -1.
        dtype: dtype of the weights; None for that which each has in the checkpoint.

    Raises:
        CheckpointError: if the directory can't be read; for a model_type or a value of an option that is not supported,
            by name; or naming every missing, extra or misshapen tensor.
        ValueError: for an unknown widening, a range that it can't have, or a dtype that is not floating-point.
    """
    if widening not in ("reinterpret", "preserve"):
        raise ValueError(f"widening must be reinterpret or preserve, got {widening!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype of torch, got {dtype!r}")
    wanted = None if eigenvalue_range is None else EigenvalueRange.of(eigenvalue_range)
    if widening == "preserve" and wanted not in (None, EigenvalueRange(-1, 1)):
        raise ValueError(
            "widening='preserve' learns the lower end, anywhere in [-1, 0]: leave eigenvalue_range out or give "
            f"(-1, 1), got ({wanted})"
        )
    directory = model_directory(Path(path))
    data = read_config(directory)
    is_run = "format" in data and "model_type" not in data
    source = RunSource() if is_run else _source(data.get("model_type"), directory)
    weights = read_weights(directory)
    options = Options(data, f"{directory / 'config.json'}")
    config = source.config(options, weights)
    options.refuse_others(frozenset(source.ignored))
    model = _load(_widened(config, wanted, widening), weights, source, directory)
    return (model if dtype is None else model.to(dtype)).eval()


def _source(model_type: object, directory: Path) -> Source:
    known = sources()
    if not isinstance(model_type, str) or model_type not in known:
        close = difflib.get_close_matches(str(model_type), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise CheckpointError(
            f"{directory} has the model_type {model_type!r}, which can't be read; {hint}those that can are "
            f"{', '.join(known)}"
        )
    return known[model_type]


def _widened(config: ModelConfig, wanted: EigenvalueRange | None, widening: Widenings) -> ModelConfig:
    def widened(mixer: MixerConfig) -> MixerConfig:
        if not isinstance(mixer, WidenedMixerConfig):
            return mixer  # attention, between layers that have eigenvalues
        if widening == "preserve":
            return replace(mixer, learn_lower_end=True)
        return mixer if wanted is None else replace(mixer, eigenvalue_range=wanted)

    return replace(config, mixer=tuple(map(widened, config.mixer_pattern)))


def _load(config: ModelConfig, weights: dict[str, Tensor], source: Source, directory: Path) -> LanguageModel:
    try:  # before memory is taken for what a config claims
        shapes = expected_shapes(config, weights)
    except WeightsError as error:
        raise CheckpointError(f"{directory} does not fit its model: {error}") from None
    rows = source.rows(config, weights)
    if not config.tie_embeddings:
        rows = [*rows, Rows((source.head,), ("head.weight",))]
    named = sorted(name for row in rows for name in row.ours)
    # Lower ends that a checkpoint has not learned start where their config says.
    ours = {name: shape for name, shape in shapes.items() if name in named or not name.endswith("widening.lower_end")}
    if named != sorted(ours):
        raise AssertionError(f"{type(source).__name__} does not name each parameter once: {set(named) ^ set(ours)}")

    expected: dict[str, tuple[int, ...]] = {}
    for row in rows:
        lengths = chunk_lengths(sum(ours[name][0] for name in row.ours), len(row.theirs))
        rest = ours[row.ours[0]][1:]
        expected |= {name: (length, *rest) for name, length in zip(row.theirs, lengths, strict=True)}
    unused = source.unused(config, weights)
    found = {name: tensor for name, tensor in weights.items() if name not in unused}
    if config.tie_embeddings and source.head in found:
        (embedding,) = (row.theirs[0] for row in rows if row.ours == ("embedding.weight",))
        head = found.pop(source.head)
        if embedding in found and not torch.equal(head, found[embedding]):
            raise CheckpointError(
                f"{directory} says that its embeddings are tied, but {source.head} is not {embedding}"
            )
    if problems := misfit(expected, found):
        raise CheckpointError(f"{directory} does not fit the model of its config: {problems}")
    if strange := sorted(name for name in expected if not found[name].is_floating_point()):
        raise CheckpointError(f"{directory} has weights that are not floating-point numbers: {', '.join(strange)}")

    state = {}
    for row in rows:
        joined = torch.cat([found[name] for name in row.theirs])  # a copy, so that no memory is the file's
        pieces = joined.split([ours[name][0] for name in row.ours])
        state |= dict(zip(row.ours, (piece.clone() for piece in pieces) if len(pieces) > 1 else pieces, strict=True))
    model = LanguageModel(config)
    model.load_state_dict(state, strict=False, assign=True)
    return model
