"""Run directories as `statetrack train` and `statetrack compile` write them.

Their config.json names no model type, so that they are told by its format number and not found in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from statetrack.model import LanguageModel, ModelConfig
from statetrack.plain import from_data
from statetrack.pretrained.source import CheckpointError, Options, Rows, Source, renamed


class RunSource(Source):
    model_type = "a run of statetrack"
    ignored = ("statetrack", "task", "training")
    head = "head.weight"

    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        from statetrack.runs import FORMAT  # which needs the tasks, and they need much

        options.require("format", (FORMAT,), None)
        try:
            return from_data(ModelConfig, options.get("model", {}))
        except ValueError as error:
            raise CheckpointError(f"{options.source}: {error}") from None

    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        with torch.device("meta"):
            names = LanguageModel(config).state_dict()
        # Lower ends are in the file only if they were learned before it was written.
        known = {name for name in names if name in weights or not name.endswith("widening.lower_end")}
        return renamed("", "", {name: name for name in sorted(known - {"head.weight"})})
