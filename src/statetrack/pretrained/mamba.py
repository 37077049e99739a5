"""Mamba and Mamba-2 as transformers has them: `MambaForCausalLM`, `Mamba2ForCausalLM`, model types mamba and mamba2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from statetrack.mixers.mamba import MambaConfig
from statetrack.mixers.mamba2 import Mamba2Config
from statetrack.mixers.mixer import MixerConfig
from statetrack.model import ModelConfig
from statetrack.pretrained.source import CheckpointError, Options, Rows, Source, renamed

_IGNORED = (
    "intermediate_size",  # expand * hidden_size, whatever it says
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
)


class _MambaSource(Source):
    def model(self, options: Options, mixer: MixerConfig, *, tied: bool) -> ModelConfig:
        return ModelConfig(
            vocab_size=options.size("vocab_size"),
            d_model=options.size("hidden_size"),
            num_layers=options.size("num_hidden_layers"),
            norm_eps=options.small("layer_norm_epsilon", 1e-5),
            residual_in_float32=options.require("residual_in_fp32", (True, False), True),
            tie_embeddings=options.require("tie_word_embeddings", (True, False), tied),
            mixer=mixer,
        )

    def require_plain(self, options: Options) -> None:
        """Refuses what neither mixer has."""
        options.require("hidden_act", ("silu", "swish"), "silu")

    def biases(self, options: Options) -> dict[str, Any]:
        return {
            "proj_bias": options.require("use_bias", (True, False), False),
            "conv_bias": options.require("use_conv_bias", (True, False), True),
        }

    def layers(self, config: ModelConfig, weights: Mapping[str, Tensor], mixer: tuple[str, ...]) -> list[Rows]:
        # The first published checkpoints say embedding for embeddings.
        old = "backbone.embedding.weight"
        rows = [
            Rows((old if old in weights else "backbone.embeddings.weight",), ("embedding.weight",)),
            Rows(("backbone.norm_f.weight",), ("norm.weight",)),
        ]
        chosen = config.layer_mixers()[0]
        assert isinstance(chosen, MambaConfig | Mamba2Config)
        mixer += ("conv1d.bias",) if chosen.conv_bias else ()
        mixer += ("in_proj.bias", "out_proj.bias") if chosen.proj_bias else ()
        for layer in range(config.num_layers):
            theirs, ours = f"backbone.layers.{layer}.", f"blocks.{layer}."
            rows += renamed(
                theirs, ours, {"norm.weight": "mixer_norm.weight"} | {f"mixer.{n}": f"mixer.{n}" for n in mixer}
            )
        return rows


class MambaSource(_MambaSource):
    model_type = "mamba"
    ignored = (*_IGNORED, "use_associative_scan", "use_mambapy")

    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        self.require_plain(options)
        rank = options.get("time_step_rank", "auto")
        mixer = MambaConfig(
            eigenvalue_range=(0, 1),  # type: ignore[arg-type]
            state_size=options.size("state_size", 16),
            expand=options.product("expand", 1, 2),
            dt_rank=None if rank == "auto" else rank,
            conv_size=options.size("conv_kernel", 4),
            **self.biases(options),
        )
        return self.model(options, mixer, tied=True)

    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        linear = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight")
        return self.layers(config, weights, (*linear, "conv1d.weight", "A_log", "D"))


class Mamba2Source(_MambaSource):
    model_type = "mamba2"
    ignored = (*_IGNORED, "chunk_size", "time_step_rank")

    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        self.require_plain(options)
        shortest, longest = self._limits(options)
        mixer = Mamba2Config(
            eigenvalue_range=(0, 1),  # type: ignore[arg-type]
            num_heads=options.size("num_heads", 128),
            head_dim=options.size("head_dim", 64),
            state_size=options.size("state_size", 128),
            n_groups=options.size("n_groups", 8),
            expand=options.product("expand", 1, 2),
            conv_size=options.size("conv_kernel", 4),
            output_norm_eps=options.small("layer_norm_epsilon", 1e-5),
            **self.biases(options),
            dt_min=shortest,
            dt_max=None if math.isinf(longest) else longest,
        )
        return self.model(options, mixer, tied=False)

    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        mixer = (
            "in_proj.weight",
            "conv1d.weight",
            "A_log",
            "dt_bias",
            "D",
            "norm.weight",
            "out_proj.weight",
        )
        return self.layers(config, weights, mixer)

    def _limits(self, options: Options) -> tuple[float, float]:
        limits = options.get("time_step_limit", (0.0, math.inf))
        try:
            # Infinity is no JSON: some versions of transformers write it as {"__float__": "Infinity"}.
            low, high = (float(limit["__float__"] if isinstance(limit, dict) else limit) for limit in limits)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{options.source}: time_step_limit must be two numbers, got {limits!r}") from None
        return low, high


SOURCES = (MambaSource, Mamba2Source)
