"""This package's own models as `statetrack.hf` saves them, model type statetrack; transformers is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from statetrack.model import LanguageModel, ModelConfig
from statetrack.plain import from_data
from statetrack.pretrained.source import CheckpointError, Options, Rows, Source, renamed


class StatetrackSource(Source):
    model_type = "statetrack"
    head = "model.head.weight"

    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        own = {f.name: options.get(f.name, None) for f in fields(ModelConfig) if f.name in options.data}
        try:
            return from_data(ModelConfig, own)
        except ValueError as error:
            raise CheckpointError(f"{options.source}: {error}") from None

    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        with torch.device("meta"):
            names = LanguageModel(config).state_dict()
        # Lower ends are in the file only if they were learned before it was written.
        known = {n for n in names if f"model.{n}" in weights or not n.endswith("widening.lower_end")}
        return renamed("model.", "", {name: name for name in sorted(known - {"head.weight"})})


SOURCES = (StatetrackSource,)
