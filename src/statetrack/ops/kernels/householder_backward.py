"""Triton kernels for the gradients of products of generalized Householder matrices.

Letters, layouts and precision are those of `householder.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.householder import (
    SHORTEST,
    clamped_beta,
    decays_of_rows,
    load_pieces,
    store_keys,
)
from statetrack.ops.kernels.products import dot_masks, halves
from statetrack.ops.kernels.tiles import TINY, store_tile


@triton.jit
def _load_rows(pointer, rows_ok, row_stride, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """As `load_tile`, with as few masks and numbers of 64 bits for each thread as there can be."""
    column = tl.arange(0, BLOCK)
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + column[None, :]
    ok = rows_ok[:, None]
    if WIDTH % BLOCK != 0:
        ok = ok & (start + column < WIDTH)[None, :]
    return tl.load(pointer + start + offsets, mask=ok, other=0.0)


@triton.jit
def _load_state(
    pointer, start, start_key, K: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Of a state [V, K] a tile [BV, BD], zero outside."""
    value, key = tl.arange(0, BV)[:, None], tl.arange(0, BD)[None, :]
    tile = pointer + start * K + start_key + (value * K + key)
    if V % BV == 0 and K % BD == 0:
        return tl.load(tile)
    return tl.load(tile, mask=(start + value < V) & (start_key + key < K), other=0.0)


@triton.jit
def _overlap(
    x, x_low, y, y_low,
    K: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of the products of two states' numbers, which with HIGH are given in halves: a trace."""
    products = tl.zeros([BV, BV], tl.float32)
    for start in range(0, V, BV):
        for start_key in range(0, K, BD):
            left = _load_state(x, start, start_key, K, V, BD, BV)
            right = _load_state(y, start, start_key, K, V, BD, BV)
            products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION)
            if HIGH:
                low = _load_state(x_low, start, start_key, K, V, BD, BV)
                products = tl.dot(low, tl.trans(right), products, input_precision=PRECISION)
                low = _load_state(y_low, start, start_key, K, V, BD, BV)
                products = tl.dot(left, tl.trans(low), products, input_precision=PRECISION)
    value = tl.arange(0, BV)
    return tl.sum(tl.sum(tl.where(value[:, None] == value[None, :], products, 0.0), axis=1), axis=0)


