"""Triton kernels for signed diagonal linear attention; `docs/kernels.md` derives them.

A chunk has BC tokens. All tensors are contiguous; the states lie transposed, [V, K]. With one decay for each head
(CHANNEL is false) the scans read queries and keys as they are and scale what comes out of the products. With one for
each key channel `channels.py` leaves queries as they read the state at the chunk's start, and keys as they write the
one at its end.

Decays are multiplied, and never divided by but for their own gradients: 0 and negative numbers are ordinary. The state
is accumulated in float32 and rounded to the operands' dtype only where it is read, so that no rounding error is fed
back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.products import dot_masks
from statetrack.ops.kernels.tiles import (
    TINY,
    load_tile,
    not_below,
    outer_products,
    overlap,
    state_products,
    store_tile,
)


@triton.jit
def _last_row(x, BC: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BC) == BC - 1)[:, None], x, 0.0), axis=0)


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
    tl.store(out_of + place * BC + row, _last_row(pairs, BC))


@triton.jit(do_not_specialize=["T", "chunks", "segments", "segment_chunks"])
def scan_forward(
    q, k, v, attention, into, out_of, initial, o, final, starts, products,
    T, H, chunks, segments, segment_chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, INITIAL: tl.constexpr, MODE: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk: outputs, the final state and, to SAVE, every chunk's first state.

    With CHANNEL `into` holds the products of all decays of a chunk, [chunk, K], and `out_of` is not read. Each program
    walks through one segment of `segment_chunks` chunks. MODE says what for:
        0: all, where `initial` and `final` are [rows, K, V] and there is one segment;
        1: all, where `initial` has a state [rows, segments, V, K] for every segment;
        2: only `final` [rows, segments, V, K], from a state of zeros, and the products of the segments' decays
           [rows, segments, K].
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    segment = tl.program_id(0).to(tl.int64)
    head = segment // segments
    b, h = head // H, head % H
    row, key = tl.arange(0, BC), tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    state_ok = value_ok[:, None] & (key < K)[None, :]
    state_at = head * K * V + value[:, None] + key[None, :] * V
    segment_at = segment * K * V + value[:, None] * K + key[None, :]
    state = tl.zeros([BV, BK], tl.float32)
    if MODE == 1:
        state += tl.load(initial + segment_at, mask=state_ok, other=0.0)
    elif INITIAL and MODE == 0:
        state += tl.load(initial + state_at, mask=state_ok, other=0.0)
    product = tl.full([BK], 1.0, tl.float32)
    begin = (segment % segments).to(tl.int32) * segment_chunks
    for chunk in range(begin, tl.minimum(begin + segment_chunks, chunks)):
        rows_ok = row < tl.minimum(T - chunk * BC, BC)
        first = b * T + chunk * BC
        place = head * chunks + chunk
        keys = load_tile(k + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        values = tl.load(v + values_at, mask=values_ok, other=0.0)
        if MODE < 2:
            queries = load_tile(q + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
            seen = tl.load(attention + place * BC * BC + row[:, None] * BC + row[None, :])
            rounded = state.to(OPERAND)
            if SAVE:
                tl.store(starts + place * K * V + value[:, None] * K + key[None, :], rounded, mask=state_ok)
            out = tl.dot(rounded, tl.trans(queries), input_precision=PRECISION)
            if not CHANNEL:
                out *= tl.load(into + place * BC + row)[None, :]
            out = tl.dot(values, tl.trans(seen), out, input_precision=PRECISION)
            tl.store(o + values_at, out.to(o.dtype.element_ty), mask=values_ok)
        if CHANNEL:
            across = tl.load(into + place * K + key, mask=key < K, other=0.0)
            written = values
        else:
            across = tl.zeros([BK], tl.float32) + tl.load(into + place * BC + BC - 1)
            written = (values.to(tl.float32) * tl.load(out_of + place * BC + row)[None, :]).to(OPERAND)
        if MODE == 2:
            product *= across
        state = tl.dot(written, keys, state * across[None, :], input_precision=PRECISION)
    if MODE == 2:
        tl.store(final + segment_at, state, mask=state_ok)
        tl.store(products + segment * K + key, product, mask=(key < K) & (tl.program_id(1) == 0))
    elif segment % segments == segments - 1:
        tl.store(final + state_at, state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "segment_chunks"])
def scan_backward(
    q, k, attention, into, out_of, d_o, d_final, d_v, d_ends, d_initial, products,
    T, H, chunks, segments, segment_chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHANNEL: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradients of the values, of every chunk's last state and of the first.

    Segments and MODE as in `scan_forward`: 1 takes `d_final` for every segment, 2 gives only `d_initial` for each.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    segment = tl.program_id(0).to(tl.int64)
    head = segment // segments
    b, h = head // H, head % H
    row, key = tl.arange(0, BC), tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    state_ok = value_ok[:, None] & (key < K)[None, :]
    state_at = head * K * V + value[:, None] + key[None, :] * V
    segment_at = segment * K * V + value[:, None] * K + key[None, :]
    if MODE == 2:
        d_state = tl.zeros([BV, BK], tl.float32)
    elif MODE == 1:
        d_state = tl.load(d_final + segment_at, mask=state_ok, other=0.0)
    else:
        d_state = tl.load(d_final + state_at, mask=state_ok, other=0.0)
    product = tl.full([BK], 1.0, tl.float32)
    begin = (segment % segments).to(tl.int32) * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)
    for step in range(end - begin):
        chunk = end - 1 - step
        rows_ok = row < tl.minimum(T - chunk * BC, BC)
        first = b * T + chunk * BC
        place = head * chunks + chunk
        queries = load_tile(q + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        d_out = tl.load(d_o + values_at, mask=values_ok, other=0.0)
        if MODE < 2:
            keys = load_tile(k + (first * H + h) * K, rows_ok, H * K, 0, K, BC, BK)
            seen = tl.load(attention + place * BC * BC + row[:, None] * BC + row[None, :])
            rounded = d_state.to(OPERAND)
            tl.store(d_ends + place * K * V + value[:, None] * K + key[None, :], rounded, mask=state_ok)
            d_values = tl.dot(rounded, tl.trans(keys), input_precision=PRECISION)
            if not CHANNEL:
                d_values *= tl.load(out_of + place * BC + row)[None, :]
            d_values = tl.dot(d_out, seen, d_values, input_precision=PRECISION)
            tl.store(d_v + values_at, d_values.to(d_v.dtype.element_ty), mask=values_ok)
        if CHANNEL:
            across = tl.load(into + place * K + key, mask=key < K, other=0.0)
            reading = d_out
        else:
            across = tl.zeros([BK], tl.float32) + tl.load(into + place * BC + BC - 1)
            reading = (d_out.to(tl.float32) * tl.load(into + place * BC + row)[None, :]).to(OPERAND)
        if MODE == 2:
            product *= across
        d_state = tl.dot(reading, queries, d_state * across[None, :], input_precision=PRECISION)
    if MODE == 2:
        tl.store(d_initial + segment_at, d_state, mask=state_ok)
        tl.store(products + segment * K + key, product, mask=(key < K) & (tl.program_id(1) == 0))
    elif segment % segments == 0:
        tl.store(d_initial + state_at, d_state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients_heads(
    q, k, v, decay, starts, d_o, d_ends, d_q, d_k, d_decay,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk by itself the gradients of q, k and one decay for each head.

    A decay's gradient is the sum, over the products of decays with it in them, of each times its own gradient, divided
    by the decay, for which TINY stands where it is smaller. Sums run only over such products, so that nothing large
    cancels.
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
    d_o, v, starts, d_ends = d_o + values_at, v + values_at, starts + state_at, d_ends + state_at

    both_ends = overlap(starts, d_ends, K * V)
    d_scores = outer_products(d_o, d_o, v, v, tokens_left, H * V, V, BC, 1, BV, OPERAND, PRECISION)
    i, j = row[:, None], row[None, :]
    decays = decay + first * H + h
    a = not_below(tl.load(decays + row * H, mask=rows_ok, other=1.0), TINY)
    following = not_below(tl.load(decays + (row + 1) * H, mask=row + 1 < tokens_left, other=1.0), TINY)
    into, out_of = tl.cumprod(a, axis=0), tl.cumprod(following, axis=0, reverse=True)
    weights = tl.where(i >= j, d_scores * tl.cumprod(tl.where(i > j, a[:, None], 1.0), axis=0), 0.0)
    operand = weights.to(OPERAND)
    scores = tl.zeros([BC, BC], tl.float32)
    asks, writes = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(0, K, BD):
        queries = load_tile(q + keys_at, rows_ok, H * K, start, K, BC, BD)
        keys = load_tile(k + keys_at, rows_ok, H * K, start, K, BC, BD)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        d_queries = state_products(d_o, d_o, starts, tokens_left, H * V, start, K, V, BC, 1, BD, BV, OPERAND, PRECISION)
        d_queries *= into[:, None]
        asks += tl.sum(d_queries * queries.to(tl.float32), axis=1)
        d_queries = tl.dot(operand, keys, d_queries, input_precision=PRECISION)
        store_tile(d_q + keys_at, d_queries, rows_ok, H * K, start, K, BC, BD)
        d_keys = state_products(v, v, d_ends, tokens_left, H * V, start, K, V, BC, 1, BD, BV, OPERAND, PRECISION)
        d_keys *= out_of[:, None]
        writes += tl.sum(d_keys * keys.to(tl.float32), axis=1)
        d_keys = tl.dot(tl.trans(operand), queries, d_keys, input_precision=PRECISION)
        store_tile(d_k + keys_at, d_keys, rows_ok, H * K, start, K, BC, BD)

    # [t, j]: what the products that end at t or later and begin after j add up to.
    spanning = dot_masks(i <= j, weights * scores, OPERAND, SPLIT, PRECISION)
    total = tl.sum(tl.where(i > j, spanning + writes[None, :], asks[None, :]), axis=1)
    total += tl.sum(tl.where(row == BC - 1, into, 0.0), axis=0) * both_ends
    tl.store(d_decay + first * H + h + row * H, total / a, mask=rows_ok)
