"""Products of float32 tiles on tensor cores, and the inverse of a unit triangular one.

With SPLIT a float32 number is a sum of two of the operands' dtype, high and low: 16 bits in all for bfloat16. Without
it operands are float32 and their products tf32x3.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        # The high half by integers: a cast whose result is also extended again is one slow instruction for every
        # number, where the two casts below are one for every two. Ties are rounded away from zero.
        bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
        high = bits.to(tl.float32, bitcast=True)
        return high.to(dtype), (x - high).to(dtype)
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

    Blocks of BASE (16, or with SPLIT 4) on the diagonal by forward substitution; then twice as large ones from pairs,
    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]: forward substitution by blocks. With SPLIT blocks of up to
    16 are multiplied one by one, each by one warp, and not as parts of the whole.
    """
    if SPLIT and BM > 16:
        system_16 = _diagonal_blocks(system, BM // 16, 16)
        x = _substitute(system_16, BM // 16, 16, BASE)
        if BASE == 4:
            x = _join_pairs(x, system_16, _pairs(4, 16)[None, :, :], OPERAND, SPLIT, PRECISION)
            x = _join_pairs(x, system_16, _pairs(8, 16)[None, :, :], OPERAND, SPLIT, PRECISION)
        x = _as_diagonal_blocks(x, BM // 16, 16)
    else:
        x = tl.reshape(_substitute(system[None, :, :], 1, BM, BASE), [BM, BM])
    if BM > 16:
        x = _join_pairs(x, system, _pairs(16, BM), OPERAND, SPLIT, PRECISION)
    if BM > 32:
        x = _join_pairs(x, system, _pairs(32, BM), OPERAND, SPLIT, PRECISION)
    return x


@triton.jit
def _is_on_diagonal(BLOCKS: tl.constexpr):
    """[BLOCKS, 1, BLOCKS, 1]"""
    block = tl.arange(0, BLOCKS)
    return (block[:, None] == block[None, :])[:, None, :, None]


@triton.jit
def _diagonal_blocks(x, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Of x [BLOCKS SIZE, BLOCKS SIZE] the blocks on the diagonal, [BLOCKS, SIZE, SIZE]."""
    return tl.sum(tl.where(_is_on_diagonal(BLOCKS), tl.reshape(x, [BLOCKS, SIZE, BLOCKS, SIZE]), 0.0), axis=2)


@triton.jit
def _as_diagonal_blocks(x, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """The reverse of `_diagonal_blocks`, with zeros elsewhere."""
    whole = tl.where(_is_on_diagonal(BLOCKS), x[:, :, None, :], 0.0)
    return tl.reshape(whole, [BLOCKS * SIZE, BLOCKS * SIZE])


@triton.jit
def _substitute(system, BATCH: tl.constexpr, ROWS: tl.constexpr, BASE: tl.constexpr):
    """The inverses of the blocks of BASE on the diagonals of I + system [BATCH, ROWS, ROWS], row after row."""
    BLOCKS: tl.constexpr = ROWS // BASE
    inside = tl.arange(0, BASE)
    same = _is_on_diagonal(BLOCKS)[None, :, :, :, :]
    blocks = tl.sum(tl.where(same, tl.reshape(system, [BATCH, BLOCKS, BASE, BLOCKS, BASE]), 0.0), axis=3)
    x = tl.where((inside[:, None] == inside[None, :])[None, None, :, :], 1.0, tl.zeros_like(blocks))
    for step in range(1, BASE):
        is_row = (inside == step)[None, None, :, None]
        row = tl.sum(tl.where(is_row, blocks, 0.0), axis=2)
        x = tl.where(is_row, x - tl.sum(row[:, :, :, None] * x, axis=2)[:, :, None, :], x)
    return tl.reshape(tl.where(same, x[:, :, :, None, :], 0.0), [BATCH, ROWS, ROWS])


@triton.jit
def _pairs(SIZE: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, ROWS]: the blocks of SIZE beside the diagonal that belong to a block of twice the size."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    return (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE != j // SIZE)


@triton.jit
def _join_pairs(x, system, pairs, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of the diagonal blocks of one size, those of twice the size, where `pairs` belong."""
    left = dot_precise(x, tl.where(pairs, system, 0.0), OPERAND, SPLIT, PRECISION)
    return x - dot_precise(left, x, OPERAND, SPLIT, PRECISION)