@triton.jit
def _products(a):
    """Products of decays, from the first on, as m 2^exponent.

    An m is a product of numbers between sqrt(1/2) and sqrt(2): one can be divided by another whatever the decays.
    """
    bits = a.to(tl.int32, bitcast=True)
    exponent = ((bits & 0x7FFFFFFF) - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return tl.cumprod(m, axis=0), tl.cumsum(exponent, axis=0)


@triton.jit
def _power(exponent):
    """2^exponent, or 0 where that is less than 2^-126, and infinity where it is more than 2^127."""
    return (tl.minimum(tl.maximum(exponent + 127, 0), 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _quotients(m, exponent, m_before, exponent_before, ok):
    """D(i, j), given the products up to all i and all j, where ok; anything finite elsewhere."""
    ratio = m[:, None] * (1 / m_before)[None, :]
    return ratio * _power(tl.where(ok, exponent[:, None] - exponent_before[None, :], 0))


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
    state_at = (head * chunks + chunk) * K * V
    keys_at, queries_at = (first * N * H + h) * K, (first * H + h) * K
    values_at, outs_at = (first * N * H + h) * V, (first * H + h) * V
    if BD == BK:
        keys = _load_rows(k + keys_at, rows_ok, H * K, 0, K, BM, BK)

    # How micro-steps and queries act on each other. Only one large accumulator at a time, or registers run out.
    between_keys = tl.zeros([BM, BM], tl.float32)
    to_queries = tl.zeros([BC, BM], tl.float32)
    # Products of fewer than 64 rows take u from registers. Its tile in shared memory then has one place, which the
    # pipeline of Triton 3.6 fills for the next trip while the last product of this one may still read it.
    STAGES: tl.constexpr = 1 if BC < 64 else None
    for start in tl.range(0, V, BV, num_stages=STAGES):
        u = _load_rows(u_high + values_at, rows_ok, H * V, start, V, BM, BV)
        d_error = _load_rows(d_error_high + values_at, rows_ok, H * V, start, V, BM, BV)
        d_out = _load_rows(d_o + outs_at, tokens_ok, H * V, start, V, BC, BV)
        between_keys = tl.dot(d_error, tl.trans(u), between_keys, input_precision=PRECISION)
        to_queries = tl.dot(d_out, tl.trans(u), to_queries, input_precision=PRECISION)
        if SPLIT:
            low = _load_rows(u_low + values_at, rows_ok, H * V, start, V, BM, BV)
            between_keys = tl.dot(d_error, tl.trans(low), between_keys, input_precision=PRECISION)
            to_queries = tl.dot(d_out, tl.trans(low), to_queries, input_precision=PRECISION)
            low = _load_rows(d_error_low + values_at, rows_ok, H * V, start, V, BM, BV)
            between_keys = tl.dot(low, tl.trans(u), between_keys, input_precision=PRECISION)

    if BD == BK:
        queries = _load_rows(q + queries_at, tokens_ok, H * K, 0, K, BC, BK)
    # Its diagonal is a sum of squares, which float32 keys take by themselves: as operands they fill the registers.
    BY_GRAM: tl.constexpr = SPLIT or DECAY
    gram, squared_norm = tl.zeros([BM, BM], tl.float32), tl.zeros([BM], tl.float32)
    for start_key in tl.static_range(0, K, BD):
        if BD < BK:
            keys = _load_rows(k + keys_at, rows_ok, H * K, start_key, K, BM, BD)
        if BY_GRAM:
            gram = tl.dot(keys, tl.trans(keys), gram, input_precision=PRECISION)
        else:
            squared_norm += tl.sum(keys * keys, axis=1)

    # On the diagonal d_error . u = beta^2 (gradient of beta), where beta is the factor of k k^T.
    i, j = row[:, None], row[None, :]
    seen = j < (token * N + N)[:, None] if N > 1 else i >= j
    scaled = clamped_beta(tl.load(beta + first * N * H + h + row * H, mask=rows_ok, other=0.0).to(tl.float32))
    d_scaled = tl.sum(tl.where(i == j, between_keys, 0.0), axis=1)
    if NORMALIZE:
        if BY_GRAM:
            squared_norm = tl.sum(tl.where(i == j, gram, 0.0), axis=1)
        directed = squared_norm > SHORTEST
        inverse_norm = tl.where(directed, 1 / tl.where(directed, squared_norm, 1.0), 0.0)
        scaled = tl.where(directed, scaled * inverse_norm, TINY)
        d_scaled *= inverse_norm
    d_scaled = d_scaled / scaled / scaled
    tl.store(d_beta + first * N * H + h + row * H, d_scaled, mask=rows_ok)
    if DECAY:
        a = decays_of_rows(decay + first * H + h, row, tokens_left, H, N, TINY)
        m, exponent = _products(a)
        if N == 1:
            token_m, token_exponent = m, exponent
        else:
            token_m, token_exponent = _products(decays_of_rows(decay + first * H + h, token, tokens_left, H, 1, TINY))
        between_keys *= _quotients(m, exponent, m, exponent, i > j)
        to_queries *= _quotients(token_m, token_exponent, m, exponent, seen)
        d_into, d_into_token = m * _power(exponent), token_m * _power(token_exponent)
        d_out_of = tl.cumprod(decays_of_rows(decay + first * H + h, row + 1, tokens_left, H, N, TINY), 0, reverse=True)
    to_queries = tl.where(seen, to_queries, 0.0)
    between_keys = tl.where(i > j, -between_keys, 0.0)
    if DECAY:
        # Every product of decays times its own gradient; a decay's gradient is the sum over the products with it in
        # them, divided by it. Sums run only over such products, so that nothing large cancels.
        of_pairs = between_keys * gram
        scores = tl.zeros([BC, BM], tl.float32)
        for start_key in tl.static_range(0, K, BD):
            if BD < BK:
                keys = _load_rows(k + keys_at, rows_ok, H * K, start_key, K, BM, BD)
                queries = _load_rows(q + queries_at, tokens_ok, H * K, start_key, K, BC, BD)
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        of_queries = to_queries * scores
        later_token = token[None, :] * N >= (row // N * N)[:, None]
        if N == 1:
            spanning = dot_masks(i <= j, of_pairs + of_queries, OPERAND, SPLIT, PRECISION)
        else:
            spanning = dot_masks(i <= j, of_pairs, OPERAND, SPLIT, PRECISION)
            spanning += dot_masks(later_token, of_queries, OPERAND, SPLIT, PRECISION)
        total = tl.sum(tl.where(i > j, spanning, 0.0), axis=1)
        asks, reads, writes = tl.zeros([BC], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    both = between_keys + tl.trans(between_keys)
    if NORMALIZE:
        both = tl.where(i == j, (-2 * scaled * d_scaled)[:, None], both)
    if SPLIT:
        both_high, both_low = halves(both, OPERAND)
        query_high, query_low = halves(to_queries, OPERAND)
    else:
        both_high, query_high = both, to_queries

    # It is 0, which the compiler does not know: else it keeps the addresses of the loop above in registers until they
    # are used again below, and with decays what is loaded again for the sums.
    nothing = 16 * tl.minimum(tokens_left, 0)
    # With one tile of keys and of values d_q is stored later, in the loop of d_k (which has to know the name): up to
    # there the states are loaded once for both.
    AT_ONCE: tl.constexpr = BD < BK or V > BV
    d_queries = tl.zeros([BC, BD], tl.float32)
    for start_key in range(0, K, BD):
        if BD < BK:
            keys = _load_rows(k + keys_at, rows_ok, H * K, start_key, K, BM, BD)
        if DECAY:
            # What products take from shared memory would else stay in registers for the sums as well.
            again = _load_rows(q + queries_at + nothing, tokens_ok, H * K, start_key, K, BC, BD)
        d_queries = tl.zeros([BC, BD], tl.float32)
        for start in range(0, V, BV):
            d_out = _load_rows(d_o + outs_at + nothing, tokens_ok, H * V, start, V, BC, BV)
            state = _load_state(starts + state_at, start, start_key, K, V, BD, BV)
            d_queries = tl.dot(d_out, state, d_queries, input_precision=PRECISION)
            if HIGH:
                low = _load_state(starts_low + state_at, start, start_key, K, V, BD, BV)
                d_queries = tl.dot(d_out, low, d_queries, input_precision=PRECISION)
        if DECAY:
            d_queries *= d_into_token[:, None]
            asks += tl.sum(d_queries * again.to(tl.float32), axis=1)
        if SPLIT:
            d_queries = tl.dot(query_low, keys, d_queries, input_precision=PRECISION)
        d_queries = tl.dot(query_high, keys, d_queries, input_precision=PRECISION)
        if AT_ONCE:
            store_tile(d_q + queries_at, d_queries, tokens_ok, H * K, start_key, K, BC, BD)

    # A loop of its own: in one with d_q the assemblers of CUDA 12.8 to 13.1 let the first trip overwrite registers with
    # which the second one multiplies.
    for start_key in range(0, K, BD):
        if BD < BK:
            keys = _load_rows(k + keys_at, rows_ok, H * K, start_key, K, BM, BD)
            queries = _load_rows(q + queries_at, tokens_ok, H * K, start_key, K, BC, BD)
        if DECAY:
            again = _load_rows(k + keys_at + nothing, rows_ok, H * K, start_key, K, BM, BD)
        d_keys = tl.zeros([BM, BD], tl.float32)
        for start in range(0, V, BV):
            d_error = _load_rows(d_error_high + values_at + nothing, rows_ok, H * V, start, V, BM, BV)
            state = _load_state(starts + state_at, start, start_key, K, V, BD, BV)
            d_keys = tl.dot(d_error, state, d_keys, input_precision=PRECISION)
            if HIGH:
                low = _load_rows(d_error_low + values_at + nothing, rows_ok, H * V, start, V, BM, BV)
                d_keys = tl.dot(low, state, d_keys, input_precision=PRECISION)
                low = _load_state(starts_low + state_at, start, start_key, K, V, BD, BV)
                d_keys = tl.dot(d_error, low, d_keys, input_precision=PRECISION)
        if not AT_ONCE:
            store_tile(d_q + queries_at, d_queries, tokens_ok, H * K, start_key, K, BC, BD)
        if DECAY:
            d_keys *= -d_into[:, None]
            reads += tl.sum(d_keys * again.to(tl.float32), axis=1)
        else:
            d_keys = -d_keys
        if SPLIT:
            d_keys = tl.dot(both_low, keys, d_keys, input_precision=PRECISION)
        d_keys = tl.dot(both_high, keys, d_keys, input_precision=PRECISION)
        if HIGH:
            d_keys = tl.dot(tl.trans(query_low), queries, d_keys, input_precision=PRECISION)
        d_keys = tl.dot(tl.trans(query_high), queries, d_keys, input_precision=PRECISION)
        if DECAY:
            again = _load_rows(k + keys_at + 2 * nothing, rows_ok, H * K, start_key, K, BM, BD)
        written = tl.zeros([BM, BD], tl.float32) if DECAY else d_keys
        for start in range(0, V, BV):
            u = _load_rows(u_high + values_at + nothing, rows_ok, H * V, start, V, BM, BV)
            d_end = _load_state(d_ends + state_at, start, start_key, K, V, BD, BV)
            written = tl.dot(u, d_end, written, input_precision=PRECISION)
            if HIGH:
                low = _load_rows(u_low + values_at + nothing, rows_ok, H * V, start, V, BM, BV)
                written = tl.dot(low, d_end, written, input_precision=PRECISION)
                end_low = _load_state(d_ends_low + state_at, start, start_key, K, V, BD, BV)
                written = tl.dot(u, end_low, written, input_precision=PRECISION)
        if DECAY:
            written *= d_out_of[:, None]
            writes += tl.sum(written * again.to(tl.float32), axis=1)
            written += d_keys
        store_tile(d_k + keys_at, written, rows_ok, H * K, start_key, K, BM, BD)
    if DECAY:
        both_ends = _overlap(
            starts + state_at, starts_low + state_at if HIGH else None, d_ends + state_at,
            d_ends_low + state_at if HIGH else None, K, V, BD, min(BV, 64), HIGH, PRECISION,
        )  # fmt: skip
        # What passes through the whole chunk counts as read at its end.
        reads += tl.where(row == BM - 1, d_into * both_ends, 0.0)
        if N == 1:
            reads += asks
        else:
            total += tl.sum(tl.where(later_token, asks[None, :], 0.0), axis=1)
        total += tl.sum(tl.where(i > j, writes[None, :], reads[None, :]), axis=1)
        tl.store(d_decay + first * H + h + (row // N) * H, total / a, mask=(row % N == 0) & rows_ok)
