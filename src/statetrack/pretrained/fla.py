"""The DeltaNet family of flash-linear-attention (FLA): model types delta_net, gated_deltanet and gated_deltaproduct.

DeltaProduct is read in two layouts: that of FLA today (`k_proj.weight`, the rows of factor 1, then those of factor 2,
and so on), and that of the code of its paper's time, with a list of projections (`k_projs.0.weight`, ...).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from statetrack.mixers.deltanet import (
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
)
from statetrack.model import ModelConfig
from statetrack.pretrained.source import CheckpointError, Options, Rows, Source, renamed
from statetrack.transition import EigenvalueRange

_SWITCH = (True, False)


class _FLASource(Source):
    ignored = (
        "attn_mode",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "use_l2warp",
    )

    @abstractmethod
    def mixer(self, options: Options, d_model: int, norm_eps: float) -> DeltaNetConfig:
        """The mixer of every layer."""

    def config(self, options: Options, weights: Mapping[str, Tensor]) -> ModelConfig:
        if options.get("attn", None) is not None:
            raise CheckpointError(
                f"{options.source}: attn = {options.data['attn']!r} puts attention between the layers, which is not "
                "supported in checkpoints of flash-linear-attention"
            )
        options.require("hidden_act", ("swish", "silu"), "swish")
        d_model, norm_eps = options.size("hidden_size"), options.small("norm_eps", 1e-6)
        return ModelConfig(
            vocab_size=options.size("vocab_size"),
            d_model=d_model,
            num_layers=options.size("num_hidden_layers"),
            mlp_size=self._mlp_size(options, d_model),
            norm_eps=norm_eps,
            tie_embeddings=options.require("tie_word_embeddings", _SWITCH, False),
            mixer=self.mixer(options, d_model, norm_eps),
        )

    def rows(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[Rows]:
        rows = renamed("model.", "", {"embeddings.weight": "embedding.weight", "norm.weight": "norm.weight"})
        block = {"attn_norm.weight": "mixer_norm.weight", "mlp_norm.weight": "mlp_norm.weight"}
        block |= {name: name for name in (f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
            rows += renamed(theirs, ours, block)
            rows += self.mixer_rows(config.layer_mixers()[layer], f"{theirs}attn.", f"{ours}mixer.", weights)  # type: ignore[arg-type]
        return rows

    def mixer_rows(self, mixer: DeltaNetConfig, theirs: str, ours: str, weights: Mapping[str, Tensor]) -> list[Rows]:
        """The rows of a layer's mixer, whose names begin so in the checkpoint and here."""
        parts = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight", "o_proj.weight", "o_norm.weight"]
        parts += ["g_proj.weight"] if mixer.output_gate else []
        parts += ["a_proj.weight", "A_log", "dt_bias"] if isinstance(mixer, GatedDeltaNetConfig) else []
        convolutions = {f"{x}_conv1d.weight": f"convolutions.{x}.weight" for x in "qkv"} if mixer.conv_size else {}
        return renamed(theirs, ours, {part: part for part in parts} | convolutions)

    def _mlp_size(self, options: Options, d_model: int) -> int:
        ratio, size = options.get("hidden_ratio", 4), options.get("intermediate_size", None)
        if size is not None:
            return options.size("intermediate_size")
        # FLA's rule: two thirds of the ratio, for the two matrices that read, rounded up to a multiple of 256.
        return 256 * -(-int(d_model * (4 if ratio is None else ratio) * 2 / 3) // 256)


def _shared(options: Options, norm_eps: float) -> dict[str, object]:
    """The options that all three mixers have."""
    short = options.require("use_short_conv", _SWITCH, True)
    size = options.size("conv_size", 4)
    return {
        "eigenvalue_range": EigenvalueRange(-1 if options.require("allow_neg_eigval", _SWITCH, False) else 0, 1),
        "conv_size": size if short else 0,
        "output_norm_eps": norm_eps,
        # FLA doesn't divide beta by the squared norm of the key.
        "normalize": False,
    }


class DeltaNetSource(_FLASource):
    model_type = "delta_net"

    def mixer(self, options: Options, d_model: int, norm_eps: float) -> DeltaNetConfig:
        options.require("use_beta", (True,), True)
        options.require("use_output_norm", (True,), True)
        options.require("qk_norm", ("l2",), "l2")
        options.require("qk_activation", ("silu",), "silu")
        heads = options.size("num_heads", 16)
        sizes = [options.product(name, d_model, 1) for name in ("expand_k", "expand_v")]
        if any(size % heads for size in sizes):
            raise CheckpointError(
                f"{options.source}: num_heads = {heads} must divide hidden_size times expand_k and expand_v, {sizes}"
            )
        return DeltaNetConfig(
            num_heads=heads,
            head_dim=sizes[0] // heads,
            value_dim=sizes[1] // heads,
            output_gate=options.require("use_gate", _SWITCH, False),
            **_shared(options, norm_eps),  # type: ignore[arg-type]
        )


class GatedDeltaNetSource(_FLASource):
    model_type = "gated_deltanet"

    def mixer(self, options: Options, d_model: int, norm_eps: float) -> DeltaNetConfig:
        head_dim, value_heads = options.size("head_dim", 256), options.get("num_v_heads", None)
        activation = options.require("output_gate_activation", ("swish", "silu", "sigmoid"), "swish")
        return GatedDeltaNetConfig(
            num_heads=options.size("num_heads", 6),
            num_value_heads=None if value_heads is None else options.size("num_v_heads"),
            head_dim=head_dim,
            value_dim=options.product("expand_v", head_dim, 2),
            output_gate=options.require("use_gate", _SWITCH, True),
            gate_activation="sigmoid" if activation == "sigmoid" else "silu",
            **_shared(options, norm_eps),  # type: ignore[arg-type]
        )


class GatedDeltaProductSource(_FLASource):
    """DeltaProduct, and Gated DeltaProduct where it has a forget gate."""

    model_type = "gated_deltaproduct"

    def mixer(self, options: Options, d_model: int, norm_eps: float) -> DeltaNetConfig:
        # Of the older code; what it calls use_gate and use_decay_gate is use_output_gate and use_forget_gate today.
        for name, value in (("use_linear_projs", True), ("skip_householder_values", False), ("norm_first", False)):
            options.require(name, (value,), value)
        head_dim = options.size("head_dim", 256)
        old_gate, old_forget = options.require("use_gate", _SWITCH, True), options.get("use_decay_gate", False)
        forget = options.require("use_forget_gate", _SWITCH, old_forget)
        kind = GatedDeltaProductConfig if forget else DeltaProductConfig
        return kind(
            num_heads=options.size("num_heads", 6),
            head_dim=head_dim,
            value_dim=options.product("expand_v", head_dim, 2),
            num_householder=options.size("num_householder", 1),
            output_gate=options.require("use_output_gate", _SWITCH, old_gate),
            **_shared(options, norm_eps),  # type: ignore[arg-type]
        )

    def mixer_rows(self, mixer: DeltaNetConfig, theirs: str, ours: str, weights: Mapping[str, Tensor]) -> list[Rows]:
        rows = super().mixer_rows(mixer, theirs, ours, weights)
        if not _is_old(weights):
            return rows
        lists = {f"{theirs}{x}_proj.weight": f"{theirs}{x}_projs.{{}}.weight" for x in "kvb"}
        lists |= {f"{theirs}{x}_conv1d.weight": f"{theirs}{x}_conv1ds.{{}}.weight" for x in "kv"}
        # There is a query convolution for each factor, of which the first is used.
        lists[f"{theirs}q_conv1d.weight"] = f"{theirs}q_conv1ds.0.weight"

        def old(row: Rows) -> Rows:
            (name,) = row.theirs
            pattern = lists.get(name, name)
            factors = mixer.num_householder if "{}" in pattern else 1
            return Rows(tuple(pattern.format(factor) for factor in range(factors)), row.ours)

        return [old(row) for row in rows]

    def unused(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> set[str]:
        if not _is_old(weights):
            return set()
        factors = max(getattr(mixer, "num_householder", 1) for mixer in config.mixer_pattern)
        prefixes = [f"model.layers.{layer}.attn.q_conv1ds." for layer in range(config.num_layers)]
        return {f"{prefix}{factor}.weight" for prefix in prefixes for factor in range(1, factors)}


def _is_old(weights: Mapping[str, Tensor]) -> bool:
    return any(".k_projs." in name for name in weights)


SOURCES = (DeltaNetSource, GatedDeltaNetSource, GatedDeltaProductSource)
