"""Triton kernels for Mamba's selective scan with any eigenvalue range; `docs/kernels.md` explains them.

Every key n of every value channel is a scalar recurrence of its own, h <- decay h + write_n v. The 32 lanes of a warp
are LK groups of keys by LV channels; each thread has J neighbouring keys of C channels, whose states stay in registers
from the first step to the last. Tensors are [threads, C, J], with C or J 1 where they say nothing about channels or
keys. Sums over J and C are within a thread, and two or three shuffles add over the groups of keys or the channels.

That is the layout which triton gives these tensors, all of them, so that it never converts one: it goes by what is
contiguous in memory, and indices made by `&` are not, as far as it can see.

A program walks through one segment of the steps: BT steps at a time, unrolled and without masks, and what is left at
the end of a sequence step by step. Between these tiles, tiles + rest for each row, states are kept for a backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(x, ok, MASKED: tl.constexpr):
    if MASKED:
        found = tl.load(x, mask=ok, other=0.0)
    else:
        found = tl.load(x)
    return found.to(tl.float32)


@triton.jit
def _store(x, value, ok, MASKED: tl.constexpr):
    if MASKED:
        tl.store(x, value.to(x.dtype.element_ty), mask=ok)
    else:
        tl.store(x, value.to(x.dtype.element_ty))


@triton.jit
def _rows(x, ok, STRIDE: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr):
    """A tuple of BT steps, in float32."""
    rows = ()
    for i in tl.static_range(BT):
        rows = rows + (_load(x + i * STRIDE, ok, MASKED),)
    return rows


@triton.jit
def _pair(pairs):
    """q and write at one step, float32s that lie in memory as one number of 64 bits."""
    both = tl.load(pairs)
    query = both.to(tl.int32).to(tl.float32, bitcast=True)
    written = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return query, written


@triton.jit
def _decay(gate, low, width, UNIT: tl.constexpr):
    """The gate widened to the range; with UNIT that is [0, 1]."""
    decay = gate
    if not UNIT:
        decay = low + width * gate
    return decay


@triton.jit
def _over_keys(x, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, C: tl.constexpr):
    """[threads, C, J] as [threads, C, 1]: for every thread the sum over all keys."""
    total = tl.sum(tl.reshape(tl.sum(x, axis=2), [W, LK, LV, C]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [W, LK, LV, C]), [W * LK * LV, C, 1])


@triton.jit
def _over_channels(x, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, J: tl.constexpr):
    """[threads, C, J] as [threads, 1, J]: for every thread the sum over all channels of its warp."""
    total = tl.sum(tl.reshape(tl.sum(x, axis=1), [W, LK, LV, J]), axis=2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [W, LK, LV, J]), [W * LK * LV, 1, J])


@triton.jit
def _over_warps(x, W: tl.constexpr, J: tl.constexpr):
    """[threads, 1, J]: for every thread the sum over its likes in all warps."""
    total = x
    if W > 1:
        total = tl.sum(tl.reshape(x, [W, 32, J]), axis=0, keep_dims=True)
        total = tl.reshape(tl.broadcast_to(total, [W, 32, J]), [W * 32, 1, J])
    return total


@triton.jit
def _threads(W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr):
    """[threads, 1, 1]: a thread's channel among those of its group of keys, that group, and its warp."""
    thread = tl.arange(0, W * LK * LV)[:, None, None]
    return thread & (LV - 1), (thread // LV) & (LK - 1), thread // (LV * LK)


@triton.jit
def _channels(lane, warp, W: tl.constexpr, LV: tl.constexpr, C: tl.constexpr):
    channel = tl.arange(0, C)[None, :, None] & (C - 1)
    return (tl.program_id(1) * W + warp) * (C * LV) + channel * LV + lane


@triton.jit
def _keys(lane_key, J: tl.constexpr):
    return lane_key * J + (tl.arange(0, J)[None, None, :] & (J - 1))


@triton.jit
def _own(
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, J: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A thread's place among others as `_threads` has it, its channels and keys, their places in a matrix [K, V], and
    whether there are such channels, and such keys of them."""
    lane, lane_key, warp = _threads(W, LK, LV)
    value, key = _channels(lane, warp, W, LV, C), _keys(lane_key, J)
    ok = value < V
    return lane, lane_key, warp, value, key, key * V + value, ok, ok & (key < K)


@triton.jit
def _gates(A, lower_end, lo, hi, h, value, matrix, ok, state_ok, K: tl.constexpr, V: tl.constexpr, LOWER: tl.constexpr):
    """What a step size is multiplied by for the exponent of 2, the lower ends of the channels, and the widths of their
    ranges."""
    if LOWER:
        low = tl.load(lower_end + h * V + value, mask=ok, other=0.0)
    else:
        low = tl.zeros([1, 1, 1], tl.float32) + lo
    scale = tl.load(A + h * K * V + matrix, mask=state_ok, other=0.0) * _LOG2_E
    return scale, low, hi - low


@triton.jit(do_not_specialize=["T", "count"])
def pack(q, write, pairs, T, count, H: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Both [B, T, H, K] as `pairs` [row, T, PADDED, 2] in float32; keys from K on are zeros."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key, token = at % PADDED, at // PADDED
    head = token // T
    source = ((head // H * T + token % T) * H + head % H) * K + key
    ok = at < count
    for part in tl.static_range(2):
        x = q if part == 0 else write
        tl.store(pairs + 2 * at + part, tl.load(x + source, mask=ok & (key < K), other=0.0).to(tl.float32), mask=ok)


@triton.jit
def _forward_tile(dt, v, pairs, o, state, product, scale, low, width, lane_key, ok,
                  STRIDE: tl.constexpr, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, J: tl.constexpr,
                  C: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr, UNIT: tl.constexpr,
                  OUT: tl.constexpr):  # fmt: skip
    """BT steps: returns the states and, without outputs (OUT), the products of their decays so far."""
    steps, values = _rows(dt, ok, STRIDE, BT, MASKED), _rows(v, ok, STRIDE, BT, MASKED)
    own = tl.zeros([W * LK * LV, C, 1], tl.float32)
    for i in tl.static_range(BT):
        query, written = _pair(pairs + i * LK * J)
        decay = _decay(tl.exp2(steps[i] * scale), low, width, UNIT)
        state = decay * state + written * values[i]
        if OUT:
            # Each group of keys stores the outputs of its part of the steps.
            own = tl.where(lane_key == i % LK, _over_keys(query * state, W, LK, LV, C), own)
            if i % LK == LK - 1 or i == BT - 1:
                some = ok & (lane_key <= i % LK)
                _store(o + (i - i % LK) * STRIDE, own, some, MASKED or i % LK < LK - 1)
        else:
            product *= decay
    return state, product


@triton.jit(do_not_specialize=["T", "segments", "length"])
def scan_forward(
    dt, A, lower_end, pairs, v, initial, o, final, starts, products,
    T, segments, length, lo, hi,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
    LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, LOWER: tl.constexpr,
    INITIAL: tl.constexpr, SAVE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Outputs, the final state and, to SAVE, the state before every tile, [row, tile, K, V].

    Each program walks through one segment of `length` tiles; `initial` [row and segment, K, V] is where it starts.
    Without OUT there are no outputs, but for every segment its last state from zero, in `final` [row and segment, K,
    V], and the product of its decays; the last segment has no program.
    """
    STRIDE: tl.constexpr = H * V
    PADDED: tl.constexpr = LK * J
    MASKED: tl.constexpr = V % (W * LV * C) != 0
    MASKED_KEYS: tl.constexpr = MASKED or K != PADDED
    walked = segments if OUT else segments - 1
    head, segment = (tl.program_id(0) // walked).to(tl.int64), tl.program_id(0) % walked
    h = head % H
    _, lane_key, _, value, key, matrix, ok, state_ok = _own(K, V, W, LK, LV, J, C)
    scale, low, width = _gates(A, lower_end, lo, hi, h, value, matrix, ok, state_ok, K, V, LOWER)
    place = (head * segments + segment) * K * V
    state, product = tl.zeros([W * LK * LV, C, J], tl.float32), tl.full([W * LK * LV, C, J], 1.0, tl.float32)
    if INITIAL:
        state += tl.load(initial + place + matrix, mask=state_ok, other=0.0)
    tiles = T // BT
    rest = T - tiles * BT
    begin = segment * length
    end = tl.minimum(begin + length, tiles)
    first = head // H * T + begin * BT
    dt, v, pairs = dt + (first * H + h) * V, v + (first * H + h) * V, pairs + (head * T + begin * BT) * PADDED
    outs = value + lane_key * STRIDE
    if OUT:
        o += (first * H + h) * V
    if SAVE:
        starts += (head * (tiles + rest) + begin) * (K * V)
    for _ in range(begin, end):
        if SAVE:
            _store(starts + matrix, state, state_ok, MASKED_KEYS)
            starts += K * V
        state, product = _forward_tile(
            dt + value, v + value, pairs + key, o + outs if OUT else o, state, product, scale, low, width, lane_key, ok,
            STRIDE, W, LK, LV, J, C, BT, MASKED, UNIT, OUT,
        )  # fmt: skip
        dt, v, pairs = dt + BT * STRIDE, v + BT * STRIDE, pairs + BT * PADDED
        if OUT:
            o += BT * STRIDE
    if OUT:
        for _ in range(rest * (segment == segments - 1).to(tl.int32)):
            if SAVE:
                _store(starts + matrix, state, state_ok, MASKED_KEYS)
                starts += K * V
            state, product = _forward_tile(
                dt + value, v + value, pairs + key, o + outs, state, product, scale, low, width, lane_key, ok,
                STRIDE, W, LK, LV, J, C, 1, MASKED, UNIT, OUT,
            )  # fmt: skip
            dt, v, pairs, o = dt + STRIDE, v + STRIDE, pairs + PADDED, o + STRIDE
        if segment == segments - 1:
            tl.store(final + head * K * V + matrix, state, mask=state_ok)
    else:
        tl.store(final + place + matrix, state, mask=state_ok)
        tl.store(products + place + matrix, product, mask=state_ok)


@triton.jit(do_not_specialize=["segments"])
def join(
    ends, products, border, borders, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, BORDER: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The states [row and segment, SIZE] before all segments, or with REVERSE their gradients after all segments.

    `border` [row, SIZE] is the one before the first (after the last) segment, zeros without BORDER. What the last
    segment (REVERSE: the first) does to a state is not read.
    """
    head = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = element < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if BORDER:
        state += tl.load(border + head * SIZE + element, mask=ok, other=0.0)
    for step in range(segments):
        at = head * segments + (segments - 1 - step if REVERSE else step)
        at = at * SIZE + element
        tl.store(borders + at, state, mask=ok)
        if step < segments - 1:
            state = state * tl.load(products + at, mask=ok, other=0.0) + tl.load(ends + at, mask=ok, other=0.0)


@triton.jit
def _summary_tile(dt, d_o, pairs, d_state, product, scale, low, width, ok,
                  STRIDE: tl.constexpr, PADDED: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr,
                  UNIT: tl.constexpr):  # fmt: skip
    """BT steps backwards: the gradients of the states, as far as the outputs go, and the products of decays so far."""
    steps, d_outs = _rows(dt, ok, STRIDE, BT, MASKED), _rows(d_o, ok, STRIDE, BT, MASKED)
    for i in tl.static_range(BT - 1, -1, -1):
        query, _ = _pair(pairs + i * PADDED)
        decay = _decay(tl.exp2(steps[i] * scale), low, width, UNIT)
        d_state = (d_state + query * d_outs[i]) * decay
        product *= decay
    return d_state, product


@triton.jit(do_not_specialize=["T", "segments", "length"])
def summarize_backward(
    dt, A, lower_end, pairs, d_o, d_starts, products,
    T, segments, length, lo, hi,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
    LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """For every segment but the first the gradient of its first state from its own outputs, and its decays' product."""
    STRIDE: tl.constexpr = H * V
    PADDED: tl.constexpr = LK * J
    MASKED: tl.constexpr = V % (W * LV * C) != 0
    head = (tl.program_id(0) // (segments - 1)).to(tl.int64)
    segment = tl.program_id(0) % (segments - 1) + 1
    h = head % H
    _, _, _, value, key, matrix, ok, state_ok = _own(K, V, W, LK, LV, J, C)
    scale, low, width = _gates(A, lower_end, lo, hi, h, value, matrix, ok, state_ok, K, V, LOWER)
    d_state, product = tl.zeros([W * LK * LV, C, J], tl.float32), tl.full([W * LK * LV, C, J], 1.0, tl.float32)
    tiles = T // BT
    begin = segment * length
    end = tl.minimum(begin + length, tiles)
    left = (T - tiles * BT) * (segment == segments - 1).to(tl.int32)
    last = end * BT + left - 1
    at = ((head // H * T + last) * H + h) * V
    dt, d_o, pairs = dt + at, d_o + at, pairs + (head * T + last) * PADDED
    for _ in range(left):
        d_state, product = _summary_tile(
            dt + value, d_o + value, pairs + key, d_state, product, scale, low, width, ok,
            STRIDE, PADDED, 1, MASKED, UNIT,
        )  # fmt: skip
        dt, d_o, pairs = dt - STRIDE, d_o - STRIDE, pairs - PADDED
    dt, d_o, pairs = dt - (BT - 1) * STRIDE, d_o - (BT - 1) * STRIDE, pairs - (BT - 1) * PADDED
    for _ in range(begin, end):
        d_state, product = _summary_tile(
            dt + value, d_o + value, pairs + key, d_state, product, scale, low, width, ok,
            STRIDE, PADDED, BT, MASKED, UNIT,
        )  # fmt: skip
        dt, d_o, pairs = dt - BT * STRIDE, d_o - BT * STRIDE, pairs - BT * PADDED
    place = (head * segments + segment) * K * V
    tl.store(d_starts + place + matrix, d_state, mask=state_ok)
    tl.store(products + place + matrix, product, mask=state_ok)


@triton.jit
def _backward_tile(dt, v, d_o, pairs, starts, d_dt, d_v, part_q, part_write, d_state, d_scale, d_low,
                   scale, low, width, lane, lane_key, warp, ok, state_ok,
                   STRIDE: tl.constexpr, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, J: tl.constexpr,
                   C: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr, MASKED_KEYS: tl.constexpr,
                   UNIT: tl.constexpr, LOWER: tl.constexpr):  # fmt: skip
    """BT steps backwards: returns the gradients of the states, and those of A and of the lower ends so far.

    The states of all steps of the tile are computed once more, and stay in registers.
    """
    steps, values = _rows(dt, ok, STRIDE, BT, MASKED), _rows(v, ok, STRIDE, BT, MASKED)
    d_outs = _rows(d_o, ok, STRIDE, BT, MASKED)
    state = _load(starts, state_ok, MASKED_KEYS)
    gates, before = (), ()
    for i in tl.static_range(BT):
        _, written = _pair(pairs + i * LK * J)
        gates, before = gates + (tl.exp2(steps[i] * scale),), before + (state,)
        state = _decay(gates[i], low, width, UNIT) * state + written * values[i]
    own_steps, own_values = tl.zeros([W * LK * LV, C, 1], tl.float32), tl.zeros([W * LK * LV, C, 1], tl.float32)
    own_query, own_written = tl.zeros([W * LK * LV, 1, J], tl.float32), tl.zeros([W * LK * LV, 1, J], tl.float32)
    for i in tl.static_range(BT - 1, -1, -1):
        query, written = _pair(pairs + i * LK * J)
        d_state += query * d_outs[i]
        # Each channel stores the sums over channels of its part of the steps, each group of keys those over keys.
        of_lane, of_group = lane == i % LV, lane_key == i % LK
        own_query = tl.where(of_lane, _over_channels(d_outs[i] * state, W, LK, LV, J), own_query)
        own_written = tl.where(of_lane, _over_channels(values[i] * d_state, W, LK, LV, J), own_written)
        own_values = tl.where(of_group, _over_keys(written * d_state, W, LK, LV, C), own_values)
        if UNIT:
            d_state *= gates[i]
            d_gated = d_state * before[i]
        else:
            d_decay = d_state * before[i]
            if LOWER:
                d_low += d_decay * (1 - gates[i])
            d_gated = d_decay * gates[i]
            d_state *= _decay(gates[i], low, width, UNIT)
        d_scale += d_gated * steps[i]
        own_steps = tl.where(of_group, _over_keys(d_gated * scale, W, LK, LV, C), own_steps)
        state = before[i]
        if i % LV == 0:
            some = (lane < BT - i) & (warp == 0)
            _store(part_q + i, _over_warps(own_query, W, J), some, BT - i < LV or W > 1)
            _store(part_write + i, _over_warps(own_written, W, J), some, BT - i < LV or W > 1)
        if i % LK == 0:
            some = ok & (lane_key < BT - i)
            _store(d_dt + i * STRIDE, own_steps * (width * _LN_2), some, MASKED or BT - i < LK)
            _store(d_v + i * STRIDE, own_values, some, MASKED or BT - i < LK)
    return d_state, d_scale, d_low


@triton.jit(do_not_specialize=["T", "rows", "segments", "length"])
def scan_backward(
    dt, A, lower_end, pairs, v, starts, d_o, d_final, d_dt, d_v, parts, d_A, d_lower_end, d_initial,
    T, rows, segments, length, lo, hi,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
    LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, LOWER: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """All gradients. Those that sum over channels or time are partial sums, to be added up in a fixed order:
    of q and write in `parts` [2, channel block, row, key, T], d_A [row and segment, K, V] and d_lower_end [row
    and segment, V]. `d_final` [row and segment, K, V] has the gradients of the states after all segments.
    """
    STRIDE: tl.constexpr = H * V
    PADDED: tl.constexpr = LK * J
    MASKED: tl.constexpr = V % (W * LV * C) != 0
    MASKED_KEYS: tl.constexpr = MASKED or K != PADDED
    head, segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    h = head % H
    lane, lane_key, warp, value, key, matrix, ok, state_ok = _own(K, V, W, LK, LV, J, C)
    scale, low, width = _gates(A, lower_end, lo, hi, h, value, matrix, ok, state_ok, K, V, LOWER)
    place = (head * segments + segment) * K * V
    d_state, d_scale = tl.zeros([W * LK * LV, C, J], tl.float32), tl.zeros([W * LK * LV, C, J], tl.float32)
    d_low = tl.zeros([W * LK * LV, C, J], tl.float32)
    if FINAL:
        d_state += tl.load(d_final + place + matrix, mask=state_ok, other=0.0)
    tiles = T // BT
    rest = T - tiles * BT
    begin = segment * length
    end = tl.minimum(begin + length, tiles)
    left = rest * (segment == segments - 1).to(tl.int32)
    # Pointers are those of the step or tile that comes next, so that all its numbers are at constant offsets.
    last = end * BT + left - 1
    at = ((head // H * T + last) * H + h) * V
    dt, v, d_o, d_dt, d_v, pairs = dt + at, v + at, d_o + at, d_dt + at, d_v + at, pairs + (head * T + last) * PADDED
    starts += (head * (tiles + rest) + end + left - 1) * (K * V)
    size = rows.to(tl.int64) * PADDED * T
    part_q = parts + tl.program_id(1) * size + head * PADDED * T + last
    part_write = part_q + tl.num_programs(1) * size
    grads, part = value + lane_key * STRIDE, key.to(tl.int64) * T + lane
    for _ in range(left):
        d_state, d_scale, d_low = _backward_tile(
            dt + value, v + value, d_o + value, pairs + key, starts + matrix, d_dt + grads, d_v + grads, part_q + part,
            part_write + part, d_state, d_scale, d_low, scale, low, width, lane, lane_key, warp, ok, state_ok,
            STRIDE, W, LK, LV, J, C, 1, MASKED, MASKED_KEYS, UNIT, LOWER,
        )  # fmt: skip
        dt, v, d_o, d_dt, d_v = dt - STRIDE, v - STRIDE, d_o - STRIDE, d_dt - STRIDE, d_v - STRIDE
        pairs, starts, part_q, part_write = pairs - PADDED, starts - K * V, part_q - 1, part_write - 1
    MORE: tl.constexpr = (BT - 1) * STRIDE
    dt, v, d_o, d_dt, d_v = dt - MORE, v - MORE, d_o - MORE, d_dt - MORE, d_v - MORE
    pairs, part_q, part_write = pairs - (BT - 1) * PADDED, part_q - (BT - 1), part_write - (BT - 1)
    for _ in range(begin, end):
        d_state, d_scale, d_low = _backward_tile(
            dt + value, v + value, d_o + value, pairs + key, starts + matrix, d_dt + grads, d_v + grads, part_q + part,
            part_write + part, d_state, d_scale, d_low, scale, low, width, lane, lane_key, warp, ok, state_ok,
            STRIDE, W, LK, LV, J, C, BT, MASKED, MASKED_KEYS, UNIT, LOWER,
        )  # fmt: skip
        dt, v, d_o = dt - BT * STRIDE, v - BT * STRIDE, d_o - BT * STRIDE
        d_dt, d_v = d_dt - BT * STRIDE, d_v - BT * STRIDE
        pairs, starts, part_q, part_write = pairs - BT * PADDED, starts - K * V, part_q - BT, part_write - BT
    tl.store(d_A + place + matrix, d_scale * width, mask=state_ok)
    if LOWER:
        d_low = _over_keys(d_low, W, LK, LV, C)
        tl.store(d_lower_end + (head * segments + segment) * V + value, d_low, mask=ok & (lane_key == 0))
    if segment == 0:
        tl.store(d_initial + head * K * V + matrix, d_state, mask=state_ok)


@triton.jit(do_not_specialize=["T", "rows", "blocks"])
def add_parts(
    parts, d_q, d_write, T, rows, blocks,
    H: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradients of q and write [B, T, H, K] from their `parts` [2, blocks, row, PADDED, T], in a fixed order."""
    head = tl.program_id(1).to(tl.int64)
    token, key = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BK)
    ok = (key < K)[:, None] & (token < T)[None, :]
    which = tl.program_id(2)
    size = rows.to(tl.int64) * PADDED * T
    parts += which * blocks * size + head * PADDED * T + key[:, None] * T + token[None, :]
    total = tl.zeros([BK, BT], tl.float32)
    for start in range(0, blocks, 4):
        for i in tl.static_range(4):
            total += tl.load(parts + i * size, mask=ok & (start + i < blocks), other=0.0)
        parts += 4 * size
    at = ((head // H * T + token) * H + head % H)[None, :] * K + key[:, None]
    x = d_q if which == 0 else d_write
    tl.store(x + at, total.to(x.dtype.element_ty), mask=ok)
