"""Mamba (arXiv 2312.00752): a diagonal system in each channel, discretized with a step size that depends on the token.

    H_t = diag(a_t) H_{t-1} + B_t (dt_t x_t)^T,     y_t = H_t^T C_t + D x_t

| mixer | native a_t | native eigenvalues | widened by `eigenvalue_range=(-1, 1)` |
|---|---|---|---|
| mamba | exp(dt_t A), A < 0 | [0, 1] | 2 exp(dt_t A) - 1, in [-1, 1] (arXiv 2411.12537) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import ShortConvolution
from statetrack.mixers.bounds import (
    FactorBounds,
    diagonal_bounds,
    gate_interval,
    linear_interval,
    map_interval,
    silu_interval,
)
from statetrack.mixers.mixer import (
    Mixer,
    State,
    WidenedMixerConfig,
    Widening,
    require_conv_size,
    require_positive,
    with_options,
)
from statetrack.ops import check_packing, linear_recurrence, triton_selective
from statetrack.transition import Discretized, EigenvalueRange, accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class MambaConfig(WidenedMixerConfig):
    """Options of Mamba.

    Attributes:
        state_size: K, the size of the state of each channel.
        expand: channels for each model dimension, V = expand * d_model.
        dt_rank: rank of the projection to the step sizes; ceil(d_model / 16) if None.
        conv_size: width of the short convolution; 0 leaves it out.
        conv_bias: give the short convolution a bias.
        proj_bias: give the projections into and out of the mixer a bias.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "mamba"
    title: ClassVar[str] = "Mamba"
    summary: ClassVar[str] = "a diagonal system in each channel, discretized with a step size that depends on the token"

    state_size: int = 16
    expand: int = 2
    dt_rank: int | None = None
    conv_size: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "state_size", "expand", "dt_rank")
        require_conv_size(self.conv_size)

    def spectrum(self) -> EigenvalueRange:
        return self.gate_range()

    def build(self, d_model: int) -> Mamba:
        return Mamba(d_model, self)


class Mamba(Mixer):
    """Mamba's mixer, [B, T, D] -> [B, T, D], with the eigenvalue range as an option.

    Parameters are named as in the original.

    Step sizes, eigenvalues and the state are float32 or better whatever the dtype of the activations.

    Args:
        d_model: D.
        config: a `MambaConfig`; or leave it out and give its fields as keyword options.
    """

    output_layer = "out_proj"
    own_start = ("dt_proj",)

    def __init__(self, d_model: int, config: MambaConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(MambaConfig, config, options)
        self.channels = config.expand * d_model
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.channels, bias=config.proj_bias)
        self.conv1d = None
        if config.conv_size:
            self.conv1d = ShortConvolution(self.channels, config.conv_size, bias=config.conv_bias)
        self.x_proj = nn.Linear(self.channels, self.dt_rank + 2 * config.state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.channels)
        self.A_log = nn.Parameter(torch.arange(1.0, config.state_size + 1).log().repeat(self.channels, 1))
        self.D = nn.Parameter(torch.ones(self.channels))
        self.out_proj = nn.Linear(self.channels, d_model, bias=config.proj_bias)
        self.widening = Widening(config, self.channels)
        # As in the original: step sizes start log-uniform in 0.001..0.1, and the low-rank part keeps their variance.
        step = torch.empty(self.channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)

    def init_state(self, batch_size: int) -> State:
        weight = self.A_log
        shape = (batch_size, 1, self.config.state_size, self.channels)
        state = {"recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device)}
        return state if self.conv1d is None else state | {"conv": self.conv1d.init_state(batch_size)}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        u, z, after = self._convolve(x, state, cu_seqlens)
        initial = None if state is None else state["recurrence"]
        raw, write, q = self._project(u)
        dt_bias, fused = self.dt_proj.bias, self.config.backend in ("auto", "triton") and cu_seqlens is None
        if fused and triton_selective.serves(u, raw, z, q, write, dt_bias, self.A_log, self.D):
            a, lower_end = self._rates(u), self.widening.current_lower_end()
            y, after["recurrence"] = triton_selective.selective_scan(
                u, raw, dt_bias, a, lower_end, write, q, self.D, z, initial, self.config.eigenvalue_range
            )
            return self.out_proj(y), after
        transition = self._discretized(raw)
        v = (transition.dt * u.unsqueeze(2)).to(u.dtype)
        o, after["recurrence"] = linear_recurrence(
            transition,
            q.unsqueeze(2),
            v,
            write=write.unsqueeze(2),
            initial_state=initial,
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        y = torch.addcmul(o.squeeze(2), u, self.D.to(u.dtype)) * F.silu(z)
        return self.out_proj(y), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Discretized:
        return self._discretized(self._project(self._convolve(x, state, cu_seqlens)[0])[0])

    def eigenvalue_parameters(self) -> list[Tensor]:
        return [self.dt_proj.weight, self.dt_proj.bias, self.A_log, *self.widening.parameters()]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        into = self.in_proj.bias
        lo, hi = linear_interval(
            self.in_proj.weight[: self.channels], scale, None if into is None else into[: self.channels]
        )
        if self.conv1d is not None:
            # Before the first token the convolution reads zeros.
            reach = torch.maximum(hi, -lo) * self.conv1d.weight.double().abs().sum((1, 2))
            bias = 0 if self.conv1d.bias is None else self.conv1d.bias.double()
            lo, hi = bias - reach, bias + reach
        to_steps = self.dt_proj.weight.double() @ self.x_proj.weight[: self.dt_rank].double()
        steps = map_interval(to_steps, silu_interval((lo, hi)), self.dt_proj.bias)
        rate = self.A_log.double().exp().mT
        gates = gate_interval(lambda x: torch.exp(-rate * F.softplus(x)), steps)
        # All channels are value channels of one head.
        lo, hi = (self.widening(gate).double().reshape(1, -1) for gate in gates)
        return diagonal_bounds((lo, hi))

    def _convolve(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, State]:
        """The activated channels [B, T, V], the output gate [B, T, V], and the state of the convolution."""
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        u, z = self.in_proj(x).chunk(2, -1)
        after: State = {}
        if self.conv1d is None:
            u = F.silu(u)
        else:
            before = None if state is None else state["conv"]
            u, after["conv"] = self.conv1d(u, before, cu_seqlens, activation="silu")
        return u, z, after

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step sizes before bias and softplus [B, T, V], the write keys B_t and the queries C_t, both [B, T, K]."""
        size = self.config.state_size
        low_rank, write, q = self.x_proj(u).split([self.dt_rank, size, size], -1)
        return F.linear(low_rank, self.dt_proj.weight), write, q

    def _rates(self, u: Tensor) -> Tensor:
        """A, [K, V]."""
        return -torch.exp(self.A_log.to(accumulation_dtype(u))).mT

    def _discretized(self, raw: Tensor) -> Discretized:
        wide = accumulation_dtype(raw)
        dt = F.softplus(raw.to(wide) + self.dt_proj.bias.to(wide))
        lower_end = self.widening.current_lower_end()
        lower_end = None if lower_end is None else lower_end.unsqueeze(0)
        return Discretized(dt.unsqueeze(2), self._rates(raw).unsqueeze(0), self.config.eigenvalue_range, lower_end)


MIXERS = (MambaConfig,)
