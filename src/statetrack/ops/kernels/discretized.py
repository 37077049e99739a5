"""Triton kernels for Mamba's selective scan with any eigenvalue range; `docs/kernels.md` explains them.

Every key n of every value channel is a scalar recurrence of its own, h <- decay h + write_n v. A tile has BT steps of
BV channels, all in registers: a thread has channels of its own and goes through the steps, unrolled, one key after the
other. Between tiles the states are kept, [row and tile, K, V] in float32; all other numbers of the size B T K V exist
nowhere.

With SERIAL one program walks through all tiles of its channels and hands the state on. Otherwise each program has one
tile: what tiles do to any state has been found by `summarize_*` and the states between them by `join_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _vectors(x, left, stride, ok, BT: tl.constexpr):
    """A tuple of BT vectors in float32, `stride` apart in memory; zero from step `left` on."""
    rows = ()
    for i in tl.static_range(BT):
        rows = rows + (tl.load(x + i * stride, mask=ok & (i < left), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _numbers(x, left, stride, BT: tl.constexpr):
    """The same of single numbers."""
    numbers = ()
    for i in tl.static_range(BT):
        numbers = numbers + (tl.load(x + i * stride, mask=i < left, other=0.0).to(tl.float32),)
    return numbers


@triton.jit
def _store_vectors(x, rows, left, stride, ok, BT: tl.constexpr):
    for i in tl.static_range(BT):
        tl.store(x + i * stride, rows[i].to(x.dtype.element_ty), mask=ok & (i < left))


@triton.jit
def _zeros(BT: tl.constexpr, BV: tl.constexpr):
    rows = ()
    for _ in tl.static_range(BT):
        rows = rows + (tl.zeros([BV], tl.float32),)
    return rows


@triton.jit
def _range(lower_end, lo, hi, h, value, value_ok, V: tl.constexpr, LOWER: tl.constexpr):
    """The lower end, and the width of the range; with LOWER a number for each value channel."""
    if LOWER:
        low = tl.load(lower_end + h * V + value, mask=value_ok, other=0.0)
    else:
        low = tl.full([1], 0.0, tl.float32) + lo
    return low, hi - low


@triton.jit(do_not_specialize=["T", "tiles"])
def summarize_forward(
    dt, A, lower_end, write, v, ends, products,
    T, H, tiles, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """For every tile its last state, had it started from zero, and the product of its decays."""
    place = tl.program_id(0).to(tl.int64)
    head, tile = place // tiles, place % tiles
    h, first, left = head % H, head // H * T + tile * BT, T - tile * BT
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    ok = value < V
    low, width = _range(lower_end, lo, hi, h, value, ok, V, LOWER)
    at = (first * H + h) * V + value
    steps, values = _vectors(dt + at, left, H * V, ok, BT), _vectors(v + at, left, H * V, ok, BT)
    for key in range(K):
        a = tl.load(A + (h * K + key) * V + value, mask=ok, other=0.0) * _LOG2_E
        written = _numbers(write + (first * H + h) * K + key, left, H * K, BT)
        state, product = tl.zeros([BV], tl.float32), tl.full([BV], 1.0, tl.float32)
        for i in tl.static_range(BT):
            decay = tl.where(i < left, low + width * tl.exp2(steps[i] * a), 1.0)
            state = decay * state + written[i] * values[i]
            product *= decay
        tl.store(ends + (place * K + key) * V + value, state, mask=ok)
        tl.store(products + (place * K + key) * V + value, product, mask=ok)


@triton.jit(do_not_specialize=["T", "tiles"])
def summarize_backward(
    dt, A, lower_end, q, d_o, d_starts, products,
    T, H, tiles, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """For every tile the gradient of its first state as far as its own outputs go, and the product of its decays."""
    place = tl.program_id(0).to(tl.int64)
    head, tile = place // tiles, place % tiles
    h, first, left = head % H, head // H * T + tile * BT, T - tile * BT
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    ok = value < V
    low, width = _range(lower_end, lo, hi, h, value, ok, V, LOWER)
    at = (first * H + h) * V + value
    steps, d_out = _vectors(dt + at, left, H * V, ok, BT), _vectors(d_o + at, left, H * V, ok, BT)
    for key in range(K):
        a = tl.load(A + (h * K + key) * V + value, mask=ok, other=0.0) * _LOG2_E
        queries = _numbers(q + (first * H + h) * K + key, left, H * K, BT)
        d_start, product = tl.zeros([BV], tl.float32), tl.full([BV], 1.0, tl.float32)
        for i in tl.static_range(BT):
            product *= tl.where(i < left, low + width * tl.exp2(steps[i] * a), 1.0)
            d_start += product * (queries[i] * d_out[i])
        tl.store(d_starts + (place * K + key) * V + value, d_start, mask=ok)
        tl.store(products + (place * K + key) * V + value, product, mask=ok)


@triton.jit(do_not_specialize=["tiles"])
def join_tiles(ends, products, border, borders, tiles, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The states [row and tile, SIZE] before all tiles, or with REVERSE their gradients after all tiles.

    `border` [row, SIZE] is the one before the first (after the last) tile.
    """
    head = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = element < SIZE
    state = tl.load(border + head * SIZE + element, mask=ok, other=0.0)
    for step in range(tiles):
        place = head * tiles + step
        if REVERSE:
            place = head * tiles + tiles - 1 - step
        at = place * SIZE + element
        tl.store(borders + at, state, mask=ok)
        state = state * tl.load(products + at, mask=ok, other=0.0) + tl.load(ends + at, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["T", "tiles"])
