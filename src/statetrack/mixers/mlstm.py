"""mLSTM (arXiv 2405.04517): a matrix memory with a normalizer, an exponential input gate and a scalar forget gate.

    C_t = f_t C_{t-1} + i_t k_t v_t^T,     n_t = f_t n_{t-1} + i_t k_t,     h_t = C_t^T q_t / max(|n_t^T q_t|, 1)

| mixer | native f_t | native eigenvalues | widened by `eigenvalue_range=(lo, hi)` |
|---|---|---|---|
| mlstm | sigmoid(W x_t + b) | [0, 1] | lo + (hi - lo) f_t; for (-1, 1) 2 f_t - 1 (arXiv 2411.12537) |

The input gate i_t = exp(.) is the original's in every range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import layer_norm
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
from statetrack.ops import linear_recurrence
from statetrack.ops.packing import groups_of
from statetrack.transition import Diagonal, EigenvalueRange, accumulated, accumulation_dtype

# The stabilizer takes |f| for at least this; it need not be exact, as no output depends on it.
_SMALLEST_LOG_FORGET = -80.0


@dataclass(frozen=True, kw_only=True)
class MLSTMConfig(WidenedMixerConfig):
    """Options of mLSTM.

    Attributes:
        num_heads: H.
        head_dim: K, the size of queries and keys in each head; d_model / (2 num_heads) if None.
        value_dim: V, the size of values in each head; d_model / num_heads if None.
        gate_soft_cap: c, the logits of both gates are bounded to -c..c by c tanh(logit / c).
        gate_gain: factor on the logit of the forget gate, before the cap. Above 1 it lets the gate saturate at the ends
            of its range early in training.
        input_bias: what the biases of the input gate start from.
        forget_bias: b, the biases of the forget gate start in equal steps from b at the first head to 2 b at the last.
            The original's 3 starts gates near 1; from 0 a gate goes to either end of its range as easily.
        output_norm: normalize what each head reads from its memory (layer norm).
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "mlstm"
    title: ClassVar[str] = "mLSTM"
    summary: ClassVar[str] = "a matrix memory with a normalizer, an exponential input gate and a scalar forget gate"

    num_heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    gate_soft_cap: float = 15.0
    gate_gain: float = 1.0
    input_bias: float = -10.0
    forget_bias: float = 3.0
    output_norm: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim")
        require_positive_number(self, "gate_soft_cap", "gate_gain")
        if not (math.isfinite(self.input_bias) and math.isfinite(self.forget_bias)):
            raise ValueError(f"biases must be finite, got {self.input_bias} and {self.forget_bias}")

    def spectrum(self) -> EigenvalueRange:
        return self.gate_range()

    def head_sizes(self, d_model: int) -> tuple[int, int]:
        """(K, V) for a model dimension."""
        return half_head_sizes(self.num_heads, self.head_dim, self.value_dim, d_model)

    def build(self, d_model: int) -> MLSTM:
        return MLSTM(d_model, self)


