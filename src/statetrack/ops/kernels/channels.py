"""Triton kernels for what a chunk with a decay for each key channel needs besides the state; `docs/kernels.md` derives
them.

Tokens have rows x that read the state, queries and with two KINDS also w, and columns y that are written to it: keys,
or u and p. With D(i, j) the product of the decays after token j up to token i, which is different for each channel,
x_i D(i, j) y_j is no product of matrices. Within a block of 16 tokens the pairs are taken one by one, and a thread has
its channels of all 16: nothing moves between threads but the sums over channels. Between an earlier group of blocks,
which ends at token m, and the later one D(i, j) = D(i, m) D(m, j), so that for the two it is a product of matrices.

A tuple of 16 tiles [BLOCKS, BD] holds the first token of every block, the second of every block, and so on. Decays are
only ever multiplied, in the backward too: 0 and negative numbers are ordinary.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tokens of a block, whose pairs are taken one by one.
BLOCK = tl.constexpr(16)
# Of those, tokens whose rows share one loop: fewer make more code, more have more pairs of which nothing is seen.
GROUP = tl.constexpr(4)


@triton.jit
def load_row(
    pointer, t, tokens_left, row_stride, start, OTHER: tl.constexpr,
    K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Token t of every block, [BLOCKS, BD] in float32."""
    token, column = tl.arange(0, BLOCKS)[:, None] * BLOCK + t, start + tl.arange(0, BD)[None, :]
    ok = (token < tokens_left) & (column < K)
    return tl.load(pointer + token * row_stride + column, mask=ok, other=OTHER).to(tl.float32)


