"""DeltaNet, Gated DeltaNet, DeltaProduct: one module whose transition is a product of generalized Householder matrices.

    H_t = (I - beta_N k_N k_N^T) ... (I - beta_1 k_1 k_1^T) a_t H_{t-1} + what the N factors write,      |k_j| = 1

| mixer | from | N | decay a_t | native eigenvalues along k | with `eigenvalue_range=(-1, 1)` |
|---|---|---|---|---|---|
| deltanet | arXiv 2406.06484 | 1 | none | 1 - beta in [0, 1], beta = sigmoid | [-1, 1], beta = 2 sigmoid |
| gated_deltanet | arXiv 2412.06464 | 1 | exp(-exp(A_log) softplus(.)) | a_t (1 - beta) in [0, 1] | [-1, 1] |
| deltaproduct | arXiv 2502.10297 | 2 | none | of a product: in [0, 1] for N <= 2 | also rotations |

The widening is that of arXiv 2411.12537. The decay of gated_deltanet has its own range, `decay_range`, native (0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import RMSNorm, ShortConvolution, l2_normalize
from statetrack.mixers.mixer import (
    Mixer,
    State,
    WidenedMixerConfig,
    Widening,
    require_conv_size,
    require_positive,
    with_options,
)
from statetrack.ops import check_packing, linear_recurrence
from statetrack.transition import EigenvalueRange, Householder, accumulated, accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(WidenedMixerConfig):
    """Options of DeltaNet; `eigenvalue_range` is that of each factor along its key, (lo, 1).

    Attributes:
        num_heads: H.
        head_dim: K, the size of queries and keys in each head; d_model / num_heads if None.
        value_dim: V, the size of values in each head; head_dim if None.
        num_householder: N, generalized Householder factors for each token.
        beta_gain: factor on the logit of beta. Above 1 it lets beta saturate at the ends of its range early in
            training.
        conv_size: width of the short convolutions on queries, keys and values; 0 leaves them out.
        activation: applied to queries, keys and values before the keys are normalized.
        output_norm: RMS-normalize what each head reads from its state.
        output_gate: multiply the normalized output by silu of a gate computed from the input.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "deltanet"
    title: ClassVar[str] = "DeltaNet"
    summary: ClassVar[str] = "one generalized Householder matrix a token; N = num_householder of them"

    num_heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    num_householder: int = 1
    beta_gain: float = 1.0
    conv_size: int = 4
    activation: Literal["silu", "identity"] = "silu"
    output_norm: bool = True
    output_gate: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim", "num_householder")
        self.eigenvalue_range.householder_beta(torch.empty(0))  # refuses a range that no beta gives
        require_conv_size(self.conv_size)
        if not (math.isfinite(self.beta_gain) and self.beta_gain > 0):
            raise ValueError(f"beta_gain must be a positive number, got {self.beta_gain}")
        if self.activation not in ("silu", "identity"):
            raise ValueError(f"activation must be silu or identity, got {self.activation!r}")

    def spectrum(self) -> EigenvalueRange | None:
        lo = self.gate_range().lo
        if self.num_householder == 1 or (self.num_householder == 2 and lo >= 0):
            # A product of two symmetric matrices with eigenvalues in [0, 1] has such eigenvalues too (proposition 1 of
            # arXiv 2411.12537).
            return EigenvalueRange(lo, 1)
        return None

    def head_sizes(self, d_model: int) -> tuple[int, int]:
        """(K, V) for a model dimension."""
        if self.head_dim is None and d_model % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} must divide d_model = {d_model}, or head_dim must be given beside it"
            )
        key_dim = self.head_dim or d_model // self.num_heads
        return key_dim, self.value_dim or key_dim

    def build(self, d_model: int) -> DeltaNet:
        return DeltaNet(d_model, self)


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaNetConfig):
    """Options of Gated DeltaNet: those of DeltaNet and the range of its decay.

    Attributes:
        decay_range: range of the scalar decay of each head; (0, 1) is the original. A signed decay beside a signed
            beta is
            possible: (-1, 1).
    """

    name: ClassVar[str] = "gated_deltanet"
    title: ClassVar[str] = "Gated DeltaNet"
    summary: ClassVar[str] = "DeltaNet with a decay of the whole state before the Householder factors"

    decay_range: EigenvalueRange = field(default=EigenvalueRange(0, 1))
    output_gate: bool = True

    def spectrum(self) -> EigenvalueRange | None:
        factors = super().spectrum()
        if factors is None:
            return None
        # A scalar decay times an eigenvalue: the extreme products of the ends.
        ends = [a * b for a in (factors.lo, factors.hi) for b in (self.decay_range.lo, self.decay_range.hi)]
        return EigenvalueRange(min(ends), max(ends))


@dataclass(frozen=True, kw_only=True)
class DeltaProductConfig(DeltaNetConfig):
    """Options of DeltaProduct: those of DeltaNet, with two Householder factors a token unless told otherwise."""

    name: ClassVar[str] = "deltaproduct"
    title: ClassVar[str] = "DeltaProduct"
    summary: ClassVar[str] = "a product of N = num_householder generalized Householder matrices a token"

    num_householder: int = 2


