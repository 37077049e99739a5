"""Triton kernels for one token: the state is read once and written once, which may be where it was.

A program has all K key channels of BV value channels of one head, so nothing but sums over keys leaves its registers.
`before` and `state` are [row, K, V] in float32; with both the same pointer the update is in place, as a program writes
no element that another one reads. All numbers are computed in float32 and read in whatever dtype they have.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The program's row, its keys and values, and where its part of the state lies."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BK)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    places = row * K * V + key[:, None] * V + value[None, :]
    return row, key, value, places, (key < K)[:, None] & (value < V)[None, :]


@triton.jit
def _keys(x, row, key, K: tl.constexpr):
    return tl.load(x + row * K + key, mask=key < K, other=0.0).to(tl.float32)


@triton.jit
def _values(x, row, value, V: tl.constexpr):
    return tl.load(x + row * V + value, mask=value < V, other=0.0).to(tl.float32)


@triton.jit
def _decayed(h, decay, row, key, K: tl.constexpr, DECAY: tl.constexpr):
    """A state after a decay of each head, or of each key channel."""
    if DECAY == "head":
        return h * tl.load(decay + row).to(tl.float32)
    if DECAY == "channel":
        return h * _keys(decay, row, key, K)[:, None]
    return h


@triton.jit
def _finish(h, state, q, o, row, key, value, places, ok, K: tl.constexpr, V: tl.constexpr):
    """Stores the state, and what the query reads of it."""
    out = tl.sum(_keys(q, row, key, K)[:, None] * h, axis=0)
    tl.store(o + row * V + value, out.to(o.dtype.element_ty), mask=value < V)
    tl.store(state + places, h, mask=ok)


@triton.jit
def householder(
    before, state, q, k, v, beta, decay, o,
    H,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORMALIZE: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    row, key, value, places, ok = _tile(K, V, BK, BV)
    h = _decayed(tl.load(before + places, mask=ok, other=0.0), decay, row, key, K, DECAY)
    for n in range(N):
        factor = (row // H * N + n) * H + row % H
        keys = _keys(k, factor, key, K)
        strength = tl.load(beta + factor).to(tl.float32)
        if NORMALIZE:
            squared_norm = tl.sum(keys * keys, axis=0)
            strength = tl.where(squared_norm > 0, strength / tl.where(squared_norm > 0, squared_norm, 1.0), 0.0)
        error = _values(v, factor, value, V) - tl.sum(keys[:, None] * h, axis=0)
        h += keys[:, None] * (strength * error)[None, :]
    _finish(h, state, q, o, row, key, value, places, ok, K, V)


@triton.jit
def diagonal(
    before, state, q, write, v, decay, o,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    row, key, value, places, ok = _tile(K, V, BK, BV)
    h = _decayed(tl.load(before + places, mask=ok, other=0.0), decay, row, key, K, DECAY)
    h += _keys(write, row, key, K)[:, None] * _values(v, row, value, V)[None, :]
    _finish(h, state, q, o, row, key, value, places, ok, K, V)


@triton.jit
def low_rank(
    before, state, q, write, v, decay, u, w, o,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    row, key, value, places, ok = _tile(K, V, BK, BV)
    h = tl.load(before + places, mask=ok, other=0.0)
    read = tl.sum(_keys(w, row, key, K)[:, None] * h, axis=0)  # before the decay
    h = _decayed(h, decay, row, key, K, DECAY) - _keys(u, row, key, K)[:, None] * read[None, :]
    h += _keys(write, row, key, K)[:, None] * _values(v, row, value, V)[None, :]
    _finish(h, state, q, o, row, key, value, places, ok, K, V)


@triton.jit
def discretized(
    before, state, q, write, v, dt, A, lower_end, o,
    H, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    row, key, value, places, ok = _tile(K, V, BK, BV)
    head = row % H
    rate = tl.load(A + head * K * V + key[:, None] * V + value[None, :], mask=ok, other=0.0).to(tl.float32) * _LOG2_E
    if LOWER:
        low = _values(lower_end, head, value, V)
    else:
        low = tl.zeros([BV], tl.float32) + lo
    gate = tl.exp2(_values(dt, row, value, V)[None, :] * rate)
    h = (low[None, :] + (hi - low)[None, :] * gate) * tl.load(before + places, mask=ok, other=0.0)
    h += _keys(write, row, key, K)[:, None] * _values(v, row, value, V)[None, :]
    _finish(h, state, q, o, row, key, value, places, ok, K, V)
