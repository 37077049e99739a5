"""Triton kernels for a causal depthwise convolution over time with its bias and activation, forward and backward.

Rows of `x` are [L, C], its tokens `STRIDE` numbers apart; PAD zeros are imagined before them. With `e_t = x_{t - PAD}`

    pre_t = bias + sum_i taps_i e_{t + i},   y_t = pre_t or silu(pre_t),   t = 0 .. M - 1,   M = L + PAD - S + 1.

`taps` are [R, C, S] and `bias` [R, C]; `rows` consecutive rows share one of the R sets. Everything is summed in float32
in a fixed order. Widths and strides are constants, so that the compiler knows how addresses are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(x, row, token, count, channel, C: tl.constexpr, STRIDE: tl.constexpr):
    """Some tokens of a row of `count`, 0 where there are none: [tokens, BC], in the dtype of x."""
    inside = (token >= 0) & (token < count)
    place = (row * count + token)[:, None] * STRIDE + channel[None, :]
    return tl.load(x + place, mask=inside[:, None] & (channel < C)[None, :], other=0.0)


@triton.jit
def _set_of(taps, bias, index, channel, C: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr):
    """One set's taps, a tuple of S vectors [1, BC], and its bias [1, BC]; float32."""
    place = index * C + channel
    found = ()
    for i in tl.static_range(S):
        found = found + (tl.load(taps + place * S + i, mask=channel < C, other=0.0).to(tl.float32)[None, :],)
    if BIAS:
        offset = tl.load(bias + place, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    else:
        offset = tl.zeros_like(found[0])
    return found, offset


@triton.jit(do_not_specialize=["L", "rows"])
def forward(
    x, taps, bias, y,
    L, rows,
    C: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    weights, offset = _set_of(taps, bias, row // rows, channel, C, S, BIAS)
    total = tl.zeros([BT, BC], tl.float32) + offset
    for i in tl.static_range(S):
        total += weights[i] * _tokens(x, row, token + i - PAD, L, channel, C, STRIDE).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    count = L + PAD - S + 1
    place = (row * count + token)[:, None] * C + channel[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < count)[:, None] & (channel < C)[None, :])


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
    x, taps, bias, d_y, d_x, d_taps, d_bias,
    L, rows, run,
    C: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """d_e_t = sum_i taps_i d_pre_{t - i}, and a program's share of the sums d_taps_i = sum_t d_pre_t e_{t + i}.

    A program has BR runs of `run` tokens, side by side, and walks along all of them at once. So x and d_y are read
    once, but for what a run sees of its neighbours: what several tokens need stays in registers.
    d_taps are [parts, C, S] and d_bias [parts, C], a part for each program of a channel.
    """
    row = tl.program_id(0).to(tl.int64)
    start = PAD + (tl.program_id(1) * BR + tl.arange(0, BR)) * run
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    weights, offset = _set_of(taps, bias, row // rows, channel, C, S, BIAS)
    # Tokens before a run, of which its first gradients consist; they are counted once, by the run whose they are. Those
    # that see zeros before x belong to no run, and are counted by the first.
    BEFORE: tl.constexpr = (S - 1 + AHEAD - 1) // AHEAD * AHEAD
    first = (start == PAD)[:, None]
    # e_t .. e_{t + S - 2} and d_pre_{t - S + 1} .. d_pre_{t - 1}.
    window, recent, sums = (), (), ()
    for i in tl.static_range(S - 1):
        window = window + (_tokens(x, row, start - BEFORE + i - PAD, L, channel, C, STRIDE).to(tl.float32),)
        recent = recent + (tl.zeros([BR, BC], tl.float32),)
    for _ in tl.static_range(S):
        sums = sums + (tl.zeros([BR, BC], tl.float32),)
    total = tl.zeros([BR, BC], tl.float32)
    for step in range(-BEFORE, run, AHEAD):
        # A few tokens are asked for at once: the first use of one waits for memory.
        next_x, next_d_y = (), ()
        for ahead in tl.static_range(AHEAD):
            token = start + step + ahead
            next_x = next_x + (_tokens(x, row, token + S - 1 - PAD, L, channel, C, STRIDE),)
            next_d_y = next_d_y + (_tokens(d_y, row, token, L + PAD - S + 1, channel, C, C),)
        for ahead in tl.static_range(AHEAD):
            newest = next_x[ahead].to(tl.float32)
            d_pre = _d_pre(window, newest, weights, offset, next_d_y[ahead].to(tl.float32), S, SILU)
            d_e = weights[0] * d_pre
            for i in tl.static_range(1, S):
                d_e += weights[i] * recent[S - 1 - i]
            counted = tl.where(first | (step >= 0), d_pre, 0.0)
            updated = ()
            for i in tl.static_range(S - 1):
                updated = updated + (sums[i] + counted * window[i],)
            sums = updated + (sums[S - 1] + counted * newest,)
            if BIAS:
                total += counted
            window = window[1:] + (newest,)
            recent = recent[1:] + (d_pre,)
            token = start + step + ahead - PAD
            inside = (step >= 0) & (token < L)
            place = (row * L + token)[:, None] * C + channel[None, :]
            tl.store(d_x + place, d_e.to(d_x.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])
    part = (row * tl.num_programs(1) + tl.program_id(1)) * C + channel
    for i in tl.static_range(S):
        tl.store(d_taps + part * S + i, tl.sum(sums[i], axis=0), mask=channel < C)
    if BIAS:
        tl.store(d_bias + part, tl.sum(total, axis=0), mask=channel < C)