class DeltaNet(Mixer):
    """DeltaNet, Gated DeltaNet or DeltaProduct, by its config; [B, T, D] -> [B, T, D].

        q, k_j, v_j = activation(conv(W x)),   q and k_j L2-normalized,   beta_j = (1 - lo) sigmoid(beta_gain W x)
        H <- a H, then for each factor j: H <- H - beta_j k_j (k_j^T H - v_j^T);   y = W_o norm(H^T q / sqrt(K))

    Beta and the decay are computed in float32 or better whatever the dtype of the activations, and so is the state.

    Args:
        d_model: D.
        config: a `DeltaNetConfig` or one derived from it; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: DeltaNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(DeltaNetConfig, config, options)
        self.num_heads, self.num_householder = config.num_heads, config.num_householder
        self.key_dim, self.value_dim = config.head_sizes(d_model)
        h, n = self.num_heads, self.num_householder
        q_size, k_size, v_size = h * self.key_dim, n * h * self.key_dim, n * h * self.value_dim
        self.q_proj = nn.Linear(d_model, q_size, bias=False)
        self.k_proj = nn.Linear(d_model, k_size, bias=False)
        self.v_proj = nn.Linear(d_model, v_size, bias=False)
        self.b_proj = nn.Linear(d_model, n * h, bias=False)
        self.o_proj = nn.Linear(h * self.value_dim, d_model, bias=False)
        self.g_proj = nn.Linear(d_model, h * self.value_dim, bias=False) if config.output_gate else None
        self.o_norm = RMSNorm(self.value_dim, eps=1e-5) if config.output_norm else None
        sizes = {"q": q_size, "k": k_size, "v": v_size} if config.conv_size else {}
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(size, config.conv_size) for name, size in sizes.items()}
        )
        self.widening = Widening(config, h)
        self.decay_range = config.decay_range if isinstance(config, GatedDeltaNetConfig) else None
        if self.decay_range is not None:
            self.a_proj = nn.Linear(d_model, h, bias=False)
            # Decays spread over time scales, as in Mamba-2: A uniform in 1..16, step sizes log-uniform in 0.001..0.1.
            self.A_log = nn.Parameter(torch.empty(h).uniform_(1, 16).log())
            step = torch.empty(h).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step

    def init_state(self, batch_size: int) -> State:
        weight = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        state = {"recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device)}
        return state | {name: conv.init_state(batch_size) for name, conv in self._convolutions()}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        projected, after = self._project(x, state, cu_seqlens)
        transition = self._transition(x, projected["k"])
        b, t, _ = x.shape
        q = l2_normalize(projected["q"].view(b, t, self.num_heads, self.key_dim)) * self.key_dim**-0.5
        v = projected["v"].view(b, t, self.num_householder, self.num_heads, self.value_dim)
        initial = None if state is None else state["recurrence"]
        o, after["recurrence"] = linear_recurrence(
            transition, q, v, initial_state=initial, cu_seqlens=cu_seqlens, backend=self.config.backend
        )
        if self.o_norm is not None:
            o = self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x)).view_as(o)
        return self.o_proj(o.flatten(2)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Householder:
        return self._transition(x, self._project(x, state, cu_seqlens)[0]["k"])

    def eigenvalue_parameters(self) -> list[Tensor]:
        gates: list[Tensor] = [self.b_proj.weight, *self.widening.parameters()]
        return gates if self.decay_range is None else [*gates, self.a_proj.weight, self.A_log, self.dt_bias]

    def _convolutions(self) -> list[tuple[str, ShortConvolution]]:
        return [(name, conv) for name, conv in self.convolutions.items() if isinstance(conv, ShortConvolution)]

    def _project(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[State, State]:
        """Activated queries, keys and values, flat, and the states of the convolutions."""
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        projected = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        after: State = {}
        if state is None:
            state = self.init_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        for name, conv in self._convolutions():
            projected[name], after[name] = conv(projected[name], state[name], cu_seqlens)
        if self.config.activation == "silu":
            projected = {name: F.silu(y) for name, y in projected.items()}
        return projected, after

    def _transition(self, x: Tensor, k: Tensor) -> Householder:
        b, t, _ = x.shape
        k = l2_normalize(k.view(b, t, self.num_householder, self.num_heads, self.key_dim))
        logits = accumulated(self.b_proj(x)).view(b, t, self.num_householder, self.num_heads)
        beta = self.widening.householder_beta(torch.sigmoid(self.config.beta_gain * logits))
        decay = None
        if self.decay_range is not None:
            step = F.softplus(accumulated(self.a_proj(x)) + accumulated(self.dt_bias))
            decay = self.decay_range.widen(torch.exp(-accumulated(self.A_log).exp() * step))
        # Keys in bf16 are a little longer or shorter than 1; dividing by their norm as rounded keeps beta = 2 a
        # reflection.
        return Householder(k, beta, decay, normalize=True)


MIXERS = (DeltaNetConfig, GatedDeltaNetConfig, DeltaProductConfig)
