"""Triton kernels for what a chunk with a decay for each key channel needs besides the state; `docs/kernels.md` derives
them.

Tokens have rows x that read the state, queries and with two KINDS also w, and columns y that are written to it: keys,
or u and p. With D(i, j) the product of the decays after token j up to token i, which is different for each channel,
x_i D(i, j) y_j is no product of matrices. But between an earlier half of a block that ends at token m and the later
half D(i, j) = D(i, m) D(m, j), so that for the two halves it is one. Blocks of 1, 2, 4, ... tokens are merged in pairs.

Tiles have KINDS BC rows, first those of the queries, then those of w. Decays are only ever multiplied, in the backward
too: 0 and negative numbers are ordinary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.products import dot_masks, unit_triangular_inverse
from statetrack.ops.kernels.tiles import load_kinds, outer_products, state_overlap, state_products, store_kinds


@triton.jit
def _is_later(level, BC: tl.constexpr, KINDS: tl.constexpr):
    """[rows, 1]: whether a row's block of 2^level tokens is the later one of its pair."""
    token = tl.arange(0, KINDS * BC) % BC
    return ((token >> level) & 1 == 1)[:, None]


@triton.jit
def _halves(level, BC: tl.constexpr, KINDS: tl.constexpr):
    """[rows, rows]: whether row i is in the later and column j in the earlier half of one pair of blocks."""
    block = (tl.arange(0, KINDS * BC) % BC) >> level
    return (block[:, None] == block[None, :] + 1) & (block[:, None] & 1 == 1)


@triton.jit
def _itself(BC: tl.constexpr, KINDS: tl.constexpr):
    """[rows, rows]: where a query meets the columns of its own token, which it sees undecayed; w does not see them."""
    row = tl.arange(0, KINDS * BC)
    return (row[:, None] % BC == row[None, :] % BC) & (row < BC)[:, None]


