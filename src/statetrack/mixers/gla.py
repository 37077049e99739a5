"""Gated linear attention, GLA (arXiv 2312.06635): a decay of its own for each key channel, from the token.

    H_t = diag(g_t) H_{t-1} + k_t v_t^T,     o_t = H_t^T q_t / sqrt(K)

| mixer | native g_t | native eigenvalues | widened by `eigenvalue_range=(lo, hi)` |
|---|---|---|---|
| gla | sigmoid(W_2 W_1 x_t + b)^(1/16) | [0, 1] | lo + (hi - lo) g_t; for (-1, 1) 2 g_t - 1 (arXiv 2411.12537) |

The root keeps gates near 1. A widened gate is below 0 only where the sigmoid is below 2^-16; `gate_normalizer = 1`
takes the sigmoid itself, which reaches both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import RMSNorm
from statetrack.mixers.bounds import FactorBounds, diagonal_bounds, gate_interval, linear_interval
from statetrack.mixers.mixer import (
    Mixer,
    State,
    WidenedMixerConfig,
    Widening,
    half_head_sizes,
    require_positive,
    require_positive_number,
    with_options,
)
from statetrack.ops import check_packing, linear_recurrence
from statetrack.transition import Diagonal, EigenvalueRange, accumulated, accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class GLAConfig(WidenedMixerConfig):
    """Options of GLA.

    Attributes:
        num_heads: H.
        head_dim: K, the size of queries and keys in each head; d_model / (2 num_heads) if None.
        value_dim: V, the size of values in each head; d_model / num_heads if None.
        decay: a decay for each key channel (the original) or one for each head.
        rank: rank of the projection to the gates.
        gate_normalizer: the gate is a sigmoid to the power of 1 / gate_normalizer; 16 is the original.
        gate_gain: factor on the logit of the gate. Above 1 it lets the gate saturate at the ends of its range early in
            training.
        output_norm: RMS-normalize what each head reads from its state.
        output_gate: multiply the normalized output by silu of a gate computed from the input.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "gla"
    title: ClassVar[str] = "GLA"
    summary: ClassVar[str] = "gated linear attention: a decay of its own for each key channel"

    num_heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    decay: Literal["channel", "head"] = "channel"
    rank: int = 16
    gate_normalizer: float = 16.0
    gate_gain: float = 1.0
    output_norm: bool = True
    output_gate: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim", "rank")
        require_positive_number(self, "gate_normalizer", "gate_gain")
        if self.decay not in ("channel", "head"):
            raise ValueError(f"decay must be channel or head, got {self.decay!r}")

    def spectrum(self) -> EigenvalueRange:
        return self.gate_range()

    def head_sizes(self, d_model: int) -> tuple[int, int]:
        """(K, V) for a model dimension."""
        return half_head_sizes(self.num_heads, self.head_dim, self.value_dim, d_model)

    def build(self, d_model: int) -> GLA:
        return GLA(d_model, self)


class GLA(Mixer):
    """Gated linear attention, [B, T, D] -> [B, T, D].

        q, k, v = W x,    g = sigmoid(gate_gain (W_2 W_1 x + b))^(1 / gate_normalizer)
        H <- diag(lo + (hi - lo) g) H + k v^T,    y = W_o (norm(H^T q / sqrt(K)) silu(W_g x))

    Parameters are named as in flash-linear-attention. Gates and the state are float32 or better whatever the dtype of
    the activations.

    Args:
        d_model: D.
        config: a `GLAConfig`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: GLAConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(GLAConfig, config, options)
        h = config.num_heads
        self.key_dim, self.value_dim = config.head_sizes(d_model)
        self.q_proj = nn.Linear(d_model, h * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, h * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, h * self.value_dim, bias=False)
        gates = h * self.key_dim if config.decay == "channel" else h
        self.gk_proj = nn.Sequential(nn.Linear(d_model, config.rank, bias=False), nn.Linear(config.rank, gates))
        self.g_proj = nn.Linear(d_model, h * self.value_dim, bias=False) if config.output_gate else None
        self.g_norm = RMSNorm(self.value_dim, eps=1e-5) if config.output_norm else None
        self.o_proj = nn.Linear(h * self.value_dim, d_model, bias=False)
        self.widening = Widening(config, h)

    def init_state(self, batch_size: int) -> State:
        weight = self.q_proj.weight
        shape = (batch_size, self.config.num_heads, self.key_dim, self.value_dim)
        return {"recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device)}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        h = self.config.num_heads
        o, recurrence = linear_recurrence(
            self.transition(x),
            self.q_proj(x).unflatten(-1, (h, self.key_dim)) * self.key_dim**-0.5,
            self.v_proj(x).unflatten(-1, (h, self.value_dim)),
            write=self.k_proj(x).unflatten(-1, (h, self.key_dim)),
            initial_state=None if state is None else state["recurrence"],
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        if self.g_norm is not None:
            o = self.g_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x)).view_as(o)
        return self.o_proj(o.flatten(2)), {"recurrence": recurrence}

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Diagonal:
        logits = self.config.gate_gain * accumulated(self.gk_proj(x))
        gate = torch.exp(F.logsigmoid(logits) / self.config.gate_normalizer)
        if self.config.decay == "head":
            return Diagonal(self.widening(gate))
        # The range may differ from head to head, so heads come last while gates are widened.
        return Diagonal(self.widening(gate.unflatten(-1, (self.config.num_heads, self.key_dim)).mT).mT)

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [*self.gk_proj.parameters(), *self.widening.parameters()]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        gain, heads = self.config.gate_gain, self.config.num_heads
        first, second, bias = (self.gk_proj.get_parameter(name).double() for name in ("0.weight", "1.weight", "1.bias"))
        logits = linear_interval(gain * (second @ first), scale, gain * bias)
        gates = gate_interval(lambda x: torch.exp(F.logsigmoid(x) / self.config.gate_normalizer), logits)
        lo, hi = (self.widening(gate.view(heads, -1).mT).mT.double() for gate in gates)
        return diagonal_bounds((lo, hi))


MIXERS = (GLAConfig,)
