"""Triton kernels for products with an activated gate, number by number, forward and backward.

Tensors are [n, W]. All W numbers of a row are there or none, so that they are one access to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(n, W: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    within = tl.arange(0, W)
    return row[:, None] * W + within[None, :], (row < n)[:, None] & (within < W)[None, :]


@triton.jit
def _sigmoid(x):
    """And its derivative, from an exponential that can't overflow, without a difference."""
    e = tl.exp(-tl.abs(x))
    opened = 1 / (1 + e)
    return tl.where(x < 0, e, 1.0) * opened, e * opened * opened


@triton.jit(do_not_specialize=["n"])
def forward(
    gate, x, y,
    n,
    W: tl.constexpr, BN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) x, or sigmoid(gate) x."""
    place, inside = _places(n, W, BN)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    opened, _ = _sigmoid(g)
    value *= opened
    if SILU:
        value *= g
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def backward(
    gate, x, d_y, d_gate, d_x,
    n,
    W: tl.constexpr, BN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    place, inside = _places(n, W, BN)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
    opened, slope = _sigmoid(g)
    if SILU:
        slope = opened + g * slope
        opened *= g
    tl.store(d_gate + place, (d * value * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_x + place, (d * opened).to(d_x.dtype.element_ty), mask=inside)
