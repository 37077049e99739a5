"""Triton kernels for sLSTM's recurrence: a program goes through all tokens of BB sequences of one head.

    (z, i, f, o)_t = gates_t + h_{t-1} R,     R [N, 4 N]

The four matrices [N, N] of R stay on the chip for all tokens, tiles of BN x BN with N in the first so many, and so do
the states [BB, BN]. All is float32; products with R are in PRECISION, tf32x3 or full float32, as what they give is fed
back. Tensors are contiguous: gates [T, H, B, 4 N], states [T, H, B, N], starts [H, B, N].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _matrix(recurrent, head, gate: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """The part of R that makes one gate: [BN, BN], rows for h, zero outside."""
    row, column = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]
    places = (head * N + row) * (4 * N) + gate * N + column
    return tl.load(recurrent + places, mask=(row < N) & (column < N), other=0.0)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _tanh(x):
    # exp of what is never positive can't overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit(do_not_specialize=["T"])
def forward(
    gates, recurrent, h_start, c_start, n_start, m_start, h_all, c_all, n_all, m_all,
    T, H, B,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row, channel = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, BN)
    ok = (row < B)[:, None] & (channel < N)[None, :]
    r_z, r_i = _matrix(recurrent, head, 0, N, BN), _matrix(recurrent, head, 1, N, BN)
    r_f, r_o = _matrix(recurrent, head, 2, N, BN), _matrix(recurrent, head, 3, N, BN)
    at = (head * B + row)[:, None] * N + channel[None, :]
    gate_at = (head * B + row)[:, None] * (4 * N) + channel[None, :]
    h, c = tl.load(h_start + at, mask=ok, other=0.0), tl.load(c_start + at, mask=ok, other=0.0)
    n, m = tl.load(n_start + at, mask=ok, other=1.0), tl.load(m_start + at, mask=ok, other=0.0)
    for _ in range(T):
        z = tl.dot(h, r_z, tl.load(gates + gate_at, mask=ok, other=0.0), input_precision=PRECISION)
        i = tl.dot(h, r_i, tl.load(gates + gate_at + N, mask=ok, other=0.0), input_precision=PRECISION)
        f = tl.dot(h, r_f, tl.load(gates + gate_at + 2 * N, mask=ok, other=0.0), input_precision=PRECISION)
        o = tl.dot(h, r_o, tl.load(gates + gate_at + 3 * N, mask=ok, other=0.0), input_precision=PRECISION)
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
        at += H * B * N
        gate_at += H * B * 4 * N


@triton.jit(do_not_specialize=["T"])
def backward(
    seen, recurrent, c_start, n_start, m_start, h_all, c_all, n_all, m_all, d_h, d_c, d_n,
    d_gates, d_h_start, d_c_start, d_n_start,
    T, H, B,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last token to the first: the gradients of the gates and of the states before the first token.

    `seen` are gates_t + h_{t-1} R, which one matrix product makes for all tokens outside, as R and its transpose would
    not both fit on the chip. The gradient of R is such a product too.
    """
    head = tl.program_id(0).to(tl.int64)
    row, channel = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, BN)
    ok = (row < B)[:, None] & (channel < N)[None, :]
    r_z, r_i = _matrix(recurrent, head, 0, N, BN), _matrix(recurrent, head, 1, N, BN)
    r_f, r_o = _matrix(recurrent, head, 2, N, BN), _matrix(recurrent, head, 3, N, BN)
    start_at = (head * B + row)[:, None] * N + channel[None, :]
    stride = (H * B * N).to(tl.int64)
    h_later = tl.zeros([BB, BN], tl.float32)
    c_later, n_later = tl.zeros([BB, BN], tl.float32), tl.zeros([BB, BN], tl.float32)
    for step in range(T):
        t = T - 1 - step
        at = start_at + t * stride
        gate_at = (head * B + row)[:, None] * (4 * N) + channel[None, :] + t * stride * 4
        earlier, first = ok & (t > 0), ok & (t == 0)
        before = at - stride
        # The states before the token: those after the one before, or the start's.
        c = tl.load(c_all + before, mask=earlier, other=0.0) + tl.load(c_start + start_at, mask=first, other=0.0)
        n = tl.load(n_all + before, mask=earlier, other=0.0) + tl.load(n_start + start_at, mask=first, other=0.0)
        m = tl.load(m_all + before, mask=earlier, other=0.0) + tl.load(m_start + start_at, mask=first, other=0.0)
        h_now, n_now = tl.load(h_all + at, mask=ok, other=0.0), tl.load(n_all + at, mask=ok, other=1.0)
        c_now, m_now = tl.load(c_all + at, mask=ok, other=0.0), tl.load(m_all + at, mask=ok, other=0.0)
        z, i = tl.load(seen + gate_at, mask=ok, other=0.0), tl.load(seen + gate_at + N, mask=ok, other=0.0)
        f, o = tl.load(seen + gate_at + 2 * N, mask=ok, other=0.0), tl.load(seen + gate_at + 3 * N, mask=ok, other=0.0)
        z, o = _tanh(z), tl.sigmoid(o)
        forget, write = tl.exp(_log_sigmoid(f) + m - m_now), tl.exp(i - m_now)
        dh = tl.load(d_h + at, mask=ok, other=0.0) + h_later
        dc = tl.load(d_c + at, mask=ok, other=0.0) + c_later + dh * o / n_now
        dn = tl.load(d_n + at, mask=ok, other=0.0) + n_later - dh * h_now / n_now
        d_z = tl.where(ok, dc * write * (1.0 - z * z), 0.0)
        d_i = tl.where(ok, (dn + dc * z) * write, 0.0)
        d_f = tl.where(ok, (dn * n + dc * c) * forget * tl.sigmoid(-f), 0.0)
        d_o = tl.where(ok, dh * c_now / n_now * o * (1.0 - o), 0.0)
        tl.store(d_gates + gate_at, d_z, mask=ok)
        tl.store(d_gates + gate_at + N, d_i, mask=ok)
        tl.store(d_gates + gate_at + 2 * N, d_f, mask=ok)
        tl.store(d_gates + gate_at + 3 * N, d_o, mask=ok)
        h_later = tl.dot(d_z, tl.trans(r_z), input_precision=PRECISION)
        h_later = tl.dot(d_i, tl.trans(r_i), h_later, input_precision=PRECISION)
        h_later = tl.dot(d_f, tl.trans(r_f), h_later, input_precision=PRECISION)
        h_later = tl.dot(d_o, tl.trans(r_o), h_later, input_precision=PRECISION)
        c_later, n_later = dc * forget, dn * forget
    tl.store(d_h_start + start_at, h_later, mask=ok)
    tl.store(d_c_start + start_at, c_later, mask=ok)
    tl.store(d_n_start + start_at, n_later, mask=ok)
