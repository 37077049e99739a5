"""The DeltaNet family: one module whose transition is a product of generalized Householder matrices.

    H_t = (I - beta_N k_N k_N^T) ... (I - beta_1 k_1 k_1^T) diag(a_t) H_{t-1} + what the N factors write,    |k_j| = 1

With s = sigmoid, every gate computed from the input, and the decay d_t = exp(-exp(A_log) softplus(.)):

| mixer | from | N | native beta, decay | native eigenvalues | with `eigenvalue_range=(-1, 1)` |
|---|---|---|---|---|---|
| deltanet | arXiv 2406.06484 | 1 | s(.), none | 1 - beta, in [0, 1] | 2 s(.): in [-1, 1] |
| gated_deltanet | arXiv 2412.06464 | 1 | s(.), d_t for each head | d_t, d_t (1 - beta): [0, 1] | 2 s(.): in [-1, 1] |
| kda | arXiv 2510.26692 | 1 | s(.), d_t for each key channel | real, in [0, 1] | 2 s(.): real, in [-1, 1] |
| deltaproduct | arXiv 2502.10297 | 2 | s(.), none | real, in [0, 1] (N <= 2) | 2 s(.): complex, rotations |
| gated_deltaproduct | arXiv 2502.10297 | 2 | s(.), d_t for each head | real, in [0, 1] (N <= 2) | 2 s(.): complex |

The widening is that of arXiv 2411.12537; for a lower end lo it is beta = (1 - lo) s(.). The decay has a range of its
own, `decay_range`, native (0, 1): widened it is a_t = lo + (hi - lo) d_t, so 2 d_t - 1 for (-1, 1). The eigenvalues of
kda are real unless both ranges are signed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import (
    RMSNorm,
    ShortConvolution,
    convolve_together,
    gated,
    joined_product,
    l2_normalize,
    unit_vectors,
)
from statetrack.mixers.bounds import FactorBounds, Interval, gate_interval, linear_interval
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
from statetrack.transition import EigenvalueRange, Householder, accumulated, accumulation_dtype

# Rows of a multiple of so many numbers begin at a multiple of 32 bytes, in which memory is read.
_ALIGNED = 16
_CONVOLVED = ("q", "k", "v")
_ACTIVATIONS = {"silu": F.silu, "identity": lambda x: x}


def products_spectrum(lo: float, factors: int) -> EigenvalueRange | None:
    """Where the eigenvalues of products of factors with eigenvalues in [lo, 1] lie; None if they may be complex."""
    if factors == 1 or (factors == 2 and lo >= 0):
        # A product of two symmetric matrices with eigenvalues in [0, 1] has such eigenvalues too (proposition 1 of
        # arXiv 2411.12537). It shortens no vector by more than lo for each of its factors.
        return EigenvalueRange(lo**factors, 1)
    return None


def gated_beta(raw: Tensor, gain: float, bias: Tensor | None, widening: Widening, shape: tuple[int, ...]) -> Tensor:
    """`beta = (1 - lo) sigmoid(gain (raw + bias))` of `shape` [..., N, H], in float32 or better.

    Args:
        raw: what `b_proj` returns, [..., N H].
        gain, bias: on the logit; bias [N H], None for none.
        widening: the range of the eigenvalues.
        shape: of the result.
    """
    logits = accumulated(raw)
    if bias is not None:
        logits = logits + accumulated(bias)
    if gain != 1:
        logits = gain * logits
    return widening.householder_beta(torch.sigmoid(logits.view(shape)))


def largest_beta(
    weight: Tensor, gain: float, bias: Tensor | None, widening: Widening, scale: Tensor, heads: int
) -> Tensor:
    """The upper end of `gated_beta`, float64 [N, H], over all inputs `scale * u` with |u| <= 1 of `b_proj`'s weight."""
    logits = linear_interval(gain * weight, scale, None if bias is None else gain * bias)
    return widening.householder_beta(gate_interval(torch.sigmoid, logits)[1].view(-1, heads)).double()


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(WidenedMixerConfig):
    """Options of DeltaNet; `eigenvalue_range` is that of each factor along its key, (lo, 1).

    Attributes:
        num_heads: heads of queries and keys, and of values unless `num_value_heads` says otherwise.
        head_dim: K, the size of queries and keys in each head; d_model / num_heads if None.
        value_dim: V, the size of values in each head; head_dim if None.
        num_value_heads: H, heads of values, gates and states, a multiple of num_heads; num_heads if None. Each head of
            queries and keys then serves num_value_heads / num_heads consecutive heads of values.
        num_householder: N, generalized Householder factors for each token.
        beta_gain: factor on the logit of beta. Above 1 it lets beta saturate at the ends of its range early in
            training.
        beta_bias: what a learned bias on the logit of beta starts from, before the gain; None for no bias, as in the
            originals. With beta_gain 4 and the range (-1, 1), 1 puts the eigenvalues of most factors near -1 at the
            start.
        conv_size: width of the short convolutions on queries, keys and values; 0 leaves them out.
        conv_bias: give the short convolutions a bias.
        activation: applied to queries, keys and values before queries and keys are normalized.
        normalize: divide keys by their norm, and beta by the squared norm of the key as rounded (see `Householder`),
            which makes beta = 2 an exact reflection whatever the dtype and the length of the key. The originals don't:
            theirs is False, and differs where a key is so short that the 1e-6 that they add to its squared norm counts.
        output_norm: RMS-normalize what each head reads from its state.
        output_norm_eps: added to the mean square inside that normalization.
        output_gate: multiply the normalized output by the activation of a gate computed from the input.
        gate_activation: of the output gate.
        backend: how the recurrence is computed, "auto" or a name from `statetrack.ops.available_backends()`.
    """

    name: ClassVar[str] = "deltanet"
    title: ClassVar[str] = "DeltaNet"
    summary: ClassVar[str] = "one generalized Householder matrix a token; N = num_householder of them"

    num_heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    num_value_heads: int | None = None
    num_householder: int = 1
    beta_gain: float = 1.0
    beta_bias: float | None = None
    conv_size: int = 4
    conv_bias: bool = False
    activation: Literal["silu", "identity"] = "silu"
    normalize: bool = True
    output_norm: bool = True
    output_norm_eps: float = 1e-5
    output_gate: bool = False
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "value_dim", "num_value_heads", "num_householder")
        if self.value_heads % self.num_heads:
            raise ValueError(
                f"num_value_heads must be a multiple of num_heads = {self.num_heads}, got {self.num_value_heads}"
            )
        self.eigenvalue_range.householder_beta(torch.empty(0))  # refuses a range that no beta gives
        require_conv_size(self.conv_size)
        require_positive_number(self, "beta_gain")
        if self.beta_bias is not None and not math.isfinite(self.beta_bias):
            raise ValueError(f"beta_bias must be a finite number or None, got {self.beta_bias}")
        if self.activation not in ("silu", "identity"):
            raise ValueError(f"activation must be silu or identity, got {self.activation!r}")
        if not (math.isfinite(self.output_norm_eps) and self.output_norm_eps >= 0):
            raise ValueError(f"output_norm_eps must be a number of at least 0, got {self.output_norm_eps}")
        if self.gate_activation not in ("silu", "sigmoid"):
            raise ValueError(f"gate_activation must be silu or sigmoid, got {self.gate_activation!r}")

    @property
    def value_heads(self) -> int:
        """H, the heads of the recurrence."""
        return self.num_value_heads or self.num_heads

    def spectrum(self) -> EigenvalueRange | None:
        return products_spectrum(self.gate_range().lo, self.num_householder)

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
        decay_range: range of the decay of each head, a number for the whole state; (0, 1) is the original. A signed
            decay beside a signed beta is possible: (-1, 1).
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


