"""Triton kernels for a causal depthwise convolution over time with its bias and activation, forward and backward.

Rows of `x` are [L, C], its tokens `STRIDE` numbers apart; PAD zeros are imagined before them. With `e_t = x_{t - PAD}`

    pre_t = bias + sum_i taps_i e_{t + i},   y_t = pre_t or silu(pre_t),   t = 0 .. M - 1,   M = L + PAD - S + 1.

`taps` are [R, C, S] and `bias` [R, C]; `rows` consecutive rows share one of the R sets. Where REACH, PAD is S - 1 and
token t sees `reach_t` tokens before it; of what is further away it sees zeros. The channels are those of up to three
parts, C0, C1 and C2 of them, 0 for none: each part of y is a tensor of its own, and a program has channels of one part.
Everything is summed in float32 in a fixed order. Widths and strides are constants, so that the compiler knows how
addresses are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(y0, y1, y2, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BC: tl.constexpr):
    """Of a program's part: its y, its first channel and size, and which of its channels the program has."""
    N0: tl.constexpr = (C0 + BC - 1) // BC
    N1: tl.constexpr = (C1 + BC - 1) // BC
    block = tl.program_id(1)
    y, first, size = y0, 0, C0
    within = block * BC
    if C1 > 0:
        second = block >= N0
        y, first, size = tl.where(second, y1, y), tl.where(second, C0, 0), tl.where(second, C1, C0)
        within = tl.where(second, (block - N0) * BC, within)
    if C2 > 0:
        third = block >= N0 + N1
        y, first, size = tl.where(third, y2, y), tl.where(third, C0 + C1, first), tl.where(third, C2, size)
        within = tl.where(third, (block - N0 - N1) * BC, within)
    return y, first, size, within + tl.arange(0, BC)


@triton.jit
def _place(blocks):
    """The row of a program, and which of the row's `blocks` it is: both lie along the first axis of the grid, as the
    others have 65,535 programs at most, which long sequences and large batches exceed."""
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks


@triton.jit
def _tokens(x, row, token, count, channel, inside, STRIDE):
    """Some tokens of a row of `count`, 0 where there are none: [tokens, BC], in the dtype of x."""
    there = (token >= 0) & (token < count)
    place = (row * count + token)[:, None] * STRIDE + channel[None, :]
    return tl.load(x + place, mask=there[:, None] & inside[None, :], other=0.0)


@triton.jit
def _set_of(taps, bias, index, channel, inside, C: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr):
    """One set's taps, a tuple of S vectors [1, BC], and its bias [1, BC]; float32."""
    place = index * C + channel
    found = ()
    for i in tl.static_range(S):
        found = found + (tl.load(taps + place * S + i, mask=inside, other=0.0).to(tl.float32)[None, :],)
    if BIAS:
        offset = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        offset = tl.zeros_like(found[0])
    return found, offset


