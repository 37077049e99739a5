"""Triton kernels for signed diagonal linear attention; `docs/kernels.md` derives them.

A chunk has BC tokens. All tensors are contiguous; the states lie transposed, [V, K]. With one decay for each head
(CHANNEL is false) the scans read queries and keys as they are and scale what comes out of the products. With one for
each key channel `prepare_channels` leaves queries as they read the state at the chunk's start, and keys as they write
the one at its end.

Decays are only ever multiplied, in the backward too: 0 and negative numbers are ordinary. The state is accumulated in
float32 and rounded to the operands' dtype only where it is read, so that no rounding error is fed back.
"""

# What a branch on a constant leaves out does not exist in the compiled kernel.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


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
def load_decays(
    decay, shift, tokens_left, row_stride, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The decays [ROWS, BLOCK] of the tokens `shift` after each row's; 1 outside the chunk."""
    row, column = tl.arange(0, ROWS) + shift, start + tl.arange(0, BLOCK)
    ok = ((row >= 0) & (row < tokens_left))[:, None] & (column < WIDTH)[None, :]
    return tl.load(decay + row[:, None] * row_stride + column[None, :], mask=ok, other=1.0).to(tl.float32)


@triton.jit
def prefix_products(a, SIZE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """From the first token of each row's block of SIZE to the row itself."""
    if SIZE == 1:
        return a
    return tl.reshape(tl.cumprod(tl.reshape(a, [BC // SIZE, SIZE, BD]), axis=1), [BC, BD])


@triton.jit
def prefix_products_before(a_before, SIZE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """From the first token of each row's block to the one before the row, whose decay is `a_before`."""
    first = (tl.arange(0, BC) % SIZE == 0)[:, None]
    return prefix_products(tl.where(first, 1.0, a_before), SIZE, BC, BD)


@triton.jit
def suffix_products(a_after, SIZE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """From the token after each row, whose decay is `a_after`, to the last of the row's block."""
    last = (tl.arange(0, BC) % SIZE == SIZE - 1)[:, None]
    a_after = tl.where(last, 1.0, a_after)
    if SIZE == 1:
        return a_after
    return tl.reshape(tl.cumprod(tl.reshape(a_after, [BC // SIZE, SIZE, BD]), axis=1, reverse=True), [BC, BD])


@triton.jit
def last_row(x, BC: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BC) == BC - 1)[:, None], x, 0.0), axis=0)


@triton.jit
def is_later(SIZE: tl.constexpr, BC: tl.constexpr):
    """[BC, 1]: whether a row's block of SIZE is the later one of its pair."""
    return (tl.arange(0, BC) // SIZE % 2 == 1)[:, None]


@triton.jit
def is_pair(SIZE: tl.constexpr, BC: tl.constexpr):
    """[BC, BC]: whether two rows are in the same pair of blocks of SIZE."""
    block = tl.arange(0, BC) // (2 * SIZE)
    return block[:, None] == block[None, :]


@triton.jit
def pair_products(x, y, SIZE: tl.constexpr, BC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """x_i . y_j for i in the later and j in the earlier half of a pair of blocks, 0 elsewhere."""
    later = is_later(SIZE, BC)
    left, right = tl.where(later, x, 0.0).to(OPERAND), tl.where(later, 0.0, y).to(OPERAND)
    return tl.where(is_pair(SIZE, BC), tl.dot(left, tl.trans(right), input_precision=PRECISION), 0.0)


@triton.jit
def _swapped(x):
    """[n, 2, BD] with the two halves exchanged."""
    is_first = (tl.arange(0, 2) == 0)[None, :, None]
    first = tl.sum(tl.where(is_first, x, 0.0), axis=1)
    second = tl.sum(tl.where(is_first, 0.0, x), axis=1)
    return tl.where(is_first, second[:, None, :], first[:, None, :])


@triton.jit
def other_totals(a, SIZE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """[n, 2, BD]: of every half of the n pairs of blocks, the product of the other half's decays."""
    PAIRS: tl.constexpr = BC // (2 * SIZE)
    halves = tl.reshape(prefix_products(a, SIZE, BC, BD), [PAIRS, 2, SIZE, BD])
    is_last = (tl.arange(0, SIZE) == SIZE - 1)[None, None, :, None]
    return _swapped(tl.sum(tl.where(is_last, halves, 0.0), axis=2))


@triton.jit
def to_rows(x, SIZE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """[n, 2, BD] as [BC, BD], every row with its half's numbers."""
    return tl.reshape(tl.broadcast_to(x[:, :, None, :], [BC // (2 * SIZE), 2, SIZE, BD]), [BC, BD])


@triton.jit
def total_gradients(d_total, of_rows, others, SIZE: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """The gradients [2 n, BD] of the products of the decays of the blocks of SIZE.

    `d_total` [n, BD] are those of the pairs' products, `of_rows` [BC, BD] is, for each row that the other half's
    product scales, the gradient of what it becomes times what it was.
    """
    PAIRS: tl.constexpr = BC // (2 * SIZE)
    sums = tl.sum(tl.reshape(of_rows, [PAIRS, 2, SIZE, BD]), axis=2)
    return tl.reshape(_swapped(sums) + d_total[:, None, :] * others, [2 * PAIRS, BD])


@triton.jit(do_not_specialize=["T", "chunks"])
def prepare_heads(
    q, k, decay, attention, into, out_of,
    T, H, chunks,
    K: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk the products of queries and keys with the decays between them, and the decays to its ends."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    first = head // H * T + chunk * BC
    row = tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    rows_ok = row < tokens_left
    place = head * chunks + chunk
    base = (first * H + head % H) * K
    scores = tl.zeros([BC, BC], tl.float32)
    for start in range(0, K, BD):
        queries = load_tile(q + base, rows_ok, H * K, start, K, BC, BD)
        keys = load_tile(k + base, rows_ok, H * K, start, K, BC, BD)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    a = tl.load(decay + first * H + head % H + row * H, mask=rows_ok, other=1.0)
    below = row[:, None] > row[None, :]
    pairs = tl.cumprod(tl.where(below, a[:, None], 1.0), axis=0)
    scores = tl.where(row[:, None] >= row[None, :], scores * pairs, 0.0)
    tile = place * BC * BC + row[:, None] * BC + row[None, :]
    tl.store(attention + tile, scores.to(attention.dtype.element_ty))
    tl.store(into + place * BC + row, tl.cumprod(a, axis=0))
    tl.store(out_of + place * BC + row, last_row(pairs, BC))


@triton.jit(do_not_specialize=["T", "chunks"])
def prepare_channels(
    q, k, decay, attention, q_in, k_out, across,
    T, H, chunks,
    K: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for a decay for each channel: scores, queries and keys at the chunk's ends, the product of all decays.

    Blocks of 1, 2, 4, ... tokens are merged in pairs. Between an earlier half that ends at token m and the later half
    D(i, j) = D(i, m) D(m, j), so that the scores of the two are one product of matrices.
    """
    OPERAND: tl.constexpr = q_in.dtype.element_ty
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    first = head // H * T + chunk * BC
    row = tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    rows_ok = row < tokens_left
    place = head * chunks + chunk
    base = (first * H + head % H) * K
    scores = tl.zeros([BC, BC], tl.float32)
    for start in range(0, K, BD):
        queries = load_tile(q + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        keys = load_tile(k + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        a = load_decays(decay + base, 0, tokens_left, H * K, start, K, BC, BD)
        a_after = load_decays(decay + base, 1, tokens_left, H * K, start, K, BC, BD)
        scores += tl.where(row[:, None] == row[None, :], tl.sum(queries * keys, axis=1)[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            x = queries * prefix_products(a, 2**level, BC, BD)
            y = keys * suffix_products(a_after, 2**level, BC, BD)
            scores += pair_products(x, y, 2**level, BC, OPERAND, PRECISION)
        into = prefix_products(a, BC, BC, BD)
        store_tile(q_in + base, queries * into, rows_ok, H * K, start, K, BC, BD)
        store_tile(k_out + base, keys * suffix_products(a_after, BC, BC, BD), rows_ok, H * K, start, K, BC, BD)
        column = start + tl.arange(0, BD)
        tl.store(across + place * K + column, last_row(into, BC), mask=column < K)
    tile = place * BC * BC + row[:, None] * BC + row[None, :]
    tl.store(attention + tile, scores.to(OPERAND))


@triton.jit(do_not_specialize=["T", "chunks"])
def scan_forward(
    q, k, v, attention, into, out_of, initial, o, final, starts,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, INITIAL: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk: outputs, the final state and, to SAVE, every chunk's first state.

    With CHANNEL `into` holds the products of all decays of a chunk, [chunk, K], and `out_of` is not read.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    row, key = tl.arange(0, BC), tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    state_ok = value_ok[:, None] & (key < K)[None, :]
    state_at = head * K * V + value[:, None] + key[None, :] * V
    state = tl.zeros([BV, BK], tl.float32)
    if INITIAL:
        state += tl.load(initial + state_at, mask=state_ok, other=0.0)
    for chunk in range(chunks):
        rows_ok = row < tl.minimum(T - chunk * BC, BC)
        first = b * T + chunk * BC
        place = head * chunks + chunk
        queries = load_tile(q + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
        keys = load_tile(k + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        values = tl.load(v + values_at, mask=values_ok, other=0.0)
        seen = tl.load(attention + place * BC * BC + row[:, None] * BC + row[None, :])
        rounded = state.to(OPERAND)
        if SAVE:
            tl.store(starts + place * K * V + value[:, None] * K + key[None, :], rounded, mask=state_ok)
        out = tl.dot(rounded, tl.trans(queries), input_precision=PRECISION)
        if CHANNEL:
            state *= tl.load(into + place * K + key, mask=key < K, other=0.0)[None, :]
            written = values
        else:
            out *= tl.load(into + place * BC + row)[None, :]
            state *= tl.load(into + place * BC + BC - 1)
            written = (values.to(tl.float32) * tl.load(out_of + place * BC + row)[None, :]).to(OPERAND)
        out = tl.dot(values, tl.trans(seen), out, input_precision=PRECISION)
        tl.store(o + values_at, out.to(o.dtype.element_ty), mask=values_ok)
        state = tl.dot(written, keys, state, input_precision=PRECISION)
    tl.store(final + state_at, state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def scan_backward(
    q, k, attention, into, out_of, d_o, d_final, d_v, d_ends, d_initial,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradients of the values, of every chunk's last state and of the first."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    row, key = tl.arange(0, BC), tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    state_ok = value_ok[:, None] & (key < K)[None, :]
    state_at = head * K * V + value[:, None] + key[None, :] * V
    d_state = tl.load(d_final + state_at, mask=state_ok, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step
        rows_ok = row < tl.minimum(T - chunk * BC, BC)
        first = b * T + chunk * BC
        place = head * chunks + chunk
        queries = load_tile(q + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
        keys = load_tile(k + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        d_out = tl.load(d_o + values_at, mask=values_ok, other=0.0)
        seen = tl.load(attention + place * BC * BC + row[:, None] * BC + row[None, :])
        rounded = d_state.to(OPERAND)
        tl.store(d_ends + place * K * V + value[:, None] * K + key[None, :], rounded, mask=state_ok)
        d_values = tl.dot(rounded, tl.trans(keys), input_precision=PRECISION)
        if CHANNEL:
            d_state *= tl.load(into + place * K + key, mask=key < K, other=0.0)[None, :]
            reading = d_out
        else:
            d_values *= tl.load(out_of + place * BC + row)[None, :]
            d_state *= tl.load(into + place * BC + BC - 1)
            reading = (d_out.to(tl.float32) * tl.load(into + place * BC + row)[None, :]).to(OPERAND)
        d_values = tl.dot(d_out, seen, d_values, input_precision=PRECISION)
        tl.store(d_v + values_at, d_values.to(d_v.dtype.element_ty), mask=values_ok)
        d_state = tl.dot(reading, queries, d_state, input_precision=PRECISION)
    tl.store(d_initial + state_at, d_state, mask=state_ok)


@triton.jit
def outer_products(
    x, y, rows_ok, row_stride,
    V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i . y_j over the values, where x and y point at rows of V numbers."""
    products = tl.zeros([BC, BC], tl.float32)
    for start in range(0, V, BV):
        left = load_tile(x, rows_ok, row_stride, start, V, BC, BV).to(OPERAND)
        right = load_tile(y, rows_ok, row_stride, start, V, BC, BV).to(OPERAND)
        products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION)
    return products


@triton.jit
def state_products(
    x, state, rows_ok, row_stride, start_key,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of V numbers times a state [V, K]: its columns from `start_key` on, [BC, BD]."""
    products = tl.zeros([BC, BD], tl.float32)
    for start in range(0, V, BV):
        left = load_tile(x, rows_ok, row_stride, start, V, BC, BV).to(OPERAND)
        ok = start + tl.arange(0, BV) < V
        right = load_tile(state + start * K, ok, K, start_key, K, BV, BD).to(OPERAND)
        products = tl.dot(left, right, products, input_precision=PRECISION)
    return products


@triton.jit
def state_overlap(x, y, start_key, K: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """The sums over V of the products of two states [V, K], for the keys from `start_key` on."""
    sums = tl.zeros([BD], tl.float32)
    for start in range(0, V, BV):
        ok = start + tl.arange(0, BV) < V
        left = load_tile(x + start * K, ok, K, start_key, K, BV, BD).to(tl.float32)
        right = load_tile(y + start * K, ok, K, start_key, K, BV, BD).to(tl.float32)
        sums += tl.sum(left * right, axis=0)
    return sums


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients_heads(
    q, k, v, decay, starts, d_o, d_ends, d_q, d_k, d_decay,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk by itself the gradients of q, k and one decay for each head.

    Decay t is one factor of every D(i, j) = D(i, t) a_t D(t - 1, j) with j < t <= i, where j may be the chunk's start
    and i its end; its gradient sums the products without it.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    h = head % H
    first = head // H * T + chunk * BC
    row = tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    rows_ok = row < tokens_left
    state_at = (head * chunks + chunk) * K * V
    keys_at, values_at = (first * H + h) * K, (first * H + h) * V

    i, j = row[:, None], row[None, :]
    decays = decay + first * H + h
    a = tl.load(decays + row * H, mask=rows_ok, other=1.0)
    pairs = tl.where(i >= j, tl.cumprod(tl.where(i > j, a[:, None], 1.0), axis=0), 0.0)
    into, out_of = tl.cumprod(a, axis=0), last_row(pairs, BC)
    d_scores = outer_products(d_o + values_at, v + values_at, rows_ok, H * V, V, BC, BV, OPERAND, PRECISION)
    weights = (d_scores * pairs).to(OPERAND)
    scores = tl.zeros([BC, BC], tl.float32)
    d_into, d_out_of = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    d_across = tl.zeros([BD], tl.float32)
    for start in range(0, K, BD):
        queries = load_tile(q + keys_at, rows_ok, H * K, start, K, BC, BD)
        keys = load_tile(k + keys_at, rows_ok, H * K, start, K, BC, BD)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        d_queries = state_products(
            d_o + values_at, starts + state_at, rows_ok, H * V, start, K, V, BC, BD, BV, OPERAND, PRECISION
        )
        d_into += tl.sum(d_queries * queries.to(tl.float32), axis=1)
        d_queries = tl.dot(weights, keys, d_queries * into[:, None], input_precision=PRECISION)
        store_tile(d_q + keys_at, d_queries, rows_ok, H * K, start, K, BC, BD)
        d_keys = state_products(
            v + values_at, d_ends + state_at, rows_ok, H * V, start, K, V, BC, BD, BV, OPERAND, PRECISION
        )
        d_out_of += tl.sum(d_keys * keys.to(tl.float32), axis=1)
        d_keys = tl.dot(tl.trans(weights), queries, d_keys * out_of[:, None], input_precision=PRECISION)
        store_tile(d_k + keys_at, d_keys, rows_ok, H * K, start, K, BC, BD)
        d_across += state_overlap(starts + state_at, d_ends + state_at, start, K, V, BD, BV)

    # before[t, j] = D(t - 1, j) for j < t, and for the chunk's start.
    a_before = tl.load(decays + (row - 1) * H, mask=(row > 0) & (row <= tokens_left), other=1.0)
    before = tl.where(i > j, tl.cumprod(tl.where(i - 1 > j, a_before[:, None], 1.0), axis=0), 0.0)
    into_before = tl.cumprod(a_before, axis=0)
    d_pairs = tl.where(i > j, d_scores * scores, 0.0)
    left = tl.dot(d_pairs, tl.trans(before), input_precision="tf32x3") + d_into[:, None] * into_before[None, :]
    d_a = tl.sum(pairs * left, axis=0)
    to_end = tl.sum(before * d_out_of[None, :], axis=1) + tl.sum(d_across, axis=0) * into_before
    tl.store(d_decay + first * H + h + row * H, d_a + out_of * to_end, mask=rows_ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients_channels(
    q, k, v, decay, starts, d_o, d_ends, d_q, d_k, d_decay,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for a decay for each channel: `prepare_channels` backwards, from the whole chunk to single tokens."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    h = head % H
    first = head // H * T + chunk * BC
    row = tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    rows_ok = row < tokens_left
    state_at = (head * chunks + chunk) * K * V
    keys_at, values_at = (first * H + h) * K, (first * H + h) * V
    d_scores = outer_products(d_o + values_at, v + values_at, rows_ok, H * V, V, BC, BV, OPERAND, PRECISION)
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], d_scores, 0.0), axis=1)[:, None]
    d_scores = d_scores.to(OPERAND)
    for start in range(0, K, BD):
        queries = load_tile(q + keys_at, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        keys = load_tile(k + keys_at, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        a = load_decays(decay + keys_at, 0, tokens_left, H * K, start, K, BC, BD)
        a_after = load_decays(decay + keys_at, 1, tokens_left, H * K, start, K, BC, BD)
        d_queries = state_products(
            d_o + values_at, starts + state_at, rows_ok, H * V, start, K, V, BC, BD, BV, OPERAND, PRECISION
        )
        d_keys = state_products(
            v + values_at, d_ends + state_at, rows_ok, H * V, start, K, V, BC, BD, BV, OPERAND, PRECISION
        )
        d_total = state_overlap(starts + state_at, d_ends + state_at, start, K, V, BD, BV)[None, :]
        for level in tl.static_range(LEVELS - 1, -1, -1):
            # As queries and keys are at the ends of their blocks, of which the merging makes pairs.
            x = queries * prefix_products(a, 2**level, BC, BD)
            y = keys * suffix_products(a_after, 2**level, BC, BD)
            later = is_later(2**level, BC)
            others = other_totals(a, 2**level, BC, BD)
            of_rows = tl.where(later, d_queries * x, d_keys * y)
            d_total = total_gradients(d_total, of_rows, others, 2**level, BC, BD)
            scale = to_rows(others, 2**level, BC, BD)
            block = tl.where(is_pair(2**level, BC), d_scores, 0.0).to(OPERAND)
            from_keys = tl.dot(block, tl.where(later, 0.0, y).to(OPERAND), input_precision=PRECISION)
            d_queries = tl.where(later, d_queries * scale + from_keys, d_queries)
            from_queries = tl.dot(tl.trans(block), tl.where(later, x, 0.0).to(OPERAND), input_precision=PRECISION)
            d_keys = tl.where(later, d_keys, d_keys * scale + from_queries)
        store_tile(d_decay + keys_at, d_queries * queries + d_total, rows_ok, H * K, start, K, BC, BD)
        store_tile(d_q + keys_at, d_queries * a + diagonal * keys, rows_ok, H * K, start, K, BC, BD)
        store_tile(d_k + keys_at, d_keys + diagonal * queries, rows_ok, H * K, start, K, BC, BD)
