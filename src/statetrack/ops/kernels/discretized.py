"""Triton kernels for Mamba's selective scan with any eigenvalue range; `docs/kernels.md` explains them.

Every key n of every value channel is a scalar recurrence of its own, h <- decay h + write_n v. The 32 lanes of a warp
are LK groups of keys by LV channels; each has J neighbouring keys of C channels, whose states stay in
registers from the first step to the last. A tensor here has one number for each thread; what a thread has several of is
a tuple of such tensors. So triton has one layout for all of them, and never converts one. Sums over keys or channels
take two or three shuffles, behind the sums within a thread.

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
def _rows(x, values_left, STRIDE: tl.constexpr, LV: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """BT steps of C channels, in float32, as a tuple: channel c of step i is number i C + c."""
    rows = ()
    for i in tl.static_range(BT):
        for c in tl.static_range(C):
            rows = rows + (_load(x + (i * STRIDE + c * LV), values_left > c * LV, MASKED),)
    return rows


@triton.jit
def _pair(pairs):
    """q and write at one step and key, float32s that lie in memory as one number of 64 bits."""
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
def _sum_keys(x, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr):
    """For every thread the sum over the groups of keys of its warp."""
    total = tl.sum(tl.reshape(x, [W, LK, LV]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [W, LK, LV]), [W * LK * LV])


@triton.jit
def _sum_channels(x, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr):
    """For every thread the sum over the channels of its group of keys."""
    total = tl.sum(tl.reshape(x, [W, LK, LV]), axis=2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [W, LK, LV]), [W * LK * LV])


@triton.jit
def _store_keys_sums(x, sums, lane_key, values_left, STRIDE: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
                     LV: tl.constexpr,
                     C: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Adds BT x C numbers over the groups of keys, of which each then stores its part of the steps.

    `x` points to the group's own first step.
    """
    for c in tl.static_range(C):
        for start in tl.static_range(0, BT, LK):
            own = _sum_keys(sums[start * C + c], W, LK, LV)
            for i in tl.static_range(1, LK):
                if start + i < BT:
                    own = tl.where(lane_key == i, _sum_keys(sums[(start + i) * C + c], W, LK, LV), own)
            ok = (values_left > c * LV) & (lane_key < BT - start)
            _store(x + (start * STRIDE + c * LV), own, ok, MASKED or BT - start < LK)


@triton.jit
def _store_channel_sums(x, sums, lane, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, BT: tl.constexpr):
    """Adds BT numbers over the channels of a warp, of which each lane then stores its part of the steps."""
    for start in tl.static_range(0, BT, LV):
        own = _sum_channels(sums[start], W, LK, LV)
        for i in tl.static_range(1, LV):
            if start + i < BT:
                own = tl.where(lane == i, _sum_channels(sums[start + i], W, LK, LV), own)
        _store(x + start, own, lane < BT - start, BT - start < LV)


@triton.jit
def _forward_tile(dt, v, pairs, o, states, products, scales, low, width, lane_key, values_left,
                  STRIDE: tl.constexpr, J: tl.constexpr, W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr,
                  C: tl.constexpr,
                  BT: tl.constexpr, MASKED: tl.constexpr, UNIT: tl.constexpr, OUT: tl.constexpr):  # fmt: skip
    """BT steps: returns the states and, without outputs (OUT), the products of their decays so far."""
    steps = _rows(dt, values_left, STRIDE, LV, C, BT, MASKED)
    values = _rows(v, values_left, STRIDE, LV, C, BT, MASKED)
    outs = ()
    for i in tl.static_range(BT):
        queries, written = (), ()
        for j in tl.static_range(J):
            query, write = _pair(pairs + (i * LK * J + j))
            queries, written = queries + (query,), written + (write,)
        new_states, new_products = (), ()
        for c in tl.static_range(C):
            out = tl.zeros_like(states[0])
            for j in tl.static_range(J):
                gate = tl.exp2(steps[i * C + c] * scales[c * J + j])
                decay = _decay(gate, low[c], width[c], UNIT)
                state = decay * states[c * J + j] + written[j] * values[i * C + c]
                new_states = new_states + (state,)
                if OUT:
                    out += queries[j] * state
                else:
                    new_products = new_products + (products[c * J + j] * decay,)
            outs = outs + (out,)
        states = new_states
        if not OUT:
            products = new_products
    if OUT:
        _store_keys_sums(o, outs, lane_key, values_left, STRIDE, W, LK, LV, C, BT, MASKED)
    return states, products


