"""What the matrices `A_t` of a mixer can be for all inputs at once: intervals from the norms of its weights.

A gate is a monotone function of a logit `w . x + b`. For all inputs `x = scale * u` with |u| <= 1, which is what an RMS
norm hands on whatever it reads, the logit stays within |scale * w| of b, and so the gate, the decay or beta stays in an
interval. Bounds are computed in float64 and rounded outwards to float32, in which gates are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Interval = tuple[Tensor, Tensor]
"""Lower and upper ends, float64, of one shape."""


@dataclass(frozen=True)
class FactorBounds:
    """Every `A_t` of a mixer is a product of symmetric matrices whose eigenvalues lie in known intervals.

    Attributes:
        lo: lower ends, in [-1, 1], for each factor and head: float64 [F, H].
        hi: upper ends.
        beta: the largest beta of a head with generalized Householder matrices, float64 [H]; None without any.
    """

    lo: Tensor
    hi: Tensor
    beta: Tensor | None = None

    def real_interval(self, head: int) -> tuple[float, float] | None:
        """An interval that holds the eigenvalues of every `A_t` of a head; None if they need not be real.

        One symmetric matrix has real eigenvalues, and so has a product of two if one of them is positive: P S has those
        of sqrt(P) S sqrt(P).
        """
        lo, hi = self.lo[:, head].tolist(), self.hi[:, head].tolist()
        if len(lo) > 2 or (len(lo) == 2 and max(lo) < 0):
            return None
        ends = [(lo[0], hi[0])] if len(lo) == 1 else list(zip(lo, hi, strict=True))
        products = [1.0]
        for factor in ends:
            products = [a * b for a in products for b in factor]
        return min(products), max(products)

    def spread(self, head: int) -> float:
        """The sum R of (1 - lo) / (1 + lo) over the factors of a head; inf if one of them reaches -1.

        Every eigenvalue z of the product satisfies |1 - z|^2 <= R (1 - |z|^2), for a vector that A takes to z times
        itself loses at least (1 + lo) / (1 - lo) times the square of what a factor changes in it from its squared
        length, and the changes add up to 1 - z (Cauchy and Schwarz). So z lies in the disc between (1 - R) / (1 + R)
        and 1, and a product of n such matrices in the one for n R. For one factor the bound is attained.
        """
        lo = self.lo[:, head]
        return float(((1 - lo) / (1 + lo)).sum())


def linear_interval(weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Interval:
    """Where `weight @ x + bias` lies for all `x = scale * u` with |u| <= 1.

    Args:
        weight: [M, D].
        scale: [D].
        bias: [M]; None for none.

    Returns:
        [M] each.
    """
    radius = (weight.double() * scale.double()).norm(dim=1)
    centre = torch.zeros_like(radius) if bias is None else bias.double()
    return centre - radius, centre + radius


def map_interval(weight: Tensor, interval: Interval, bias: Tensor | None = None) -> Interval:
    """Where `weight @ y + bias` lies for y in an interval [D]; weight [M, D], bias [M]; returns [M] each."""
    lo, hi = interval
    up, down = weight.double().clamp(min=0), weight.double().clamp(max=0)
    centre = 0 if bias is None else bias.double()
    return up @ lo + down @ hi + centre, up @ hi + down @ lo + centre


def silu_interval(interval: Interval) -> Interval:
    """Where silu lies on an interval; it falls down to -1.2785 and rises from there."""
    lo, hi = interval
    at_lo, at_hi = F.silu(lo), F.silu(hi)
    least = torch.where((lo < _SILU_TURNS) & (hi > _SILU_TURNS), _SILU_LEAST, torch.minimum(at_lo, at_hi))
    return least, torch.maximum(at_lo, at_hi)


def gate_interval(function: Callable[[Tensor], Tensor], interval: Interval) -> Interval:
    """Where a monotone gate with values in [0, 1] lies on an interval of logits, rounded outwards to float32."""
    ends = [function(end) for end in interval]
    lo, hi = torch.minimum(*ends).float(), torch.maximum(*ends).float()
    infinity = torch.tensor(torch.inf, device=lo.device)
    return torch.nextafter(lo, -infinity).clamp(min=0).double(), torch.nextafter(hi, infinity).clamp(max=1).double()


def diagonal_bounds(entries: Interval) -> FactorBounds:
    """The bounds of diagonal matrices from those of their entries, [H, K] each."""
    lo, hi = entries
    return FactorBounds(lo.amin(1).unsqueeze(0), hi.amax(1).unsqueeze(0))


_SILU_TURNS = -1.2784645427610738
_SILU_LEAST = -0.2784645427610738