class MLSTM(Mixer):
    """mLSTM's layer as in xLSTM 7B, [B, T, D] -> [B, T, D], with the eigenvalue range as an option.

        q, k, v = W x,    i~ = cap(W x + b),    f = lo + (hi - lo) sigmoid(cap(gate_gain (W x + b)))
        m <- max(log |f| + m, i~),    f' = f exp(m_before - m),    i' = exp(i~ - m)
        C <- f' C + i' k v^T,    n <- f' n + i' k,    h = C^T q' / (max(|n^T q'|, exp(-m)) + eps),    q' = q / sqrt(K)
        y = W_o (norm(h) sigmoid(W x))

    Any stabilizer m gives the same h (but for eps), as C, n and exp(-m) are all multiples of exp(-m). So m takes |f| no
    smaller than exp(-80), no gradient passes it, and the signed f is never the argument of a logarithm where that
    would matter: f = 0 and f = -1 are exact and have finite gradients. The normalizer n is one more column of the
    memory, for a value that is always 1.

    Parameters are named as in transformers' xLSTM. Gates, m and the memory are float32 or better whatever the dtype of
    the activations.

    Args:
        d_model: D.
        config: an `MLSTMConfig`; or leave it out and give its fields as keyword options.
    """

    output_layer = "out_proj"
    own_start = ("igate_preact", "fgate_preact")

    def __init__(self, d_model: int, config: MLSTMConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(MLSTMConfig, config, options)
        h = config.num_heads
        self.key_dim, self.value_dim = config.head_sizes(d_model)
        self.q = nn.Linear(d_model, h * self.key_dim, bias=False)
        self.k = nn.Linear(d_model, h * self.key_dim, bias=False)
        self.v = nn.Linear(d_model, h * self.value_dim, bias=False)
        self.ogate_preact = nn.Linear(d_model, h * self.value_dim, bias=False)
        self.igate_preact = nn.Linear(d_model, h)
        self.fgate_preact = nn.Linear(d_model, h)
        self.multihead_norm = MultiHeadLayerNorm(h, self.value_dim) if config.output_norm else None
        self.out_proj = nn.Linear(h * self.value_dim, d_model, bias=False)
        self.widening = Widening(config, h)
        with torch.no_grad():  # as in the original, gates depend on their biases alone at first
            self.igate_preact.weight.zero_()
            self.igate_preact.bias.fill_(config.input_bias)
            self.fgate_preact.weight.zero_()
            self.fgate_preact.bias.copy_(torch.linspace(config.forget_bias, 2 * config.forget_bias, h))

    def init_state(self, batch_size: int) -> State:
        weight, h = self.q.weight, self.config.num_heads
        wide = {"dtype": accumulation_dtype(weight), "device": weight.device}
        return {
            "recurrence": torch.zeros(batch_size, h, self.key_dim, self.value_dim + 1, **wide),
            "stabilizer": torch.zeros(batch_size, h, **wide),
        }

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        state = self.starting_state(x, state, cu_seqlens)
        h, after = self.config.num_heads, {}
        forget, log_input = self._forget(x), self._cap(self.igate_preact(x))
        with torch.no_grad():
            before, m, after["stabilizer"] = _stabilizers(forget, log_input, state["stabilizer"], cu_seqlens)
        v = accumulated(self.v(x)).unflatten(-1, (h, self.value_dim))
        o, after["recurrence"] = linear_recurrence(
            Diagonal(forget * torch.exp(before - m)),
            self.q(x).unflatten(-1, (h, self.key_dim)) * self.key_dim**-0.5,
            F.pad(v, (0, 1), value=1.0),
            write=torch.exp(log_input - m).unsqueeze(-1) * self.k(x).unflatten(-1, (h, self.key_dim)),
            initial_state=state["recurrence"],
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        numerator, normalizer = o.split([self.value_dim, 1], -1)
        read = numerator / (torch.maximum(normalizer.abs(), torch.exp(-m).unsqueeze(-1)) + 1e-6)
        if self.multihead_norm is not None:
            read = self.multihead_norm(read)
        gate = self.ogate_preact(x)
        return self.out_proj(read.flatten(2).to(gate.dtype) * torch.sigmoid(gate)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Diagonal:
        """The forget gates f, which move the memory in its own units; f' moves it in units of exp(m)."""
        return Diagonal(self._forget(x))

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [*self.fgate_preact.parameters(), *self.widening.parameters()]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        gain, gate = self.config.gate_gain, self.fgate_preact
        logits = linear_interval(gain * gate.weight, scale, gain * gate.bias)
        lo, hi = gate_interval(lambda x: torch.sigmoid(self._cap(x)), logits)
        return diagonal_bounds((self.widening(lo).double().unsqueeze(1), self.widening(hi).double().unsqueeze(1)))

    def _forget(self, x: Tensor) -> Tensor:
        """The signed forget gates [B, T, H]."""
        return self.widening(torch.sigmoid(self._cap(self.config.gate_gain * self.fgate_preact(x))))

    def _cap(self, logits: Tensor) -> Tensor:
        cap = self.config.gate_soft_cap
        return cap * torch.tanh(accumulated(logits) / cap)


class MultiHeadLayerNorm(nn.Module):
    """Layer normalization of each head, [B, T, H, V] -> [B, T, H, V], with a weight for each channel and no bias.

    Args:
        num_heads: H.
        value_dim: V.
    """

    def __init__(self, num_heads: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * value_dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, 1e-6, x.dtype) * self.weight.to(x.dtype).view(x.shape[-2:])


def _stabilizers(
    forget: Tensor, log_input: Tensor, start: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`m_t = max(log |f_t| + m_{t-1}, i~_t)` for all tokens at once.

    Args:
        forget: f [B, T, H].
        log_input: i~ [B, T, H].
        start: m before the first token of each sequence, [B, H] or [S, H].
        cu_seqlens: the boundaries of packed sequences.

    Returns:
        m before and after every token, [B, T, H], and after the last token of each sequence, [B, H] or [S, H].
    """
    if cu_seqlens is None:
        # With F_t the sum of log |f| up to t, m_t - F_t is the largest of m_0 and all i~_s - F_s.
        total = forget.abs().log().clamp(min=_SMALLEST_LOG_FORGET).cumsum(1)
        candidates = torch.cat([start.unsqueeze(1), log_input - total], 1)
        m = candidates.cummax(1).values + F.pad(total, (0, 0, 1, 0))
        return m[:, :-1], m[:, 1:], m[:, -1]
    groups = groups_of(cu_seqlens, forget)
    # With f = 1 and i = 0 padding leaves m alone.
    rows = [
        _stabilizers(take(forget, 1.0), take(log_input, -math.inf), start.index_select(0, take.sequences), None)
        for take in groups.groups
    ]
    before, after, last = zip(*rows, strict=True)
    return groups.join_tokens(before), groups.join_tokens(after), groups.join_states(last, start)


MIXERS = (MLSTMConfig,)
