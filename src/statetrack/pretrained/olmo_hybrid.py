"""OLMo Hybrid as transformers has it: `OlmoHybridForCausalLM`, model type olmo_hybrid.

Layers of the gated delta rule have their norms before the mixer and the MLP, layers of attention after them. Files are
read under the names that are published and those that the modules of transformers have, which differ in the norms and
in the convolutions: three of their own, or one over queries, keys and values together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from statetrack.mixers.attention import AttentionConfig
from statetrack.mixers.deltanet import GatedDeltaNetConfig
from statetrack.mixers.mixer import MixerConfig
from statetrack.model import ModelConfig, NormPlacement
from statetrack.pretrained.source import CheckpointError, Options, Rows, Source, chunk_lengths, renamed
from statetrack.transition import EigenvalueRange

_LINEAR, _FULL = "linear_attention", "full_attention"


class OlmoHybridSource(Source):
    model_type = "olmo_hybrid"
    ignored = (
        "linear_a_log_max",
        "linear_a_log_min",
        "linear_dt_init_floor",
        "linear_dt_max",
        "linear_dt_min",
    )

    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        options.require("hidden_act", ("silu", "swish"), "silu")
        options.require("attention_bias", (False,), False)
        options.require("attention_dropout", (0, 0.0, None), 0.0)
        norm_eps = options.small("rms_norm_eps", 1e-6)
        layers = options.size("num_hidden_layers", 32)
        kinds = self._layer_types(options, layers)
        mixers: dict[str, MixerConfig] = {
            _LINEAR: self._linear(options),
            _FULL: self._attention(options, norm_eps),
        }
        placements: list[NormPlacement] = ["before" if kind == _LINEAR else "after" for kind in kinds]
        return ModelConfig(
            vocab_size=options.size("vocab_size", 100352),
            d_model=options.size("hidden_size", 3840),
            num_layers=layers,
            mlp_size=options.size("intermediate_size", 11008),
            norm_eps=norm_eps,
            norm_placement=tuple(placements),
            tie_embeddings=options.require("tie_word_embeddings", (True, False), False),
            mixer=tuple(mixers[kind] for kind in kinds),
        )

    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        rows = renamed("model.", "", {"embed_tokens.weight": "embedding.weight", "norm.weight": "norm.weight"})
        mlp = {name: name for name in (f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
        for layer, mixer in enumerate(config.layer_mixers()):
            theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
            rows += renamed(theirs, ours, mlp)
            if isinstance(mixer, GatedDeltaNetConfig):
                norms = {
                    "mixer_norm": ("attention_layer_norm", "input_layernorm"),
                    "mlp_norm": ("feedforward_layer_norm", "post_attention_layernorm"),
                }
                parts, theirs_mixer = [f"{x}_proj.weight" for x in "qkvabgo"], "linear_attn."
                parts += ["A_log", "dt_bias", "o_norm.weight"]
                rows += self._convolutions(f"{theirs}linear_attn.", f"{ours}mixer.convolutions.", weights)
            else:
                # transformers writes the first norm of these layers under a name that is meant for the others.
                norms = {
                    "mixer_norm": ("post_attention_layernorm", "feedforward_layer_norm"),
                    "mlp_norm": ("post_feedforward_layernorm",),
                }
                parts, theirs_mixer = [f"{x}_proj.weight" for x in "qkvo"], "self_attn."
                parts += ["q_norm.weight", "k_norm.weight"]
            for our, candidates in norms.items():
                known = [f"{theirs}{candidate}.weight" for candidate in candidates]
                rows.append(
                    Rows((next((name for name in known if name in weights), known[0]),), (f"{ours}{our}.weight",))
                )
            rows += renamed(f"{theirs}{theirs_mixer}", f"{ours}mixer.", {part: part for part in parts})
        return rows

    def _convolutions(self, theirs: str, ours: str, weights: Mapping[str, Tensor]) -> list[Rows]:
        single, joined = tuple(f"{theirs}{x}_conv1d.weight" for x in "qkv"), f"{theirs}conv1d.weight"
        convolutions = tuple(f"{ours}{x}.weight" for x in "qkv")
        if joined in weights:
            return [Rows((joined,), convolutions)]
        lengths = [len(weights[name]) for name in single if name in weights]
        if len(lengths) == 3 and lengths == chunk_lengths(sum(lengths), 3):
            # transformers, when it writes, cuts the joined convolution into thirds, whatever the three sizes.
            return [Rows(single, convolutions)]
        return [Rows((name,), (our,)) for name, our in zip(single, convolutions, strict=True)]

    def _layer_types(self, options: Options, layers: int) -> list[str]:
        kinds = options.get("layer_types", None)
        if kinds is None:
            kinds = [_FULL if layer % 4 == 3 else _LINEAR for layer in range(layers)]
            kinds[-1] = kinds[-1] if _FULL in kinds else _FULL
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (_LINEAR, _FULL) for kind in kinds):
            raise CheckpointError(
                f"{options.source}: layer_types must say {_LINEAR} or {_FULL} for each of the {layers} layers, got "
                f"{kinds!r}"
            )
        return kinds

    def _linear(self, options: Options) -> GatedDeltaNetConfig:
        attention_heads = options.size("num_attention_heads", 30)
        heads = self._size(options, "linear_num_key_heads", attention_heads)
        key_dim = self._size(options, "linear_key_head_dim", int(0.75 * options.size("hidden_size", 3840) / heads))
        negative = options.require("linear_allow_neg_eigval", (True, False), True)
        return GatedDeltaNetConfig(
            eigenvalue_range=EigenvalueRange(-1 if negative else 0, 1),
            num_heads=heads,
            num_value_heads=self._size(options, "linear_num_value_heads", attention_heads),
            head_dim=key_dim,
            value_dim=self._size(options, "linear_value_head_dim", 2 * key_dim),
            conv_size=options.size("linear_conv_kernel_dim", 4),
            output_norm_eps=1e-5,  # that of FLA, whatever rms_norm_eps is
            normalize=False,
            output_gate=True,
        )

    def _attention(self, options: Options, norm_eps: float) -> AttentionConfig:
        heads, theta = options.size("num_attention_heads", 30), self._rope_theta(options)
        head_dim = options.get("head_dim", None)
        return AttentionConfig(
            num_heads=heads,
            num_key_value_heads=self._size(options, "num_key_value_heads", heads),
            head_dim=None if head_dim is None else options.size("head_dim"),
            rotary=theta is not None,
            qk_norm=True,
            qk_norm_eps=norm_eps,
            rope_theta=AttentionConfig.rope_theta if theta is None else theta,
        )

    def _rope_theta(self, options: Options) -> float | None:
        rope = options.get("rope_parameters", None) or {}
        if isinstance(rope, dict) and rope.get("rope_theta") is None:
            return None
        theta = rope["rope_theta"] if isinstance(rope, dict) else None
        if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise CheckpointError(f"{options.source}: rope_parameters must hold a positive rope_theta, got {rope!r}")
        if (kind := rope.get("rope_type", "default")) != "default":
            raise CheckpointError(f"{options.source}: rope_type = {kind!r} is not supported here, only 'default'")
        return theta

    def _size(self, options: Options, name: str, default: int) -> int:
        """The size of an option that null leaves to its default."""
        return default if options.get(name, None) is None else options.size(name)


SOURCES = (OlmoHybridSource,)