def scan_forward(
    dt, A, lower_end, q, write, v, starts, o, final,
    T, H, tiles, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr, SERIAL: tl.constexpr,
):  # fmt: skip
    """Outputs and the final state. `starts` has the states before all tiles; with SERIAL only the first is given."""
    pid = tl.program_id(0).to(tl.int64)
    if SERIAL:
        head, begin, count = pid, 0, tiles
    else:
        head, begin, count = pid // tiles, (pid % tiles).to(tl.int32), 1
    h = head % H
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    ok = value < V
    low, width = _range(lower_end, lo, hi, h, value, ok, V, LOWER)
    for index in range(count):
        tile = begin + index
        first, left = head // H * T + tile * BT, T - tile * BT
        at = (first * H + h) * V + value
        steps, values = _vectors(dt + at, left, H * V, ok, BT), _vectors(v + at, left, H * V, ok, BT)
        out = _zeros(BT, BV)
        for key in range(K):
            a = tl.load(A + (h * K + key) * V + value, mask=ok, other=0.0) * _LOG2_E
            key_at = (first * H + h) * K + key
            queries = _numbers(q + key_at, left, H * K, BT)
            written = _numbers(write + key_at, left, H * K, BT)
            state = tl.load(starts + ((head * tiles + tile) * K + key) * V + value, mask=ok, other=0.0)
            sums = ()
            for i in tl.static_range(BT):
                decay = tl.where(i < left, low + width * tl.exp2(steps[i] * a), 1.0)
                state = decay * state + written[i] * values[i]
                sums = sums + (out[i] + queries[i] * state,)
            out = sums
            if tile == tiles - 1:
                tl.store(final + (head * K + key) * V + value, state, mask=ok)
            elif SERIAL:
                tl.store(starts + ((head * tiles + tile + 1) * K + key) * V + value, state, mask=ok)
        _store_vectors(o + at, out, left, H * V, ok, BT)
        if SERIAL:
            # The next tile loads what other threads of this program may have stored.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "tiles", "rows"])