@triton.jit(do_not_specialize=["L", "rows"])
def forward(
    x, taps, bias, reach, y0, y1, y2,
    L, rows,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr,
    STRIDE: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, REACH: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    count = L + PAD - S + 1
    row, within = _place((count + BT - 1) // BT)
    token = within * BT + tl.arange(0, BT)
    y, first, size, own = _part(y0, y1, y2, C0, C1, C2, BC)
    channel, inside = first + own, own < size
    weights, offset = _set_of(taps, bias, row // rows, channel, inside, C, S, BIAS)
    if REACH:
        reached = tl.load(reach + token, mask=token < count, other=0)[:, None]
    total = tl.zeros([BT, BC], tl.float32) + offset
    for i in tl.static_range(S):
        seen = _tokens(x, row, token + i - PAD, L, channel, inside, STRIDE).to(tl.float32)
        if REACH:
            seen = tl.where(reached >= PAD - i, seen, 0.0)
        total += weights[i] * seen
    if SILU:
        total = total * tl.sigmoid(total)
    place = (row * count + token)[:, None] * size + own[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < count)[:, None] & inside[None, :])


@triton.jit
def _d_pre(window, newest, weights, offset, d_y, S: tl.constexpr, SILU: tl.constexpr):
    """The gradient of pre_t from that of y_t; `window` holds e_t .. e_{t + S - 2}, and e_{t + S - 1} is `newest`."""
    if SILU:
        pre = offset + weights[S - 1] * newest
        for i in tl.static_range(S - 1):
            pre += weights[i] * window[i]
        gate = tl.sigmoid(pre)
        d_y = d_y * gate * (1 + pre * (1 - gate))
    return d_y


@triton.jit(do_not_specialize=["L", "rows", "run"])
def backward(
    x, taps, bias, reach, d_y0, d_y1, d_y2, d_x, d_taps, d_bias,
    L, rows, run,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr,
    STRIDE: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, REACH: tl.constexpr,
    WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """d_e_t = sum_i taps_i d_pre_{t - i}, and a program's share of the sums d_taps_i = sum_t d_pre_t e_{t + i}.

    A program has BR runs of `run` tokens, side by side, and walks along all of them at once. So x and d_y are read
    once, but for what a run sees of its neighbours: what several tokens need stays in registers.
    Tokens of d_x are WIDTH numbers apart. d_taps are [parts, C, S] and d_bias [parts, C], a part for each program of a
    channel.
    """
    row, within = _place((L + BR * run - 1) // (BR * run))
    start = PAD + (within * BR + tl.arange(0, BR)) * run
    d_y, first_channel, size, own = _part(d_y0, d_y1, d_y2, C0, C1, C2, BC)
    channel, inside = first_channel + own, own < size
    weights, offset = _set_of(taps, bias, row // rows, channel, inside, C, S, BIAS)
    # Tokens before a run, of which its first gradients consist; they are counted once, by the run whose they are. Those
    # that see zeros before x belong to no run, and are counted by the first.
    BEFORE: tl.constexpr = (S - 1 + AHEAD - 1) // AHEAD * AHEAD
    first = (start == PAD)[:, None]
    # e_t .. e_{t + S - 2}, and d_pre_{t - S + 1} .. d_pre_{t - 1} with how far back these tokens see.
    window, recent, reaches, sums = (), (), (), ()
    for i in tl.static_range(S - 1):
        before = start - BEFORE + i - PAD
        window = window + (_tokens(x, row, before, L, channel, inside, STRIDE).to(tl.float32),)
        recent = recent + (tl.zeros([BR, BC], tl.float32),)
        reaches = reaches + (tl.zeros([BR, 1], tl.int32),)
    for _ in tl.static_range(S):
        sums = sums + (tl.zeros([BR, BC], tl.float32),)
    total = tl.zeros([BR, BC], tl.float32)
    count = L + PAD - S + 1
    for step in range(-BEFORE, run, AHEAD):
        # A few tokens are asked for at once: the first use of one waits for memory.
        next_x, next_d_y, next_reach = (), (), ()
        for ahead in tl.static_range(AHEAD):
            token = start + step + ahead
            next_x = next_x + (_tokens(x, row, token + S - 1 - PAD, L, channel, inside, STRIDE),)
            next_d_y = next_d_y + (_tokens(d_y, row, token, count, own, inside, size),)
            if REACH:
                there = (token >= 0) & (token < count)
                next_reach = next_reach + (tl.load(reach + token, mask=there, other=0)[:, None],)
        for ahead in tl.static_range(AHEAD):
            newest = next_x[ahead].to(tl.float32)
            seen = window
            if REACH:
                seen = ()
                for i in tl.static_range(S - 1):
                    seen = seen + (tl.where(next_reach[ahead] >= S - 1 - i, window[i], 0.0),)
            d_pre = _d_pre(seen, newest, weights, offset, next_d_y[ahead].to(tl.float32), S, SILU)
            if REACH:
                d_e = weights[0] * tl.where(next_reach[ahead] >= S - 1, d_pre, 0.0)
            else:
                d_e = weights[0] * d_pre
            for i in tl.static_range(1, S):
                later = recent[S - 1 - i]
                if REACH:
                    later = tl.where(reaches[S - 1 - i] >= S - 1 - i, later, 0.0)
                d_e += weights[i] * later
            counted = tl.where(first | (step >= 0), d_pre, 0.0)
            updated = ()
            for i in tl.static_range(S - 1):
                updated = updated + (sums[i] + counted * seen[i],)
            sums = updated + (sums[S - 1] + counted * newest,)
            if BIAS:
                total += counted
            window = window[1:] + (newest,)
            recent = recent[1:] + (d_pre,)
            if REACH:
                reaches = reaches[1:] + (next_reach[ahead],)
            token = start + step + ahead - PAD
            place = (row * L + token)[:, None] * WIDTH + channel[None, :]
            mine = ((step >= 0) & (token < L))[:, None] & inside[None, :]
            tl.store(d_x + place, d_e.to(d_x.dtype.element_ty), mask=mine)
    part = tl.program_id(0).to(tl.int64) * C + channel
    for i in tl.static_range(S):
        tl.store(d_taps + part * S + i, tl.sum(sums[i], axis=0), mask=inside)
    if BIAS:
        tl.store(d_bias + part, tl.sum(total, axis=0), mask=inside)
