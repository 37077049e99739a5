"""RWKV-7 (arXiv 2503.14456): a decay for each channel, minus a matrix of rank one along the removal key.

    H_t = (diag(w_t) - s a_t kk_t kk_t^T) H_{t-1} + k_t v_t^T,     |kk_t| = 1,     y_t = H_t^T r_t

with w = exp(-e^(-1/2) sigmoid(.)), in (0.545, 1), and a = sigmoid(.). `a` is a gate for each channel, so it stands on
one side of kk only: u = s a * kk, w = kk of a `LowRank` transition.

| mixer | native s | native range along kk | widened by `eigenvalue_range=(lo, 1)` |
|---|---|---|---|
| rwkv7 | 1 | (e^(-e^(-1/2)) - 1, 1) = (-0.4548, 1) | s = e^(-e^(-1/2)) - lo: 1.5452 for (-1, 1), 0.5452 for (0, 1) |

The range is that of kk^T A kk, which is an eigenvalue where the channels of w and of a agree. Where they don't, A is
not symmetric, eigenvalues may be complex, and norms come up to 1.15 at s = 1: nothing is promised of the spectrum.
Measure it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statetrack.layers import HeadNorm, LowRankMap, l2_normalize, token_shift
from statetrack.mixers.mixer import (
    Mixer,
    State,
    WidenedMixerConfig,
    Widening,
    require_positive,
    require_positive_number,
    split_heads,
    with_options,
)
from statetrack.ops import check_packing, linear_recurrence
from statetrack.transition import EigenvalueRange, LowRank, accumulated, accumulation_dtype

SMALLEST_DECAY = math.exp(-math.exp(-0.5))
"""The lower end of the decays w, 0.5452."""

NATIVE_RANGE = EigenvalueRange(SMALLEST_DECAY - 1, 1)
"""The `eigenvalue_range` with which the mixer is the published one, (-0.4548, 1)."""

_NORM_EPS = 64e-5  # of the published layer, whatever the size of a head


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(WidenedMixerConfig):
    """Options of RWKV-7; `eigenvalue_range` is that along the removal key, (lo, 1) with lo below 0.5452.

    Attributes:
        num_heads: H.
        head_dim: K, the size of keys and values in each head; d_model / num_heads if None.
        decay_rank: rank of the map to the decays; if None, about 1.8 sqrt(D) in multiples of 32, as published.
        removal_rank: rank of the map to the gates `a`; as `decay_rank` if None.
        gate_rank: rank of the map to the output gate; if None, about 0.6 D^0.8 in multiples of 32, as published.
        removal_gain: factor on the logit of `a`. Above 1 it lets `a` saturate early in training.
        token_shift: mix every token with the one before it, channel by channel, ahead of the projections.
        output_norm: normalize what each head reads from its state.
        output_gate: multiply the output by a gate computed from the input.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "rwkv7"
    title: ClassVar[str] = "RWKV-7"
    summary: ClassVar[str] = "a decay for each channel minus a matrix of rank one along a removal key"

    num_heads: int = 4
    head_dim: int | None = None
    decay_rank: int | None = None
    removal_rank: int | None = None
    gate_rank: int | None = None
    removal_gain: float = 1.0
    token_shift: bool = True
    output_norm: bool = True
    output_gate: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "decay_rank", "removal_rank", "gate_rank")
        require_positive_number(self, "removal_gain")
        self.eigenvalue_range.removal(torch.empty(0), SMALLEST_DECAY)  # refuses a range that no scale gives

    def build(self, d_model: int) -> RWKV7:
        return RWKV7(d_model, self)


