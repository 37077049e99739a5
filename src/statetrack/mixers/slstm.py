"""sLSTM (arXiv 2405.04517): an LSTM with exponential input gates and a normalizer; a baseline, not a linear recurrence.

    c_t = sigmoid(f) c_{t-1} + exp(i) tanh(z),   n_t = sigmoid(f) n_{t-1} + exp(i),   h_t = sigmoid(o) c_t / n_t

where each of z, i, f, o is W x_t + R h_{t-1} + b, with a matrix R for each head. The states are kept divided by
exp(m_t), the largest weight so far, which changes no output. As the gates see h_{t-1}, there is no state-transition
matrix and so no eigenvalue range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statetrack.layers import HeadNorm, ShortConvolution
from statetrack.mixers.mixer import (
    Mixer,
    MixerConfig,
    State,
    require_conv_size,
    require_positive,
    split_heads,
    with_options,
)
from statetrack.ops.packing import segments_of
from statetrack.ops.slstm import slstm
from statetrack.transition import accumulated, accumulation_dtype

_STATES = ("h", "c", "n", "m")


@dataclass(frozen=True, kw_only=True)
class SLSTMConfig(MixerConfig):
    """Options of sLSTM.

    Attributes:
        num_heads: H.
        head_dim: N, the channels of each head; d_model / num_heads if None.
        conv_size: width of the short convolution ahead of the input and forget gates; 0 leaves it out.
        output_norm: normalize the output of each head.
    """

    name: ClassVar[str] = "slstm"
    title: ClassVar[str] = "sLSTM"
    summary: ClassVar[str] = "an LSTM with exponential gates and a normalizer; its recurrence is not linear"
    absent: ClassVar[dict[str, str]] = {
        "eigenvalue_range": "slstm has no eigenvalue_range: its recurrence is not linear and has no transition matrix"
    }

    num_heads: int = 4
    head_dim: int | None = None
    conv_size: int = 4
    output_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim")
        require_conv_size(self.conv_size)

    def build(self, d_model: int) -> SLSTM:
        return SLSTM(d_model, self)


class SLSTM(Mixer):
    """sLSTM and a projection back to the model dimension, [B, T, D] -> [B, T, D].

    The states `h`, `c`, `n` and `m` [B, H, N] and the gates are float32 or better whatever the dtype of the
    activations.

    Args:
        d_model: D.
        config: an `SLSTMConfig`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: SLSTMConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(SLSTMConfig, config, options)
        self.num_heads = h = config.num_heads
        self.head_dim = n = split_heads(config, d_model)
        self.conv = ShortConvolution(d_model, config.conv_size, bias=True) if config.conv_size else None
        self.z_proj = nn.Linear(d_model, h * n, bias=False)
        self.i_proj = nn.Linear(d_model, h * n, bias=False)
        self.f_proj = nn.Linear(d_model, h * n, bias=False)
        self.g_proj = nn.Linear(d_model, h * n, bias=False)  # the gate o; o_proj is the way out
        self.o_proj = nn.Linear(h * n, d_model, bias=False)
        self.recurrent = nn.Parameter(torch.zeros(h, n, 4 * n))
        bias = torch.zeros(h, 4, n)
        bias[:, 2] = torch.linspace(3, 6, n)  # heads start with a long memory, each channel with another
        self.bias = nn.Parameter(bias.flatten(1))
        self.o_norm = HeadNorm(h, n, 1e-5) if config.output_norm else None

    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.head_dim)
        zeros = torch.zeros(shape, dtype=accumulation_dtype(self.recurrent), device=self.recurrent.device)
        state = {"h": zeros, "c": zeros.clone(), "n": zeros.clone(), "m": torch.full_like(zeros, -torch.inf)}
        return state if self.conv is None else state | {"conv": self.conv.init_state(batch_size)}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        state = self.starting_state(x, state, cu_seqlens)
        seen, after = x, {}
        if self.conv is not None:
            seen, after["conv"] = self.conv(x, state["conv"], cu_seqlens, activation="silu")
        inputs = [self.z_proj(x), self.i_proj(seen), self.f_proj(seen), self.g_proj(x)]
        inputs = [part.unflatten(-1, (self.num_heads, self.head_dim)) for part in inputs]
        parameters = accumulated(self.bias), accumulated(self.recurrent)
        before = [state[name].to(parameters[1].dtype) for name in _STATES]
        if cu_seqlens is None:
            states = slstm(inputs, *parameters, before)
            h, ends = states[0], [values[:, -1] for values in states]
        else:
            h, ends = _packed(inputs, parameters, before, cu_seqlens)
        after |= dict(zip(_STATES, ends, strict=True))
        h = h.flatten(2) if self.o_norm is None else self.o_norm(h)
        return self.o_proj(h.to(x.dtype)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> None:
        return None


def _packed(
    inputs: list[Tensor], parameters: tuple[Tensor, Tensor], before: list[Tensor], cu_seqlens: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """h [1, T, H, N] of packed sequences and the states [S, H, N] after them, from those before them."""
    segments = segments_of(cu_seqlens, inputs[0])
    going_on = [start.index_select(0, segments.order) for start in before]
    h, ends = [], []
    for take, (steps, rows) in zip(segments.groups, segments.ends, strict=True):
        tokens = [take(part).transpose(0, 1) for part in inputs]  # [L, R, H, N] -> [R, L, H, N]
        states = slstm(tokens, *parameters, [values[: len(tokens[0])] for values in going_on])
        h.append(states[0].transpose(0, 1))
        ends.append([values[rows, steps] for values in states])
        going_on = [values[:, -1] for values in states]
    after = [
        segments.join_states(list(parts), start) for parts, start in zip(zip(*ends, strict=True), before, strict=True)
    ]
    return segments.join_tokens(h), after


MIXERS = (SLSTMConfig,)
