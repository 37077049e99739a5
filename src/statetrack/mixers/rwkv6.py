"""RWKV-6 (arXiv 2404.05892): a diagonal state with a decay for each channel, read before it is updated.

    H_t = diag(a_t) H_{t-1} + k_t v_t^T,     y_t = (H_{t-1} + diag(u) k_t v_t^T)^T r_t

| mixer | native a_t | native eigenvalues | widened by `eigenvalue_range=(-1, 1)` |
|---|---|---|---|
| rwkv6 | exp(-exp(.)) | [0, 1] | 2 exp(-exp(.)) - 1, in [-1, 1] |

A token reads the state without its own decay, so an eigenvalue of -1 shows in the output one token later; the bonus `u`
is what a token sees of itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import HeadNorm, LowRankMap, token_shift
from statetrack.mixers.bounds import FactorBounds, diagonal_bounds, gate_interval
from statetrack.mixers.mixer import (
    Mixer,
    State,
    WidenedMixerConfig,
    Widening,
    require_positive,
    split_heads,
    with_options,
)
from statetrack.ops import linear_recurrence
from statetrack.ops.packing import Move, Packing, packing_of
from statetrack.transition import Diagonal, EigenvalueRange, accumulation_dtype

_NORM_EPS = 64e-5  # of the published layer, whatever the size of a head
_INPUTS = "wkvrg"  # in the order of the published parameters


@dataclass(frozen=True, kw_only=True)
class RWKV6Config(WidenedMixerConfig):
    """Options of RWKV-6.

    Attributes:
        num_heads: H.
        head_dim: K, the size of keys and values in each head; d_model / num_heads if None.
        shift_rank: rank of the maps that say how much of the token before each input takes.
        decay_rank: rank of the map to the decays.
        output_norm: normalize what each head reads from its state.
        output_gate: multiply the output by silu of a gate computed from the input.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "rwkv6"
    title: ClassVar[str] = "RWKV-6"
    summary: ClassVar[str] = "a decay for each channel that depends on the token; the state is read before its update"

    num_heads: int = 4
    head_dim: int | None = None
    shift_rank: int = 32
    decay_rank: int = 64
    output_norm: bool = True
    output_gate: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "shift_rank", "decay_rank")

    def spectrum(self) -> EigenvalueRange:
        return self.gate_range()

    def reads_before_update(self) -> bool:
        return True

    def build(self, d_model: int) -> RWKV6:
        return RWKV6(d_model, self)


