"""Triton kernels for sLSTM's recurrence: a program goes through all tokens of BB rows of one head.

    (z, i, f, o)_t = inputs_t + bias + h_{t-1} R,     R [N, 4 N]

The four matrices [N, N] of R stay on the chip for all tokens, tiles of BN x BN with N in the first so many, and so do
the states [BB, BN]. All is float32; products with R are in PRECISION, tf32x3 or full float32, as what they give is fed
back. Tensors are contiguous: inputs and states [G B, T, H, N], starts [G B, H, N], and the parameters of each of the G
groups of B rows, bias [G, H, 4 N] and R [G, H, N, 4 N].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _matrix(recurrent, which, gate: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """The part of R that makes one gate: [BN, BN], rows for h, zero outside."""
    row, column = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]
    places = (which * N + row) * (4 * N) + gate * N + column
    return tl.load(recurrent + places, mask=(row < N) & (column < N), other=0.0)


@triton.jit
def _bias(bias, which, gate: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    channel = tl.arange(0, BN)
    return tl.load(bias + which * (4 * N) + gate * N + channel, mask=channel < N, other=0.0)[None, :]


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _tanh(x):
    # exp of what is never positive can't overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit(do_not_specialize=["T", "B", "R"])
def forward(
    z_all, i_all, f_all, o_all, bias, recurrent, h_start, c_start, n_start, m_start,
    h_all, c_all, n_all, m_all, gates,
    T, H, B, R,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0).to(tl.int64)  # of the G H heads
    group, head = which // H, which % H
    row, channel = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, BN)
    ok = (row < B)[:, None] & (channel < N)[None, :]
    r_z, r_i = _matrix(recurrent, which, 0, N, BN), _matrix(recurrent, which, 1, N, BN)
    r_f, r_o = _matrix(recurrent, which, 2, N, BN), _matrix(recurrent, which, 3, N, BN)
    b_z, b_i = _bias(bias, which, 0, N, BN), _bias(bias, which, 1, N, BN)
    b_f, b_o = _bias(bias, which, 2, N, BN), _bias(bias, which, 3, N, BN)
    start_at = ((group * B + row) * H + head)[:, None] * N + channel[None, :]
    at = ((group * B + row) * T * H + head)[:, None] * N + channel[None, :]
    plane = R.to(tl.int64) * T * H * N
    h, c = tl.load(h_start + start_at, mask=ok, other=0.0), tl.load(c_start + start_at, mask=ok, other=0.0)
    n, m = tl.load(n_start + start_at, mask=ok, other=1.0), tl.load(m_start + start_at, mask=ok, other=0.0)
    for _ in range(T):
        z = b_z + tl.load(z_all + at, mask=ok, other=0.0).to(tl.float32)
        i = b_i + tl.load(i_all + at, mask=ok, other=0.0).to(tl.float32)
        f = b_f + tl.load(f_all + at, mask=ok, other=0.0).to(tl.float32)
        o = b_o + tl.load(o_all + at, mask=ok, other=0.0).to(tl.float32)
        z = tl.dot(h, r_z, z, input_precision=PRECISION)
        i = tl.dot(h, r_i, i, input_precision=PRECISION)
        f = tl.dot(h, r_f, f, input_precision=PRECISION)
        o = tl.dot(h, r_o, o, input_precision=PRECISION)
        if SAVE:
            tl.store(gates + at, z, mask=ok)
            tl.store(gates + plane + at, i, mask=ok)
            tl.store(gates + 2 * plane + at, f, mask=ok)
            tl.store(gates + 3 * plane + at, o, mask=ok)
        kept = _log_sigmoid(f) + m
        m = tl.maximum(kept, i)
        forget, write = tl.exp(kept - m), tl.exp(i - m)
        c = forget * c + write * _tanh(z)
        n = forget * n + write
        h = tl.where(ok, tl.sigmoid(o) * c / n, 0.0)
        tl.store(h_all + at, h, mask=ok)
        tl.store(c_all + at, c, mask=ok)
        tl.store(n_all + at, n, mask=ok)
        tl.store(m_all + at, m, mask=ok)
        at += H * N


@triton.jit(do_not_specialize=["T", "B", "R"])
def backward(
    gates, recurrent, c_start, n_start, m_start, h_all, c_all, n_all, m_all, d_h, d_c, d_n,
    d_z_all, d_i_all, d_f_all, d_o_all, d_gates, d_h_start, d_c_start, d_n_start,
    T, H, B, R,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, NORMALIZER: tl.constexpr,
):  # fmt: skip
    """From the last token to the first: the gradients of the inputs and of the first states.

    Args:
        gates: [4, G B, T, H, N], with the bias and what h R adds.
        d_gates: the gradients of the inputs once more, all in float32, [4, G B, T, H, N], for `parameters`.
        C, NORMALIZER: whether c and n have gradients of their own.
    """
    which = tl.program_id(0).to(tl.int64)
    group, head = which // H, which % H
    row, channel = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, BN)
    ok = (row < B)[:, None] & (channel < N)[None, :]
    r_z, r_i = _matrix(recurrent, which, 0, N, BN), _matrix(recurrent, which, 1, N, BN)
    r_f, r_o = _matrix(recurrent, which, 2, N, BN), _matrix(recurrent, which, 3, N, BN)
    start_at = ((group * B + row) * H + head)[:, None] * N + channel[None, :]
    step, plane = H * N, R.to(tl.int64) * T * H * N
    at = ((group * B + row) * T * H + head)[:, None] * N + channel[None, :] + (T - 1).to(tl.int64) * step
    h_later = tl.zeros([BB, BN], tl.float32)
    c_later, n_later = tl.zeros([BB, BN], tl.float32), tl.zeros([BB, BN], tl.float32)
    c_now, n_now = tl.load(c_all + at, mask=ok, other=0.0), tl.load(n_all + at, mask=ok, other=1.0)
    m_now = tl.load(m_all + at, mask=ok, other=0.0)
    for later in range(T):
        # The states before the token: those after the one before, or the start's.
        earlier, first = ok & (later < T - 1), ok & (later == T - 1)
        before = at - step
        c = tl.load(c_all + before, mask=earlier, other=0.0) + tl.load(c_start + start_at, mask=first, other=0.0)
        n = tl.load(n_all + before, mask=earlier, other=0.0) + tl.load(n_start + start_at, mask=first, other=0.0)
        n = tl.where(ok, n, 1.0)  # which the token before divides by
        m = tl.load(m_all + before, mask=earlier, other=0.0) + tl.load(m_start + start_at, mask=first, other=0.0)
        z, i = tl.load(gates + at, mask=ok, other=0.0), tl.load(gates + plane + at, mask=ok, other=0.0)
        f = tl.load(gates + 2 * plane + at, mask=ok, other=0.0)
        o = tl.load(gates + 3 * plane + at, mask=ok, other=0.0)
        z, o = _tanh(z), tl.sigmoid(o)
        forget, write = tl.exp(_log_sigmoid(f) + m - m_now), tl.exp(i - m_now)
        h_now = tl.load(h_all + at, mask=ok, other=0.0)
        dh = tl.load(d_h + at, mask=ok, other=0.0).to(tl.float32) + h_later
        dc, dn = c_later + dh * o / n_now, n_later - dh * h_now / n_now
        if C:
            dc += tl.load(d_c + at, mask=ok, other=0.0)
        if NORMALIZER:
            dn += tl.load(d_n + at, mask=ok, other=0.0)
        d_z = tl.where(ok, dc * write * (1.0 - z * z), 0.0)
        d_i = tl.where(ok, (dn + dc * z) * write, 0.0)
        d_f = tl.where(ok, (dn * n + dc * c) * forget * tl.sigmoid(-f), 0.0)
        d_o = tl.where(ok, dh * c_now / n_now * o * (1.0 - o), 0.0)
        tl.store(d_z_all + at, d_z.to(d_z_all.dtype.element_ty), mask=ok)
        tl.store(d_i_all + at, d_i.to(d_i_all.dtype.element_ty), mask=ok)
        tl.store(d_f_all + at, d_f.to(d_f_all.dtype.element_ty), mask=ok)
        tl.store(d_o_all + at, d_o.to(d_o_all.dtype.element_ty), mask=ok)
        tl.store(d_gates + at, d_z, mask=ok)
        tl.store(d_gates + plane + at, d_i, mask=ok)
        tl.store(d_gates + 2 * plane + at, d_f, mask=ok)
        tl.store(d_gates + 3 * plane + at, d_o, mask=ok)
        h_later = tl.dot(d_z, tl.trans(r_z), input_precision=PRECISION)
        h_later = tl.dot(d_i, tl.trans(r_i), h_later, input_precision=PRECISION)
        h_later = tl.dot(d_f, tl.trans(r_f), h_later, input_precision=PRECISION)
        h_later = tl.dot(d_o, tl.trans(r_o), h_later, input_precision=PRECISION)
        c_later, n_later = dc * forget, dn * forget
        c_now, n_now, m_now = c, n, m
        at = before
    tl.store(d_h_start + start_at, h_later, mask=ok)
    tl.store(d_c_start + start_at, c_later, mask=ok)
    tl.store(d_n_start + start_at, n_later, mask=ok)


@triton.jit(do_not_specialize=["T", "B", "R"])
def parameters(
    h_start, h_all, d_gates, parts,
    T, H, B, R,
    N: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one gate's part of R and of the bias, of every so manieth tile of BP tokens.

    Writes parts [G H, parts of a head, N + 1, 4 N], with the bias in the last row.
    """
    which, gate = tl.program_id(0).to(tl.int64), tl.program_id(2)
    group, head = which // H, which % H
    channel = tl.arange(0, BN)
    inside = (channel < N)[None, :]
    d_gates += gate * (R.to(tl.int64) * T * H * N)
    of_r, of_bias = tl.zeros([BN, BN], tl.float32), tl.zeros([BP, BN], tl.float32)
    for start in range(tl.program_id(1) * BP, B * T, tl.num_programs(1) * BP):
        token = start + tl.arange(0, BP)
        ok = (token < B * T)[:, None] & inside
        first = (token % T == 0)[:, None]
        at = ((group * B * T + token) * H + head)[:, None] * N + channel[None, :]
        start_at = ((group * B + token // T) * H + head)[:, None] * N + channel[None, :]
        # The state before the token.
        h = tl.load(h_all + at - H * N, mask=ok & ~first, other=0.0)
        h += tl.load(h_start + start_at, mask=ok & first, other=0.0)
        d = tl.load(d_gates + at, mask=ok, other=0.0)
        of_r = tl.dot(tl.trans(h), d, of_r, input_precision=PRECISION)
        of_bias += d
    parts += (which * tl.num_programs(1) + tl.program_id(1)) * (N + 1) * (4 * N) + gate * N
    row = tl.arange(0, BN)[:, None]
    tl.store(parts + row * (4 * N) + channel[None, :], of_r, mask=(row < N) & inside)
    tl.store(parts + N * (4 * N) + channel, tl.sum(of_bias, axis=0), mask=channel < N)
