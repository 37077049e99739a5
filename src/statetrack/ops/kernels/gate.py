"""Triton kernels for products with an activated gate, number by number, forward and backward.

Tensors are [n, W]. All W numbers of a row are there or none, so that they are one access to memory. Gate and x, and
their gradients, may be parts of wider tensors: then COLUMNS rows lie one after the other, and the next ones begin
GATE, X, D_GATE and D_X numbers after these.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(n, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    return row, row < n


@triton.jit
def _places(row, W: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    within = tl.arange(0, W)[None, :]
    if COLUMNS * W == STRIDE:
        place = row[:, None] * W + within
    else:
        place = (row // COLUMNS)[:, None] * STRIDE + (row % COLUMNS)[:, None] * W + within
    return place


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
    COLUMNS: tl.constexpr, GATE: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) x, or sigmoid(gate) x."""
    row, there = _rows(n, BN)
    inside = there[:, None] & (tl.arange(0, W) < W)[None, :]
    g = tl.load(gate + _places(row, W, COLUMNS, GATE), mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + _places(row, W, COLUMNS, X), mask=inside, other=0.0).to(tl.float32)
    opened, _ = _sigmoid(g)
    value *= opened
    if SILU:
        value *= g
    tl.store(y + _places(row, W, 1, W), value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def backward(
    gate, x, d_y, d_gate, d_x,
    n,
    W: tl.constexpr, BN: tl.constexpr, SILU: tl.constexpr,
    COLUMNS: tl.constexpr, GATE: tl.constexpr, X: tl.constexpr, D_GATE: tl.constexpr, D_X: tl.constexpr,
):  # fmt: skip
    row, there = _rows(n, BN)
    inside = there[:, None] & (tl.arange(0, W) < W)[None, :]
    g = tl.load(gate + _places(row, W, COLUMNS, GATE), mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + _places(row, W, COLUMNS, X), mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_y + _places(row, W, 1, W), mask=inside, other=0.0).to(tl.float32)
    opened, slope = _sigmoid(g)
    if SILU:
        slope = opened + g * slope
        opened *= g
    d_g, d_value = d * value * slope, d * opened
    tl.store(d_gate + _places(row, W, COLUMNS, D_GATE), d_g.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_x + _places(row, W, COLUMNS, D_X), d_value.to(d_x.dtype.element_ty), mask=inside)
