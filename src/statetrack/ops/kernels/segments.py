"""Triton kernels that join segments of time which have been scanned at once; `docs/kernels.md` explains them.

A segment does H <- A_s H + B_s to any state H. All states lie transposed, [V, K].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["segments"])
def join_segments(
    maps, ends, border, borders,
    segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, BORDER: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states between segments, in `borders` [rows, segments, V, K]: H <- A_s H + B_s, or backwards with A_s^T.

    `maps` are the A_s^T [rows, segments, K, K], or [rows, segments, K] where they are DIAGONAL, `ends` the B_s^T [rows,
    segments, V, K], `border` [rows, K, V] is the state before the first (REVERSE: after the last) segment.
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
        if DIAGONAL:
            state = state * tl.load(maps + place * K + key, mask=key < K, other=0.0)[None, :]
            state += tl.load(ends + at, mask=ok, other=0.0)
        else:
            across = tl.load(maps + place * K * K + key[:, None] * K + key[None, :], mask=map_ok, other=0.0)
            if REVERSE:
                across = tl.trans(across)
            state = tl.load(ends + at, mask=ok, other=0.0) + tl.dot(state, across, input_precision="tf32x3")