@triton.jit
def _others(into, level, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr):
    """The product of the decays of the other block of each row's pair.

    `into` are the products from the start of each row's block up to its token; those of a block's last token are asked.
    """
    row = tl.arange(0, KINDS * BC)
    last = (row // BC) * BC + ((((row % BC) >> level) ^ 1) << level) + (1 << level) - 1
    return tl.gather(into, tl.broadcast_to(last[:, None], [KINDS * BC, BD]), 0)


@triton.jit
def _merge(before, after, a, level, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr):
    """From the products of decays within blocks of 2^level tokens those within blocks of twice the size.

    `before` are those from the start of a row's block to the token before, `after` from the token after to the end.
    """
    others = _others(before * a, level, BC, KINDS, BD)
    later = _is_later(level, BC, KINDS)
    return tl.where(later, before * others, before), tl.where(later, after, after * others)


@triton.jit
def _reading(x, before, a, BC: tl.constexpr, KINDS: tl.constexpr):
    """Rows as they read the state at their block's start: a query after its own token's decay, w before it."""
    if KINDS == 1:
        return x * before * a
    own = (tl.arange(0, KINDS * BC) < BC)[:, None]
    return x * tl.where(own, before * a, before)


@triton.jit
def _load_decays(
    decay, tokens_left, row_stride, start, K: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr
):
    token, column = tl.arange(0, KINDS * BC) % BC, start + tl.arange(0, BD)
    ok = (token < tokens_left)[:, None] & (column < K)[None, :]
    return tl.load(decay + token[:, None] * row_stride + column[None, :], mask=ok, other=1.0)


@triton.jit
def _quarter(x, ROW: tl.constexpr, COLUMN: tl.constexpr, BC: tl.constexpr):
    """Of a tile [2 BC, 2 BC] the rows of kind ROW and the columns of kind COLUMN."""
    kind = tl.arange(0, 2)
    x = tl.sum(tl.where((kind == COLUMN)[None, :, None], tl.reshape(x, [2 * BC, 2, BC]), 0.0), axis=1)
    return tl.sum(tl.where((kind == ROW)[:, None, None], tl.reshape(x, [2, BC, BC]), 0.0), axis=0)


@triton.jit(do_not_specialize=["T", "chunks", "numbers"])
def prepare_channels(
    x, x2, y, y2, decay, scores, x_in, y_out, across, inverse,
    T, H, chunks, numbers: tl.int64,
    K: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk what does not depend on the state.

    That is the scores x_i D(i, j) y_j [chunk, KINDS BC, KINDS BC], where w of token i does not see its own decay; the
    rows as they read the state at the chunk's start and the columns as they write the one at its end, [KINDS, B, T, H,
    K], where the kinds are `numbers` apart; the product of all decays [chunk, K]. With two kinds also (I + W)^-1
    [chunk, BC, BC], where W are the scores of w and u.
    """
    OPERAND: tl.constexpr = x_in.dtype.element_ty
    ROWS: tl.constexpr = KINDS * BC
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    place = head * chunks + chunk
    base = ((head // H * T + chunk * BC) * H + head % H) * K
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, K, BD):
        reading = load_kinds(x + base, x2 + base, tokens_left, H * K, start, K, BC, KINDS, BD)
        writing = load_kinds(y + base, y2 + base, tokens_left, H * K, start, K, BC, KINDS, BD)
        a = _load_decays(decay + base, tokens_left, H * K, start, K, BC, KINDS, BD)
        before, after = tl.full([ROWS, BD], 1.0, tl.float32), tl.full([ROWS, BD], 1.0, tl.float32)
        left, right = reading.to(OPERAND), writing.to(OPERAND)
        itself = _itself(BC, KINDS)
        total += tl.where(itself, tl.dot(left, tl.trans(right), input_precision=PRECISION), 0.0)
        for level in range(LEVELS):
            left = _reading(reading, before, a, BC, KINDS).to(OPERAND)
            right = (writing * after).to(OPERAND)
            products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
            total += tl.where(_halves(level, BC, KINDS), products, 0.0)
            before, after = _merge(before, after, a, level, BC, KINDS, BD)
        left, right = _reading(reading, before, a, BC, KINDS), writing * after
        store_kinds(x_in + base, x_in + numbers + base, left, tokens_left, H * K, start, K, BC, KINDS, BD)
        store_kinds(y_out + base, y_out + numbers + base, right, tokens_left, H * K, start, K, BC, KINDS, BD)
        column = start + tl.arange(0, BD)
        all_decays = tl.sum(tl.where((row == BC - 1)[:, None], before * a, 0.0), axis=0)
        tl.store(across + place * K + column, all_decays, mask=column < K)
    tl.store(scores + place * ROWS * ROWS + row[:, None] * ROWS + row[None, :], total.to(OPERAND))
    if KINDS == 2:
        solved = unit_triangular_inverse(_quarter(total, 1, 0, BC), BC, BASE, tl.float32, False, PRECISION)
        step = tl.arange(0, BC)
        tl.store(inverse + place * BC * BC + step[:, None] * BC + step[None, :], solved)


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients_channels(
    x, x2, y, y2, decay, starts, d_out, d_out2, written, written2, d_ends, d_x, d_x2, d_y, d_y2, d_decay,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of rows, columns and decays: `prepare_channels` backwards, from the whole chunk to single tokens.

    `d_out` is the gradient of what each row has read, `written` the values that each column writes.
    """
    # What w reads is fed back into the state, so its products are those of float32 numbers.
    OPERAND: tl.constexpr = tl.float32 if KINDS == 2 else y.dtype.element_ty
    ROWS: tl.constexpr = KINDS * BC
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    h = head % H
    first = head // H * T + chunk * BC
    tokens_left = tl.minimum(T - chunk * BC, BC)
    state_at = (head * chunks + chunk) * K * V
    base, values_at = (first * H + h) * K, (first * H + h) * V
    d_out, d_out2, written, written2 = d_out + values_at, d_out2 + values_at, written + values_at, written2 + values_at
    starts, d_ends = starts + state_at, d_ends + state_at
    d_scores = outer_products(
        d_out, d_out2, written, written2, tokens_left, H * V, V, BC, KINDS, BV, OPERAND, PRECISION
    )
    token = tl.arange(0, ROWS) % BC
    for start in range(0, K, BD):
        reading = load_kinds(x + base, x2 + base, tokens_left, H * K, start, K, BC, KINDS, BD)
        writing = load_kinds(y + base, y2 + base, tokens_left, H * K, start, K, BC, KINDS, BD)
        a = _load_decays(decay + base, tokens_left, H * K, start, K, BC, KINDS, BD)
        of_x = state_products(
            d_out, d_out2, starts, tokens_left, H * V, start, K, V, BC, KINDS, BD, BV, OPERAND, PRECISION
        )
        of_y = state_products(
            written, written2, d_ends, tokens_left, H * V, start, K, V, BC, KINDS, BD, BV, OPERAND, PRECISION
        )
        # The gradient of the product of all decays of each row's block, which in the end is its token alone.
        of_block = tl.zeros([ROWS, BD], tl.float32) + state_overlap(starts, d_ends, start, K, V, BD, BV)[None, :]
        for step in range(LEVELS):
            level = LEVELS - 1 - step
            before, after = tl.full([ROWS, BD], 1.0, tl.float32), tl.full([ROWS, BD], 1.0, tl.float32)
            for below in range(level):
                before, after = _merge(before, after, a, below, BC, KINDS, BD)
            others = _others(before * a, level, BC, KINDS, BD)
            later = _is_later(level, BC, KINDS)
            left, right = _reading(reading, before, a, BC, KINDS), writing * after
            block = token >> level
            other_block = block[:, None] == (block ^ 1)[None, :]
            scaled = tl.where(later, of_x * left, of_y * right)
            of_block = of_block * others + dot_masks(other_block, scaled, OPERAND, SPLIT, PRECISION)
            pairs = tl.where(_halves(level, BC, KINDS), d_scores, 0.0).to(OPERAND)
            from_y = tl.dot(pairs, right.to(OPERAND), input_precision=PRECISION)
            of_y = tl.where(
                later, of_y, tl.dot(tl.trans(pairs), left.to(OPERAND), of_y * others, input_precision=PRECISION)
            )
            of_x = tl.where(later, of_x * others + from_y, of_x)
        itself = tl.where(_itself(BC, KINDS), d_scores, 0.0).to(OPERAND)
        column = start + tl.arange(0, BD)
        decays_ok = ((tl.arange(0, ROWS) < BC) & (token < tokens_left))[:, None] & (column < K)[None, :]
        tl.store(d_decay + base + token[:, None] * (H * K) + column[None, :], of_block + of_x * reading, mask=decays_ok)
        of_x = _reading(of_x, tl.full([ROWS, BD], 1.0, tl.float32), a, BC, KINDS)
        of_x = tl.dot(itself, writing.to(OPERAND), of_x, input_precision=PRECISION)
        of_y = tl.dot(tl.trans(itself), reading.to(OPERAND), of_y, input_precision=PRECISION)
        store_kinds(d_x + base, d_x2 + base, of_x, tokens_left, H * K, start, K, BC, KINDS, BD)
        store_kinds(d_y + base, d_y2 + base, of_y, tokens_left, H * K, start, K, BC, KINDS, BD)
