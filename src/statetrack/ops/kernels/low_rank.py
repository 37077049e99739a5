"""Triton kernels for a decay for each channel minus a matrix of rank one; `docs/kernels.md` derives them.

A step is H <- diag(a) H - u (w^T H) + p v^T. A chunk has BC steps. All tensors are contiguous, and the states lie
transposed, [V, K]. All operands are float32 and their products tf32x3, because what w reads is fed back into the state.
Decays are only ever multiplied, in the backward too: 0 and negative numbers are ordinary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.tiles import load_tile


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def _scores(scores, place, ROW: tl.constexpr, COLUMN: tl.constexpr, BC: tl.constexpr):
    """Those of the rows of kind ROW (q, w) and the columns of kind COLUMN (u, p), [BC, BC]."""
    row, column = ROW * BC + tl.arange(0, BC), COLUMN * BC + tl.arange(0, BC)
    return tl.load(scores + place * 4 * BC * BC + row[:, None] * (2 * BC) + column[None, :])


@triton.jit(do_not_specialize=["T", "chunks", "numbers", "segments", "segment_chunks"])
def scan_forward(
    v, scores, x_in, y_out, across, inverse, initial, o, final, starts, written,
    T, H, chunks, numbers: tl.int64, segments, segment_chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, MODE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk: outputs, the final state and, to SAVE, every chunk's first state and what u writes, which is
    minus what w has read.

    `x_in` has the rows of q and of w, `y_out` those of u and p, `numbers` apart. Each program walks through one segment
    of `segment_chunks` chunks. MODE says what for:
        0: all, where `initial` and `final` are [rows, K, V] and there is one segment;
        1: all, where `initial` has a state [rows, segments, V, K] for every segment;
        2: only `final` [rows, segments, V, K], from a state of zeros;
        3: only `final` [rows, segments, K, K], the transposed product of the transitions: the identity is the first
           state and no values are written.
    """
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
    if MODE == 3:
        state += tl.where(value[:, None] == key[None, :], 1.0, 0.0)
    elif MODE == 1:
        state += tl.load(initial + segment_at, mask=state_ok, other=0.0)
    elif INITIAL and MODE == 0:
        state += tl.load(initial + state_at, mask=state_ok, other=0.0)
    begin = (segment % segments).to(tl.int32) * segment_chunks
    for chunk in range(begin, tl.minimum(begin + segment_chunks, chunks)):
        rows_ok = row < tl.minimum(T - chunk * BC, BC)
        first = b * T + chunk * BC
        place = head * chunks + chunk
        keys_at = (first * H + h) * K
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        if MODE < 3:
            values = tl.load(v + values_at, mask=values_ok, other=0.0).to(tl.float32)
        tile = place * BC * BC + row[:, None] * BC + row[None, :]
        if SAVE:
            at = place * K * V + value[:, None] * K + key[None, :]
            tl.store(starts + at, state.to(starts.dtype.element_ty), mask=state_ok)
        read = _dot(state, tl.trans(load_tile(x_in + numbers + keys_at, rows_ok, H * K, 0, K, BC, BK)))
        if MODE < 3:
            read += _dot(values, tl.trans(_scores(scores, place, 1, 1, BC)))
        own = -_dot(read, tl.trans(tl.load(inverse + tile)))
        if SAVE:
            tl.store(written + values_at, own, mask=values_ok)
        if MODE < 2:
            out = _dot(state, tl.trans(load_tile(x_in + keys_at, rows_ok, H * K, 0, K, BC, BK)))
            out += _dot(own, tl.trans(_scores(scores, place, 0, 0, BC)))
            out += _dot(values, tl.trans(_scores(scores, place, 0, 1, BC)))
            tl.store(o + values_at, out.to(o.dtype.element_ty), mask=values_ok)
        state *= tl.load(across + place * K + key, mask=key < K, other=0.0)[None, :]
        state += _dot(own, load_tile(y_out + keys_at, rows_ok, H * K, 0, K, BC, BK))
        if MODE < 3:
            state += _dot(values, load_tile(y_out + numbers + keys_at, rows_ok, H * K, 0, K, BC, BK))
    if MODE >= 2:
        tl.store(final + segment_at, state, mask=state_ok)
    elif segment % segments == segments - 1:
        tl.store(final + state_at, state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks", "numbers", "segments", "segment_chunks"])
def scan_backward(
    scores, x_in, y_out, across, inverse, d_o, d_final, d_v, d_read, d_ends, d_initial,
    T, H, chunks, numbers: tl.int64, segments, segment_chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradients of the values, of every chunk's last state and of the first.

    `d_read` is the gradient of what w has read. Segments and MODE as in `scan_forward`: 1 takes `d_final` for every
    segment, 2 gives only `d_initial` for each.
    """
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
    begin = (segment % segments).to(tl.int32) * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)
    for step in range(end - begin):
        chunk = end - 1 - step
        rows_ok = row < tl.minimum(T - chunk * BC, BC)
        first = b * T + chunk * BC
        place = head * chunks + chunk
        keys_at = (first * H + h) * K
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        d_out = tl.load(d_o + values_at, mask=values_ok, other=0.0).to(tl.float32)
        tile = place * BC * BC + row[:, None] * BC + row[None, :]
        if MODE < 2:
            at = place * K * V + value[:, None] * K + key[None, :]
            tl.store(d_ends + at, d_state.to(d_ends.dtype.element_ty), mask=state_ok)
        d_own = _dot(d_out, _scores(scores, place, 0, 0, BC))
        d_own += _dot(d_state, tl.trans(load_tile(y_out + keys_at, rows_ok, H * K, 0, K, BC, BK)))
        reading = -_dot(d_own, tl.load(inverse + tile))
        if MODE < 2:
            tl.store(d_read + values_at, reading, mask=values_ok)
            d_values = _dot(d_out, _scores(scores, place, 0, 1, BC)) + _dot(reading, _scores(scores, place, 1, 1, BC))
            d_values += _dot(d_state, tl.trans(load_tile(y_out + numbers + keys_at, rows_ok, H * K, 0, K, BC, BK)))
            tl.store(d_v + values_at, d_values.to(d_v.dtype.element_ty), mask=values_ok)
        d_state *= tl.load(across + place * K + key, mask=key < K, other=0.0)[None, :]
        d_state += _dot(d_out, load_tile(x_in + keys_at, rows_ok, H * K, 0, K, BC, BK))
        d_state += _dot(reading, load_tile(x_in + numbers + keys_at, rows_ok, H * K, 0, K, BC, BK))
    if MODE == 2:
        tl.store(d_initial + segment_at, d_state, mask=state_ok)
    elif segment % segments == 0:
        tl.store(d_initial + state_at, d_state, mask=state_ok)
