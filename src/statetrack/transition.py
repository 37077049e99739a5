"""State-transition matrices: what distinguishes one linear RNN from another.

Every linear RNN is the recurrence (equation 1 of Grazzi et al., arXiv 2411.12537)

    H_t = A_t H_{t-1} + B_t,        o_t = H_t^T q_t,

with a state `H` of shape [K, V] for each head. The models differ in `A_t`; a `Transition` is the value of `A_t` for
every token of a batch. Operations consume it, the analysis tools read its eigenvalues.

Letters used for shapes in the whole package:
    B batch, T time, H heads, N Householder factors for each token, K key dimension, V value dimension, D model
    dimension.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

SHORTEST_KEY = 1e-9
"""The length up to which a key with `normalize` counts as 0. It would write its value 1 / |k| times, and the backward
passes through numbers like 1 / |k|^4, which leave the range of float32."""


@dataclass(frozen=True)
class EigenvalueRange:
    """The interval [lo, hi] that the eigenvalues of a transition may take; -1 <= lo < hi <= 1.

    This class is the only place that knows how a gate with values in [0, 1] is widened to another range. Wherever a
    range is expected, a pair such as `(-1, 1)` or a string such as `"-1,1"` will do.
    """

    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        lo, hi = float(self.lo), float(self.hi)
        if not (math.isfinite(lo) and math.isfinite(hi) and -1 <= lo < hi <= 1):
            raise ValueError(f"an eigenvalue range needs -1 <= lo < hi <= 1, for example (-1, 1); got ({lo:g}, {hi:g})")
        object.__setattr__(self, "lo", lo)
        object.__setattr__(self, "hi", hi)

    @classmethod
    def of(cls, value: EigenvalueRangeLike) -> EigenvalueRange:
        """Reads a range from an `EigenvalueRange`, a pair of numbers, or a string `"lo,hi"`."""
        if isinstance(value, EigenvalueRange):
            return value
        parts = value.split(",") if isinstance(value, str) else value
        try:
            lo, hi = (float(part) for part in parts)
        except (TypeError, ValueError):
            raise ValueError(f"an eigenvalue range is two numbers lo,hi, for example -1,1; got {value!r}") from None
        return cls(lo, hi)

    def widen(self, gate: Tensor, lo: Tensor | None = None) -> Tensor:
        """Maps a gate in [0, 1] onto [lo, hi]: `lo + (hi - lo) gate`; for (-1, 1) the paper's `2 gate - 1`.

        Args:
            gate: any shape.
            lo: a lower end of its own for every entry, which broadcasts against the gate; None for the range's.
        """
        if lo is not None:
            return lo + (self.hi - lo) * gate
        if self.lo == 0 and self.hi == 1:
            return gate
        return self.lo + (self.hi - self.lo) * gate

    def householder_beta(self, gate: Tensor, lo: Tensor | None = None) -> Tensor:
        """Maps a gate in [0, 1] onto the `beta` for which `1 - beta` runs from 1 at gate 0 to lo at gate 1.

        For (0, 1) this is the gate itself (DeltaNet), for (-1, 1) it is `2 gate`. `lo` is as in `widen`.

        Raises:
            ValueError: if hi is not 1. A generalized Householder matrix is the identity outside its key, so 1 is always
                among its eigenvalues.
        """
        if self.hi != 1:
            raise ValueError(
                f"the eigenvalue range of a generalized Householder matrix ends at 1; got ({self.lo:g}, {self.hi:g})"
            )
        if lo is not None:
            return (1 - lo) * gate
        return gate if self.lo == 0 else (1 - self.lo) * gate

    def removal(self, gate: Tensor, decay: float, lo: Tensor | None = None) -> Tensor:
        """Maps a gate in [0, 1] onto what is taken from a decay along one direction: `decay - removal` ends at lo.

        It is `(decay - lo) gate`. For `diag(w) - s k k^T` (RWKV-7) with entries of w in [decay, 1], |k| = 1 and
        s = removal(gate, decay), the number `k^T A k = k^T diag(w) k - s` lies in [lo, 1]. `householder_beta` is the
        case decay = 1.

        Args:
            gate: any shape.
            decay: the lower end of the decays.
            lo: as in `widen`.

        Raises:
            ValueError: if hi is not 1, as the removal is 0 at gate 0 and decays come up to 1; or if lo is not below
                `decay`.
        """
        if self.hi != 1:
            raise ValueError(
                f"the eigenvalue range of a decay minus a matrix of rank one ends at 1; got ({self.lo:g}, {self.hi:g})"
            )
        if self.lo >= decay:
            raise ValueError(
                f"the eigenvalue range of a decay minus a matrix of rank one starts below the smallest decay, "
                f"{decay:.4g}; got ({self.lo:g}, {self.hi:g})"
            )
        return (decay - (self.lo if lo is None else lo)) * gate

    def __str__(self) -> str:
        return f"{self.lo:g},{self.hi:g}"


EigenvalueRangeLike = EigenvalueRange | tuple[float, float] | list[float] | str


@dataclass(frozen=True)
class Transition(ABC):
    """The state-transition matrices `A_t` of a batch of token sequences: a frozen dataclass of tensors."""

    names: ClassVar[tuple[str, ...]]
    """Its tensors. Written out, because torch.compile (in torch 2.11) can't look for them in an instance."""

    identity: ClassVar[dict[str, float]]
    """The tensors whose first two axes are B and T, by name, with the value that makes a step leave the state alone."""

    @property
    @abstractmethod
    def batch_shape(self) -> tuple[int, int, int]:
        """(B, T, H)."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        return {name: x for name in self.names if (x := getattr(self, name)) is not None}

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same kind of transition with `function` applied to every tensor whose first two axes are B and T."""
        return replace(self, **{name: function(x) for name, x in self.tensors().items() if name in self.identity})

    @property
    def has_identity(self) -> bool:
        """Whether the values of `identity` do make a step that leaves the state alone."""
        return True

    @abstractmethod
    def dense(self) -> Tensor:
        """`A_t` written out: [B, T, H, K, K], or [B, T, H, V, K, K] where value channels have matrices of their own."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """The eigenvalues of every `A_t`: complex128, the shape of `dense()` without its last axis."""


@dataclass(frozen=True)
class Householder(Transition):
    """Products of N generalized Householder matrices, after an optional decay (DeltaNet, Gated DeltaNet, DeltaProduct).

        A_t = (I - beta_N k_N k_N^T) ... (I - beta_1 k_1 k_1^T) diag(decay)

    The factor j = 1 is applied first, the decay before it. Along k_j a factor has the eigenvalue `1 - beta_j |k_j|^2`.

    Attributes:
        k: keys [B, T, N, H, K].
        beta: [B, T, N, H].
        decay: None, [B, T, H] (one signed number for each head) or [B, T, H, K] (one for each key channel). It is
            linear, not a logarithm, so that 0 and negative numbers can be said.
        normalize: divide beta by |k|^2 of the key as rounded to its dtype, so that beta = 2 is an exact reflection,
            with the eigenvalue -1, whatever the dtype of k; a key with |k| <= 1e-9 counts as 0 and its factor is the
            identity. Another function than `normalize=False`.
    """

    names = ("k", "beta", "decay")
    identity = {"k": 0.0, "beta": 0.0, "decay": 1.0}  # noqa: RUF012

    k: Tensor
    beta: Tensor
    decay: Tensor | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.k.ndim != 5:
            raise ValueError(
                f"k must be [B, T, N, H, K], got {_shape(self.k)}; "
                "for one factor a token use k.unsqueeze(2) and beta.unsqueeze(2)"
            )
        if self.beta.shape != self.k.shape[:-1]:
            raise ValueError(f"beta must be [B, T, N, H] = {_shape(self.k)[:-1]} to go with k, got {_shape(self.beta)}")
        b, t, n, h, k = self.k.shape
        if n == 0 or k == 0:
            raise ValueError(f"k must have at least one factor and one channel, got N = {n}, K = {k}")
        if self.decay is not None and self.decay.shape not in ((b, t, h), (b, t, h, k)):
            raise ValueError(f"decay must be {(b, t, h)} or {(b, t, h, k)} to go with k, got {_shape(self.decay)}")

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        b, t, _, h, _ = self.k.shape
        return b, t, h

    @property
    def effective_beta(self) -> Tensor:
        """The factor of k k^T: beta, or beta / |k|^2 with `normalize`; float32 or float64, [B, T, N, H]."""
        dtype = accumulation_dtype(self.k, self.beta)
        beta = self.beta.to(dtype)
        if not self.normalize:
            return beta
        squared_norm = self.k.to(dtype).square().sum(-1)
        directed = squared_norm > SHORTEST_KEY**2
        # The inner `where` keeps 0/0 out of the backward as well: torch.where passes 0 * inf = NaN on otherwise.
        return torch.where(directed, beta / torch.where(directed, squared_norm, 1), 0)

    def dense(self) -> Tensor:
        beta = self.effective_beta
        k = self.k.to(beta.dtype)
        b, t, n, h, dim = k.shape
        product = torch.eye(dim, dtype=k.dtype, device=k.device).expand(b, t, h, dim, dim)
        if self.decay is not None:
            decay = self.decay.to(beta.dtype)
            product = product * (decay[..., None, None] if decay.ndim == 3 else decay[..., None, :])
        for j in range(n):
            k_j = k[:, :, j, :, :, None]
            product = product - beta[:, :, j, :, None, None] * k_j @ (k_j.mT @ product)
        return product

    def eigenvalues(self) -> Tensor:
        count, dim = self.k.shape[2], self.k.shape[-1]
        if count >= dim or (self.decay is not None and self.decay.ndim == 4):
            return _eigvals(self.dense())
        # With the keys as columns of Y the product is I - Y S Y^T (the WY form), S = (I + tril(diag(beta) G, -1))^-1
        # diag(beta), G = Y^T Y; so all eigenvalues are 1 but those of the small I - G S.
        k = self.k.double().permute(0, 1, 3, 2, 4)
        beta = replace(self, k=self.k.double()).effective_beta.permute(0, 1, 3, 2).unsqueeze(-1)
        gram = k @ k.mT
        identity = torch.eye(count, dtype=k.dtype, device=k.device)
        s = torch.linalg.solve_triangular(identity + (beta * gram).tril(-1), identity * beta, upper=False)
        small = _eigvals(identity - gram @ s) if count > 1 else (1 - gram * beta).squeeze(-1).to(torch.complex128)
        values = torch.cat([small, small.new_ones(*small.shape[:-1], dim - count)], -1)
        return _finite(values if self.decay is None else values * self.decay.unsqueeze(-1))


@dataclass(frozen=True)
class Discretized(Transition):
    """A continuous-time diagonal system, discretized with a step size that depends on the token (Mamba).

        A_t = diag(lo + (hi - lo) exp(dt_t A)),     elementwise on the state [K, V]

    with A < 0 and dt >= 0. The range (0, 1) is Mamba's own `exp(dt A)`; (-1, 1) is the paper's `2 exp(dt A) - 1`. The
    product dt A is as large as all states together, B T H K V numbers, and is never kept in memory by an operation.

    Attributes:
        dt: step sizes [B, T, H, V].
        A: [H, K, V].
        eigenvalue_range: the range (lo, hi).
        lower_end: [H, V], a lower end of its own for each value channel, in place of lo; None for lo.
    """

    names = ("dt", "A", "lower_end")
    identity = {"dt": 0.0}  # noqa: RUF012

    dt: Tensor
    A: Tensor
    eigenvalue_range: EigenvalueRange = field(default_factory=EigenvalueRange)
    lower_end: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eigenvalue_range", EigenvalueRange.of(self.eigenvalue_range))
        if self.dt.ndim != 4 or self.A.ndim != 3:
            raise ValueError(f"dt must be [B, T, H, V] and A [H, K, V], got {_shape(self.dt)} and {_shape(self.A)}")
        if self.A.shape[0] != self.dt.shape[2] or self.A.shape[2] != self.dt.shape[3]:
            raise ValueError(
                f"dt [B, T, H, V] and A [H, K, V] must share H and V, got {_shape(self.dt)} and {_shape(self.A)}"
            )
        if self.lower_end is not None and self.lower_end.shape != self.dt.shape[2:]:
            raise ValueError(f"lower_end must be [H, V] = {_shape(self.dt)[2:]}, got {_shape(self.lower_end)}")

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        b, t, h, _ = self.dt.shape
        return b, t, h

    @property
    def has_identity(self) -> bool:
        return self.eigenvalue_range.hi == 1  # dt = 0 makes the decay hi

    def diagonal(self) -> Tensor:
        """The entries of A_t: [B, T, H, K, V], float32 or float64."""
        return self.decay_of(self.dt)

    def decay_of(self, dt: Tensor) -> Tensor:
        """The entries of the transition for step sizes [..., H, V]: [..., H, K, V], float32 or float64."""
        dtype = accumulation_dtype(dt, self.A)
        lo = None if self.lower_end is None else self.lower_end.to(dtype).unsqueeze(1)
        return self.eigenvalue_range.widen((dt.to(dtype).unsqueeze(-2) * self.A.to(dtype)).exp_(), lo)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal().mT)

    def eigenvalues(self) -> Tensor:
        return _finite(self.diagonal().mT).to(torch.complex128)


@dataclass(frozen=True)
class Diagonal(Transition):
    """Diagonal matrices given as they are (GLA, RetNet, Mamba-2, mLSTM, RWKV-6).

        A_t = diag(decay)

    Attributes:
        decay: [B, T, H] (one number for each head) or [B, T, H, K] (one for each key channel). It is linear and signed,
            not a logarithm: 0 and -1 can be said.
    """

    names = ("decay",)
    identity = {"decay": 1.0}  # noqa: RUF012

    decay: Tensor

    def __post_init__(self) -> None:
        if self.decay.ndim not in (3, 4):
            raise ValueError(f"decay must be [B, T, H] or [B, T, H, K], got {_shape(self.decay)}")

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        b, t, h = self.decay.shape[:3]
        return b, t, h

    def diagonal(self) -> Tensor:
        """The distinct entries of A_t: [B, T, H, K], or [B, T, H, 1] for one number a head; float32 or float64."""
        decay = accumulated(self.decay)
        return decay.unsqueeze(-1) if decay.ndim == 3 else decay

    def dense(self) -> Tensor:
        """`A_t` [B, T, H, K, K]; one number a head is a multiple of the identity of any size, written with K = 1."""
        return torch.diag_embed(self.diagonal())

    def eigenvalues(self) -> Tensor:
        return _finite(self.diagonal()).to(torch.complex128)


@dataclass(frozen=True)
class LowRank(Transition):
    """A diagonal matrix minus one of rank one (RWKV-7).

        A_t = diag(decay) - u w^T

    Both parts act on the same state: what `w` reads has not decayed. Nothing is promised of the eigenvalues, which may
    leave the unit circle; measure them.

    Attributes:
        decay: [B, T, H, K] or [B, T, H], linear and signed.
        u: [B, T, H, K], the direction that is written.
        w: [B, T, H, K], the direction that is read.
    """

    names = ("decay", "u", "w")
    identity = {"decay": 1.0, "u": 0.0, "w": 0.0}  # noqa: RUF012

    decay: Tensor
    u: Tensor
    w: Tensor

    def __post_init__(self) -> None:
        if self.u.ndim != 4 or self.u.shape != self.w.shape:
            raise ValueError(f"u and w must both be [B, T, H, K], got {_shape(self.u)} and {_shape(self.w)}")
        if self.decay.shape not in (self.u.shape, self.u.shape[:-1]):
            raise ValueError(
                f"decay must be {_shape(self.u)} or {_shape(self.u)[:-1]} to go with u, got {_shape(self.decay)}"
            )

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        b, t, h, _ = self.u.shape
        return b, t, h

    def dense(self) -> Tensor:
        dtype = accumulation_dtype(self.decay, self.u, self.w)
        decay, u, w = (x.to(dtype) for x in (self.decay, self.u, self.w))
        decay = decay.unsqueeze(-1).expand(u.shape) if decay.ndim == 3 else decay
        return torch.diag_embed(decay) - u.unsqueeze(-1) * w.unsqueeze(-2)

    def eigenvalues(self) -> Tensor:
        return _eigvals(self.dense())


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and transition parameters: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def accumulated(x: Tensor) -> Tensor:
    """`x` in the dtype of states and transition parameters."""
    return x.to(accumulation_dtype(x))


def _eigvals(matrices: Tensor) -> Tensor:
    matrices = _finite(matrices).to(torch.float64)
    # LAPACK's iteration may not converge on numbers near the smallest there are, so the largest entry becomes 1.
    largest = matrices.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(matrices.dtype).tiny)
    matrices = matrices / largest
    try:
        values = torch.linalg.eigvals(matrices)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # Nor where entries differ by many orders of magnitude, as it scales rows to balance them. A rotation of the
        # coordinates leaves the eigenvalues and makes all entries alike.
        generator = torch.Generator().manual_seed(0)
        size = matrices.shape[-1]
        rotation = torch.linalg.qr(torch.randn(size, size, dtype=matrices.dtype, generator=generator))[0]
        rotation = rotation.to(matrices.device)
        values = torch.linalg.eigvals(rotation.mT @ matrices @ rotation)
    return values * largest.squeeze(-1)


def _finite(matrices: Tensor) -> Tensor:
    if not torch.isfinite(matrices).all():
        raise ValueError(
            "a transition with NaN or infinite entries has no eigenvalues; check the inputs that it was made of"
        )
    return matrices


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
