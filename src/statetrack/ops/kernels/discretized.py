"""Triton kernels for Mamba's selective scan with any eigenvalue range; `docs/kernels.md` explains them.

Every key n of every value channel is a scalar recurrence of its own, h <- decay h + write_n v. A tile has BT steps of
BV channels; for one key after the other its BT BV states live in registers, and an associative scan along time computes
them. Between tiles they are kept, [row and tile, K, V] in float32; all other numbers of the size B T K V exist nowhere.

With SERIAL one program walks through all tiles of its channels and hands the state on. Otherwise each program has one
tile: what tiles do to any state has been found by `summarize_*` and the states between them by `join_tiles`.
"""

# What a branch on a constant leaves out does not exist in the compiled kernel.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _compose(decay, h, next_decay, next_h):
    """First h -> decay x + h, then the same with the next two."""
    return decay * next_decay, next_decay * h + next_h


@triton.jit
def _decays(dt, ok, a, low, width):
    """exp(dt A), and the decays that it becomes in the range; 1 where there is no step."""
    gate = tl.exp2(dt * a[None, :])
    return gate, tl.where(ok, low + width * gate, 1.0)


@triton.jit
def _range(lower_end, lo, hi, h, value, value_ok, V: tl.constexpr, LOWER: tl.constexpr):
    """The lower end, and the width of the range; with LOWER a number for each value channel."""
    if LOWER:
        low = tl.load(lower_end + h * V + value, mask=value_ok, other=0.0)[None, :]
    else:
        low = tl.full([1, 1], 0.0, tl.float32) + lo
    return low, hi - low


@triton.jit
def _row(x, index, BT: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BT) == index)[:, None], x, 0.0), axis=0)


