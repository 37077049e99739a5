"""Triton kernels for a causal depthwise convolution over time, forward and backward.

Rows of `extended` are [L + S - 1, C]: the S - 1 inputs before the first token, then the L tokens; `taps` are [R, C, S],
and `rows` consecutive rows share one of the R sets. Sums run in float32 in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x, row, first, last, channel, C: tl.constexpr, BT: tl.constexpr):
    """Tokens first to first + BT - 1 of a row of [last, C], 0 where there are none: float32 [BT, BC]."""
    token = first + tl.arange(0, BT)
    inside = (token >= 0) & (token < last)
    place = (row * last + token)[:, None] * C + channel[None, :]
    return tl.load(x + place, mask=inside[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["L", "rows"])
def forward(
    extended, taps, y,
    L, rows,
    C: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y_t = sum_i taps_i extended_{t + i}."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BT
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    total = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(S):
        tap = tl.load(taps + (row // rows * C + channel) * S + i, mask=channel < C, other=0.0).to(tl.float32)
        total += tap[None, :] * _tile(extended, row, first + i, L + S - 1, channel, C, BT)
    token = first + tl.arange(0, BT)
    place = (row * L + token)[:, None] * C + channel[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < L)[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["L", "rows"])
def backward_inputs(
    d_y, taps, d_extended,
    L, rows,
    C: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d_extended_u = sum_i taps_i d_y_{u - i}."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BT
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    total = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(S):
        tap = tl.load(taps + (row // rows * C + channel) * S + i, mask=channel < C, other=0.0).to(tl.float32)
        total += tap[None, :] * _tile(d_y, row, first - i, L, channel, C, BT)
    token = first + tl.arange(0, BT)
    place = (row * (L + S - 1) + token)[:, None] * C + channel[None, :]
    inside = (token < L + S - 1)[:, None] & (channel < C)[None, :]
    tl.store(d_extended + place, total.to(d_extended.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L", "rows", "blocks"])
def backward_taps(
    extended, d_y, parts,
    L, rows, blocks,
    C: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts [R, blocks, S, C]: of every blocks-th row of a set, the sums over tokens of d_y_t extended_{t + i}."""
    taps = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    for i in tl.static_range(S):
        total = tl.zeros([BC], tl.float32)
        for within in range(block, rows, blocks):
            row = taps * rows + within
            for first in range(0, L, BT):
                x = _tile(extended, row, first + i, L + S - 1, channel, C, BT)
                total += tl.sum(x * _tile(d_y, row, first, L, channel, C, BT), axis=0)
        place = ((taps * blocks + block) * S + i) * C + channel
        tl.store(parts + place, total, mask=channel < C)
