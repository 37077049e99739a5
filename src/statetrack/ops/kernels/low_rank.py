"""Triton kernels for a decay for each channel minus a matrix of rank one; `docs/kernels.md` derives them.

A step is H <- diag(a) H - u (w^T H) + p v^T. A chunk has BC steps. All tensors are contiguous, and the states lie
transposed, [V, K]. All operands are float32 and their products tf32x3, because what w reads is fed back into the state.
Decays are only ever multiplied, in the backward too: 0 and negative numbers are ordinary.
"""

# What a branch on a constant leaves out does not exist in the compiled kernel.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from statetrack.ops.kernels.diagonal import (
    is_later,
    is_pair,
    last_row,
    load_decays,
    load_tile,
    other_totals,
    outer_products,
    pair_products,
    prefix_products,
    prefix_products_before,
    state_overlap,
    state_products,
    store_tile,
    suffix_products,
    to_rows,
    total_gradients,
)
from statetrack.ops.kernels.householder import unit_triangular_inverse

_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision=_PRECISION)


@triton.jit
def _pairs(x, y, SIZE: tl.constexpr, BC: tl.constexpr):
    return pair_products(x, y, SIZE, BC, tl.float32, _PRECISION)


@triton.jit(do_not_specialize=["T", "chunks"])
def prepare(
    q, w, u, p, decay, inverse, from_values, query_u, query_p, q_in, w_in, u_out, p_out, across,
    T, H, chunks,
    K: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BASE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """For every chunk what does not depend on the state.

    With D(i, j) the product of the decays after step j up to step i: (I + W)^-1 for W(i, j) = w_i D(i - 1, j) u_j below
    the diagonal, the same products of w and p, those of q with D(i, j) and the diagonal; q and w as they read the state
    at the chunk's start, u and p as they write the one at its end; the product of all decays.
    """
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    first = head // H * T + chunk * BC
    row = tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    rows_ok = row < tokens_left
    place = head * chunks + chunk
    base = (first * H + head % H) * K
    equal = row[:, None] == row[None, :]
    w_u, w_p = tl.zeros([BC, BC], tl.float32), tl.zeros([BC, BC], tl.float32)
    q_u, q_p = tl.zeros([BC, BC], tl.float32), tl.zeros([BC, BC], tl.float32)
    for start in range(0, K, BD):
        tile_q = load_tile(q + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        tile_w = load_tile(w + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        tile_u = load_tile(u + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        tile_p = load_tile(p + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        a_before = load_decays(decay + base, -1, tokens_left, H * K, start, K, BC, BD)
        a = load_decays(decay + base, 0, tokens_left, H * K, start, K, BC, BD)
        a_after = load_decays(decay + base, 1, tokens_left, H * K, start, K, BC, BD)
        q_u += tl.where(equal, tl.sum(tile_q * tile_u, axis=1)[:, None], 0.0)
        q_p += tl.where(equal, tl.sum(tile_q * tile_p, axis=1)[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            later_q = tile_q * prefix_products(a, 2**level, BC, BD)
            later_w = tile_w * prefix_products_before(a_before, 2**level, BC, BD)
            out_of = suffix_products(a_after, 2**level, BC, BD)
            w_u += _pairs(later_w, tile_u * out_of, 2**level, BC)
            w_p += _pairs(later_w, tile_p * out_of, 2**level, BC)
            q_u += _pairs(later_q, tile_u * out_of, 2**level, BC)
            q_p += _pairs(later_q, tile_p * out_of, 2**level, BC)
        into = prefix_products(a, BC, BC, BD)
        out_of = suffix_products(a_after, BC, BC, BD)
        into_before = prefix_products_before(a_before, BC, BC, BD)
        store_tile(q_in + base, tile_q * into, rows_ok, H * K, start, K, BC, BD)
        store_tile(w_in + base, tile_w * into_before, rows_ok, H * K, start, K, BC, BD)
        store_tile(u_out + base, tile_u * out_of, rows_ok, H * K, start, K, BC, BD)
        store_tile(p_out + base, tile_p * out_of, rows_ok, H * K, start, K, BC, BD)
        column = start + tl.arange(0, BD)
        tl.store(across + place * K + column, last_row(into, BC), mask=column < K)
    tile = place * BC * BC + row[:, None] * BC + row[None, :]
    tl.store(from_values + tile, w_p)
    tl.store(query_u + tile, q_u)
    tl.store(query_p + tile, q_p)
    tl.store(inverse + tile, unit_triangular_inverse(w_u, BC, BASE, tl.float32, False, _PRECISION))


@triton.jit(do_not_specialize=["T", "chunks"])
def scan_forward(
    v, inverse, from_values, query_u, query_p, q_in, w_in, u_out, p_out, across, initial, o, final, starts, reads,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk: outputs, the final state and, to SAVE, every chunk's first state and what w has read."""
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
        keys_at = (first * H + h) * K
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        values = tl.load(v + values_at, mask=values_ok, other=0.0).to(tl.float32)
        tile = place * BC * BC + row[:, None] * BC + row[None, :]
        if SAVE:
            at = place * K * V + value[:, None] * K + key[None, :]
            tl.store(starts + at, state.to(starts.dtype.element_ty), mask=state_ok)
        read = _dot(state, tl.trans(load_tile(w_in + keys_at, rows_ok, H * K, 0, K, BC, BK)))
        read += _dot(values, tl.trans(tl.load(from_values + tile)))
        read = _dot(read, tl.trans(tl.load(inverse + tile)))
        if SAVE:
            tl.store(reads + values_at, read, mask=values_ok)
        out = _dot(state, tl.trans(load_tile(q_in + keys_at, rows_ok, H * K, 0, K, BC, BK)))
        out += _dot(values, tl.trans(tl.load(query_p + tile)))
        out -= _dot(read, tl.trans(tl.load(query_u + tile)))
        tl.store(o + values_at, out.to(o.dtype.element_ty), mask=values_ok)
        state *= tl.load(across + place * K + key, mask=key < K, other=0.0)[None, :]
        state += _dot(values, load_tile(p_out + keys_at, rows_ok, H * K, 0, K, BC, BK))
        state -= _dot(read, load_tile(u_out + keys_at, rows_ok, H * K, 0, K, BC, BK))
    tl.store(final + state_at, state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def scan_backward(
    inverse, from_values, query_u, query_p, q_in, w_in, u_out, p_out, across, d_o, d_final,
    d_v, d_reads, d_ends, d_initial,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradients of the values, of every chunk's last state and of the first.

    `d_reads` is the gradient of what w reads of the chunk's first state.
    """
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
        keys_at = (first * H + h) * K
        values_at = (first * H + h) * V + value[:, None] + row[None, :] * (H * V)
        values_ok = value_ok[:, None] & rows_ok[None, :]
        d_out = tl.load(d_o + values_at, mask=values_ok, other=0.0).to(tl.float32)
        tile = place * BC * BC + row[:, None] * BC + row[None, :]
        at = place * K * V + value[:, None] * K + key[None, :]
        tl.store(d_ends + at, d_state.to(d_ends.dtype.element_ty), mask=state_ok)
        d_read = _dot(d_out, tl.load(query_u + tile))
        d_read += _dot(d_state, tl.trans(load_tile(u_out + keys_at, rows_ok, H * K, 0, K, BC, BK)))
        d_read = _dot(-d_read, tl.load(inverse + tile))
        tl.store(d_reads + values_at, d_read, mask=values_ok)
        d_values = _dot(d_out, tl.load(query_p + tile)) + _dot(d_read, tl.load(from_values + tile))
        d_values += _dot(d_state, tl.trans(load_tile(p_out + keys_at, rows_ok, H * K, 0, K, BC, BK)))
        tl.store(d_v + values_at, d_values.to(d_v.dtype.element_ty), mask=values_ok)
        d_state *= tl.load(across + place * K + key, mask=key < K, other=0.0)[None, :]
        d_state += _dot(d_out, load_tile(q_in + keys_at, rows_ok, H * K, 0, K, BC, BK))
        d_state += _dot(d_read, load_tile(w_in + keys_at, rows_ok, H * K, 0, K, BC, BK))
    tl.store(d_initial + state_at, d_state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients(
    q, w, u, p, v, decay, starts, reads, d_o, d_reads, d_ends, d_q, d_w, d_u, d_p, d_decay,
    T, H, chunks,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """For every chunk by itself the other gradients: `prepare` backwards, from the whole chunk to single steps."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    head = (pid // chunks).to(tl.int64)
    h = head % H
    first = head // H * T + chunk * BC
    row = tl.arange(0, BC)
    tokens_left = tl.minimum(T - chunk * BC, BC)
    rows_ok = row < tokens_left
    state_at = (head * chunks + chunk) * K * V
    base, values_at = (first * H + h) * K, (first * H + h) * V
    equal = row[:, None] == row[None, :]
    d_q_u = -outer_products(d_o + values_at, reads + values_at, rows_ok, H * V, V, BC, BV, tl.float32, _PRECISION)
    d_q_p = outer_products(d_o + values_at, v + values_at, rows_ok, H * V, V, BC, BV, tl.float32, _PRECISION)
    d_w_u = -outer_products(d_reads + values_at, reads + values_at, rows_ok, H * V, V, BC, BV, tl.float32, _PRECISION)
    d_w_p = outer_products(d_reads + values_at, v + values_at, rows_ok, H * V, V, BC, BV, tl.float32, _PRECISION)
    own_u = tl.sum(tl.where(equal, d_q_u, 0.0), axis=1)[:, None]
    own_p = tl.sum(tl.where(equal, d_q_p, 0.0), axis=1)[:, None]
    for start in range(0, K, BD):
        tile_q = load_tile(q + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        tile_w = load_tile(w + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        tile_u = load_tile(u + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        tile_p = load_tile(p + base, rows_ok, H * K, start, K, BC, BD).to(tl.float32)
        a_before = load_decays(decay + base, -1, tokens_left, H * K, start, K, BC, BD)
        a = load_decays(decay + base, 0, tokens_left, H * K, start, K, BC, BD)
        a_after = load_decays(decay + base, 1, tokens_left, H * K, start, K, BC, BD)
        first_state, last_state = starts + state_at, d_ends + state_at
        of_q = state_products(
            d_o + values_at, first_state, rows_ok, H * V, start, K, V, BC, BD, BV, tl.float32, _PRECISION
        )
        of_w = state_products(
            d_reads + values_at, first_state, rows_ok, H * V, start, K, V, BC, BD, BV, tl.float32, _PRECISION
        )
        of_u = -state_products(
            reads + values_at, last_state, rows_ok, H * V, start, K, V, BC, BD, BV, tl.float32, _PRECISION
        )
        of_p = state_products(
            v + values_at, last_state, rows_ok, H * V, start, K, V, BC, BD, BV, tl.float32, _PRECISION
        )
        d_total = state_overlap(first_state, last_state, start, K, V, BD, BV)[None, :]
        for level in tl.static_range(LEVELS - 1, -1, -1):
            # As all four are at the ends of their blocks, of which the merging makes pairs.
            later, pair = is_later(2**level, BC), is_pair(2**level, BC)
            out_of = suffix_products(a_after, 2**level, BC, BD)
            at_q = tl.where(later, tile_q * prefix_products(a, 2**level, BC, BD), 0.0)
            at_w = tl.where(later, tile_w * prefix_products_before(a_before, 2**level, BC, BD), 0.0)
            at_u, at_p = tl.where(later, 0.0, tile_u * out_of), tl.where(later, 0.0, tile_p * out_of)
            others = other_totals(a, 2**level, BC, BD)
            of_rows = of_q * at_q + of_w * at_w + of_u * at_u + of_p * at_p
            d_total = total_gradients(d_total, of_rows, others, 2**level, BC, BD)
            scale = to_rows(others, 2**level, BC, BD)
            q_u, q_p = tl.where(pair, d_q_u, 0.0), tl.where(pair, d_q_p, 0.0)
            w_u, w_p = tl.where(pair, d_w_u, 0.0), tl.where(pair, d_w_p, 0.0)
            of_q = tl.where(later, of_q * scale + _dot(q_u, at_u) + _dot(q_p, at_p), of_q)
            of_w = tl.where(later, of_w * scale + _dot(w_u, at_u) + _dot(w_p, at_p), of_w)
            of_u = tl.where(later, of_u, of_u * scale + _dot(tl.trans(q_u), at_q) + _dot(tl.trans(w_u), at_w))
            of_p = tl.where(later, of_p, of_p * scale + _dot(tl.trans(q_p), at_q) + _dot(tl.trans(w_p), at_w))
        store_tile(d_decay + base, of_q * tile_q + d_total, rows_ok, H * K, start, K, BC, BD)
        store_tile(d_q + base, of_q * a + own_u * tile_u + own_p * tile_p, rows_ok, H * K, start, K, BC, BD)
        store_tile(d_w + base, of_w, rows_ok, H * K, start, K, BC, BD)
        store_tile(d_u + base, of_u + own_u * tile_q, rows_ok, H * K, start, K, BC, BD)
        store_tile(d_p + base, of_p + own_p * tile_q, rows_ok, H * K, start, K, BC, BD)
