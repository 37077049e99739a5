"""Triton kernels for products of generalized Householder matrices; `docs/kernels.md` derives them.

Letters: a chunk has C tokens of N micro-steps each, m = C N of them, in tiles of BC and BM rows. All tensors are
contiguous; the states lie transposed, [V, K], so that a state in registers is the left operand of every product and
never goes through shared memory on the serial path.

Precision. With SPLIT the keys, queries and output gradients are bfloat16, exact operands of the tensor cores, and each
float32 number that the recurrence feeds back into itself is a sum of two bfloat16 numbers, high and low, 16 bits in
all. Without it all operands are float32 and the products tf32x3. Plain bfloat16 is used only where an error ends in one
output, and with HIGH not there either: what is named *_low is then read and written, else it is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.products import halves, unit_triangular_inverse
from statetrack.ops.kernels.tiles import TINY, load_tile, not_below
from statetrack.transition import SHORTEST_KEY

# Up to this |k|^2 a normalized key counts as 0.
SHORTEST = tl.constexpr(SHORTEST_KEY**2)


@triton.jit
def load_rows(pointer, rows_ok, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [ROWS, BLOCK] of rows of WIDTH contiguous numbers, zero outside."""
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, BLOCK)[None, :]
    if WIDTH == BLOCK:
        return tl.load(pointer + offsets, mask=rows_ok[:, None], other=0.0)
    return tl.load(pointer + offsets, mask=rows_ok[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :], other=0.0)


