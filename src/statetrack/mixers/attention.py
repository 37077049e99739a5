"""Causal softmax attention (arXiv 1706.03762) with rotary positions: a baseline, whose memory grows with the tokens.

    y_t = W_o sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s,     q and k rotated by their positions (arXiv 2104.09864)

It has no state-transition matrix and so no eigenvalue range. With few key heads it is grouped-query attention
(arXiv 2305.13245), with `qk_norm` that of OLMo 2 (arXiv 2501.00656), with `window` sliding-window attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import RMSNorm
from statetrack.mixers.mixer import (
    Mixer,
    MixerConfig,
    State,
    require_positive,
    require_positive_number,
    split_heads,
    with_options,
)
from statetrack.ops import check_packing
from statetrack.ops.packing import groups_of, padded_rows, tokens_of
from statetrack.ops.vmapped import is_vmapped, vmapped_over_heads
from statetrack.transition import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Options of attention.

    Attributes:
        num_heads: H, heads of queries.
        num_key_value_heads: heads of keys and values, a divisor of num_heads; num_heads if None.
        head_dim: K, even; d_model / num_heads if None.
        rope_theta: base of the wavelengths of the rotary positions.
        rotary: rotate queries and keys by their positions; without it attention knows no order but causality.
        qk_norm: RMS-normalize all queries of a token together, and all its keys.
        qk_norm_eps: added to the mean square inside that normalization.
        window: how many tokens a token sees, itself included; None for all before it.
    """

    name: ClassVar[str] = "attention"
    title: ClassVar[str] = "Attention"
    summary: ClassVar[str] = "causal softmax attention with rotary positions; no recurrence, a growing cache"
    absent: ClassVar[dict[str, str]] = {
        "eigenvalue_range": "attention has no eigenvalue_range: it keeps all tokens and has no state-transition matrix"
    }

    num_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rotary: bool = True
    qk_norm: bool = False
    qk_norm_eps: float = 1e-5
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "num_key_value_heads", "head_dim", "window")
        require_positive_number(self, "rope_theta", "qk_norm_eps")
        if self.num_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} must divide num_heads = {self.num_heads}"
            )

    def build(self, d_model: int) -> Attention:
        return Attention(d_model, self)


class Attention(Mixer):
    """Causal softmax attention, [B, T, D] -> [B, T, D].

    Its state is the cache of keys and values: `k` and `v` [B, L, key heads, K], and `length` [B], how many of the L
    places of each row are taken. L grows with the tokens, also where there is a window.

    Args:
        d_model: D.
        config: an `AttentionConfig`; or leave it out and give its fields as keyword options.
    """

    growing = True

    def __init__(self, d_model: int, config: AttentionConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(AttentionConfig, config, options)
        self.head_dim = split_heads(config, d_model)
        if config.rotary and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self.key_heads = config.num_key_value_heads or config.num_heads
        q_size, k_size = config.num_heads * self.head_dim, self.key_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, q_size, bias=False)
        self.k_proj = nn.Linear(d_model, k_size, bias=False)
        self.v_proj = nn.Linear(d_model, k_size, bias=False)
        self.o_proj = nn.Linear(q_size, d_model, bias=False)
        self.q_norm = RMSNorm(q_size, eps=config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(k_size, eps=config.qk_norm_eps) if config.qk_norm else None

    def init_state(self, batch_size: int) -> State:
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch_size, 0, self.key_heads, self.head_dim)
        length = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return {"k": empty, "v": empty.clone(), "length": length}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        heads = [projected.unflatten(-1, (-1, self.head_dim)) for projected in (q, k, v)]
        if cu_seqlens is None:
            o, after = self._rows(heads, state, None)
        else:
            o, after = self._packed(heads, state, cu_seqlens)
        return self.o_proj(o.flatten(2)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> None:
        return None

    def recurrence_flops(self, length: int) -> float:
        seen = min((length + 1) / 2, self.config.window or length)  # tokens, on average
        return 4.0 * self.config.num_heads * self.head_dim * seen

    def _packed(self, heads: list[Tensor], state: State | None, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        """Outputs [1, T, H, K] of packed queries, keys and values, and the state."""
        rows = padded_rows(cu_seqlens, heads[0])
        if state is not None:
            o, after = self._rows([rows.unpack(x) for x in heads], state, rows.lengths)
            return rows.pack(o), after
        q, k, v = heads
        if self.config.rotary:
            positions = tokens_of(cu_seqlens, q).offset.unsqueeze(0)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        # Sequences of similar length share a call: the padding at their end, which no token sees, is less than half.
        groups = groups_of(cu_seqlens, q)
        outputs = []
        for take in groups.groups:
            row_positions = torch.arange(take.tokens.shape[1], device=q.device).unsqueeze(0)
            outputs.append(self._attend(take(q), take(k), take(v), row_positions, causal=True))
        return groups.join_tokens(outputs), {"k": rows.unpack(k), "v": rows.unpack(v), "length": rows.lengths}

    def _rows(self, heads: list[Tensor], state: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """Outputs [B, T, H, K] of rows, which have padding after `lengths` [B] tokens unless that is None."""
        q, k, v = heads
        b, t = q.shape[:2]
        before = torch.zeros(b, dtype=torch.long, device=q.device) if state is None else state["length"]
        positions = before.unsqueeze(1) + torch.arange(t, device=q.device)
        if self.config.rotary:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        if state is not None:
            # A row's keys lie at their positions, so a shorter row's new keys overwrite its padding.
            places = positions[:, :, None, None].expand_as(k)
            k = F.pad(state["k"].to(k.dtype), (0, 0, 0, 0, 0, t)).scatter(1, places, k)
            v = F.pad(state["v"].to(v.dtype), (0, 0, 0, 0, 0, t)).scatter(1, places, v)
        o = self._attend(q, k, v, positions[:1] if state is None else positions, causal=state is None)
        return o, {"k": k, "v": v, "length": before + (t if lengths is None else lengths)}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, causal: bool) -> Tensor:
        """Outputs [B, T, H, K] of queries at `positions` [B, T] or [1, T] on keys at 0, 1, ...

        Args:
            causal: the positions are those of the keys.
        """
        mask = None
        if not causal or self.config.window is not None:
            distance = positions.unsqueeze(2) - torch.arange(k.shape[1], device=k.device)
            mask = distance >= 0 if self.config.window is None else (distance >= 0) & (distance < self.config.window)
            mask = mask.unsqueeze(1)
        attend = partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.key_heads != self.config.num_heads,
        )
        heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        o = vmapped_over_heads(attend, [1, 1, 1], *heads) if is_vmapped() else attend(heads[0], heads[1], heads[2])
        return o.transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates the pairs (i, i + K / 2) of heads [B, T, H, K] by angles that grow with the positions [B, T]."""
        wide, half = accumulation_dtype(x), self.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
        angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(2)
        cos, sin = angles.cos(), angles.sin()
        first, second = x.to(wide).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


MIXERS = (AttentionConfig,)
