"""DeltaProduct without anything that rounds: the mixer that automata are compiled to.

    H_t = (I - beta_N k_N k_N^T / |k_N|^2) ... (I - beta_1 k_1 k_1^T / |k_1|^2) H_{t-1} + what the N factors write
    y_t = W_o [H_t^T q, H_{t-1}^T q]

It is the recurrence of `deltaproduct` (arXiv 2502.10297), in which every number can be a small integer and is then
exact in bfloat16: keys are not normalized to unit length (1/sqrt 2 has no exact floating-point number; the transition
divides by |k|^2 = 2 instead, and takes k = 0 for no factor at all), the gate of beta is linear and cut off at 0 and 1
instead of a sigmoid that reaches them only by rounding, and there is no convolution, activation or norm. A head reads
its state along a query of its own, the same for all tokens, after the update and, with `read_before`, before it as
well: the second is what the next level of a cascade needs.

The widening of the eigenvalue range is that of arXiv 2411.12537.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statetrack.mixers.bounds import FactorBounds, gate_interval, linear_interval
from statetrack.mixers.mixer import Mixer, MixerConfig, State, require_positive, with_options
from statetrack.ops import linear_recurrence
from statetrack.ops.packing import tokens_of
from statetrack.transition import EigenvalueRange, Householder, accumulated, accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class ExactDeltaProductConfig(MixerConfig):
    """Options of exact DeltaProduct.

    Attributes:
        num_heads: H.
        head_dim: K, the size of keys in each head.
        value_dim: V, the size of values in each head.
        num_householder: N, generalized Householder factors for each token.
        eigenvalue_range: range of the eigenvalue of each factor along its key, (lo, 1).
        read_before: read the state before the update as well as after it.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "exact_deltaproduct"
    title: ClassVar[str] = "Exact DeltaProduct"
    summary: ClassVar[str] = "DeltaProduct on integers, without rounding: what automata are compiled to"

    num_heads: int = 1
    head_dim: int = 8
    value_dim: int = 8
    num_householder: int = 2
    eigenvalue_range: EigenvalueRange = field(default=EigenvalueRange(-1, 1))
    read_before: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim", "num_householder")
        self.eigenvalue_range.householder_beta(torch.empty(0))  # refuses a range that no beta gives

    def reads_before_update(self) -> bool:
        return self.read_before

    def build(self, d_model: int) -> ExactDeltaProduct:
        return ExactDeltaProduct(d_model, self)


class ExactDeltaProduct(Mixer):
    """DeltaProduct without rounding; [B, T, D] -> [B, T, D].

        k_j, v_j = W x,   beta_j = (1 - lo) clip(W_b x, 0, 1);   the rest as above

    Args:
        d_model: D.
        config: an `ExactDeltaProductConfig`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: ExactDeltaProductConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(ExactDeltaProductConfig, config, options)
        h, n, reads = config.num_heads, config.num_householder, 1 + config.read_before
        self.query = nn.Parameter(torch.randn(h, config.head_dim) * config.head_dim**-0.5)
        self.k_proj = nn.Linear(d_model, n * h * config.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n * h * config.value_dim, bias=False)
        self.b_proj = nn.Linear(d_model, n * h, bias=False)
        self.o_proj = nn.Linear(reads * h * config.value_dim, d_model, bias=False)

    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.config.num_heads, self.config.head_dim, self.config.value_dim)
        dtype = accumulation_dtype(self.query)
        return {"recurrence": torch.zeros(shape, dtype=dtype, device=self.query.device)}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        b, t, _ = x.shape
        state = self.starting_state(x, state, cu_seqlens)
        v = self.v_proj(x).view(b, t, self.config.num_householder, self.config.num_heads, self.config.value_dim)
        q = self.query.to(v.dtype).expand(b, t, -1, -1)
        # Ahead of the recurrence, which may overwrite the state.
        first = self._read(state["recurrence"]).to(v.dtype) if self.config.read_before else None
        o, after = linear_recurrence(
            self.transition(x),
            q,
            v,
            initial_state=state["recurrence"],
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        if first is not None:
            o = torch.cat([o, _before(o, first, cu_seqlens)], 2)
        return self.o_proj(o.flatten(2)), {"recurrence": after}

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Householder:
        shape = (*x.shape[:2], self.config.num_householder, self.config.num_heads)
        gate = accumulated(self.b_proj(x)).clamp(0, 1).view(shape)
        beta = self.config.eigenvalue_range.householder_beta(gate)
        return Householder(self.k_proj(x).view(*shape, self.config.head_dim), beta, normalize=True)

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [self.b_proj.weight]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        gate = gate_interval(lambda x: x.clamp(0, 1), linear_interval(self.b_proj.weight, scale))[1]
        beta = self.config.eigenvalue_range.householder_beta(gate.view(-1, self.config.num_heads))
        return FactorBounds(1 - beta, torch.ones_like(beta), beta.amax(0))

    def _read(self, state: Tensor) -> Tensor:
        """What the queries read of a state: [B, H, V]."""
        return torch.einsum("hk,bhkv->bhv", self.query.to(state.dtype), state)


def _before(o: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What the state before each update reads: as the query is fixed, what the one after the token before did.

    Args:
        o: what the states after the updates read, [B, T, H, V].
        first: what the initial states read, [B, H, V] or [S, H, V].
        cu_seqlens: the boundaries of packed sequences.
    """
    if cu_seqlens is None:
        return torch.cat([first.unsqueeze(1), o[:, :-1]], 1)
    shifted = torch.cat([o[:, :1], o[:, :-1]], 1)
    places = tokens_of(cu_seqlens, o)
    return shifted.index_copy(1, places.starts, first.index_select(0, places.filled).unsqueeze(0))


MIXERS = (ExactDeltaProductConfig,)