@dataclass(frozen=True, kw_only=True)
class GatedDeltaProductConfig(GatedDeltaNetConfig):
    """Options of Gated DeltaProduct: those of Gated DeltaNet, with two Householder factors unless told otherwise."""

    name: ClassVar[str] = "gated_deltaproduct"
    title: ClassVar[str] = "Gated DeltaProduct"
    summary: ClassVar[str] = "DeltaProduct with a decay of the whole state before the Householder factors"

    num_householder: int = 2


@dataclass(frozen=True, kw_only=True)
class KimiDeltaAttentionConfig(GatedDeltaNetConfig):
    """Options of Kimi Delta Attention: those of Gated DeltaNet, whose `decay_range` is now that of each key channel.

    Decay and output gate are computed by two small matrices each instead of a large one.

    Attributes:
        decay_rank: numbers between the two matrices of the decay; V if None.
        gate_rank: numbers between the two matrices of the output gate; V if None.
        gate_bias: give the second matrix of the output gate a bias, as in FLA; the published model has none.
    """

    name: ClassVar[str] = "kda"
    title: ClassVar[str] = "Kimi Delta Attention"
    summary: ClassVar[str] = "Gated DeltaNet with a decay for each key channel"

    gate_activation: Literal["silu", "sigmoid"] = "sigmoid"
    decay_rank: int | None = None
    gate_rank: int | None = None
    gate_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "decay_rank", "gate_rank")

    def spectrum(self) -> EigenvalueRange | None:
        if self.num_householder > 1 or (self.gate_range().lo < 0 and self.decay_range.lo < 0):
            return None  # three factors, or two of which none is positive: complex eigenvalues are possible
        # One of the two symmetric factors is positive, P, and the other, S, is symmetric: P S has the eigenvalues of
        # sqrt(P) S sqrt(P), so that they are real, between the extreme products of the ends.
        return super().spectrum()


