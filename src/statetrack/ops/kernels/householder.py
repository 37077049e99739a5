"""Triton kernels for products of generalized Householder matrices; `docs/kernels.md` derives them.

Letters: a chunk has C tokens of N micro-steps each, m = C N of them, in tiles of BC and BM rows. All tensors are
contiguous; the states lie transposed, [V, K], so that a state in registers is the left operand of every product and
never goes through shared memory on the serial path.

Precision. With SPLIT the keys, queries and output gradients are bfloat16, exact operands of the tensor cores, and each
float32 number that the recurrence feeds back into itself is a sum of two bfloat16 numbers, high and low, 16 bits in
all. Without it all operands are float32 and the products tf32x3. Plain bfloat16 is used only where an error ends in one
output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.transition import SHORTEST_KEY

# Stands for a beta or, in the backward, a decay of exactly 0: it moves no result by more than the rounding, and lets
# the gradient divide. The square is still a normal float32.
_TINY = tl.constexpr(2.0**-40)
# Up to this |k|^2 a normalized key counts as 0.
_SHORTEST = tl.constexpr(SHORTEST_KEY**2)


@triton.jit
def _halves(x, dtype: tl.constexpr):
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def dot_precise(a, b, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a b for float32 tiles, to 16 bits with SPLIT."""
    if SPLIT:
        a_high, a_low = _halves(a, OPERAND)
        b_high, b_low = _halves(b, OPERAND)
        c = tl.dot(a_high, b_low, input_precision=PRECISION)
        c = tl.dot(a_low, b_high, c, input_precision=PRECISION)
        return tl.dot(a_high, b_high, c, input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_masks(mask, x, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """mask x for a mask of zeros and ones and a float32 tile."""
    if SPLIT:
        high, low = _halves(x, OPERAND)
        c = tl.dot(mask.to(OPERAND), low, input_precision=PRECISION)
        return tl.dot(mask.to(OPERAND), high, c, input_precision=PRECISION)
    return tl.dot(mask.to(tl.float32), x, input_precision=PRECISION)


@triton.jit
def _load_rows(pointer, rows_ok, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [ROWS, BLOCK] of rows of WIDTH contiguous numbers, zero outside."""
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, BLOCK)[None, :]
    if WIDTH == BLOCK:
        return tl.load(pointer + offsets, mask=rows_ok[:, None], other=0.0)
    return tl.load(pointer + offsets, mask=rows_ok[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, x, rows_ok, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, BLOCK)[None, :]
    ok = rows_ok[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=ok)


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


@triton.jit
def _clamped_beta(beta):
    return tl.where(tl.abs(beta) < _TINY, _TINY, beta)


@triton.jit
def _decays(decay, tokens_left, H, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr):
    """Products of decays, from the decay of the chunk's first token on.

    Returns, with D(i, j) the product of the decays after micro-step j up to micro-step i: the decays of the micro-steps
    [BM], D(i, j) [BM, BM] (1 for i <= j), D(end of token t, j) [BC, BM], D(i, start) [BM], D(end of t, start) [BC],
    D(end, j) [BM] and D(end, start). Unless EXACT, _TINY stands for 0.
    """
    row, token = tl.arange(0, BM), tl.arange(0, BC)
    starts = (row % N == 0) & (row // N < tokens_left)
    a = tl.load(decay + (row // N) * H, mask=starts, other=1.0).to(tl.float32)
    of_token = tl.load(decay + token * H, mask=token < tokens_left, other=1.0).to(tl.float32)
    if not EXACT:
        a = tl.where(a == 0, _TINY, a)
        of_token = tl.where(of_token == 0, _TINY, of_token)
    pairs = tl.cumprod(tl.where(row[:, None] > row[None, :], a[:, None], 1.0), axis=0)
    if N == 1:
        to_token = pairs
    else:
        to_token = tl.cumprod(tl.where((token * N)[:, None] > row[None, :], of_token[:, None], 1.0), axis=0)
    into = tl.cumprod(a, axis=0)
    into_token = tl.cumprod(of_token, axis=0)
    out_of = tl.sum(tl.where((row == BM - 1)[:, None], pairs, 0.0), axis=0)
    across = tl.sum(tl.where(row == BM - 1, into, 0.0), axis=0)
    return a, pairs, to_token, into, into_token, out_of, across


@triton.jit(do_not_specialize=["T", "chunks"])
def prepare(
    q, k, beta, decay, inverse_high, inverse_low, attention, into, into_token, out_of,
    T, H, chunks,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    BASE: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
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
    keys = _load_rows(k + (first * N * H + h) * K, rows_ok, H * K, BM, K, BK)
    queries = _load_rows(q + (first * H + h) * K, token < tokens_left, H * K, BC, K, BK)
    strength = _clamped_beta(tl.load(beta + first * N * H + h + row * H, mask=rows_ok, other=0.0).to(tl.float32))

    i, j = row[:, None], row[None, :]
    place = head * chunks + chunk
    seen = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    seen = tl.where(row[None, :] < (token * N + N)[:, None], seen, 0.0)
    if DECAY:
        _, d_pairs, d_token, d_into, d_into_token, d_out_of, _ = _decays(
            decay + first * H + h, tokens_left, H, N, BM, BC, True
        )
        seen *= d_token
        tl.store(into + place * BM + row, d_into)
        tl.store(out_of + place * BM + row, d_out_of)
        tl.store(into_token + place * BC + token, d_into_token)
    # Stored at once: its registers are wanted for the inverse.
    tl.store(attention + place * BC * BM + token[:, None] * BM + j, seen.to(OPERAND))

    gram = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    squared_norm = tl.sum(tl.where(i == j, gram, 0.0), axis=1)
    directed = squared_norm > (_SHORTEST if NORMALIZE else 0.0)
    divisor = tl.where(directed, squared_norm, 1.0)
    scaled = strength
    if NORMALIZE:
        scaled = tl.where(directed, strength / divisor, _TINY)
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
        high, low = _halves(inverse, OPERAND)
        tl.store(inverse_high + tile, high)
        tl.store(inverse_low + tile, low)
    else:
        tl.store(inverse_high + tile, inverse)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "segment_chunks"])
def scan_forward(
    q, k, v, inverse_high, inverse_low, attention, into, into_token, out_of, initial,
    o, final, starts, u_high, u_low,
    T, H, chunks, segments, segment_chunks,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, MODE: tl.constexpr, DECAY: tl.constexpr, SAVE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
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
    segment = tl.program_id(0).to(tl.int64)
    head = segment // segments
    b, h = head // H, head % H
    row, token, key = tl.arange(0, BM), tl.arange(0, BC), tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    state_ok = value_ok[:, None] & (key < K)[None, :]
    state = tl.zeros([BV, BK], tl.float32)
    if MODE == 3:
        state += tl.where(value[:, None] == key[None, :], 1.0, 0.0)
    elif MODE == 1:
        state += tl.load(initial + segment * K * V + value[:, None] * K + key[None, :], mask=state_ok, other=0.0)
    elif INITIAL and MODE == 0:
        state += tl.load(initial + head * K * V + value[:, None] + key[None, :] * V, mask=state_ok, other=0.0)
    begin = (segment % segments).to(tl.int32) * segment_chunks
    for chunk in range(begin, tl.minimum(begin + segment_chunks, chunks)):
        tokens_left = tl.minimum(T - chunk * C, C)
        rows_ok, tokens_ok = row < tokens_left * N, token < tokens_left
        first = b * T + chunk * C
        place = head * chunks + chunk
        keys = _load_rows(k + (first * N * H + h) * K, rows_ok, H * K, BM, K, BK)
        values_at = (first * N * H + h) * V + value[:, None] + row[None, :] * (H * V)
        if MODE < 3:
            values = tl.load(v + values_at, mask=value_ok[:, None] & rows_ok[None, :], other=0.0).to(tl.float32)
        tile = place * BM * BM + row[:, None] * BM + row[None, :]
        t_high = tl.load(inverse_high + tile)
        if MODE < 2:
            queries = _load_rows(q + (first * H + h) * K, tokens_ok, H * K, BC, K, BK)
            seen = tl.load(attention + place * BC * BM + token[:, None] * BM + row[None, :])

        if SPLIT:
            high, low = _halves(state, OPERAND)
        else:
            high, low = state, state
        if SAVE:
            tl.store(starts + place * K * V + value[:, None] * K + key[None, :], high, mask=state_ok)
        read = tl.dot(high, tl.trans(keys), input_precision=PRECISION)
        if SPLIT:
            read = tl.dot(low, tl.trans(keys), read, input_precision=PRECISION)
        if DECAY:
            read *= tl.load(into + place * BM + row)[None, :]
        error = -read
        if MODE < 3:
            error += values
        if SPLIT:
            t_low = tl.load(inverse_low + tile)
            e_high, e_low = _halves(error, OPERAND)
            u = tl.dot(e_high, tl.trans(t_low), input_precision=PRECISION)
            u = tl.dot(e_low, tl.trans(t_high), u, input_precision=PRECISION)
            u = tl.dot(e_high, tl.trans(t_high), u, input_precision=PRECISION)
            w_high, w_low = _halves(u, OPERAND)
        else:
            u = tl.dot(error, tl.trans(t_high), input_precision=PRECISION)
            w_high, w_low = u, u
        if SAVE:
            values_ok = value_ok[:, None] & rows_ok[None, :]
            tl.store(u_high + values_at, w_high, mask=values_ok)
            if SPLIT:
                tl.store(u_low + values_at, w_low, mask=values_ok)
        if MODE < 2:
            out = tl.dot(high, tl.trans(queries), input_precision=PRECISION)
            if DECAY:
                out *= tl.load(into_token + place * BC + token)[None, :]
            out = tl.dot(w_high, tl.trans(seen), out, input_precision=PRECISION)
            if SPLIT:
                out = tl.dot(w_low, tl.trans(seen), out, input_precision=PRECISION)
            out_at = (first * H + h) * V + value[:, None] + token[None, :] * (H * V)
            tl.store(o + out_at, out.to(o.dtype.element_ty), mask=value_ok[:, None] & tokens_ok[None, :])
        if DECAY:
            state *= tl.load(into + place * BM + BM - 1)
            u *= tl.load(out_of + place * BM + row)[None, :]
            if SPLIT:
                w_high, w_low = _halves(u, OPERAND)
            else:
                w_high, w_low = u, u
        state = tl.dot(w_high, keys, state, input_precision=PRECISION)
        if SPLIT:
            state = tl.dot(w_low, keys, state, input_precision=PRECISION)
    if MODE >= 2:
        tl.store(final + segment * K * V + value[:, None] * K + key[None, :], state, mask=state_ok)
    elif segment % segments == segments - 1:
        tl.store(final + head * K * V + value[:, None] + key[None, :] * V, state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "segment_chunks"])
def scan_backward(
    q, k, inverse_high, inverse_low, attention, into, into_token, out_of, d_o, d_final,
    d_error_high, d_error_low, d_ends, d_initial,
    T, H, chunks, segments, segment_chunks,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MODE: tl.constexpr, DECAY: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradients of the values, of every chunk's last state and the first state.

    Segments and MODE as in `scan_forward`: 1 takes `d_final` for every segment, 2 gives only `d_initial` for each.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    segment = tl.program_id(0).to(tl.int64)
    head = segment // segments
    b, h = head // H, head % H
    row, token, key = tl.arange(0, BM), tl.arange(0, BC), tl.arange(0, BK)
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
    begin = (segment % segments).to(tl.int32) * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)
    for step in range(end - begin):
        chunk = end - 1 - step
        tokens_left = tl.minimum(T - chunk * C, C)
        rows_ok, tokens_ok = row < tokens_left * N, token < tokens_left
        first = b * T + chunk * C
        place = head * chunks + chunk
        keys = _load_rows(k + (first * N * H + h) * K, rows_ok, H * K, BM, K, BK)
        queries = _load_rows(q + (first * H + h) * K, tokens_ok, H * K, BC, K, BK)
        out_at = (first * H + h) * V + value[:, None] + token[None, :] * (H * V)
        d_out = tl.load(d_o + out_at, mask=value_ok[:, None] & tokens_ok[None, :], other=0.0)
        tile = place * BM * BM + row[:, None] * BM + row[None, :]
        t_high = tl.load(inverse_high + tile)
        seen = tl.load(attention + place * BC * BM + token[:, None] * BM + row[None, :])

        if SPLIT:
            high, low = _halves(d_state, OPERAND)
        else:
            high, low = d_state, d_state
        if MODE < 2:
            tl.store(d_ends + place * K * V + value[:, None] * K + key[None, :], high, mask=state_ok)
        d_u = tl.dot(high, tl.trans(keys), input_precision=PRECISION)
        if SPLIT:
            d_u = tl.dot(low, tl.trans(keys), d_u, input_precision=PRECISION)
        if DECAY:
            d_u *= tl.load(out_of + place * BM + row)[None, :]
        d_u = tl.dot(d_out, seen, d_u, input_precision=PRECISION)
        if SPLIT:
            t_low = tl.load(inverse_low + tile)
            high, low = _halves(d_u, OPERAND)
            d_error = tl.dot(high, t_low, input_precision=PRECISION)
            d_error = tl.dot(low, t_high, d_error, input_precision=PRECISION)
            d_error = tl.dot(high, t_high, d_error, input_precision=PRECISION)
            w_high, w_low = _halves(d_error, OPERAND)
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
            d_state *= tl.load(into + place * BM + BM - 1)
            d_out = (d_out.to(tl.float32) * tl.load(into_token + place * BC + token)[None, :]).to(OPERAND)
            d_error *= tl.load(into + place * BM + row)[None, :]
        d_state = tl.dot(d_out, queries, d_state, input_precision=PRECISION)
        if SPLIT:
            w_high, w_low = _halves(-d_error, OPERAND)
            d_state = tl.dot(w_high, keys, d_state, input_precision=PRECISION)
            d_state = tl.dot(w_low, keys, d_state, input_precision=PRECISION)
        else:
            d_state = tl.dot(-d_error, keys, d_state, input_precision=PRECISION)
    if MODE == 2:
        tl.store(d_initial + segment_at, d_state, mask=state_ok)
    elif segment % segments == 0:
        tl.store(d_initial + state_at, d_state, mask=state_ok)


@triton.jit(do_not_specialize=["segments"])
def join_segments(
    maps, ends, border, borders,
    segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BORDER: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states between segments, in `borders` [rows, segments, V, K]: H <- A_s H + B_s, or backwards with A_s^T.

    `maps` are the A_s^T [rows, segments, K, K], `ends` the B_s^T [rows, segments, V, K], `border` [rows, K, V] is the
    state before the first (REVERSE: after the last) segment.
    """
    head = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    ok = (value < V)[:, None] & (key < K)[None, :]
    map_ok = (key < K)[:, None] & (key < K)[None, :]
    state = tl.zeros([BV, BK], tl.float32)
    if BORDER:
        state += tl.load(border + head * K * V + value[:, None] + key[None, :] * V, mask=ok, other=0.0)
    for step in range(segments):
        place = head * segments + step
        if REVERSE:
            place = head * segments + segments - 1 - step
        at = place * K * V + value[:, None] * K + key[None, :]
        tl.store(borders + at, state, mask=ok)
        across = tl.load(maps + place * K * K + key[:, None] * K + key[None, :], mask=map_ok, other=0.0)
        if REVERSE:
            across = tl.trans(across)
        state = tl.load(ends + at, mask=ok, other=0.0) + tl.dot(state, across, input_precision="tf32x3")


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients(
    q, k, beta, decay, starts, u_high, u_low, d_o, d_error_high, d_error_low, d_ends,
    d_q, d_k, d_beta, d_decay,
    T, H, chunks,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For every chunk by itself the gradients of q, k, beta and the decays, from what the two scans have left."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    b, h = head // H, head % H
    row, token, key = tl.arange(0, BM), tl.arange(0, BC), tl.arange(0, BK)
    tokens_left = tl.minimum(T - chunk * C, C)
    rows_ok, tokens_ok = row < tokens_left * N, token < tokens_left
    first = b * T + chunk * C
    place = head * chunks + chunk
    key_rows = (first * N * H + h) * K
    keys = _load_rows(k + key_rows, rows_ok, H * K, BM, K, BK)
    squared_norm = tl.sum(keys.to(tl.float32) * keys.to(tl.float32), axis=1)
    directed = squared_norm > _SHORTEST
    inverse_norm = tl.where(directed, 1 / tl.where(directed, squared_norm, 1.0), 0.0)
    scaled = _clamped_beta(tl.load(beta + first * N * H + h + row * H, mask=rows_ok, other=0.0).to(tl.float32))
    if NORMALIZE:
        scaled = tl.where(directed, scaled * inverse_norm, _TINY)

    values_at = (first * N * H + h) * V + row[:, None] * (H * V)
    outs_at = (first * H + h) * V + token[:, None] * (H * V)
    states_at = place * K * V + key[None, :]

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
    queries = _load_rows(q + (first * H + h) * K, tokens_ok, H * K, BC, K, BK)
    later_token = token[None, :] * N >= (row // N * N)[:, None]
    total = tl.zeros([BM], tl.float32)
    if DECAY:
        a, d_pairs, d_token, d_into, d_into_token, d_out_of, across = _decays(
            decay + first * H + h, tokens_left, H, N, BM, BC, False
        )
        between_keys *= d_pairs
        to_queries *= d_token
        # Every product of decays times its own gradient; a decay's gradient is the sum over the products with it in
        # them, divided by it. Sums run only over such products, so that nothing large cancels.
        of_pairs = between_keys * tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        of_queries = to_queries * tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if N == 1:
            spanning = dot_masks(i <= j, of_pairs + of_queries, OPERAND, SPLIT, PRECISION)
        else:
            spanning = dot_masks(i <= j, of_pairs, OPERAND, SPLIT, PRECISION)
            spanning += dot_masks(later_token, of_queries, OPERAND, SPLIT, PRECISION)
        total += tl.sum(tl.where(i > j, spanning, 0.0), axis=1)

    d_queries = tl.zeros([BC, BK], tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        d_out = tl.load(d_o + outs_at + value[None, :], mask=tokens_ok[:, None] & (value < V)[None, :], other=0.0)
        states_ok = (value < V)[:, None] & (key < K)[None, :]
        state = tl.load(starts + states_at + value[:, None] * K, mask=states_ok, other=0.0)
        d_queries = tl.dot(d_out, state, d_queries, input_precision=PRECISION)
    if DECAY:
        d_queries *= d_into_token[:, None]
        asks = tl.sum(d_queries * queries.to(tl.float32), axis=1)
        total += tl.sum(tl.where(later_token, asks[None, :], 0.0), axis=1)
    if SPLIT:
        query_high, low = _halves(to_queries, OPERAND)
        d_queries = tl.dot(low, keys, d_queries, input_precision=PRECISION)
    else:
        query_high = to_queries
    d_queries = tl.dot(query_high, keys, d_queries, input_precision=PRECISION)
    _store_rows(d_q + (first * H + h) * K, d_queries, tokens_ok, H * K, BC, K, BK)

    d_keys = tl.zeros([BM, BK], tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        ok = rows_ok[:, None] & (value < V)[None, :]
        d_error = tl.load(d_error_high + values_at + value[None, :], mask=ok, other=0.0)
        states_ok = (value < V)[:, None] & (key < K)[None, :]
        state = tl.load(starts + states_at + value[:, None] * K, mask=states_ok, other=0.0)
        d_keys = tl.dot(d_error, state, d_keys, input_precision=PRECISION)
    d_keys = -d_keys
    if DECAY:
        d_keys *= d_into[:, None]
        reads = tl.sum(d_keys * keys.to(tl.float32), axis=1)
        total += tl.sum(tl.where(i <= j, reads[None, :], 0.0), axis=1)
        d_reading = d_keys
        d_keys = tl.zeros([BM, BK], tl.float32)
    d_across = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        ok = rows_ok[:, None] & (value < V)[None, :]
        u = tl.load(u_high + values_at + value[None, :], mask=ok, other=0.0)
        states_ok = (value < V)[:, None] & (key < K)[None, :]
        d_end = tl.load(d_ends + states_at + value[:, None] * K, mask=states_ok, other=0.0)
        d_keys = tl.dot(u, d_end, d_keys, input_precision=PRECISION)
        if DECAY:
            state = tl.load(starts + states_at + value[:, None] * K, mask=states_ok, other=0.0)
            d_across += tl.sum(state.to(tl.float32) * d_end.to(tl.float32), axis=0)
    if DECAY:
        d_keys *= d_out_of[:, None]
        writes = tl.sum(d_keys * keys.to(tl.float32), axis=1)
        total += tl.sum(tl.where(i > j, writes[None, :], 0.0), axis=1)
        total += across * tl.sum(d_across, axis=0)
        starts_token = (row % N == 0) & rows_ok
        tl.store(d_decay + first * H + h + (row // N) * H, total / a, mask=starts_token)
        d_keys += d_reading
    both = between_keys + tl.trans(between_keys)
    if NORMALIZE:
        both = tl.where(i == j, (-2 * scaled * d_scaled)[:, None], both)
    if SPLIT:
        high, low = _halves(both, OPERAND)
        d_keys = tl.dot(low, keys, d_keys, input_precision=PRECISION)
    else:
        high = both
    d_keys = tl.dot(high, keys, d_keys, input_precision=PRECISION)
    d_keys = tl.dot(tl.trans(query_high), queries, d_keys, input_precision=PRECISION)
    _store_rows(d_k + key_rows, d_keys, rows_ok, H * K, BM, K, BK)


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
                directed = squared_norm > _SHORTEST
                strength = tl.where(directed, strength / tl.where(directed, squared_norm, 1.0), 0.0)
            error = values - tl.sum(keys[:, None] * state, axis=0)
            state += keys[:, None] * (strength * error)[None, :]
        place = (b * T + t) * H + h
        queries = tl.load(q + place * K + key, mask=key_ok, other=0.0).to(tl.float32)
        out = tl.sum(queries[:, None] * state, axis=0)
        tl.store(o + place * V + value, out.to(o.dtype.element_ty), mask=value_ok)
    tl.store(final + state_at, state, mask=state_ok)