@triton.jit(do_not_specialize=["T", "tiles"])
def summarize_forward(
    dt, A, lower_end, write, v, ends, products,
    T, H, tiles, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """For every tile its last state, had it started from zero, and the product of its decays."""
    place = tl.program_id(0).to(tl.int64)
    head, tile = place // tiles, place % tiles
    h = head % H
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    t = head // H * T + tile * BT + tl.arange(0, BT)[:, None]
    steps_ok = tile * BT + tl.arange(0, BT) < T
    ok = steps_ok[:, None] & value_ok[None, :]
    low, width = _range(lower_end, lo, hi, h, value, value_ok, V, LOWER)
    steps = tl.load(dt + (t * H + h) * V + value[None, :], mask=ok, other=0.0).to(tl.float32)
    values = tl.load(v + (t * H + h) * V + value[None, :], mask=ok, other=0.0).to(tl.float32)
    for key in range(K):
        a = tl.load(A + (h * K + key) * V + value, mask=value_ok, other=0.0) * _LOG2_E
        written = tl.load(write + (t * H + h) * K + key, mask=steps_ok[:, None], other=0.0).to(tl.float32)
        _, decay = _decays(steps, steps_ok[:, None], a, low, width)
        product, state = tl.associative_scan((decay, written * values), 0, _compose)
        at = (place * K + key) * V + value
        tl.store(ends + at, _row(state, BT - 1, BT), mask=value_ok)
        tl.store(products + at, _row(product, BT - 1, BT), mask=value_ok)


@triton.jit(do_not_specialize=["T", "tiles"])
def summarize_backward(
    dt, A, lower_end, q, d_o, d_starts, products,
    T, H, tiles, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """For every tile the gradient of its first state as far as its own outputs go, and the product of its decays."""
    place = tl.program_id(0).to(tl.int64)
    head, tile = place // tiles, place % tiles
    h = head % H
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    t = head // H * T + tile * BT + tl.arange(0, BT)[:, None]
    steps_ok = tile * BT + tl.arange(0, BT) < T
    ok = steps_ok[:, None] & value_ok[None, :]
    low, width = _range(lower_end, lo, hi, h, value, value_ok, V, LOWER)
    steps = tl.load(dt + (t * H + h) * V + value[None, :], mask=ok, other=0.0).to(tl.float32)
    d_out = tl.load(d_o + (t * H + h) * V + value[None, :], mask=ok, other=0.0).to(tl.float32)
    for key in range(K):
        a = tl.load(A + (h * K + key) * V + value, mask=value_ok, other=0.0) * _LOG2_E
        query = tl.load(q + (t * H + h) * K + key, mask=steps_ok[:, None], other=0.0).to(tl.float32)
        _, decay = _decays(steps, steps_ok[:, None], a, low, width)
        product = tl.cumprod(decay, axis=0)
        at = (place * K + key) * V + value
        tl.store(d_starts + at, tl.sum(product * query * d_out, axis=0), mask=value_ok)
        tl.store(products + at, _row(product, BT - 1, BT), mask=value_ok)


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
    value_ok = value < V
    low, width = _range(lower_end, lo, hi, h, value, value_ok, V, LOWER)
    for index in range(count):
        tile = begin + index
        t = head // H * T + tile * BT + tl.arange(0, BT)[:, None]
        steps_ok = tile * BT + tl.arange(0, BT) < T
        ok = steps_ok[:, None] & value_ok[None, :]
        steps = tl.load(dt + (t * H + h) * V + value[None, :], mask=ok, other=0.0).to(tl.float32)
        values = tl.load(v + (t * H + h) * V + value[None, :], mask=ok, other=0.0).to(tl.float32)
        out = tl.zeros([BT, BV], tl.float32)
        for key in range(K):
            a = tl.load(A + (h * K + key) * V + value, mask=value_ok, other=0.0) * _LOG2_E
            query = tl.load(q + (t * H + h) * K + key, mask=steps_ok[:, None], other=0.0).to(tl.float32)
            written = tl.load(write + (t * H + h) * K + key, mask=steps_ok[:, None], other=0.0).to(tl.float32)
            _, decay = _decays(steps, steps_ok[:, None], a, low, width)
            product, state = tl.associative_scan((decay, written * values), 0, _compose)
            start = tl.load(starts + ((head * tiles + tile) * K + key) * V + value, mask=value_ok, other=0.0)
            state += product * start[None, :]
            out += query * state
            end = _row(state, BT - 1, BT)
            if tile == tiles - 1:
                tl.store(final + (head * K + key) * V + value, end, mask=value_ok)
            elif SERIAL:
                tl.store(starts + ((head * tiles + tile + 1) * K + key) * V + value, end, mask=value_ok)
        tl.store(o + (t * H + h) * V + value[None, :], out.to(o.dtype.element_ty), mask=ok)
        if SERIAL:
            # The next tile loads what other threads of this program have just stored.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "tiles"])
def scan_backward(
    dt, A, lower_end, q, write, v, starts, d_o, d_ends,
    d_dt, d_v, d_q, d_write, d_A, d_lower_end, d_initial,
    T, H, tiles, rows, lo, hi,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LOWER: tl.constexpr, SERIAL: tl.constexpr,
):  # fmt: skip
    """All gradients. Those that sum over channels or time are partial sums, to be added up in a fixed order:
    d_q and d_write [channel block, row, K, T], d_A [row and tile, K, V], d_lower_end [row and tile, V].

    `d_ends` has the gradients of the states after all tiles; with SERIAL only the last is given. A decay's own gradient
    is that of the state after it times the state before it, so every scan is done as far as the step before: with the
    decays of the neighbours, for nothing is divided by a decay.
    """
    pid = tl.program_id(0).to(tl.int64)
    if SERIAL:
        head, last, count = pid, tiles - 1, tiles
    else:
        head, last, count = pid // tiles, (pid % tiles).to(tl.int32), 1
    h = head % H
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    value_ok = value < V
    low, width = _range(lower_end, lo, hi, h, value, value_ok, V, LOWER)
    step = tl.arange(0, BT)
    for index in range(count):
        tile = last - index
        t = head // H * T + tile * BT + step[:, None]
        steps_ok = (tile * BT + step < T)[:, None]
        before_ok, after_ok = (
            (step > 0)[:, None] & steps_ok,
            (step < BT - 1)[:, None] & (tile * BT + step + 1 < T)[:, None],
        )
        ok = steps_ok & value_ok[None, :]
        at = (t * H + h) * V + value[None, :]
        steps = tl.load(dt + at, mask=ok, other=0.0).to(tl.float32)
        steps_before = tl.load(dt + at - H * V, mask=before_ok & value_ok[None, :], other=0.0).to(tl.float32)
        steps_after = tl.load(dt + at + H * V, mask=after_ok & value_ok[None, :], other=0.0).to(tl.float32)
        values = tl.load(v + at, mask=ok, other=0.0).to(tl.float32)
        values_before = tl.load(v + at - H * V, mask=before_ok & value_ok[None, :], other=0.0).to(tl.float32)
        d_out = tl.load(d_o + at, mask=ok, other=0.0).to(tl.float32)
        d_steps, d_values = tl.zeros([BT, BV], tl.float32), tl.zeros([BT, BV], tl.float32)
        d_low = tl.zeros([BV], tl.float32)
        for key in range(K):
            a = tl.load(A + (h * K + key) * V + value, mask=value_ok, other=0.0) * _LOG2_E
            key_at = (t * H + h) * K + key
            query = tl.load(q + key_at, mask=steps_ok, other=0.0).to(tl.float32)
            written = tl.load(write + key_at, mask=steps_ok, other=0.0).to(tl.float32)
            written_before = tl.load(write + key_at - H * K, mask=before_ok, other=0.0).to(tl.float32)
            state_at = ((head * tiles + tile) * K + key) * V + value

            _, decay_before = _decays(steps_before, before_ok, a, low, width)
            product, state_before = tl.associative_scan((decay_before, written_before * values_before), 0, _compose)
            state_before += product * tl.load(starts + state_at, mask=value_ok, other=0.0)[None, :]
            _, decay_after = _decays(steps_after, after_ok, a, low, width)
            product, d_state = tl.associative_scan((decay_after, query * d_out), 0, _compose, reverse=True)
            d_state += product * tl.load(d_ends + state_at, mask=value_ok, other=0.0)[None, :]

            gate, decay = _decays(steps, steps_ok, a, low, width)
            state = decay * state_before + written * values
            d_values += written * d_state
            partial_at = ((tl.program_id(1) * rows + head) * K + key) * T + tile * BT + step
            tl.store(d_q + partial_at, tl.sum(d_out * state, axis=1), mask=tile * BT + step < T)
            tl.store(d_write + partial_at, tl.sum(values * d_state, axis=1), mask=tile * BT + step < T)
            d_decay = tl.where(steps_ok, d_state * state_before, 0.0)
            d_exponent = d_decay * gate * width
            d_steps += d_exponent * (a / _LOG2_E)[None, :]
            tl.store(d_A + state_at, tl.sum(d_exponent * steps, axis=0), mask=value_ok)
            if LOWER:
                d_low += tl.sum(d_decay * (1 - gate), axis=0)
            d_start = _row(decay * d_state, 0, BT)
            if tile == 0:
                tl.store(d_initial + (head * K + key) * V + value, d_start, mask=value_ok)
            elif SERIAL:
                tl.store(d_ends + state_at - K * V, d_start, mask=value_ok)
        tl.store(d_dt + at, d_steps.to(d_dt.dtype.element_ty), mask=ok)
        tl.store(d_v + at, d_values.to(d_v.dtype.element_ty), mask=ok)
        if LOWER:
            tl.store(d_lower_end + (head * tiles + tile) * V + value, d_low, mask=value_ok)
        if SERIAL:
            # The next tile loads what other threads of this program have just stored.
            tl.debug_barrier()