class DeltaNet(Mixer):
    """A member of the DeltaNet family, by its config; [B, T, D] -> [B, T, D].

        q, k_j, v_j = activation(conv(W x)),   q and k_j L2-normalized
        beta_j = (1 - lo) sigmoid(beta_gain (W_b x + b_b)), b_b = 0 unless the config has a beta_bias
        H <- a H, then for each factor j: H <- H - beta_j k_j (k_j^T H - v_j^T);   y = W_o norm(H^T q / sqrt(K))

    Beta and the decay are computed in float32 or better whatever the dtype of the activations, and so is the state.

    Args:
        d_model: D.
        config: a `DeltaNetConfig` or one derived from it; or leave it out and give its fields as keyword options.
    """

    def __init__(self, d_model: int, config: DeltaNetConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config = with_options(DeltaNetConfig, config, options)
        self.num_key_heads, self.num_heads = config.num_heads, config.value_heads
        self.num_householder = config.num_householder
        self.key_dim, self.value_dim = config.head_sizes(d_model)
        h, n = self.num_heads, self.num_householder
        q_size = self.num_key_heads * self.key_dim
        k_size, v_size, o_size = n * q_size, n * h * self.value_dim, h * self.value_dim
        self.q_proj = nn.Linear(d_model, q_size, bias=False)
        self.k_proj = nn.Linear(d_model, k_size, bias=False)
        self.v_proj = nn.Linear(d_model, v_size, bias=False)
        self.b_proj = nn.Linear(d_model, n * h, bias=False)
        # A parameter of its own, as layers with a bias are not joined.
        bias = config.beta_bias
        self.beta_bias = None if bias is None else nn.Parameter(torch.full((n * h,), float(bias)))
        self.o_proj = nn.Linear(o_size, d_model, bias=False)
        kda = config if isinstance(config, KimiDeltaAttentionConfig) else None
        if not config.output_gate:
            self.g_proj = None
        elif kda is None:
            self.g_proj = nn.Linear(d_model, o_size, bias=False)
        else:
            self.g_proj = _low_rank(d_model, kda.gate_rank or self.value_dim, o_size, bias=kda.gate_bias)
        self.o_norm = RMSNorm(self.value_dim, eps=config.output_norm_eps) if config.output_norm else None
        sizes = dict(zip(_CONVOLVED, (q_size, k_size, v_size), strict=True)) if config.conv_size else {}
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(size, config.conv_size, bias=config.conv_bias) for name, size in sizes.items()}
        )
        self.widening = Widening(config, h)
        self.decay_range = config.decay_range if isinstance(config, GatedDeltaNetConfig) else None
        if self.decay_range is not None:
            self.decay_shape = (h,) if kda is None else (h, self.key_dim)
            if kda is None:
                self.a_proj = nn.Linear(d_model, h, bias=False)
            else:
                self.a_proj = _low_rank(d_model, kda.decay_rank or self.value_dim, h * self.key_dim)
            # Decays spread over time scales, as in Mamba-2: A uniform in 1..16, step sizes log-uniform in 0.001..0.1.
            self.A_log = nn.Parameter(torch.empty(h).uniform_(1, 16).log())
            step = torch.empty(self.decay_shape).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step

    def init_state(self, batch_size: int) -> State:
        weight = self.q_proj.weight
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        state = {"recurrence": torch.zeros(shape, dtype=accumulation_dtype(weight), device=weight.device)}
        return state | {name: conv.init_state(batch_size) for name, conv in self._convolutions()}

    def scan(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        projected, after = self._project(x, state, cu_seqlens)
        transition = self._transition(x, projected)
        b, t, _ = x.shape
        q = projected["q"].view(b, t, self.num_key_heads, self.key_dim)
        q = self._for_every_value_head(l2_normalize(q, scale=self.key_dim**-0.5))
        v = projected["v"].view(b, t, self.num_householder, self.num_heads, self.value_dim)
        initial = None if state is None else state["recurrence"]
        o, after["recurrence"] = linear_recurrence(
            transition,
            q,
            v,
            initial_state=initial,
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
        if self.o_norm is not None:
            o = self.o_norm(o)
        if self.g_proj is not None:
            gate = projected["g"] if "g" in projected else self.g_proj(x)
            o = gated(gate.view_as(o), o, self.config.gate_activation)
        return self.o_proj(o.flatten(2)), after

    def transition(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Householder:
        return self._transition(x, self._project(x, state, cu_seqlens)[0])

    def eigenvalue_parameters(self) -> list[Tensor]:
        gates: list[Tensor] = [self.b_proj.weight, *self.widening.parameters()]
        if self.beta_bias is not None:
            gates.append(self.beta_bias)
        return gates if self.decay_range is None else [*gates, *self.a_proj.parameters(), self.A_log, self.dt_bias]

    def factor_bounds(self, scale: Tensor) -> FactorBounds | None:
        if not self.config.normalize:
            return None  # keys as rounded may be longer than 1
        gain, bias = self.config.beta_gain, self.beta_bias
        beta = largest_beta(self.b_proj.weight, gain, bias, self.widening, scale, self.num_heads)
        lo, hi = 1 - beta, torch.ones_like(beta)
        if self.decay_range is not None:
            decays = self._decay_interval(self.decay_range, scale)
            if len(self.decay_shape) == 1:  # one number a head: it scales the first factor
                ends = torch.stack([end * factor[0] for end in decays for factor in (lo, hi)])
                lo, hi = torch.cat([ends.amin(0)[None], lo[1:]]), torch.cat([ends.amax(0)[None], hi[1:]])
            else:
                lo = torch.cat([decays[0].amin(1)[None], lo])
                hi = torch.cat([decays[1].amax(1)[None], hi])
        return FactorBounds(lo, hi, beta.amax(0))

    def _decay_interval(self, decay_range: EigenvalueRange, scale: Tensor) -> Interval:
        """Where the decays lie, [H] or [H, K] each."""
        if isinstance(self.a_proj, nn.Sequential):
            first, second = (self.a_proj.get_parameter(f"{part}.weight").double() for part in (0, 1))
            weight = second @ first
        else:
            weight = self.a_proj.weight
        rate = self.A_log.double().exp().view(-1, *(1 for _ in self.decay_shape[1:]))
        steps = linear_interval(weight, scale, self.dt_bias.flatten())
        lo, hi = gate_interval(lambda x: torch.exp(-rate * F.softplus(x.view(self.decay_shape))), steps)
        return decay_range.widen(lo), decay_range.widen(hi)

    def _convolutions(self) -> list[tuple[str, ShortConvolution]]:
        return [(name, conv) for name, conv in self.convolutions.items() if isinstance(conv, ShortConvolution)]

    def _project(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[State, State]:
        """Activated queries "q", keys "k" and values "v", flat, and the states of the convolutions.

        Where one product computes all that is read of x, beside these what `g_proj`, `b_proj` and `a_proj` return.
        """
        if cu_seqlens is not None:
            check_packing(x.shape[0], x.shape[1], cu_seqlens)
        activation, fused = _ACTIVATIONS[self.config.activation], self.config.activation == "silu"
        in_kernel = "silu" if fused else None
        projected, after = self._project_together(x, state, cu_seqlens, in_kernel)
        for name, conv in self._convolutions():
            if name not in after:
                before = None if state is None else state[name]
                projected[name], after[name] = conv(projected[name], before, cu_seqlens, activation=in_kernel)
        if not (fused and self.convolutions):
            projected |= {name: activation(projected[name]) for name in _CONVOLVED}
        return projected, after

    def _project_together(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, activation: Literal["silu"] | None
    ) -> tuple[State, State]:
        """What linear layers make of x, and, where the convolutions are one as well, their outputs and states."""
        layers = dict(zip(_CONVOLVED, (self.q_proj, self.k_proj, self.v_proj), strict=True))
        others = {"g": self.g_proj, "b": self.b_proj, "a": None if self.decay_range is None else self.a_proj}
        all_layers = layers | {name: layer for name, layer in others.items() if isinstance(layer, nn.Linear)}
        product = joined_product(x, *all_layers.values(), multiple=_ALIGNED)
        if product is None:
            return {name: layer(x) for name, layer in layers.items()}, {}
        widths = [layer.weight.shape[0] for layer in all_layers.values()]
        convolutions = [conv for _, conv in self._convolutions()]
        if state is None and convolutions:
            passed = widths[len(layers) :]
            together = convolve_together(product, convolutions, passed, cu_seqlens, activation=activation)
            if together is not None:
                outputs, after = together
                return dict(zip(all_layers, outputs, strict=True)), dict(zip(layers, after, strict=True))
        parts = product.split([*widths, product.shape[-1] - sum(widths)], -1)
        return dict(zip(all_layers, parts[:-1], strict=True)), {}

    def _for_every_value_head(self, x: Tensor) -> Tensor:
        """[..., num_key_heads, K] -> [..., H, K]."""
        return (
            x.repeat_interleave(self.num_heads // self.num_key_heads, -2) if self.num_heads > self.num_key_heads else x
        )

    def _transition(self, x: Tensor, projected: State) -> Householder:
        b, t, _ = x.shape
        k = projected["k"].view(b, t, self.num_householder, self.num_key_heads, self.key_dim)
        # With beta divided by its squared length, a key of length l writes its value 1 / l times: l has to be 1.
        k = unit_vectors(k) if self.config.normalize else l2_normalize(k)
        raw = projected["b"] if "b" in projected else self.b_proj(x)
        shape = (b, t, self.num_householder, self.num_heads)
        beta = gated_beta(raw, self.config.beta_gain, self.beta_bias, self.widening, shape)
        decay = None
        if self.decay_range is not None:
            rate = accumulated(self.A_log).exp().view(-1, *(1 for _ in self.decay_shape[1:]))
            raw = projected["a"] if "a" in projected else self.a_proj(x)
            step = accumulated(raw).view(b, t, *self.decay_shape) + accumulated(self.dt_bias)
            decay = self.decay_range.widen(torch.exp(-rate * F.softplus(step)))
        # Keys in bf16 are a little longer or shorter than 1; dividing by their norm as rounded keeps beta = 2 a
        # reflection.
        return Householder(self._for_every_value_head(k), beta, decay, normalize=self.config.normalize)


def _low_rank(inputs: int, rank: int, outputs: int, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


MIXERS = (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaProductConfig,
    KimiDeltaAttentionConfig,
)
