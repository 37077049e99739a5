"""Triton kernels that divide vectors by their length, forward and backward.

`x` is [rows, K]. A program has BR rows, whole; it reads them once. Sums run in float32 in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scales(x, least, eps):
    """`1 / sqrt(|x|^2 + eps)` of each row, 0 where |x|^2 <= least, NaN where it is NaN: [BR, 1]."""
    squared_norm = tl.sum(x * x, axis=1)
    undirected = squared_norm <= least
    # The inner `where` keeps the root of 0 out.
    return tl.where(undirected, 0.0, tl.rsqrt(tl.where(undirected, 1.0, squared_norm) + eps))[:, None]


@triton.jit(do_not_specialize=["rows", "least", "eps", "scale"])
def forward(x, y, rows, least, eps, scale, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """y = scale x / sqrt(|x|^2 + eps), 0 where |x|^2 <= least."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    channel = tl.arange(0, BK)
    place = row[:, None] * K + channel[None, :]
    inside = (row < rows)[:, None] & (channel < K)[None, :]
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (wide * (_scales(wide, least, eps) * scale)).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "least", "eps", "scale"])
def backward(x, d_y, d_x, rows, least, eps, scale, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """d_x = scale r (d_y - r^2 (x . d_y) x) with r = 1 / sqrt(|x|^2 + eps), 0 where |x|^2 <= least."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    channel = tl.arange(0, BK)
    place = row[:, None] * K + channel[None, :]
    inside = (row < rows)[:, None] & (channel < K)[None, :]
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
    r = _scales(wide, least, eps)
    # The unit vector twice and not r^2 x, which overflows where x is short.
    unit = wide * r
    along = tl.sum(unit * d_out, axis=1)[:, None]
    tl.store(d_x + place, ((d_out - unit * along) * (r * scale)).to(d_x.dtype.element_ty), mask=inside)