class RWKV6(Mixer):
    """The time mix of RWKV-6, [B, T, D] -> [B, T, D], with the eigenvalue range as an option.

        d = x_before - x,   x_c = x + d (mu_c + map_c(x + d mu_x)) for c in w, k, v, r, g
        r, k, v = W x_c,   a = lo + (hi - lo) exp(-exp(map(x_w))),   g = silu(W_g x_g)
        y = W_o (g * norm((H + diag(u) k v^T)^T r)),   then H <- diag(a) H + k v^T

    Decays and the state are float32 or better whatever the dtype of the activations.

    Args:
        d_model: D.
        config: an `RWKV6Config`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: RWKV6Config | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(RWKV6Config, config, options)
        self.num_heads = h = config.num_heads
        self.head_dim = split_heads(config, d_model)
        size = h * self.head_dim
        self.inputs = _INPUTS if config.output_gate else _INPUTS.replace("g", "")
        # As published: how much of the token before an input takes, in every channel, from all of it to none.
        channel = torch.arange(d_model) / d_model
        self.mix_x = nn.Parameter(1 - channel)
        self.mix = nn.Parameter(torch.stack([1 - channel ** (0.5 if c in "rg" else 1.0) for c in self.inputs]))
        self.mix_down = nn.Linear(d_model, len(self.inputs) * config.shift_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(len(self.inputs), config.shift_rank, d_model).uniform_(-0.01, 0.01))
        self.r_proj = nn.Linear(d_model, size, bias=False)
        self.k_proj = nn.Linear(d_model, size, bias=False)
        self.v_proj = nn.Linear(d_model, size, bias=False)
        self.g_proj = nn.Linear(d_model, size, bias=False) if config.output_gate else None
        self.o_proj = nn.Linear(size, d_model, bias=False)
        self.w_map = LowRankMap(d_model, config.decay_rank, size, torch.tanh)
        self.o_norm = HeadNorm(h, self.head_dim, _NORM_EPS) if config.output_norm else None
        self.widening = Widening(config, h)
        linear = torch.arange(size) / max(size - 1, 1)
        zigzag = 0.1 * ((torch.arange(size) + 1) % 3 - 1)
        self.bonus = nn.Parameter((1 - linear + zigzag).view(h, self.head_dim))
        with torch.no_grad():
            assert self.w_map.bias is not None
            self.w_map.bias.copy_(-6 + 5 * linear**0.7)

    def init_state(self, batch_size: int) -> State:
        weight = self.r_proj.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return {
            "recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device),
            "shift": weight.new_zeros(batch_size, weight.shape[1]),
        }

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        inputs, after = self._shift(x, state, cu_seqlens)
        r, k, v = (
            self._heads(projection(inputs[name]))
            for name, projection in (("r", self.r_proj), ("k", self.k_proj), ("v", self.v_proj))
        )
        initial = None if state is None else state["recurrence"]
        o, after["recurrence"] = _read_before_update(
            self._transition(inputs), r, k, v, initial, cu_seqlens, self.config.backend
        )
        o = o + (r * self.bonus.to(r.dtype) * k).sum(-1, keepdim=True) * v
        o = o.flatten(2) if self.o_norm is None else self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(inputs["g"]))
        return self.o_proj(o), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Diagonal:
        return self._transition(self._shift(x, state, cu_seqlens)[0])

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [*self.w_map.parameters(), *self.widening.parameters()]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        # Whatever the inputs are, the tanh in the middle of the map stays in [-1, 1].
        reach, bias = self.w_map.up.weight.double().abs().sum(1), self.w_map.bias
        bias = torch.zeros_like(reach) if bias is None else bias.double()
        gates = gate_interval(_decay_gate, (bias - reach, bias + reach))
        lo, hi = (self.widening(self._heads(gate).mT).mT.double() for gate in gates)
        return diagonal_bounds((lo, hi))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _shift(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[State, State]:
        """The inputs of the projections, each [B, T, D], and the state of the token shift."""
        state = self.starting_state(x, state, cu_seqlens)
        before, last = token_shift(x, state["shift"], cu_seqlens)
        difference = before - x
        low = torch.tanh(self.mix_down(torch.addcmul(x, difference, self.mix_x.to(x.dtype))))
        low = low.unflatten(-1, (len(self.inputs), -1))
        shares = torch.einsum("btcr,crd->cbtd", low, self.mix_up.to(low.dtype)).to(x.dtype)
        shares = shares + self.mix.to(x.dtype)[:, None, None]
        mixed = torch.addcmul(x, difference, shares)
        return dict(zip(self.inputs, mixed.unbind(0), strict=True)), {"shift": last}

    def _transition(self, inputs: State) -> Diagonal:
        gate = _decay_gate(self._heads(self.w_map(inputs["w"])))
        return Diagonal(self.widening(gate.mT).mT)  # `Widening` wants the heads last


def _decay_gate(logits: Tensor) -> Tensor:
    # From 7 on the gate is 0 even in float64; beyond, the gradient would be 0 * inf.
    return torch.exp(-torch.exp(logits.clamp(max=7)))


def _read_before_update(
    transition: Diagonal,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`o_t = H_{t-1}^T q_t` for `H_t = A_t H_{t-1} + k_t v_t^T`; all as in `linear_recurrence`.

    It is the usual recurrence, which reads after the update, in a row of one more token: token t reads where token
    t - 1 updates. The first step leaves the state alone, and the last reads nothing.
    """
    if initial_state is not None and cu_seqlens is None and q.shape[1] == 1:
        # Two tokens would take more than twice the time of a step, which may overwrite the state, hence comes last.
        o = (q.unsqueeze(-1) * initial_state.unsqueeze(1)).sum(3).to(v.dtype)
        return o, linear_recurrence(transition, q, v, write=k, initial_state=initial_state, backend=backend)[1]
    ahead, behind = (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1)
    if cu_seqlens is None:
        delayed = Diagonal(F.pad(transition.decay, ahead, value=1.0))
        o, state = linear_recurrence(
            delayed,
            F.pad(q, behind),
            F.pad(v, ahead),
            write=F.pad(k, ahead),
            initial_state=initial_state,
            backend=backend,
        )
        return o[:, :-1], state
    sequences, length = len(cu_seqlens) - 1, q.shape[1]
    reads, longer = packing_of(cu_seqlens).make(_delayed, q)

    def place(x: Tensor, places: Tensor, fill: float = 0.0) -> Tensor:
        return x.new_full((1, length + sequences, *x.shape[2:]), fill).index_copy(1, places, x)

    o, state = linear_recurrence(
        Diagonal(place(transition.decay, reads + 1, 1.0)),
        place(q, reads),
        place(v, reads + 1),
        write=place(k, reads + 1),
        initial_state=initial_state,
        cu_seqlens=longer,
        backend=backend,
    )
    return o.index_select(1, reads), state


def _delayed(packing: Packing, move: Move) -> tuple[Tensor, Tensor]:
    """Where the tokens read, [T], and the boundaries of sequences with one token more, on the host."""
    sequence = torch.repeat_interleave(torch.tensor(packing.lengths))
    longer = torch.tensor(packing.boundaries) + torch.arange(len(packing.boundaries))
    return move(torch.arange(len(sequence)) + sequence), longer  # every sequence before adds one token


MIXERS = (RWKV6Config,)