@triton.jit
def load_pieces(
    pointer, rows_ok, row_stride, ROWS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Rows of K numbers: a tuple of tiles [ROWS, BD]."""
    if BD == BK:
        return (load_rows(pointer, rows_ok, row_stride, ROWS, K, BK),)
    pieces = ()
    for start in tl.static_range(0, K, BD):
        pieces = pieces + (load_tile(pointer, rows_ok, row_stride, start, K, ROWS, BD),)
    return pieces


@triton.jit
def store_keys(pointer, x, value, value_ok, start: tl.constexpr, K: tl.constexpr, BD: tl.constexpr):
    """Into rows of K numbers the BD from `start` on."""
    key = start + tl.arange(0, BD)
    tl.store(pointer + value[:, None] * K + key[None, :], x, mask=value_ok[:, None] & (key < K)[None, :])


@triton.jit
def clamped_beta(beta):
    return tl.where(tl.abs(beta) < TINY, TINY, beta)


@triton.jit
def _decays(decay, tokens_left, H, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Products of decays, from the decay of the chunk's first token on.

    Returns, with D(i, j) the product of the decays after micro-step j up to micro-step i: D(i, j) [BM, BM] (1 for
    i <= j), D(end of token t, j) [BC, BM], D(i, start) [BM], D(end of t, start) [BC], and D(end, j) [BM].
    """
    row, token = tl.arange(0, BM), tl.arange(0, BC)
    a = decays_of_rows(decay, row, tokens_left, H, N, 0)
    pairs = tl.cumprod(tl.where(row[:, None] > row[None, :], a[:, None], 1.0), axis=0)
    into = tl.cumprod(a, axis=0)
    if N == 1:
        to_token, into_token = pairs, into
    else:
        of_token = tl.load(decay + token * H, mask=token < tokens_left, other=1.0).to(tl.float32)
        to_token = tl.cumprod(tl.where((token * N)[:, None] > row[None, :], of_token[:, None], 1.0), axis=0)
        into_token = tl.cumprod(of_token, axis=0)
    out_of = tl.cumprod(decays_of_rows(decay, row + 1, tokens_left, H, N, 0), axis=0, reverse=True)
    return pairs, to_token, into, into_token, out_of


@triton.jit
def decays_of_rows(decay, row, tokens_left, H, N: tl.constexpr, LEAST: tl.constexpr):
    """Each token's decay at its first micro-step, and 1 elsewhere. LEAST as in `not_below`."""
    starts = (row % N == 0) & (row // N < tokens_left)
    return not_below(tl.load(decay + (row // N) * H, mask=starts, other=1.0).to(tl.float32), LEAST)


@triton.jit(do_not_specialize=["T", "chunks"])
def prepare(
    q, k, beta, decay, inverse_high, inverse_low, attention, attention_low, into, into_token, out_of,
    T, H, chunks,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    BASE: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk what does not depend on the state: the inverse times beta, and the products of queries and keys.

    With W(i, j) = D(i, j) k_i . k_j below the diagonal: (I + diag(beta) W)^-1 diag(beta), [chunk, BM, BM], in two
    halves with SPLIT. A micro-step's strength beta |k|^2 is multiplied by k_i . k_j / |k_i|^2, which is exactly 1 where
    a key repeats.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    b, h = head // H, head % H
    row, token = tl.arange(0, BM), tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * C, C)
    rows_ok = row < tokens_left * N
    first = b * T + chunk * C
    keys = load_rows(k + (first * N * H + h) * K, rows_ok, H * K, BM, K, BK)
    queries = load_rows(q + (first * H + h) * K, token < tokens_left, H * K, BC, K, BK)
    strength = clamped_beta(tl.load(beta + first * N * H + h + row * H, mask=rows_ok, other=0.0).to(tl.float32))

    i, j = row[:, None], row[None, :]
    place = head * chunks + chunk
    seen = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    seen = tl.where(row[None, :] < (token * N + N)[:, None], seen, 0.0)
    if DECAY:
        d_pairs, d_token, d_into, d_into_token, d_out_of = _decays(decay + first * H + h, tokens_left, H, N, BM, BC)
        seen *= d_token
        tl.store(into + place * BM + row, d_into)
        tl.store(out_of + place * BM + row, d_out_of)
        tl.store(into_token + place * BC + token, d_into_token)
    # Stored at once: its registers are wanted for the inverse.
    tl.store(attention + place * BC * BM + token[:, None] * BM + j, seen.to(OPERAND))
    if HIGH:
        _, seen_low = halves(seen, OPERAND)
        tl.store(attention_low + place * BC * BM + token[:, None] * BM + j, seen_low)

    gram = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    squared_norm = tl.sum(tl.where(i == j, gram, 0.0), axis=1)
    directed = squared_norm > (SHORTEST if NORMALIZE else 0.0)
    divisor = tl.where(directed, squared_norm, 1.0)
    scaled = strength
    if NORMALIZE:
        scaled = tl.where(directed, strength / divisor, TINY)
    else:
        strength = strength * squared_norm
    system = tl.where(i > j, gram / divisor[:, None] * strength[:, None], 0.0)
    if DECAY:
        system *= d_pairs
    inverse = unit_triangular_inverse(system, BM, BASE, OPERAND, SPLIT, PRECISION)
    # `scaled` belongs to the columns; a reduction gives it the layout of a row.
    inverse *= tl.sum(tl.where(i == j, scaled[:, None], 0.0), axis=0)[None, :]
    tile = place * BM * BM + i * BM + j
    if SPLIT:
        high, low = halves(inverse, OPERAND)
        tl.store(inverse_high + tile, high)
        tl.store(inverse_low + tile, low)
    else:
        tl.store(inverse_high + tile, inverse)


@triton.jit
def _ask(
    states, queries,
    BV: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr,
    OPERAND: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries read from a state in pieces, whose halves are made once more: all at once they need too many
    registers to be kept."""
    out = tl.zeros([BV, BC], tl.float32)
    for part in tl.static_range(PIECES):
        high = states[part].to(OPERAND)
        out = tl.dot(high, tl.trans(queries[part]), out, input_precision=PRECISION)
        if HIGH:
            low = (states[part] - high.to(tl.float32)).to(OPERAND)
            out = tl.dot(low, tl.trans(queries[part]), out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["T", "chunks", "segments", "segment_chunks"])
def scan_forward(
    q, k, v, inverse_high, inverse_low, attention, attention_low, into, into_token, out_of, initial,
    o, final, starts, starts_low, u_high, u_low,
    T, H, chunks, segments, segment_chunks,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, MODE: tl.constexpr, DECAY: tl.constexpr, SAVE: tl.constexpr,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk: outputs, the final state and, to SAVE, every chunk's first state and its u.

    Each program walks through one segment of `segment_chunks` chunks. MODE says what for:
        0: all, where `initial` and `final` are [rows, K, V] and there is one segment;
        1: all, where `initial` has a state [rows, segments, V, K] for every segment;
        2: only `final` [rows, segments, V, K], from a state of zeros;
        3: only `final` [rows, segments, K, K], the transposed product of the transitions: the identity is the first
           state and no values are written.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    PIECES: tl.constexpr = (K + BD - 1) // BD
    segment = tl.program_id(0).to(tl.int64)
    head = segment // segments
    b, h = head // H, head % H
    row, token = tl.arange(0, BM), tl.arange(0, BC)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    states = ()
    for start_key in tl.static_range(0, K, BD):
        key = start_key + tl.arange(0, BD)
        state_ok = value_ok[:, None] & (key < K)[None, :]
        state = tl.zeros([BV, BD], tl.float32)
        if MODE == 3:
            state += tl.where(value[:, None] == key[None, :], 1.0, 0.0)
        elif MODE == 1:
            state += tl.load(initial + segment * K * V + value[:, None] * K + key[None, :], mask=state_ok, other=0.0)
        elif INITIAL and MODE == 0:
            state += tl.load(initial + head * K * V + value[:, None] + key[None, :] * V, mask=state_ok, other=0.0)
        states = states + (state,)
    begin = (segment % segments).to(tl.int32) * segment_chunks
    for chunk in range(begin, tl.minimum(begin + segment_chunks, chunks)):
        tokens_left = tl.minimum(T - chunk * C, C)
        rows_ok, tokens_ok = row < tokens_left * N, token < tokens_left
        first = b * T + chunk * C
        place = head * chunks + chunk
        keys = load_pieces(k + (first * N * H + h) * K, rows_ok, H * K, BM, K, BK, BD)
        values_at = (first * N * H + h) * V + value[:, None] + row[None, :] * (H * V)
        if MODE < 3:
            values = tl.load(v + values_at, mask=value_ok[:, None] & rows_ok[None, :], other=0.0).to(tl.float32)
        tile = place * BM * BM + row[:, None] * BM + row[None, :]
        t_high = tl.load(inverse_high + tile)
        if MODE < 2:
            queries = load_pieces(q + (first * H + h) * K, tokens_ok, H * K, BC, K, BK, BD)
            seen = tl.load(attention + place * BC * BM + token[:, None] * BM + row[None, :])

        read = tl.zeros([BV, BM], tl.float32)
        for part in tl.static_range(PIECES):
            if SPLIT:
                high, low = halves(states[part], OPERAND)
            else:
                high, low = states[part], states[part]
            if SAVE:
                store_keys(starts + place * K * V, high, value, value_ok, part * BD, K, BD)
                if HIGH:
                    store_keys(starts_low + place * K * V, low, value, value_ok, part * BD, K, BD)
            read = tl.dot(high, tl.trans(keys[part]), read, input_precision=PRECISION)
            if SPLIT:
                read = tl.dot(low, tl.trans(keys[part]), read, input_precision=PRECISION)
        # With a decay already here, as u needs registers until the state has been multiplied by the decays.
        if MODE < 2 and DECAY and BD < BK:
            out = _ask(states, queries, BV, BC, PIECES, OPERAND, HIGH, PRECISION)
        if DECAY:
            read *= tl.load(into + place * BM + row)[None, :]
        error = -read
        if MODE < 3:
            error += values
        if SPLIT:
            t_low = tl.load(inverse_low + tile)
            e_high, e_low = halves(error, OPERAND)
            u = tl.dot(e_high, tl.trans(t_low), input_precision=PRECISION)
            u = tl.dot(e_low, tl.trans(t_high), u, input_precision=PRECISION)
            u = tl.dot(e_high, tl.trans(t_high), u, input_precision=PRECISION)
            w_high, w_low = halves(u, OPERAND)
        else:
            u = tl.dot(error, tl.trans(t_high), input_precision=PRECISION)
            w_high, w_low = u, u
        if SAVE:
            values_ok = value_ok[:, None] & rows_ok[None, :]
            tl.store(u_high + values_at, w_high, mask=values_ok)
            if SPLIT:
                tl.store(u_low + values_at, w_low, mask=values_ok)
        if MODE < 2:
            if BD == BK:
                out = tl.dot(high, tl.trans(queries[0]), input_precision=PRECISION)
                if HIGH:
                    out = tl.dot(low, tl.trans(queries[0]), out, input_precision=PRECISION)
            elif not DECAY:
                out = _ask(states, queries, BV, BC, PIECES, OPERAND, HIGH, PRECISION)
            if DECAY:
                out *= tl.load(into_token + place * BC + token)[None, :]
            out = tl.dot(w_high, tl.trans(seen), out, input_precision=PRECISION)
            if SPLIT:
                out = tl.dot(w_low, tl.trans(seen), out, input_precision=PRECISION)
            if HIGH:
                seen_low = tl.load(attention_low + place * BC * BM + token[:, None] * BM + row[None, :])
                out = tl.dot(w_high, tl.trans(seen_low), out, input_precision=PRECISION)
            out_at = (first * H + h) * V + value[:, None] + token[None, :] * (H * V)
            tl.store(o + out_at, out.to(o.dtype.element_ty), mask=value_ok[:, None] & tokens_ok[None, :])
        if DECAY:
            total = tl.load(into + place * BM + BM - 1)
            u *= tl.load(out_of + place * BM + row)[None, :]
            if SPLIT:
                w_high, w_low = halves(u, OPERAND)
            else:
                w_high, w_low = u, u
        before, states = states, ()
        for part in tl.static_range(PIECES):
            state = before[part]
            if DECAY:
                state *= total
            state = tl.dot(w_high, keys[part], state, input_precision=PRECISION)
            if SPLIT:
                state = tl.dot(w_low, keys[part], state, input_precision=PRECISION)
            states = states + (state,)
    for part in tl.static_range(PIECES):
        key = part * BD + tl.arange(0, BD)
        state_ok = value_ok[:, None] & (key < K)[None, :]
        if MODE >= 2:
            tl.store(final + segment * K * V + value[:, None] * K + key[None, :], states[part], mask=state_ok)
        elif segment % segments == segments - 1:
            tl.store(final + head * K * V + value[:, None] + key[None, :] * V, states[part], mask=state_ok)


@triton.jit(do_not_specialize=["T"])
def steps(
    q, k, v, beta, decay, initial, o, final,
    T, H,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, DECAY: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The recurrence itself, step by step in float32, for a few tokens: decoding."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    key = tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    key_ok, value_ok = key < K, value < V
    state_at = head * K * V + key[:, None] * V + value[None, :]
    state_ok = key_ok[:, None] & value_ok[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        state += tl.load(initial + state_at, mask=state_ok, other=0.0)
    for t in range(T):
        if DECAY:
            state *= tl.load(decay + (b * T + t) * H + h)
        for n in range(N):
            place = ((b * T + t) * N + n) * H + h
            keys = tl.load(k + place * K + key, mask=key_ok, other=0.0).to(tl.float32)
            values = tl.load(v + place * V + value, mask=value_ok, other=0.0).to(tl.float32)
            strength = tl.load(beta + place)
            if NORMALIZE:
                squared_norm = tl.sum(keys * keys, axis=0)
                directed = squared_norm > SHORTEST
                strength = tl.where(directed, strength / tl.where(directed, squared_norm, 1.0), 0.0)
            error = values - tl.sum(keys[:, None] * state, axis=0)
            state += keys[:, None] * (strength * error)[None, :]
        place = (b * T + t) * H + h
        queries = tl.load(q + place * K + key, mask=key_ok, other=0.0).to(tl.float32)
        out = tl.sum(queries[:, None] * state, axis=0)
        tl.store(o + place * V + value, out.to(o.dtype.element_ty), mask=value_ok)
    tl.store(final + state_at, state, mask=state_ok)