class RWKV7(Mixer):
    """The time mix of RWKV-7, [B, T, D] -> [B, T, D], with the eigenvalue range as an option.

    It is the time mix of the first layer of the published model. In later layers that model mixes the values with those
    of the first layer (`v_first`); that couples layers, and is left out here.

        x_c = x + (x_before - x) mu_c for c in r, w, k, v, a, g
        r, k, v = W x_c,   w = exp(-e^(-1/2) sigmoid(map_w(x_w))),   a = sigmoid(map_a(x_a)),   g = map_g(x_g)
        kk = normalize(k * k_k),   k <- k (1 + (a - 1) k_a)
        H <- (diag(w) - (s a * kk) kk^T) H + k v^T
        y = W_o (g * (norm(H^T r) + (r . (r_k * k)) v))

    Decays, removal keys and the state are float32 or better whatever the dtype of the activations.

    Args:
        d_model: D.
        config: an `RWKV7Config`; or leave it out and give its fields as keyword options.
    """

    own_start = ("r_proj", "k_proj", "v_proj", "w_map", "a_map", "g_map")

    def __init__(self, d_model: int, config: RWKV7Config | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(RWKV7Config, config, options)
        self.num_heads = h = config.num_heads
        self.head_dim = split_heads(config, d_model)
        size = h * self.head_dim
        decay_rank = config.decay_rank or _published_rank(1.8, 0.5, d_model)
        gate_rank = config.gate_rank or _published_rank(0.6, 0.8, d_model)
        # How much of the token before each of the six inputs takes, in every channel: from all of it to none.
        channel = torch.arange(d_model) / d_model
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        inputs = list(powers) if config.output_gate else [name for name in powers if name != "g"]
        self.mix = nn.ParameterDict(
            {name: nn.Parameter(1 - channel ** powers[name]) for name in inputs} if config.token_shift else {}
        )
        self.r_proj = nn.Linear(d_model, size, bias=False)
        self.k_proj = nn.Linear(d_model, size, bias=False)
        self.v_proj = nn.Linear(d_model, size, bias=False)
        self.o_proj = nn.Linear(size, d_model, bias=False)
        self.w_map = LowRankMap(d_model, decay_rank, size, torch.tanh)
        self.a_map = LowRankMap(d_model, config.removal_rank or decay_rank, size)
        self.g_map = LowRankMap(d_model, gate_rank, size, torch.sigmoid, bias=False) if config.output_gate else None
        self.o_norm = HeadNorm(h, self.head_dim, _NORM_EPS) if config.output_norm else None
        self.widening = Widening(config, h)
        # As published: decays spread over time scales within each head and over all channels.
        linear = torch.arange(size) / max(size - 1, 1)
        zigzag = 2 * torch.arange(self.head_dim) / max(self.head_dim - 1, 1) - 1
        zigzag = (zigzag * zigzag.abs()).repeat(h)
        self.k_k = nn.Parameter(0.71 - 0.1 * (linear - 0.5))
        self.k_a = nn.Parameter(torch.full((size,), 1.02))
        self.r_k = nn.Parameter(torch.full((h, self.head_dim), -0.04))
        with torch.no_grad():
            assert self.w_map.bias is not None
            assert self.a_map.bias is not None
            self.w_map.bias.copy_(-5.5 + 6 * linear + 2.5 * zigzag)
            self.a_map.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (linear - 0.5))
            for projection, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
                projection.weight.uniform_(-bound * d_model**-0.5, bound * d_model**-0.5)

    def init_state(self, batch_size: int) -> State:
        weight = self.r_proj.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        state = {"recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device)}
        return state | ({"shift": weight.new_zeros(batch_size, weight.shape[1])} if self.config.token_shift else {})

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        inputs, after = self._shift(x, state, cu_seqlens)
        transition, k, a = self._transition(inputs)
        # What is written takes the place of what was removed.
        k = k * (1 + (a - 1) * self._heads(accumulated(self.k_a))).to(k.dtype)
        r, v = self._heads(self.r_proj(inputs["r"])), self._heads(self.v_proj(inputs["v"]))
        initial = None if state is None else state["recurrence"]
        o, after["recurrence"] = linear_recurrence(
            transition, r, v, write=k, initial_state=initial, cu_seqlens=cu_seqlens, backend=self.config.backend
        )
        o = o.flatten(2) if self.o_norm is None else self.o_norm(o)
        o = o + ((r * k * self.r_k.to(r.dtype)).sum(-1, keepdim=True) * v).flatten(2)
        if self.g_map is not None:
            o = o * self.g_map(inputs["g"]).to(o.dtype)
        return self.o_proj(o), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> LowRank:
        return self._transition(self._shift(x, state, cu_seqlens)[0])[0]

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [*self.w_map.parameters(), *self.a_map.parameters(), *self.widening.parameters()]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _shift(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[State, State]:
        """The inputs of the projections, each [B, T, D], and the state of the token shift."""
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        if not self.config.token_shift:
            return dict.fromkeys("rwkvag", x), {}
        if state is None:
            state = self.init_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        before, last = token_shift(x, state["shift"], cu_seqlens)
        difference = before - x
        return {name: torch.addcmul(x, difference, mix.to(x.dtype)) for name, mix in self.mix.items()}, {"shift": last}

    def _transition(self, inputs: State) -> tuple[LowRank, Tensor, Tensor]:
        """The transition, the keys as projected and the gates a, each [B, T, H, K]."""
        k = self._heads(self.k_proj(inputs["k"]))
        kk = l2_normalize(accumulated(k) * self._heads(accumulated(self.k_k)), eps=1e-12)
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(self._heads(self.w_map(inputs["w"]))))
        a = torch.sigmoid(self.config.removal_gain * self._heads(self.a_map(inputs["a"])))
        removal = self.widening.removal(a.mT, SMALLEST_DECAY).mT  # `Widening` wants the heads last
        return LowRank(decay, removal * kk, kk), k, a


def _published_rank(factor: float, power: float, d_model: int) -> int:
    return max(32, 32 * round(factor * d_model**power / 32))


MIXERS = (RWKV7Config,)
