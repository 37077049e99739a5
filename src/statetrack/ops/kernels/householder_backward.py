"""Triton kernels for the gradients of products of generalized Householder matrices.

Letters, layouts and precision are those of `householder.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.householder import (
    SHORTEST,
    clamped_beta,
    decays,
    load_keys,
    load_pieces,
    load_rows,
    store_keys,
)
from statetrack.ops.kernels.products import dot_masks, halves
from statetrack.ops.kernels.tiles import TINY, load_tile, overlap, store_tile


@triton.jit(do_not_specialize=["T", "chunks", "segments", "segment_chunks"])
def scan_backward(
    q, k, inverse_high, inverse_low, attention, attention_low, into, into_token, out_of, d_o, d_final,
    d_error_high, d_error_low, d_ends, d_ends_low, d_initial,
    T, H, chunks, segments, segment_chunks,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    FINAL: tl.constexpr, MODE: tl.constexpr, DECAY: tl.constexpr,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradients of the values, of every chunk's last state and the first state.

    Segments and MODE as in `scan_forward`: 1 takes `d_final` for every segment, 2 gives only `d_initial` for each.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    PIECES: tl.constexpr = (K + BD - 1) // BD
    segment = tl.program_id(0).to(tl.int64)
    head = segment // segments
    b, h = head // H, head % H
    row, token = tl.arange(0, BM), tl.arange(0, BC)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    d_states = ()
    for start_key in tl.static_range(0, K, BD):
        key = start_key + tl.arange(0, BD)
        state_ok = value_ok[:, None] & (key < K)[None, :]
        if MODE == 2 or (MODE == 0 and not FINAL):
            d_state = tl.zeros([BV, BD], tl.float32)
        elif MODE == 1:
            d_state = tl.load(d_final + (segment * K * V + value[:, None] * K + key[None, :]), mask=state_ok, other=0.0)
        else:
            d_state = tl.load(d_final + (head * K * V + value[:, None] + key[None, :] * V), mask=state_ok, other=0.0)
        d_states = d_states + (d_state,)
    begin = (segment % segments).to(tl.int32) * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)
    for step in range(end - begin):
        chunk = end - 1 - step
        tokens_left = tl.minimum(T - chunk * C, C)
        rows_ok, tokens_ok = row < tokens_left * N, token < tokens_left
        first = b * T + chunk * C
        place = head * chunks + chunk
        keys = load_pieces(k + (first * N * H + h) * K, rows_ok, H * K, BM, K, BK, BD)
        queries = load_pieces(q + (first * H + h) * K, tokens_ok, H * K, BC, K, BK, BD)
        out_at = (first * H + h) * V + value[:, None] + token[None, :] * (H * V)
        d_out = tl.load(d_o + out_at, mask=value_ok[:, None] & tokens_ok[None, :], other=0.0)
        tile = place * BM * BM + row[:, None] * BM + row[None, :]
        t_high = tl.load(inverse_high + tile)
        seen = tl.load(attention + place * BC * BM + token[:, None] * BM + row[None, :])

        d_u = tl.zeros([BV, BM], tl.float32)
        for part in tl.static_range(PIECES):
            if SPLIT:
                high, low = halves(d_states[part], OPERAND)
            else:
                high, low = d_states[part], d_states[part]
            if MODE < 2:
                store_keys(d_ends + place * K * V, high, value, value_ok, part * BD, K, BD)
                if HIGH:
                    store_keys(d_ends_low + place * K * V, low, value, value_ok, part * BD, K, BD)
            d_u = tl.dot(high, tl.trans(keys[part]), d_u, input_precision=PRECISION)
            if SPLIT:
                d_u = tl.dot(low, tl.trans(keys[part]), d_u, input_precision=PRECISION)
        if DECAY:
            d_u *= tl.load(out_of + place * BM + row)[None, :]
        d_u = tl.dot(d_out, seen, d_u, input_precision=PRECISION)
        if HIGH:
            seen_low = tl.load(attention_low + place * BC * BM + token[:, None] * BM + row[None, :])
            d_u = tl.dot(d_out, seen_low, d_u, input_precision=PRECISION)
        if SPLIT:
            t_low = tl.load(inverse_low + tile)
            high, low = halves(d_u, OPERAND)
            d_error = tl.dot(high, t_low, input_precision=PRECISION)
            d_error = tl.dot(low, t_high, d_error, input_precision=PRECISION)
            d_error = tl.dot(high, t_high, d_error, input_precision=PRECISION)
            w_high, w_low = halves(d_error, OPERAND)
        else:
            d_error = tl.dot(d_u, t_high, input_precision=PRECISION)
            w_high, w_low = d_error, d_error
        values_at = (first * N * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        if MODE < 2:
            tl.store(d_error_high + values_at, w_high, mask=values_ok)
            if SPLIT:
                tl.store(d_error_low + values_at, w_low, mask=values_ok)
        if DECAY:
            total = tl.load(into + place * BM + BM - 1)
            d_asked = d_out.to(tl.float32) * tl.load(into_token + place * BC + token)[None, :]
            d_out = d_asked.to(OPERAND)
            if HIGH:
                _, asked_low = halves(d_asked, OPERAND)
            d_error *= tl.load(into + place * BM + row)[None, :]
        after, d_states = d_states, ()
        for part in tl.static_range(PIECES):
            d_state = after[part]
            if DECAY:
                d_state *= total
                if HIGH:
                    d_state = tl.dot(asked_low, queries[part], d_state, input_precision=PRECISION)
            d_state = tl.dot(d_out, queries[part], d_state, input_precision=PRECISION)
            if SPLIT:
                w_high, w_low = halves(-d_error, OPERAND)
                d_state = tl.dot(w_high, keys[part], d_state, input_precision=PRECISION)
                d_state = tl.dot(w_low, keys[part], d_state, input_precision=PRECISION)
            else:
                d_state = tl.dot(-d_error, keys[part], d_state, input_precision=PRECISION)
            d_states = d_states + (d_state,)
    for part in tl.static_range(PIECES):
        key = part * BD + tl.arange(0, BD)
        state_ok = value_ok[:, None] & (key < K)[None, :]
        if MODE == 2:
            tl.store(d_initial + (segment * K * V + value[:, None] * K + key[None, :]), d_states[part], mask=state_ok)
        elif segment % segments == 0:
            tl.store(d_initial + (head * K * V + value[:, None] + key[None, :] * V), d_states[part], mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients(
    q, k, beta, decay, starts, starts_low, u_high, u_low, d_o, d_error_high, d_error_low, d_ends, d_ends_low,
    d_q, d_k, d_beta, d_decay,
    T, H, chunks,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SPLIT: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk by itself the gradients of q, k, beta and the decays, from what the two scans have left.

    Those of q and k in tiles of BD key channels, one after the other: one of 256 would not fit the registers.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    b, h = head // H, head % H
    row, token = tl.arange(0, BM), tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * C, C)
    rows_ok, tokens_ok = row < tokens_left * N, token < tokens_left
    first = b * T + chunk * C
    place = head * chunks + chunk
    if DECAY:  # here, where registers are free
        both_ends = overlap(starts, starts_low, d_ends, d_ends_low, place * K * V, K * V, HIGH)
    key_rows = (first * N * H + h) * K
    query_rows = (first * H + h) * K
    squared_norm = tl.zeros([BM], tl.float32)
    for start_key in tl.static_range(0, BK, BD):
        keys = load_keys(k + key_rows, rows_ok, H * K, start_key, BM, K, BK, BD)
        squared_norm += tl.sum(keys.to(tl.float32) * keys.to(tl.float32), axis=1)
    directed = squared_norm > SHORTEST
    inverse_norm = tl.where(directed, 1 / tl.where(directed, squared_norm, 1.0), 0.0)
    scaled = clamped_beta(tl.load(beta + first * N * H + h + row * H, mask=rows_ok, other=0.0).to(tl.float32))
    if NORMALIZE:
        scaled = tl.where(directed, scaled * inverse_norm, TINY)

    values_at = (first * N * H + h) * V + row[:, None] * (H * V)
    outs_at = (first * H + h) * V + token[:, None] * (H * V)

    # How micro-steps and queries act on each other. Only one large accumulator at a time, or registers run out.
    between_keys = tl.zeros([BM, BM], tl.float32)
    to_queries = tl.zeros([BC, BM], tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)[None, :]
        ok = rows_ok[:, None] & (value < V)
        u = tl.load(u_high + values_at + value, mask=ok, other=0.0)
        d_error = tl.load(d_error_high + values_at + value, mask=ok, other=0.0)
        d_out = tl.load(d_o + outs_at + value, mask=tokens_ok[:, None] & (value < V), other=0.0)
        between_keys = tl.dot(d_error, tl.trans(u), between_keys, input_precision=PRECISION)
        to_queries = tl.dot(d_out, tl.trans(u), to_queries, input_precision=PRECISION)
        if SPLIT:
            low = tl.load(u_low + values_at + value, mask=ok, other=0.0)
            between_keys = tl.dot(d_error, tl.trans(low), between_keys, input_precision=PRECISION)
            to_queries = tl.dot(d_out, tl.trans(low), to_queries, input_precision=PRECISION)
            low = tl.load(d_error_low + values_at + value, mask=ok, other=0.0)
            between_keys = tl.dot(low, tl.trans(u), between_keys, input_precision=PRECISION)

    # On the diagonal d_error . u = beta^2 (gradient of beta), where beta is the factor of k k^T.
    i, j = row[:, None], row[None, :]
    d_scaled = tl.sum(tl.where(i == j, between_keys, 0.0), axis=1) / scaled / scaled
    if NORMALIZE:
        d_scaled *= inverse_norm
    tl.store(d_beta + first * N * H + h + row * H, d_scaled, mask=rows_ok)
    between_keys = tl.where(i > j, -between_keys, 0.0)
    to_queries = tl.where(row[None, :] < (token * N + N)[:, None], to_queries, 0.0)
    if BD == BK:
        queries = load_rows(q + query_rows, tokens_ok, H * K, BC, K, BK)
    if DECAY:
        a, d_pairs, d_token, d_into, d_into_token, d_out_of = decays(
            decay + first * H + h, tokens_left, H, N, BM, BC, TINY
        )
        between_keys *= d_pairs
        to_queries *= d_token
        # Every product of decays times its own gradient; a decay's gradient is the sum over the products with it in
        # them, divided by it. Sums run only over such products, so that nothing large cancels.
        gram, scores = tl.zeros([BM, BM], tl.float32), tl.zeros([BC, BM], tl.float32)
        for start_key in tl.static_range(0, BK, BD):
            if BD < BK:
                keys = load_tile(k + key_rows, rows_ok, H * K, start_key, K, BM, BD)
                queries = load_tile(q + query_rows, tokens_ok, H * K, start_key, K, BC, BD)
            gram = tl.dot(keys, tl.trans(keys), gram, input_precision=PRECISION)
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        of_pairs = between_keys * gram
        of_queries = to_queries * scores
        later_token = token[None, :] * N >= (row // N * N)[:, None]
        if N == 1:
            spanning = dot_masks(i <= j, of_pairs + of_queries, OPERAND, SPLIT, PRECISION)
        else:
            spanning = dot_masks(i <= j, of_pairs, OPERAND, SPLIT, PRECISION)
            spanning += dot_masks(later_token, of_queries, OPERAND, SPLIT, PRECISION)
        total = tl.sum(tl.where(i > j, spanning, 0.0), axis=1)
        total += tl.sum(tl.where(row == BM - 1, d_into, 0.0), axis=0) * both_ends
        asks, reads, writes = tl.zeros([BC], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)

    for start_key in range(0, BK, BD):
        key = start_key + tl.arange(0, BD)
        states_at = place * K * V + key[None, :]
        if BD < BK:
            keys = load_tile(k + key_rows, rows_ok, H * K, start_key, K, BM, BD)
            queries = load_tile(q + query_rows, tokens_ok, H * K, start_key, K, BC, BD)
        d_queries = tl.zeros([BC, BD], tl.float32)
        for start in range(0, V, BV):
            value = start + tl.arange(0, BV)
            d_out = tl.load(d_o + outs_at + value[None, :], mask=tokens_ok[:, None] & (value < V)[None, :], other=0.0)
            states_ok = (value < V)[:, None] & (key < K)[None, :]
            state = tl.load(starts + states_at + value[:, None] * K, mask=states_ok, other=0.0)
            d_queries = tl.dot(d_out, state, d_queries, input_precision=PRECISION)
            if HIGH:
                low = tl.load(starts_low + states_at + value[:, None] * K, mask=states_ok, other=0.0)
                d_queries = tl.dot(d_out, low, d_queries, input_precision=PRECISION)
        if DECAY:
            d_queries *= d_into_token[:, None]
            asks += tl.sum(d_queries * queries.to(tl.float32), axis=1)
        if SPLIT:
            query_high, query_low = halves(to_queries, OPERAND)
            d_queries = tl.dot(query_low, keys, d_queries, input_precision=PRECISION)
        else:
            query_high = to_queries
        d_queries = tl.dot(query_high, keys, d_queries, input_precision=PRECISION)
        store_tile(d_q + query_rows, d_queries, tokens_ok, H * K, start_key, K, BC, BD)

        d_keys = tl.zeros([BM, BD], tl.float32)
        for start in range(0, V, BV):
            value = start + tl.arange(0, BV)
            ok = rows_ok[:, None] & (value < V)[None, :]
            d_error = tl.load(d_error_high + values_at + value[None, :], mask=ok, other=0.0)
            states_ok = (value < V)[:, None] & (key < K)[None, :]
            state = tl.load(starts + states_at + value[:, None] * K, mask=states_ok, other=0.0)
            d_keys = tl.dot(d_error, state, d_keys, input_precision=PRECISION)
            if HIGH:
                low = tl.load(d_error_low + values_at + value[None, :], mask=ok, other=0.0)
                d_keys = tl.dot(low, state, d_keys, input_precision=PRECISION)
                low = tl.load(starts_low + states_at + value[:, None] * K, mask=states_ok, other=0.0)
                d_keys = tl.dot(d_error, low, d_keys, input_precision=PRECISION)
        d_keys = -d_keys
        if DECAY:
            d_keys *= d_into[:, None]
            reads += tl.sum(d_keys * keys.to(tl.float32), axis=1)
            d_reading = d_keys
            d_keys = tl.zeros([BM, BD], tl.float32)
        for start in range(0, V, BV):
            value = start + tl.arange(0, BV)
            ok = rows_ok[:, None] & (value < V)[None, :]
            u = tl.load(u_high + values_at + value[None, :], mask=ok, other=0.0)
            states_ok = (value < V)[:, None] & (key < K)[None, :]
            d_end = tl.load(d_ends + states_at + value[:, None] * K, mask=states_ok, other=0.0)
            d_keys = tl.dot(u, d_end, d_keys, input_precision=PRECISION)
            if HIGH:
                low = tl.load(u_low + values_at + value[None, :], mask=ok, other=0.0)
                d_keys = tl.dot(low, d_end, d_keys, input_precision=PRECISION)
                end_low = tl.load(d_ends_low + states_at + value[:, None] * K, mask=states_ok, other=0.0)
                d_keys = tl.dot(u, end_low, d_keys, input_precision=PRECISION)
        if DECAY:
            d_keys *= d_out_of[:, None]
            writes += tl.sum(d_keys * keys.to(tl.float32), axis=1)
            d_keys += d_reading
        both = between_keys + tl.trans(between_keys)
        if NORMALIZE:
            both = tl.where(i == j, (-2 * scaled * d_scaled)[:, None], both)
        if SPLIT:
            both_high, both_low = halves(both, OPERAND)
            d_keys = tl.dot(both_low, keys, d_keys, input_precision=PRECISION)
        else:
            both_high = both
        d_keys = tl.dot(both_high, keys, d_keys, input_precision=PRECISION)
        if HIGH:
            d_keys = tl.dot(tl.trans(query_low), queries, d_keys, input_precision=PRECISION)
        d_keys = tl.dot(tl.trans(query_high), queries, d_keys, input_precision=PRECISION)
        store_tile(d_k + key_rows, d_keys, rows_ok, H * K, start_key, K, BM, BD)
    if DECAY:
        total += tl.sum(tl.where(later_token, asks[None, :], 0.0), axis=1)
        total += tl.sum(tl.where(i <= j, reads[None, :], 0.0) + tl.where(i > j, writes[None, :], 0.0), axis=1)
        tl.store(d_decay + first * H + h + (row // N) * H, total / a, mask=(row % N == 0) & rows_ok)