def scan_backward(
    dt, A, lower_end, q, write, v, starts, d_o, d_ends,
    d_dt, d_v, d_q, d_write, d_A, d_lower_end, d_initial,
    T, H, tiles, rows, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr, SERIAL: tl.constexpr,
):  # fmt: skip
    """All gradients. Those that sum over channels or time are partial sums, to be added up in a fixed order:
    d_q and d_write [channel block, row, K, T], d_A [row and tile, K, V], d_lower_end [row and tile, V].

    `d_ends` has the gradients of the states after all tiles; with SERIAL only the last is given. The states of a tile
    are computed once more and stay in registers until the steps have been gone through from the last to the first.
    """
    pid = tl.program_id(0).to(tl.int64)
    if SERIAL:
        head, last, count = pid, tiles - 1, tiles
    else:
        head, last, count = pid // tiles, (pid % tiles).to(tl.int32), 1
    h = head % H
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    ok = value < V
    low, width = _range(lower_end, lo, hi, h, value, ok, V, LOWER)
    for index in range(count):
        tile = last - index
        first, left = head // H * T + tile * BT, T - tile * BT
        at = (first * H + h) * V + value
        steps, values = _vectors(dt + at, left, H * V, ok, BT), _vectors(v + at, left, H * V, ok, BT)
        d_out = _vectors(d_o + at, left, H * V, ok, BT)
        d_steps, d_values = _zeros(BT, BV), _zeros(BT, BV)
        d_low = tl.zeros([BV], tl.float32)
        for key in range(K):
            a = tl.load(A + (h * K + key) * V + value, mask=ok, other=0.0)
            key_at = (first * H + h) * K + key
            queries = _numbers(q + key_at, left, H * K, BT)
            written = _numbers(write + key_at, left, H * K, BT)
            state_at = ((head * tiles + tile) * K + key) * V + value
            partial_at = ((tl.program_id(1) * rows + head) * K + key) * T + tile * BT
            state = tl.load(starts + state_at, mask=ok, other=0.0)
            gates, before = (), ()
            for i in tl.static_range(BT):
                gates = gates + (tl.exp2(steps[i] * (a * _LOG2_E)),)
                before = before + (state,)
                state = tl.where(i < left, low + width * gates[i], 1.0) * state + written[i] * values[i]
            d_state = tl.load(d_ends + state_at, mask=ok, other=0.0)
            d_a = tl.zeros([BV], tl.float32)
            new_steps, new_values = (), ()
            for i in tl.static_range(BT - 1, -1, -1):
                d_state += queries[i] * d_out[i]
                tl.store(d_q + partial_at + i, tl.sum(d_out[i] * state, axis=0), mask=i < left)
                tl.store(d_write + partial_at + i, tl.sum(values[i] * d_state, axis=0), mask=i < left)
                new_values = (d_values[i] + written[i] * d_state,) + new_values
                # The gradient of the decay. From step `left` on dt is 0 and the gate 1, so that nothing comes of it.
                d_decay = d_state * before[i]
                if LOWER:
                    d_low += d_decay * (1 - gates[i])
                d_decay *= gates[i]
                d_a += d_decay * steps[i]
                new_steps = (d_steps[i] + d_decay * a,) + new_steps
                d_state *= tl.where(i < left, low + width * gates[i], 1.0)
                state = before[i]
            d_steps, d_values = new_steps, new_values
            tl.store(d_A + state_at, d_a * width, mask=ok)
            if tile == 0:
                tl.store(d_initial + (head * K + key) * V + value, d_state, mask=ok)
            elif SERIAL:
                tl.store(d_ends + state_at - K * V, d_state, mask=ok)
        scaled = ()
        for i in tl.static_range(BT):
            scaled = scaled + (d_steps[i] * width,)
        _store_vectors(d_dt + at, scaled, left, H * V, ok, BT)
        _store_vectors(d_v + at, d_values, left, H * V, ok, BT)
        if LOWER:
            tl.store(d_lower_end + (head * tiles + tile) * V + value, d_low, mask=ok)
        if SERIAL:
            # The next tile loads what other threads of this program may have stored.
            tl.debug_barrier()