@triton.jit
def _range(lower_end, lo, hi, zero, values_left, LV: tl.constexpr, C: tl.constexpr, LOWER: tl.constexpr):
    """The lower ends of a thread's channels and the widths of their ranges."""
    low, width = (), ()
    for c in tl.static_range(C):
        if LOWER:
            end = tl.load(lower_end + c * LV, mask=values_left > c * LV, other=0.0)
        else:
            end = zero + lo
        low, width = low + (end,), width + (hi - end,)
    return low, width


@triton.jit
def _load_states(x, keys_left, values_left, V: tl.constexpr, LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr):
    """C x J numbers of a [K, V] matrix: key j of channel c is number c J + j."""
    found = ()
    for c in tl.static_range(C):
        for j in tl.static_range(J):
            ok = (keys_left > j) & (values_left > c * LV)
            found = found + (tl.load(x + (j * V + c * LV), mask=ok, other=0.0),)
    return found


@triton.jit
def _load_scales(A, keys_left, values_left, V: tl.constexpr, LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr):
    found, scales = _load_states(A, keys_left, values_left, V, LV, J, C), ()
    for n in tl.static_range(C * J):
        scales = scales + (found[n] * _LOG2_E,)
    return scales


@triton.jit
def _store_states(
    x, states, keys_left, values_left, V: tl.constexpr, LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr
):
    for c in tl.static_range(C):
        for j in tl.static_range(J):
            ok = (keys_left > j) & (values_left > c * LV)
            tl.store(x + (j * V + c * LV), states[c * J + j], mask=ok)


@triton.jit
def _filled(x, COUNT: tl.constexpr):
    copies = ()
    for _ in tl.static_range(COUNT):
        copies = copies + (x,)
    return copies


