"""The LSTM (with forget gates, Gers et al. 2000): a baseline whose recurrence is not linear.

    i, f, o = sigmoid(W x_t + U h_{t-1} + b),   g = tanh(W x_t + U h_{t-1} + b)
    c_t = f * c_{t-1} + i * g,   h_t = o * tanh(c_t),   y_t = W_o h_t

It has no state-transition matrix and so no eigenvalue range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statetrack.mixers.mixer import Mixer, MixerConfig, State, require_positive, with_options
from statetrack.ops import check_packing
from statetrack.ops.packing import segments_of
from statetrack.precision import autocasts, product_dtype


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(MixerConfig):
    """Options of the LSTM.

    Attributes:
        hidden_size: channels of the state; d_model if None.
    """

    name: ClassVar[str] = "lstm"
    title: ClassVar[str] = "LSTM"
    summary: ClassVar[str] = "the classical gated RNN; its recurrence is not linear"
    absent: ClassVar[dict[str, str]] = {
        "eigenvalue_range": "lstm has no eigenvalue_range: its recurrence is not linear and has no transition matrix"
    }

    vmaps: ClassVar[bool] = False  # PyTorch's LSTM has no batching rule

    hidden_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "hidden_size")

    def build(self, d_model: int) -> LSTM:
        return LSTM(d_model, self)


class LSTM(Mixer):
    """`torch.nn.LSTM` of one layer and a projection back to the model dimension, [B, T, D] -> [B, T, D].

    The states `h` and `c` [B, hidden_size] have the dtype of the activations, as PyTorch's kernels want it.

    Args:
        d_model: D.
        config: an `LSTMConfig`; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: LSTMConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(LSTMConfig, config, options)
        self.hidden_size = config.hidden_size or d_model
        # The parameters of the module without the module, at which torch.compile would break its graph.
        self.lstm = nn.ParameterDict(dict(nn.LSTM(d_model, self.hidden_size).named_parameters()))
        self.o_proj = nn.Linear(self.hidden_size, d_model, bias=False)

    def init_state(self, batch_size: int) -> State:
        zeros = self.o_proj.weight.new_zeros(batch_size, self.hidden_size)
        return {"h": zeros, "c": zeros.clone()}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        if cu_seqlens is None:
            state = self.init_state(x.shape[0]) if state is None else state
            h, state = self._rows(x, state)
            return self.o_proj(h), state
        check_packing(x.shape[0], x.shape[1], cu_seqlens)
        state = self.init_state(len(cu_seqlens) - 1) if state is None else state
        # Rows end with a segment: the state after each row's last token is then the state after the whole segment.
        segments = segments_of(cu_seqlens, x, alike=True)
        going_on = {name: value.index_select(0, segments.order) for name, value in state.items()}
        outputs, ends = [], []
        for take, (_, rows) in zip(segments.groups, segments.ends, strict=True):
            tokens = take(x).transpose(0, 1)  # [L, R, D] -> [R, L, D]
            h, going_on = self._rows(tokens, {name: value[: len(tokens)] for name, value in going_on.items()})
            outputs.append(h.transpose(0, 1))
            ends.append({name: value.index_select(0, rows) for name, value in going_on.items()})
        after = {name: segments.join_states([end[name] for end in ends], value) for name, value in state.items()}
        return self.o_proj(segments.join_tokens(outputs)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> None:
        return None

    def _rows(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The hidden states [B, T, hidden_size] of rows of equal length, and the state after them."""
        weights = [self.lstm[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h, c = (state[name].to(x.dtype) for name in ("h", "c"))
        # PyTorch's kernel for the CPU reads whatever lies behind the end of what is too small.
        sizes, fitting = (*x.shape, *h.shape), (len(h), x.shape[1], weights[0].shape[1], len(x), self.hidden_size)
        if sizes != fitting or c.shape != h.shape:
            raise ValueError(
                f"an LSTM with D = {fitting[2]} takes x [B, T, {fitting[2]}] and states [B, {self.hidden_size}], got "
                f"{tuple(x.shape)} and {tuple(h.shape)}, {tuple(c.shape)}"
            )
        if torch.compiler.is_compiling():
            return _unrolled(x, h, c, weights)
        # Under autocast PyTorch asks oneDNN for an LSTM in bfloat16, which that refuses on many CPUs.
        widened = x.device.type == "cpu" and autocasts(x)
        dtype = product_dtype(x)
        if widened:
            x, h, c = (y.to(weights[0].dtype) for y in (x, h, c))
        with torch.autocast("cpu", enabled=False):  # which is nothing to a GPU
            output, h, c = torch.lstm(x, (h.unsqueeze(0), c.unsqueeze(0)), weights, True, 1, 0.0, False, False, True)
        output, h, c = (y.to(dtype) if widened else y for y in (output, h, c))
        return output, {"h": h.squeeze(0), "c": c.squeeze(0)}


def _unrolled(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, State]:
    """The same, written out for torch.compile, which can't trace the backward of PyTorch's CPU kernel."""
    weight_x, weight_h, bias_x, bias_h = weights
    outputs = []
    for token in nn.functional.linear(x, weight_x, bias_x).unbind(1):
        i, f, g, o = (token + nn.functional.linear(h, weight_h, bias_h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1), {"h": h, "c": c}


MIXERS = (LSTMConfig,)
