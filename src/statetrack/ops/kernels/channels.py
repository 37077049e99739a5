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

from statetrack.ops.kernels.products import dot_masks
from statetrack.ops.kernels.tiles import load_kinds, outer_products, state_overlap, state_products, store_kinds

# Tokens of a block, whose pairs are taken one by one.
BLOCK = tl.constexpr(16)
GROUP = tl.constexpr(4)


@triton.jit
def _load_row(
    pointer, t, tokens_left, row_stride, start, OTHER: tl.constexpr,
    K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Token t of every block, [BLOCKS, BD] in float32."""
    token, column = tl.arange(0, BLOCKS)[:, None] * BLOCK + t, start + tl.arange(0, BD)[None, :]
    ok = (token < tokens_left) & (column < K)
    return tl.load(pointer + token * row_stride + column, mask=ok, other=OTHER).to(tl.float32)


@triton.jit
def _load_rows(
    pointer, tokens_left, row_stride, start, OTHER: tl.constexpr,
    K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = ()
    for t in tl.static_range(BLOCK):
        rows = rows + (_load_row(pointer, t, tokens_left, row_stride, start, OTHER, K, BLOCKS, BD),)
    return rows


@triton.jit
def _store_row(pointer, x, t, tokens_left, row_stride, start, K: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr):
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
def _is_later(level: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS, 1]: whether a block is in the later one of such a pair."""
    return ((tl.arange(0, BLOCKS) >> level) & 1 == 1)[:, None]


@triton.jit
def _between(level: tl.constexpr, BC: tl.constexpr):
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
def _to_end(a, BLOCKS: tl.constexpr, BD: tl.constexpr):
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
        a = _load_rows(decay, tokens_left, row_stride, start, 1.0, K, BLOCKS, BD)
        if KINDS == 1:
            columns = _load_rows(y, tokens_left, row_stride, start, 0.0, K, BLOCKS, BD)
            _pairs(x, columns, a, blocks, blocks_ok, x, tokens_left, row_stride, start, 1, ROWS, False, K, BLOCKS, BD)
            to_end = _to_end(a, BLOCKS, BD)
            all_decays = to_end[BLOCK]
            reading, writing = (), ()
            from_start = tl.full([BLOCKS, BD], 1.0, tl.float32)
            for t in tl.static_range(BLOCK):
                from_start *= a[t]
                row = _load_row(x, t, tokens_left, row_stride, start, 0.0, K, BLOCKS, BD)
                reading = reading + (row * from_start,)
                writing = writing + (columns[t] * to_end[BLOCK - 1 - t],)
            for level in tl.static_range(LEVELS):
                left, right = _stack(reading, OPERAND, BLOCKS, BD), _stack(writing, OPERAND, BLOCKS, BD)
                products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
                between += tl.where(_between(level, BC), products, 0.0)
                others = _others(decay, level, tokens_left, row_stride, start, K, BLOCKS, BD)
                later = _is_later(level, BLOCKS)
                reading = _scaled(reading, tl.where(later, others, 1.0))
                writing = _scaled(writing, tl.where(later, 1.0, others))
                all_decays *= others
            for t in tl.static_range(BLOCK):
                _store_row(x_in, reading[t], t, tokens_left, row_stride, start, K, BLOCKS, BD)
                _store_row(y_out, writing[t], t, tokens_left, row_stride, start, K, BLOCKS, BD)
            tl.store(across + column + block, all_decays, mask=(block == 0) & (column < K))
        else:
            # Kinds are loops too, for the compiler's sake.
            for column_kind in range(2):
                of_kind, at_kind = y, y_out
                if column_kind == 1:
                    of_kind, at_kind = y2, y_out + numbers
                columns = _load_rows(of_kind, tokens_left, row_stride, start, 0.0, K, BLOCKS, BD)
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
                    _store_row(at_kind, columns[t] * to_end, t, tokens_left, row_stride, start, K, BLOCKS, BD)
                    to_end *= a[t]
                tl.store(across + block * K + column, to_end, mask=blocks_ok & (column < K))
    if KINDS == 1:
        i, j = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
        tl.store(scores + i * BC + j, between.to(OPERAND), mask=i // BLOCK != j // BLOCK)
    else:
        # Scores that other threads have stored.
        tl.debug_barrier()
        _unit_inverse(blocks + BC * ROWS, inverse + (place + block) * BC * BC, blocks_ok, BLOCKS)


@triton.jit
def _is_later_token(level, BC: tl.constexpr, KINDS: tl.constexpr):
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
def _total_of_other(into, level, BC: tl.constexpr, KINDS: tl.constexpr, BD: tl.constexpr):
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
    others = _total_of_other(before * a, level, BC, KINDS, BD)
    later = _is_later_token(level, BC, KINDS)
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
            others = _total_of_other(before * a, level, BC, KINDS, BD)
            later = _is_later_token(level, BC, KINDS)
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
