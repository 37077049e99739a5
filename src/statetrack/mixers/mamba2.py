"""Mamba-2 (arXiv 2405.21060): one decay for each head, discretized with a step size that depends on the token.

    H_t = a_t H_{t-1} + B_t (dt_t x_t)^T,     y_t = H_t^T C_t + D x_t

| mixer | native a_t | native eigenvalues | widened by `eigenvalue_range=(lo, hi)` |
|---|---|---|---|
| mamba2 | exp(dt_t A), A < 0 | [0, 1] | lo + (hi - lo) exp(dt_t A); for (-1, 1) 2 exp(dt_t A) - 1 (arXiv 2411.12537) |

What is written, dt_t B_t x_t^T, is the original's in every range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import ShortConvolution, rms_norm
from statetrack.mixers.bounds import FactorBounds, diagonal_bounds, gate_interval, linear_interval
from statetrack.mixers.mixer import (
    Mixer,
    State,
    WidenedMixerConfig,
    Widening,
    require_conv_size,
    require_positive,
    require_positive_number,
    with_options,
)
from statetrack.ops import check_packing, linear_recurrence
from statetrack.transition import Diagonal, EigenvalueRange, accumulated, accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(WidenedMixerConfig):
    """Options of Mamba-2.

    Attributes:
        num_heads: H, a divisor of the expand * d_model channels.
        head_dim: V, the channels of each head; expand * d_model / num_heads if None, and nothing else if given.
        state_size: K, the size of the state of each channel.
        n_groups: heads are split into so many groups, which share B_t and C_t.
        expand: channels for each model dimension.
        conv_size: width of the short convolution on x, B and C; 0 leaves it out.
        conv_bias: give the short convolution a bias.
        proj_bias: give the projections into and out of the mixer a bias.
        dt_min: smallest step size; step sizes are clamped to it.
        dt_max: largest step size; None for no limit.
        gate_gain: factor on the logit of the step size. Above 1 it lets the decay saturate at the ends of its range
            early in training.
        output_norm: RMS-normalize the gated output over the channels of each group.
        output_norm_eps: added to the mean square inside that normalization.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "mamba2"
    title: ClassVar[str] = "Mamba-2"
    summary: ClassVar[str] = "one decay a head, discretized with a step size that depends on the token"

    num_heads: int = 4
    head_dim: int | None = None
    state_size: int = 64
    n_groups: int = 1
    expand: int = 2
    conv_size: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    gate_gain: float = 1.0
    output_norm: bool = True
    output_norm_eps: float = 1e-5
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "state_size", "n_groups", "expand")
        require_conv_size(self.conv_size)
        require_positive_number(self, "gate_gain", "output_norm_eps")
        if self.num_heads % self.n_groups:
            raise ValueError(f"n_groups = {self.n_groups} must divide num_heads = {self.num_heads}")
        if not (0 <= self.dt_min < (math.inf if self.dt_max is None else self.dt_max)):
            raise ValueError(
                f"step sizes need 0 <= dt_min < dt_max, got dt_min = {self.dt_min}, dt_max = {self.dt_max}"
            )

    def spectrum(self) -> EigenvalueRange:
        return self.gate_range()

    def channels_per_head(self, d_model: int) -> int:
        """V for a model dimension."""
        channels = self.expand * d_model
        if channels % self.num_heads or self.head_dim not in (None, channels // self.num_heads):
            raise ValueError(
                f"num_heads * head_dim must be expand * d_model = {channels}, "
                f"got num_heads = {self.num_heads}, head_dim = {self.head_dim}"
            )
        return channels // self.num_heads

    def build(self, d_model: int) -> Mamba2:
        return Mamba2(d_model, self)


class Mamba2(Mixer):
    """Mamba-2's mixer, [B, T, D] -> [B, T, D], with the eigenvalue range as an option.

        z, x, B, C, r = W x,    x, B, C = silu(conv(x, B, C)),    dt = clamp(softplus(gate_gain r + dt_bias))
        a = lo + (hi - lo) exp(-dt exp(A_log)),    H <- a H + B (dt x)^T,    y = W_o norm((H^T C + D x) silu(z))

    Parameters are named as in the original. Step sizes, decays and the state are float32 or better whatever the dtype
    of the activations.

    Args:
        d_model: D.
        config: a `Mamba2Config`; or leave it out and give its fields as keyword options.
    """

    output_layer = "out_proj"

    def __init__(self, d_model: int, config: Mamba2Config | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(Mamba2Config, config, options)
        self.head_dim = config.channels_per_head(d_model)
        self.channels = config.expand * d_model
        self.group_size = config.n_groups * config.state_size  # of B and of C, all groups together
        convolved = self.channels + 2 * self.group_size
        h = config.num_heads
        self.in_proj = nn.Linear(d_model, self.channels + convolved + h, bias=config.proj_bias)
        self.conv1d = None
        if config.conv_size:
            self.conv1d = ShortConvolution(convolved, config.conv_size, bias=config.conv_bias)
        # As in the original: A uniform in 1..16, step sizes log-uniform in 0.001..0.1, and softplus(dt_bias) = step.
        self.A_log = nn.Parameter(torch.empty(h).uniform_(1, 16).log())
        step = torch.empty(h).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.D = nn.Parameter(torch.ones(h))
        self.norm = None
        if config.output_norm:
            self.norm = GroupedRMSNorm(self.channels, config.n_groups, config.output_norm_eps)
        self.out_proj = nn.Linear(self.channels, d_model, bias=config.proj_bias)
        self.widening = Widening(config, h)

    def init_state(self, batch_size: int) -> State:
        weight = self.A_log
        shape = (batch_size, self.config.num_heads, self.config.state_size, self.head_dim)
        state = {"recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device)}
        return state if self.conv1d is None else state | {"conv": self.conv1d.init_state(batch_size)}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        convolved_size = self.channels + 2 * self.group_size
        z, convolved, r = self.in_proj(x).split([self.channels, convolved_size, self.config.num_heads], -1)
        after: State = {}
        if self.conv1d is None:
            convolved = F.silu(convolved)
        else:
            before = None if state is None else state["conv"]
            convolved, after["conv"] = self.conv1d(convolved, before, cu_seqlens, activation="silu")
        u, write, q = convolved.split([self.channels, self.group_size, self.group_size], -1)
        u = u.unflatten(-1, (self.config.num_heads, self.head_dim))
        dt = self._step_sizes(r)
        o, after["recurrence"] = linear_recurrence(
            self._transition(dt),
            self._for_heads(q),
            dt.unsqueeze(-1) * u,
            write=self._for_heads(write),
            initial_state=None if state is None else state["recurrence"],
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        y = (o + accumulated(self.D).unsqueeze(-1) * u).flatten(2) * F.silu(accumulated(z))
        if self.norm is not None:
            y = self.norm(y)
        return self.out_proj(y.to(z.dtype)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Diagonal:
        return self._transition(self._step_sizes(self.in_proj(x)[..., -self.config.num_heads :]))

    def eigenvalue_parameters(self) -> list[Tensor]:
        # The rows of in_proj that make the step sizes can't be told from the rest of that matrix, as in the original.
        return [self.A_log, self.dt_bias, *self.widening.parameters()]

    def factor_bounds(self, scale: Tensor) -> FactorBounds:
        gain, heads, bias = self.config.gate_gain, self.config.num_heads, self.dt_bias
        if self.in_proj.bias is not None:
            bias = bias + gain * self.in_proj.bias[-heads:]
        steps = linear_interval(gain * self.in_proj.weight[-heads:], scale, bias)
        rate = self.A_log.double().exp()
        limits = (self.config.dt_min, self.config.dt_max)
        lo, hi = gate_interval(lambda x: torch.exp(-rate * F.softplus(x).clamp(*limits)), steps)
        return diagonal_bounds((self.widening(lo).double().unsqueeze(1), self.widening(hi).double().unsqueeze(1)))

    def _step_sizes(self, r: Tensor) -> Tensor:
        dt = F.softplus(self.config.gate_gain * accumulated(r) + accumulated(self.dt_bias))
        return dt.clamp(self.config.dt_min, self.config.dt_max)

    def _transition(self, dt: Tensor) -> Diagonal:
        return Diagonal(self.widening(torch.exp(-dt * accumulated(self.A_log).exp())))

    def _for_heads(self, x: Tensor) -> Tensor:
        """What the groups share, [B, T, G K], for each head: [B, T, H, K]."""
        groups = x.unflatten(-1, (self.config.n_groups, self.config.state_size))
        return groups.repeat_interleave(self.config.num_heads // self.config.n_groups, 2)


class GroupedRMSNorm(nn.Module):
    """RMS normalization over each of `groups` equal parts of the channels, [..., C] -> [..., C].

    Args:
        channels: C.
        groups: how many parts.
        eps: added to the mean square of each.
    """

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x.unflatten(-1, (self.groups, -1)), None, self.eps).flatten(-2)
        return normed * self.weight.to(normed.dtype)


MIXERS = (Mamba2Config,)
