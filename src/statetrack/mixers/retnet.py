"""RetNet's retention (arXiv 2307.08621): linear attention with rotary positions and a fixed decay for each head.

    H_t = gamma_h H_{t-1} + k_t v_t^T,     o_t = H_t^T q_t / sqrt(K),     gamma_h = 1 - 2^(-5 - h)

| mixer | native decay | native eigenvalues | widened |
|---|---|---|---|
| retnet | 1 - 2^(-5 - h) for head h = 0, 1, ... | [31/32, 1) | not possible: there is no gate |

The decay depends on no token, so that there is no gate to widen, and no range that would let a token flip the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import head_norm
from statetrack.mixers.mixer import (
    Mixer,
    MixerConfig,
    State,
    require_positive,
    require_positive_number,
    split_heads,
    with_options,
)
from statetrack.ops import linear_recurrence
from statetrack.ops.packing import tokens_of
from statetrack.transition import Diagonal, EigenvalueRange, accumulated, accumulation_dtype

_NO_RANGE = (
    "retnet has no eigenvalue_range: its decays are fixed positive numbers that depend on no token, so there is no "
    "gate to widen and nothing that a token could flip; for signed gates take gla or mamba2"
)


@dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    """Options of RetNet. It has no `eigenvalue_range`, and says why if it is asked for one.

    Attributes:
        num_heads: H.
        head_dim: K, the size of queries and keys in each head, an even number; d_model / num_heads if None.
        value_dim: V, the size of values in each head; 2 head_dim if None.
        rotary_base: wavelengths of the rotary positions run from 2 pi to 2 pi rotary_base tokens.
        output_norm: normalize what each head reads from its state (group norm).
        output_gate: multiply the normalized output by silu of a gate computed from the input.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "retnet"
    title: ClassVar[str] = "RetNet"
    summary: ClassVar[str] = "linear attention with rotary positions and a fixed decay for each head"
    rotary_positions: ClassVar[bool] = True
    absent: ClassVar[dict[str, str]] = {"eigenvalue_range": _NO_RANGE, "learn_lower_end": _NO_RANGE}

    num_heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    rotary_base: float = 10000.0
    output_norm: bool = True
    output_gate: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim")
        require_positive_number(self, "rotary_base")

    def spectrum(self) -> EigenvalueRange:
        return EigenvalueRange(1 - 2**-5, 1 - 2 ** -(4 + self.num_heads))

    def head_sizes(self, d_model: int) -> tuple[int, int]:
        """(K, V) for a model dimension."""
        key_dim = split_heads(self, d_model)
        if key_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {key_dim}")
        return key_dim, self.value_dim or 2 * key_dim

    def build(self, d_model: int) -> RetNet:
        return RetNet(d_model, self)


class RetNet(Mixer):
    """Multi-scale retention, [B, T, D] -> [B, T, D].

        q, k = rotate(W x, position),    v = W x
        H <- gamma H + k v^T,    y = W_o (group_norm(H^T q / sqrt(K)) silu(W_g x))

    Parameters are named as in flash-linear-attention; the group norm, which that library replaces by an RMS norm, is
    the paper's. The state holds the position of the next token beside the recurrence; packed sequences start at 0. The
    state and the angles are float32 or better whatever the dtype of the activations.

    Args:
        d_model: D.
        config: a `RetNetConfig`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: RetNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(RetNetConfig, config, options)
        h = config.num_heads
        self.key_dim, self.value_dim = config.head_sizes(d_model)
        self.q_proj = nn.Linear(d_model, h * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, h * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, h * self.value_dim, bias=False)
        self.g_proj = nn.Linear(d_model, h * self.value_dim, bias=False) if config.output_gate else None
        self.g_norm = nn.GroupNorm(h, h * self.value_dim) if config.output_norm else None
        self.o_proj = nn.Linear(h * self.value_dim, d_model, bias=False)

    def init_state(self, batch_size: int) -> State:
        weight = self.q_proj.weight
        shape = (batch_size, self.config.num_heads, self.key_dim, self.value_dim)
        return {
            "recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device),
            "position": torch.zeros(batch_size, dtype=torch.long, device=weight.device),
        }

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        state = self.starting_state(x, state, cu_seqlens)
        h, after = self.config.num_heads, {}
        positions, after["position"] = _positions(x, state["position"], cu_seqlens)
        rotation = self._rotation(positions)
        o, after["recurrence"] = linear_recurrence(
            self.transition(x),
            _rotate(self.q_proj(x).unflatten(-1, (h, self.key_dim)), *rotation) * self.key_dim**-0.5,
            self.v_proj(x).unflatten(-1, (h, self.value_dim)),
            write=_rotate(self.k_proj(x).unflatten(-1, (h, self.key_dim)), *rotation),
            initial_state=state["recurrence"],
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        norm = self.g_norm
        o = o.flatten(2) if norm is None else head_norm(o, norm.weight, norm.bias, norm.eps)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Diagonal:
        exponents = torch.arange(-5, -5 - self.config.num_heads, -1, dtype=accumulation_dtype(x), device=x.device)
        return Diagonal((1 - torch.exp2(exponents)).expand(x.shape[0], x.shape[1], -1))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at positions [B, T]: [B, T, 1, K / 2], float64."""
        # An angle at position 10^6 has an error of several degrees in float32.
        exponents = torch.arange(0, self.key_dim, 2, dtype=torch.float64, device=positions.device) / self.key_dim
        angles = positions[..., None, None].double() * self.config.rotary_base**-exponents
        return angles.cos(), angles.sin()


def _positions(x: Tensor, start: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The positions of tokens [B, T], and of the token after the last of each sequence."""
    if cu_seqlens is None:
        return start[:, None] + torch.arange(x.shape[1], device=x.device), start + x.shape[1]
    places = tokens_of(cu_seqlens, x)
    return (start.index_select(0, places.sequence) + places.offset)[None], start + places.lengths


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + K / 2) of channels [B, T, H, K], computed in float32 or better."""
    wide = accumulated(x)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    first, second = wide.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


MIXERS = (RetNetConfig,)
