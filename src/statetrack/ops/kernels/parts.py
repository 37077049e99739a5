"""A Triton kernel for the sum of the parts of a gradient that the programs of a backward have written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def sum_parts(parts, total, count, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """total [R, N] of the `parts` [R, count, N], in a fixed order."""
    row, column = tl.arange(0, BP), tl.program_id(0) * BN + tl.arange(0, BN)
    which = tl.program_id(1).to(tl.int64)
    parts += which * count * N + row[:, None] * N + column[None, :]
    summed = tl.zeros([BP, BN], tl.float32)
    for start in range(0, count, BP):
        inside = (start + row < count)[:, None] & (column < N)[None, :]
        summed += tl.load(parts, mask=inside, other=0.0)
        parts += BP * N
    tl.store(total + which * N + column, tl.sum(summed, axis=0).to(total.dtype.element_ty), mask=column < N)