@triton.jit
def _lanes(W: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr):
    """Each thread's channel among those of its group of keys, that group, and its warp."""
    thread = tl.arange(0, W * LK * LV)
    return thread % LV, thread // LV % LK, thread // (LV * LK)


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
    MASKED: tl.constexpr = V % (W * LV * C) != 0
    walked = segments if OUT else segments - 1
    head, segment = (tl.program_id(0) // walked).to(tl.int64), tl.program_id(0) % walked
    h = head % H
    lane, lane_key, warp = _lanes(W, LK, LV)
    value = (tl.program_id(1) * W + warp) * (C * LV) + lane
    values_left, keys_left, matrix = V - value, K - lane_key * J, lane_key * (J * V) + value
    zero = tl.zeros([W * LK * LV], tl.float32)
    low, width = _range(lower_end + h * V + value if LOWER else lower_end, lo, hi, zero, values_left, LV, C, LOWER)
    scales = _load_scales(A + h * K * V + matrix, keys_left, values_left, V, LV, J, C)
    place = head * segments + segment
    if INITIAL:
        states = _load_states(initial + place * K * V + matrix, keys_left, values_left, V, LV, J, C)
    else:
        states = _filled(zero, C * J)
    decays = _filled(zero + 1, 1 if OUT else C * J)
    tiles = T // BT
    rest = T - tiles * BT
    begin = segment * length
    end = tl.minimum(begin + length, tiles)
    first = head // H * T + begin * BT
    at = (first * H + h) * V + value
    dt, v, pairs = dt + at, v + at, pairs + (head * T + begin * BT) * (LK * J) + lane_key * J
    if OUT:
        o += at + lane_key * STRIDE
    if SAVE:
        starts += (head * (tiles + rest) + begin) * (K * V) + matrix
    for _ in range(begin, end):
        if SAVE:
            _store_states(starts, states, keys_left, values_left, V, LV, J, C)
            starts += K * V
        states, decays = _forward_tile(
            dt, v, pairs, o, states, decays, scales, low, width, lane_key, values_left,
            STRIDE, J, W, LK, LV, C, BT, MASKED, UNIT, OUT,
        )  # fmt: skip
        dt, v, pairs = dt + BT * STRIDE, v + BT * STRIDE, pairs + BT * LK * J
        if OUT:
            o += BT * STRIDE
    if OUT:
        for _ in range(rest * (segment == segments - 1).to(tl.int32)):
            if SAVE:
                _store_states(starts, states, keys_left, values_left, V, LV, J, C)
                starts += K * V
            states, decays = _forward_tile(
                dt, v, pairs, o, states, decays, scales, low, width, lane_key, values_left,
                STRIDE, J, W, LK, LV, C, 1, MASKED, UNIT, OUT,
            )  # fmt: skip
            dt, v, pairs, o = dt + STRIDE, v + STRIDE, pairs + LK * J, o + STRIDE
        if segment == segments - 1:
            _store_states(final + head * K * V + matrix, states, keys_left, values_left, V, LV, J, C)
    else:
        _store_states(final + place * K * V + matrix, states, keys_left, values_left, V, LV, J, C)
        _store_states(products + place * K * V + matrix, decays, keys_left, values_left, V, LV, J, C)


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
def _summary_tile(dt, d_o, pairs, d_states, products, scales, low, width, values_left,
                  STRIDE: tl.constexpr, J: tl.constexpr, LK: tl.constexpr, LV: tl.constexpr, C: tl.constexpr,
                  BT: tl.constexpr, MASKED: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """BT steps backwards: the gradients of the states, as far as the outputs go, and the products of decays so far."""
    steps = _rows(dt, values_left, STRIDE, LV, C, BT, MASKED)
    d_outs = _rows(d_o, values_left, STRIDE, LV, C, BT, MASKED)
    for i in tl.static_range(BT - 1, -1, -1):
        queries = ()
        for j in tl.static_range(J):
            query, _ = _pair(pairs + (i * LK * J + j))
            queries = queries + (query,)
        new_states, new_products = (), ()
        for c in tl.static_range(C):
            for j in tl.static_range(J):
                gate = tl.exp2(steps[i * C + c] * scales[c * J + j])
                decay = _decay(gate, low[c], width[c], UNIT)
                new_states = new_states + ((d_states[c * J + j] + queries[j] * d_outs[i * C + c]) * decay,)
                new_products = new_products + (products[c * J + j] * decay,)
        d_states, products = new_states, new_products
    return d_states, products


@triton.jit(do_not_specialize=["T", "segments", "length"])
def summarize_backward(
    dt, A, lower_end, pairs, d_o, d_starts, products,
    T, segments, length, lo, hi,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
    LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """For every segment but the first the gradient of its first state from its own outputs, and its decays' product."""
    STRIDE: tl.constexpr = H * V
    MASKED: tl.constexpr = V % (W * LV * C) != 0
    head = (tl.program_id(0) // (segments - 1)).to(tl.int64)
    segment = tl.program_id(0) % (segments - 1) + 1
    h = head % H
    lane, lane_key, warp = _lanes(W, LK, LV)
    value = (tl.program_id(1) * W + warp) * (C * LV) + lane
    values_left, keys_left, matrix = V - value, K - lane_key * J, lane_key * (J * V) + value
    zero = tl.zeros([W * LK * LV], tl.float32)
    low, width = _range(lower_end + h * V + value if LOWER else lower_end, lo, hi, zero, values_left, LV, C, LOWER)
    scales = _load_scales(A + h * K * V + matrix, keys_left, values_left, V, LV, J, C)
    d_states, decays = _filled(zero, C * J), _filled(zero + 1, C * J)
    tiles = T // BT
    begin = segment * length
    end = tl.minimum(begin + length, tiles)
    past = tl.where(segment == segments - 1, T, end * BT)
    at = ((head // H * T + past) * H + h) * V + value
    dt, d_o, pairs = dt + at, d_o + at, pairs + (head * T + past) * (LK * J) + lane_key * J
    dt, d_o, pairs = dt - STRIDE, d_o - STRIDE, pairs - LK * J
    for _ in range(past - end * BT):
        d_states, decays = _summary_tile(
            dt, d_o, pairs, d_states, decays, scales, low, width, values_left,
            STRIDE, J, LK, LV, C, 1, MASKED, UNIT,
        )  # fmt: skip
        dt, d_o, pairs = dt - STRIDE, d_o - STRIDE, pairs - LK * J
    MORE: tl.constexpr = (BT - 1) * STRIDE
    dt, d_o, pairs = dt - MORE, d_o - MORE, pairs - (BT - 1) * LK * J
    for _ in range(begin, end):
        d_states, decays = _summary_tile(
            dt, d_o, pairs, d_states, decays, scales, low, width, values_left,
            STRIDE, J, LK, LV, C, BT, MASKED, UNIT,
        )  # fmt: skip
        dt, d_o, pairs = dt - BT * STRIDE, d_o - BT * STRIDE, pairs - BT * LK * J
    place = (head * segments + segment) * K * V + matrix
    _store_states(d_starts + place, d_states, keys_left, values_left, V, LV, J, C)
    _store_states(products + place, decays, keys_left, values_left, V, LV, J, C)


@triton.jit
def _backward_tile(dt, v, d_o, pairs, starts, d_dt, d_v, part_q, part_write, d_states, d_scales, d_lows,
                   scales, low, width, lane_key, lane, keys_left, values_left, plane,
                   V: tl.constexpr, STRIDE: tl.constexpr, J: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
                   LV: tl.constexpr,
                   C: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr, UNIT: tl.constexpr,
                   LOWER: tl.constexpr):  # fmt: skip
    """BT steps backwards: returns the gradients of the states, and those of A and of the lower ends so far.

    One key at a time, for its states at all steps of the tile are computed once more, and stay in registers.
    """
    steps = _rows(dt, values_left, STRIDE, LV, C, BT, MASKED)
    values = _rows(v, values_left, STRIDE, LV, C, BT, MASKED)
    d_outs = _rows(d_o, values_left, STRIDE, LV, C, BT, MASKED)
    zero = tl.zeros_like(steps[0])
    d_steps, d_values = _filled(zero, BT * C), _filled(zero, BT * C)
    # Key j of channel c is number j C + c of these, and c J + j of `d_states` and `d_scales`.
    all_states, all_scales = (), ()
    for j in tl.static_range(J):
        queries, written = (), ()
        for i in tl.static_range(BT):
            query, write = _pair(pairs + (i * LK * J + j))
            queries, written = queries + (query,), written + (write,)
        d_queries, d_written = _filled(zero, BT), _filled(zero, BT)
        new_steps, new_values, new_lows = (), (), ()
        for c in tl.static_range(C):
            scale = scales[c * J + j]
            ok = (keys_left > j) & (values_left > c * LV)
            state = tl.load(starts + (j * V + c * LV), mask=ok, other=0.0)
            gates, before = (), ()
            for i in tl.static_range(BT):
                gates = gates + (tl.exp2(steps[i * C + c] * scale),)
                before = before + (state,)
                decay = _decay(gates[i], low[c], width[c], UNIT)
                state = decay * state + written[i] * values[i * C + c]
            d_state, d_scale, d_low = d_states[c * J + j], d_scales[c * J + j], d_lows[c if LOWER else 0]
            c_queries, c_written, c_steps, c_values = (), (), (), ()
            for i in tl.static_range(BT - 1, -1, -1):
                d_out = d_outs[i * C + c]
                d_state += queries[i] * d_out
                c_queries = (d_queries[i] + d_out * state,) + c_queries
                c_written = (d_written[i] + d_state * values[i * C + c],) + c_written
                c_values = (d_values[i * C + c] + d_state * written[i],) + c_values
                if UNIT:
                    d_state *= gates[i]
                    d_gated = d_state * before[i]
                else:
                    d_decay = d_state * before[i]
                    if LOWER:
                        d_low += d_decay * (1 - gates[i])
                    d_gated = d_decay * gates[i]
                    d_state *= _decay(gates[i], low[c], width[c], UNIT)
                d_scale += d_gated * steps[i * C + c]
                c_steps = (d_steps[i * C + c] + d_gated * scale,) + c_steps
                state = before[i]
            d_queries, d_written = c_queries, c_written
            new_steps, new_values = new_steps + c_steps, new_values + c_values
            all_states, all_scales = all_states + (d_state,), all_scales + (d_scale,)
            if LOWER:
                new_lows = new_lows + (d_low,)
        # From channel by channel to step by step.
        d_steps, d_values = (), ()
        for i in tl.static_range(BT):
            for c in tl.static_range(C):
                d_steps, d_values = d_steps + (new_steps[c * BT + i],), d_values + (new_values[c * BT + i],)
        if LOWER:
            d_lows = new_lows
        _store_channel_sums(part_q + j * plane, d_queries, lane, W, LK, LV, BT)
        _store_channel_sums(part_write + j * plane, d_written, lane, W, LK, LV, BT)
    scaled = ()
    for i in tl.static_range(BT):
        for c in tl.static_range(C):
            scaled = scaled + (d_steps[i * C + c] * (width[c] * _LN_2),)
    _store_keys_sums(d_dt, scaled, lane_key, values_left, STRIDE, W, LK, LV, C, BT, MASKED)
    _store_keys_sums(d_v, d_values, lane_key, values_left, STRIDE, W, LK, LV, C, BT, MASKED)
    new_states, new_scales = (), ()
    for c in tl.static_range(C):
        for j in tl.static_range(J):
            new_states, new_scales = new_states + (all_states[j * C + c],), new_scales + (all_scales[j * C + c],)
    return new_states, new_scales, d_lows


@triton.jit(do_not_specialize=["T", "rows", "segments", "length"])
def scan_backward(
    dt, A, lower_end, pairs, v, starts, d_o, d_final, d_dt, d_v, parts, d_A, d_lower_end, d_initial,
    T, rows, segments, length, lo, hi,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, LK: tl.constexpr,
    LV: tl.constexpr, J: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, LOWER: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """All gradients. Those that sum over channels or time are partial sums, to be added up in a fixed order:
    of q and write in `parts` [2, channel block and warp, row, key, T], d_A [row and segment, K, V] and d_lower_end [row
    and segment, V]. `d_final` [row and segment, K, V] has the gradients of the states after all segments.
    """
    STRIDE: tl.constexpr = H * V
    MASKED: tl.constexpr = V % (W * LV * C) != 0
    head, segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    h = head % H
    lane, lane_key, warp = _lanes(W, LK, LV)
    value = (tl.program_id(1) * W + warp) * (C * LV) + lane
    values_left, keys_left, matrix = V - value, K - lane_key * J, lane_key * (J * V) + value
    zero = tl.zeros([W * LK * LV], tl.float32)
    low, width = _range(lower_end + h * V + value if LOWER else lower_end, lo, hi, zero, values_left, LV, C, LOWER)
    scales = _load_scales(A + h * K * V + matrix, keys_left, values_left, V, LV, J, C)
    place = head * segments + segment
    if FINAL:
        d_states = _load_states(d_final + place * K * V + matrix, keys_left, values_left, V, LV, J, C)
    else:
        d_states = _filled(zero, C * J)
    d_scales, d_lows = _filled(zero, C * J), _filled(zero, C if LOWER else 1)
    tiles = T // BT
    rest = T - tiles * BT
    begin = segment * length
    end = tl.minimum(begin + length, tiles)
    past = tl.where(segment == segments - 1, T, end * BT)
    left = past - end * BT
    at = ((head // H * T + past) * H + h) * V + value
    own = at + lane_key * STRIDE
    dt, v, d_o, d_dt, d_v = dt + at, v + at, d_o + at, d_dt + own, d_v + own
    pairs += (head * T + past) * (LK * J) + lane_key * J
    starts += (head * (tiles + rest) + end + left) * (K * V) + matrix
    block = (tl.program_id(1) * W + warp).to(tl.int64)
    part_q = parts + ((block * rows + head) * (LK * J) + lane_key * J) * T + past + lane
    part_write = part_q + tl.num_programs(1).to(tl.int64) * W * rows * (LK * J) * T
    # Pointers are moved behind a tile, so that all numbers of one are at constant offsets from them.
    dt, v, d_o, d_dt, d_v = dt - STRIDE, v - STRIDE, d_o - STRIDE, d_dt - STRIDE, d_v - STRIDE
    pairs, starts, part_q, part_write = pairs - LK * J, starts - K * V, part_q - 1, part_write - 1
    for _ in range(left):
        d_states, d_scales, d_lows = _backward_tile(
            dt, v, d_o, pairs, starts, d_dt, d_v, part_q, part_write, d_states, d_scales, d_lows, scales, low, width,
            lane_key, lane, keys_left, values_left, T, V, STRIDE, J, W, LK, LV, C, 1, MASKED, UNIT, LOWER,
        )  # fmt: skip
        dt, v, d_o, d_dt, d_v = dt - STRIDE, v - STRIDE, d_o - STRIDE, d_dt - STRIDE, d_v - STRIDE
        pairs, starts, part_q, part_write = pairs - LK * J, starts - K * V, part_q - 1, part_write - 1
    MORE: tl.constexpr = (BT - 1) * STRIDE
    dt, v, d_o, d_dt, d_v = dt - MORE, v - MORE, d_o - MORE, d_dt - MORE, d_v - MORE
    pairs, part_q, part_write = pairs - (BT - 1) * LK * J, part_q - (BT - 1), part_write - (BT - 1)
    for _ in range(begin, end):
        d_states, d_scales, d_lows = _backward_tile(
            dt, v, d_o, pairs, starts, d_dt, d_v, part_q, part_write, d_states, d_scales, d_lows, scales, low, width,
            lane_key, lane, keys_left, values_left, T, V, STRIDE, J, W, LK, LV, C, BT, MASKED, UNIT, LOWER,
        )  # fmt: skip
        dt, v, d_o = dt - BT * STRIDE, v - BT * STRIDE, d_o - BT * STRIDE
        d_dt, d_v = d_dt - BT * STRIDE, d_v - BT * STRIDE
        pairs, starts, part_q, part_write = pairs - BT * LK * J, starts - K * V, part_q - BT, part_write - BT
    scaled = ()
    for c in tl.static_range(C):
        for j in tl.static_range(J):
            scaled = scaled + (d_scales[c * J + j] * width[c],)
    _store_states(d_A + place * K * V + matrix, scaled, keys_left, values_left, V, LV, J, C)
    if LOWER:
        for c in tl.static_range(C):
            d_low = _sum_keys(d_lows[c], W, LK, LV)
            ok = (values_left > c * LV) & (lane_key == 0)
            tl.store(d_lower_end + place * V + value + c * LV, d_low, mask=ok)
    if segment == 0:
        _store_states(d_initial + head * K * V + matrix, d_states, keys_left, values_left, V, LV, J, C)


@triton.jit(do_not_specialize=["T", "rows", "blocks"])
def add_parts(
    parts, d_q, d_write, T, rows, blocks,
    H: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradients of q and write [B, T, H, K] from their `parts` [2, blocks, row, PADDED, T], in a fixed order."""
    head = tl.program_id(0).to(tl.int64)
    token, key = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BK)
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