@triton.jit
def load_rows(
    pointer, tokens_left, row_stride, start, OTHER: tl.constexpr,
    K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = ()
    for t in tl.static_range(BLOCK):
        rows = rows + (load_row(pointer, t, tokens_left, row_stride, start, OTHER, K, BLOCKS, BD),)
    return rows


@triton.jit
def store_row(pointer, x, t, tokens_left, row_stride, start, K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr):
    """Token t of every block."""
    token, column = tl.arange(0, BLOCKS)[:, None] * BLOCK + t, start + tl.arange(0, BD)[None, :]
    ok = (token < tokens_left) & (column < K)
    tl.store(pointer + token * row_stride + column, x.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def _scaled(rows, factor):
    out = ()
    for t in tl.static_range(BLOCK):
        out = out + (rows[t] * factor,)
    return out


@triton.jit
def _stack(rows, dtype: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr):
    """The tokens in their order, [BLOCKS 16, BD]. Joined in pairs, which moves nothing between threads."""
    halves = ()
    for t in tl.static_range(8):
        halves = halves + (tl.join(rows[t].to(dtype), rows[t + 8].to(dtype)),)
    quarters = ()
    for t in tl.static_range(4):
        quarters = quarters + (tl.join(halves[t], halves[t + 4]),)
    x = tl.join(tl.join(quarters[0], quarters[2]), tl.join(quarters[1], quarters[3]))
    return tl.reshape(tl.permute(tl.reshape(x, [BLOCKS, BD, BLOCK]), [0, 2, 1]), [BLOCKS * BLOCK, BD])


@triton.jit
def _others(
    decay, level: tl.constexpr, tokens_left, row_stride, start, K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr
):
    """The products of all decays of the other one of each pair of neighbours of 2^level blocks, [BLOCKS, BD].

    They are read again: from the thread that has them to the others they would go through shared memory, and the
    compiler then took every factor there by itself.
    """
    column = start + tl.arange(0, BD)[None, :]
    token = (((tl.arange(0, BLOCKS)[:, None] >> level) ^ 1) << level) * BLOCK
    product = tl.full([BLOCKS, BD], 1.0, tl.float32)
    for t in range(BLOCK << level):
        ok = (token + t < tokens_left) & (column < K)
        product *= tl.load(decay + (token + t) * row_stride + column, mask=ok, other=1.0)
    return product


@triton.jit
def is_later(level: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS, 1]: whether a block is in the later one of such a pair."""
    return ((tl.arange(0, BLOCKS) >> level) & 1 == 1)[:, None]


@triton.jit
def lies_between(level: tl.constexpr, BC: tl.constexpr):
    """[tokens, tokens]: whether token i is in the later and token j in the earlier one of such a pair."""
    group = tl.arange(0, BC) // (BLOCK << level)
    return (group[:, None] == group[None, :] + 1) & (group[:, None] & 1 == 1)


@triton.jit
def _pairs(
    x, y, a, scores, scores_ok, x_in, tokens_left, row_stride, start,
    own, COLUMNS: tl.constexpr, SAVE: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Stores the scores of the pairs within blocks for rows x and columns y, with zeros above the diagonal.

    Rows see tokens up to their own, for which `own` is 1, or those before it. `scores` are the places of the blocks'
    first rows, [BLOCKS, 1]; a row has COLUMNS. What earlier tiles of channels have left there is added to. To SAVE also
    the rows as they read the state at their block's start.
    """
    column = tl.arange(0, BD)[None, :]
    token, channel = tl.arange(0, BLOCKS)[:, None] * BLOCK, start + column
    ok = scores_ok & (column < BLOCK)
    # Rows are a loop, four at a time, because with all of them unrolled the compiler took two minutes.
    for group in tl.static_range(0, BLOCK, GROUP):
        for i in range(group, group + GROUP):
            rows_ok = (token + i < tokens_left) & (channel < K)
            at = (token + i) * row_stride + channel
            # The row as it reads the state after token j.
            row = tl.load(x + at, mask=rows_ok, other=0.0).to(tl.float32)
            products = tl.zeros([BLOCKS, BD], tl.float32)
            for j in tl.static_range(group + GROUP - 1, -1, -1):
                seen = tl.sum(row * y[j], axis=1)[:, None]
                if j < group:
                    products = tl.where(column == j, seen, products)
                    row *= a[j]
                else:
                    products = tl.where((column == j) & (i + own > j), seen, products)
                    row *= tl.where(i + own > j, a[j], 1.0)
            if K > BD:
                products += tl.load(scores + i * COLUMNS + column, mask=ok & (start > 0), other=0.0).to(tl.float32)
            tl.store(scores + i * COLUMNS + column, products.to(scores.dtype.element_ty), mask=ok)
            if SAVE:
                tl.store(x_in + at, row.to(x_in.dtype.element_ty), mask=rows_ok)


@triton.jit
def products_to_end(a, BLOCKS: tl.constexpr, BD: tl.constexpr):
    """The products of the decays after the last token of a block, after the one before, ..., and of all: 17 tiles."""
    product = tl.full([BLOCKS, BD], 1.0, tl.float32)
    products = (product,)
    for t in tl.static_range(BLOCK - 1, -1, -1):
        product *= a[t]
        products = products + (product,)
    return products


@triton.jit
def _unit_inverse(system, inverse, ok, BLOCKS: tl.constexpr):
    """Stores (I + W)^-1 for the strictly lower triangular W of every block, by forward substitution.

    `system` and `inverse` are the places of the blocks' first rows, [BLOCKS, 1]; those of W are 2 BLOCK apart.
    """
    column = tl.arange(0, BLOCK)[None, :]
    rows = ()
    for i in tl.static_range(BLOCK):
        row = tl.where(column == i, 1.0, tl.zeros([BLOCKS, BLOCK], tl.float32))
        for j in tl.static_range(i):
            row -= tl.load(system + (i * 2 * BLOCK + j), mask=ok, other=0.0) * rows[j]
        tl.store(inverse + i * BLOCK + column, row, mask=ok)
        rows = rows + (row,)


@triton.jit(do_not_specialize=["T", "chunks", "numbers"])
def prepare_channels(
    x, x2, y, y2, decay, scores, x_in, y_out, across, inverse,
    T, H, chunks, numbers: tl.int64,
    K: tl.constexpr, BC: tl.constexpr, KINDS: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk what does not depend on the state.

    That is the scores x_i D(i, j) y_j [chunk, KINDS BC, KINDS BC], where w of token i does not see its own decay; the
    rows as they read the state at the chunk's start and the columns as they write the one at its end, [KINDS, B, T, H,
    K], where the kinds are `numbers` apart; the product of all decays [chunk, K]. With two kinds also (I + W)^-1
    [chunk, BC, BC], where W are the scores of w and u.

    A program takes BLOCKS blocks: one chunk, of 2^LEVELS blocks, or with two kinds chunks of one block each.
    """
    OPERAND: tl.constexpr = x_in.dtype.element_ty
    ROWS: tl.constexpr = KINDS * BC
    CHUNKS: tl.constexpr = BLOCKS * BLOCK // BC
    pid = tl.program_id(0)
    programs = (chunks + CHUNKS - 1) // CHUNKS
    chunk = pid % programs * CHUNKS
    head = (pid // programs).to(tl.int64)
    tokens_left = tl.minimum(T - chunk * BC, BLOCKS * BLOCK)
    place = head * chunks + chunk
    row_stride = H * K
    base = ((head // H * T + chunk * BC) * H + head % H) * K
    x, x2, y, y2, decay, x_in, y_out = x + base, x2 + base, y + base, y2 + base, decay + base, x_in + base, y_out + base
    across += place * K
    block = tl.arange(0, BLOCKS)[:, None]
    if KINDS == 1:
        scores += place * BC * BC
        blocks, blocks_ok = scores + block * (BLOCK * BC + BLOCK), block < BLOCKS
    else:
        blocks, blocks_ok = scores + (place + block) * ROWS * ROWS, chunk + block < chunks
    between = tl.zeros([BC, BC], tl.float32)
    for start in range(0, K, BD):
        column = start + tl.arange(0, BD)[None, :]
        a = load_rows(decay, tokens_left, row_stride, start, 1.0, K, BLOCKS, BD)
        if KINDS == 1:
            columns = load_rows(y, tokens_left, row_stride, start, 0.0, K, BLOCKS, BD)
            _pairs(x, columns, a, blocks, blocks_ok, x, tokens_left, row_stride, start, 1, ROWS, False, K, BLOCKS, BD)
            to_end = products_to_end(a, BLOCKS, BD)
            all_decays = to_end[BLOCK]
            reading, writing = (), ()
            from_start = tl.full([BLOCKS, BD], 1.0, tl.float32)
            for t in tl.static_range(BLOCK):
                from_start *= a[t]
                row = load_row(x, t, tokens_left, row_stride, start, 0.0, K, BLOCKS, BD)
                reading = reading + (row * from_start,)
                writing = writing + (columns[t] * to_end[BLOCK - 1 - t],)
            for level in tl.static_range(LEVELS):
                left, right = _stack(reading, OPERAND, BLOCKS, BD), _stack(writing, OPERAND, BLOCKS, BD)
                products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
                between += tl.where(lies_between(level, BC), products, 0.0)
                others = _others(decay, level, tokens_left, row_stride, start, K, BLOCKS, BD)
                later = is_later(level, BLOCKS)
                reading = _scaled(reading, tl.where(later, others, 1.0))
                writing = _scaled(writing, tl.where(later, 1.0, others))
                all_decays *= others
            for t in tl.static_range(BLOCK):
                store_row(x_in, reading[t], t, tokens_left, row_stride, start, K, BLOCKS, BD)
                store_row(y_out, writing[t], t, tokens_left, row_stride, start, K, BLOCKS, BD)
            tl.store(across + column + block, all_decays, mask=(block == 0) & (column < K))
        else:
            # Kinds are loops too, for the compiler's sake.
            for column_kind in range(2):
                of_kind, at_kind = y, y_out
                if column_kind == 1:
                    of_kind, at_kind = y2, y_out + numbers
                columns = load_rows(of_kind, tokens_left, row_stride, start, 0.0, K, BLOCKS, BD)
                for row_kind in range(2):
                    of_rows, in_rows = x, x_in
                    if row_kind == 1:
                        of_rows, in_rows = x2, x_in + numbers
                    _pairs(
                        of_rows, columns, a, blocks + row_kind * (BC * ROWS) + column_kind * BC, blocks_ok, in_rows,
                        tokens_left, row_stride, start, 1 - row_kind, ROWS, True, K, BLOCKS, BD,
                    )  # fmt: skip
                to_end = tl.full([BLOCKS, BD], 1.0, tl.float32)
                for t in tl.static_range(BLOCK - 1, -1, -1):
                    store_row(at_kind, columns[t] * to_end, t, tokens_left, row_stride, start, K, BLOCKS, BD)
                    to_end *= a[t]
                tl.store(across + block * K + column, to_end, mask=blocks_ok & (column < K))
    if KINDS == 1:
        i, j = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
        tl.store(scores + i * BC + j, between.to(OPERAND), mask=i // BLOCK != j // BLOCK)
    else:
        # Scores that other threads have stored.
        tl.debug_barrier()
        _unit_inverse(blocks + BC * ROWS, inverse + (place + block) * BC * BC, blocks_ok, BLOCKS)
