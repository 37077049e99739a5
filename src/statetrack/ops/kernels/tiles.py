"""What the Triton kernels share: tiles of rows, and products with states that lie transposed, [V, K]."""

from __future__ import annotations

import triton
import triton.language as tl

# Stands for a beta or, in the backward, a decay of exactly 0: it moves no result by more than the rounding, and lets
# the gradient divide. The square is still a normal float32.
TINY = tl.constexpr(2.0**-40)


@triton.jit
def load_tile(pointer, rows_ok, row_stride, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows of WIDTH contiguous numbers the columns from `start` on: a tile [ROWS, BLOCK], zero outside."""
    column = start + tl.arange(0, BLOCK)
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + column[None, :]
    return tl.load(pointer + offsets, mask=rows_ok[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(pointer, x, rows_ok, row_stride, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + column[None, :]
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=rows_ok[:, None] & (column < WIDTH)[None, :])


@triton.jit
def load_kinds(
    first, second, tokens_left, row_stride, start,
    WIDTH: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows [KINDS BC, BLOCK] of `first` and, for two kinds, below them those of `second`; in float32."""
    row = tl.arange(0, KINDS * BC)
    token, kind = row % BC, row // BC
    column = start + tl.arange(0, BLOCK)
    offsets = token[:, None] * row_stride + column[None, :]
    ok = (token < tokens_left)[:, None] & (column < WIDTH)[None, :]
    if KINDS == 1:
        return tl.load(first + offsets, mask=ok, other=0.0).to(tl.float32)
    above = tl.load(first + offsets, mask=ok & (kind == 0)[:, None], other=0.0).to(tl.float32)
    return above + tl.load(second + offsets, mask=ok & (kind == 1)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_kinds(
    first, second, x, tokens_left, row_stride, start,
    WIDTH: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, KINDS * BC)
    token, kind = row % BC, row // BC
    column = start + tl.arange(0, BLOCK)
    offsets = token[:, None] * row_stride + column[None, :]
    ok = (token < tokens_left)[:, None] & (column < WIDTH)[None, :]
    tl.store(first + offsets, x.to(first.dtype.element_ty), mask=ok & (kind == 0)[:, None])
    if KINDS == 2:
        tl.store(second + offsets, x.to(second.dtype.element_ty), mask=ok & (kind == 1)[:, None])


@triton.jit
def state_overlap(x, y, start_key, K: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """The sums over V of the products of two states, for the BD keys from `start_key` on."""
    products = tl.zeros([BV, BD], tl.float32)
    for start in range(0, V, BV):
        ok = start + tl.arange(0, BV) < V
        left = load_tile(x + start * K, ok, K, start_key, K, BV, BD).to(tl.float32)
        products += left * load_tile(y + start * K, ok, K, start_key, K, BV, BD).to(tl.float32)
    return tl.sum(products, axis=0)


@triton.jit
def outer_products(
    x, x2, y, y2, tokens_left, row_stride,
    V: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i . y_j over the values, [KINDS BC, KINDS BC]; rows as in `load_kinds`."""
    products = tl.zeros([KINDS * BC, KINDS * BC], tl.float32)
    for start in range(0, V, BV):
        left = load_kinds(x, x2, tokens_left, row_stride, start, V, BC, KINDS, BV).to(OPERAND)
        right = load_kinds(y, y2, tokens_left, row_stride, start, V, BC, KINDS, BV).to(OPERAND)
        products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION)
    return products


@triton.jit
def state_products(
    x, x2, state, tokens_left, row_stride, start_key,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of V numbers, as in `load_kinds`, times a state: its BD columns from `start_key` on."""
    products = tl.zeros([KINDS * BC, BD], tl.float32)
    for start in range(0, V, BV):
        left = load_kinds(x, x2, tokens_left, row_stride, start, V, BC, KINDS, BV).to(OPERAND)
        ok = start + tl.arange(0, BV) < V
        right = load_tile(state + start * K, ok, K, start_key, K, BV, BD).to(OPERAND)
        products = tl.dot(left, right, products, input_precision=PRECISION)
    return products


@triton.jit
def overlap(x, y, SIZE: tl.constexpr):
    """The sum of the products of SIZE numbers."""
    BLOCK: tl.constexpr = 2048
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):  # unrolled, so that all loads are under way at once
        ok = start + tl.arange(0, BLOCK) < SIZE
        place = start + tl.arange(0, BLOCK)
        left = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
        sums += left * tl.load(y + place, mask=ok, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def not_below(x, LEAST: tl.constexpr):
    """Numbers of less than LEAST are taken to be LEAST in size."""
    return tl.where(tl.abs(x) < LEAST, tl.where(x < 0, -LEAST, LEAST), x)
