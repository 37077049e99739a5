"""DeltaProduct without its additive path: tokens turn and reflect a learned state, and write nothing.

    H_t = (I - beta_N k_N k_N^T) ... (I - beta_1 k_1 k_1^T) H_{t-1},     H_0 a parameter,     |k_j| = 1
    y_t = W_o H_t^T q / sqrt(K)

The transition is that of `deltaproduct` (arXiv 2502.10297), the widening of its range that of arXiv 2411.12537. What
is missing is the inhomogeneous term of the recurrence, so that H_t is linear in H_0; so are the states of the bilinear
RNNs without additive terms of arXiv 2505.21749, which have other matrices. One learned query reads each head, the same
for all tokens.

Values and the queries of tokens are left out, because where tokens only act on a state, as in word problems of groups,
they do harm: what tokens write adds to an error that nothing takes away, and a query of the last token lets the answer
depend on that token beside the state. Without them far more seeds learned A5 and S5 (docs/recipe.md). The price: a
layer can't forget and take up something new, so no resets, flip-flops or recall. If each of two words a and b resets
the state, its matrix has no further effect when it is applied again; a contraction like that is an orthogonal
projection, and where "a, then b" equals b alone and "b, then a" equals a, the two are the same one.

| mixer | native beta | native eigenvalues | with `eigenvalue_range=(-1, 1)` |
|---|---|---|---|
| homogeneous_deltaproduct | sigmoid | real, in [0, 1] (N <= 2) | 2 sigmoid: complex, rotations |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statetrack.layers import l2_normalize, unit_vectors
from statetrack.mixers.bounds import FactorBounds
from statetrack.mixers.deltanet import gated_beta, largest_beta, products_spectrum
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
from statetrack.ops import linear_recurrence
from statetrack.transition import EigenvalueRange, Householder, accumulated


@dataclass(frozen=True, kw_only=True)
class HomogeneousDeltaProductConfig(WidenedMixerConfig):
    """Options of homogeneous DeltaProduct; `eigenvalue_range` is that of each factor along its key, (lo, 1).

    Attributes:
        num_heads: H.
        head_dim: K, the size of queries and keys in each head; d_model / num_heads if None.
        value_dim: V, columns of the state in each head; head_dim if None.
        num_householder: N, generalized Householder factors for each token.
        beta_gain: factor on the logit of beta. Above 1 it lets beta saturate at the ends of its range early in
            training.
        beta_bias: what the learned bias on the logit of beta starts from, before the gain; with beta_gain 4, 1 puts the
            eigenvalues of most factors near -1 at the start, if the range is (-1, 1).
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "homogeneous_deltaproduct"
    title: ClassVar[str] = "Homogeneous DeltaProduct"
    summary: ClassVar[str] = "DeltaProduct acting on a learned initial state, with nothing written"

    num_heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    num_householder: int = 2
    beta_gain: float = 1.0
    beta_bias: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim", "num_householder")
        self.eigenvalue_range.householder_beta(torch.empty(0))  # refuses a range that no beta gives
        require_positive_number(self, "beta_gain")
        if not math.isfinite(self.beta_bias):
            raise ValueError(f"beta_bias must be a finite number, got {self.beta_bias}")

    def spectrum(self) -> EigenvalueRange | None:
        return products_spectrum(self.gate_range().lo, self.num_householder)

    def build(self, d_model: int) -> HomogeneousDeltaProduct:
        return HomogeneousDeltaProduct(d_model, self)


class HomogeneousDeltaProduct(Mixer):
    """DeltaProduct that acts on a learned state and writes nothing; [B, T, D] -> [B, T, D].

        k_j = W x, L2-normalized,   q L2-normalized,   beta_j = (1 - lo) sigmoid(beta_gain (W_b x + b_b))
        H <- H - beta_j k_j k_j^T H for each factor j;   y = W_o H^T q / sqrt(K)

    Beta is computed in float32 or better whatever the dtype of the activations, and so is the state. Before the first
    token it is the parameter `initial_state` [H, K, V], the same for every sequence.

    Args:
        d_model: D.
        config: a `HomogeneousDeltaProductConfig`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: HomogeneousDeltaProductConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(HomogeneousDeltaProductConfig, config, options)
        h, n = config.num_heads, config.num_householder
        self.key_dim = split_heads(config, d_model)
        self.value_dim = config.value_dim or self.key_dim
        self.initial_state = nn.Parameter(torch.randn(h, self.key_dim, self.value_dim) * self.value_dim**-0.5)
        self.query = nn.Parameter(torch.randn(h, self.key_dim))
        self.k_proj = nn.Linear(d_model, n * h * self.key_dim, bias=False)
        self.b_proj = nn.Linear(d_model, n * h, bias=False)
        self.beta_bias = nn.Parameter(torch.full((n * h,), float(config.beta_bias)))
        self.o_proj = nn.Linear(h * self.value_dim, d_model, bias=False)
        self.widening = Widening(config, h)

    def init_state(self, batch_size: int) -> State:
        learned = accumulated(self.initial_state).expand(batch_size, -1, -1, -1)
        # A copy also for one row: who decodes overwrites the state, and must not overwrite the parameter.
        return {"recurrence": learned.clone(memory_format=torch.contiguous_format)}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        b, t, _ = x.shape
        state = self.starting_state(x, state, cu_seqlens)
        transition = self.transition(x)
        dtype = transition.k.dtype
        q = l2_normalize(self.query, scale=self.key_dim**-0.5).to(dtype).expand(b, t, -1, -1)
        nothing = x.new_zeros(*transition.beta.shape, self.value_dim, dtype=dtype)
        o, after = linear_recurrence(
            transition,
            q,
            nothing,
            initial_state=state["recurrence"],
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        return self.o_proj(o.flatten(2)), {"recurrence": after}

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Householder:
        shape = (*x.shape[:2], self.config.num_householder, self.config.num_heads)
        k = unit_vectors(self.k_proj(x).view(*shape, self.key_dim))
        beta = gated_beta(self.b_proj(x), self.config.beta_gain, self.beta_bias, self.widening, shape)
        return Householder(k, beta, normalize=True)  # also in bf16, as in `DeltaNet`

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [self.b_proj.weight, self.beta_bias, *self.widening.parameters()]

    def initial_state_parameters(self) -> list[Tensor]:
        return [self.initial_state]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        gain, heads = self.config.beta_gain, self.config.num_heads
        beta = largest_beta(self.b_proj.weight, gain, self.beta_bias, self.widening, scale, heads)
        return FactorBounds(1 - beta, torch.ones_like(beta), beta.amax(0))


MIXERS = (HomogeneousDeltaProductConfig,)
