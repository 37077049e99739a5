"""Products of float32 tiles on tensor cores, and the inverse of a unit triangular one.

With SPLIT a float32 number is a sum of two of the operands' dtype, high and low: 16 bits in all for bfloat16. Without
it operands are float32 and their products tf32x3.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x, dtype: tl.constexpr):
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def dot_precise(a, b, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a b for float32 tiles, to 16 bits with SPLIT."""
    if SPLIT:
        a_high, a_low = halves(a, OPERAND)
        b_high, b_low = halves(b, OPERAND)
        c = tl.dot(a_high, b_low, input_precision=PRECISION)
        c = tl.dot(a_low, b_high, c, input_precision=PRECISION)
        return tl.dot(a_high, b_high, c, input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_masks(mask, x, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """mask x for a mask of zeros and ones and a float32 tile."""
    if SPLIT:
        high, low = halves(x, OPERAND)
        c = tl.dot(mask.to(OPERAND), low, input_precision=PRECISION)
        return tl.dot(mask.to(OPERAND), high, c, input_precision=PRECISION)
    return tl.dot(mask.to(tl.float32), x, input_precision=PRECISION)


@triton.jit
def unit_triangular_inverse(
    system, BM: tl.constexpr, BASE: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """(I + system)^-1 for a strictly lower triangular `system` [BM, BM].

    Blocks of BASE on the diagonal by forward substitution; then twice as large ones from pairs of blocks,
    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]: forward substitution by blocks.
    """
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BM)[None, :]
    if BASE == 2:
        x = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -system, 0.0))
    else:
        BLOCKS: tl.constexpr = BM // BASE
        block, inside = tl.arange(0, BLOCKS), tl.arange(0, BASE)
        same = (block[:, None] == block[None, :])[:, None, :, None]
        diagonal = tl.sum(tl.where(same, tl.reshape(system, [BLOCKS, BASE, BLOCKS, BASE]), 0.0), axis=2)
        x = tl.where((inside[:, None] == inside[None, :])[None, :, :], 1.0, tl.zeros_like(diagonal))
        for step in range(1, BASE):
            is_row = (inside == step)[None, :, None]
            row = tl.sum(tl.where(is_row, diagonal, 0.0), axis=1)
            x = tl.where(is_row, x - tl.sum(row[:, :, None] * x, axis=1)[:, None, :], x)
        x = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [BM, BM])
    if BASE <= 2:
        x = _join_pairs(x, system, 2, BM, OPERAND, SPLIT, PRECISION)
    if BASE <= 4:
        x = _join_pairs(x, system, 4, BM, OPERAND, SPLIT, PRECISION)
    if BASE <= 8:
        x = _join_pairs(x, system, 8, BM, OPERAND, SPLIT, PRECISION)
    if BM > 16:
        x = _join_pairs(x, system, 16, BM, OPERAND, SPLIT, PRECISION)
    if BM > 32:
        x = _join_pairs(x, system, 32, BM, OPERAND, SPLIT, PRECISION)
    return x


@triton.jit
def _join_pairs(
    x, system, SIZE: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """From the inverses of the diagonal blocks of SIZE, those of twice the size."""
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BM)[None, :]
    pair = (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE != j // SIZE)
    left = dot_precise(x, tl.where(pair, system, 0.0), OPERAND, SPLIT, PRECISION)
    return x - dot_precise(left, x, OPERAND, SPLIT, PRECISION)
