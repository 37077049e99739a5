"""Triton kernels for what is before and after Mamba's selective scan, number by number, forward and backward.

    before:  dt = softplus(raw + bias),  v = dt u          after:  y = (o + D u) silu(z)

Tensors are [R, n, C], replicas by tokens by channels, or [n, R, C] if the scan reads or writes them, for which replicas
are heads. A program takes RUN times BN tokens of BC channels of a replica; gradients of a number for each channel leave
it as one float32 partial sum, [programs along tokens, R, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from statetrack.ops.kernels.gate import _sigmoid


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to the last bits also where it is small, as step sizes are."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3: the first term left out is below 2e-8 of it.
    s = e / (2 + e)
    w = s * s
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def _channels(C: tl.constexpr, BC: tl.constexpr):
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    return channel, channel < C


@triton.jit
def _places(i, n, channel, ok, C: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr):
    """Of a tile: the rows of its tokens in tensors [R, n, C], its places in them and in those of the scan, and whether
    there are such."""
    token = ((tl.program_id(0).to(tl.int64) * RUN + i) * BN + tl.arange(0, BN))[:, None]
    replica = tl.program_id(2)
    row, scanned = replica * n + token, token * tl.num_programs(2) + replica
    return row, row * C + channel[None, :], scanned * C + channel[None, :], (token < n) & ok[None, :]


@triton.jit
def _parameter(x, channel, ok, C: tl.constexpr):
    return tl.load(x + tl.program_id(2) * C + channel, mask=ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_part(x, channel, ok, total, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    tl.store(x + row * C + channel, tl.sum(total, axis=0), mask=ok)


@triton.jit
def _tile(x, place, inside):
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(x, place, value, inside):
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def before(raw, bias, u, dt, v, n, C: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    channel, ok = _channels(C, BC)
    offset = _parameter(bias, channel, ok, C)
    for i in range(RUN):
        _, place, of_scan, inside = _places(i, n, channel, ok, C, RUN, BN)
        step = _softplus(_tile(raw, place, inside) + offset)
        _put(dt, of_scan, step, inside)
        _put(v, of_scan, step * _tile(u, place, inside), inside)


@triton.jit(do_not_specialize=["n"])
def after(
    o, u, D, z, y, n,
    C: tl.constexpr, STRIDE: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows of z are STRIDE numbers from each other."""
    channel, ok = _channels(C, BC)
    skip = _parameter(D, channel, ok, C)
    for i in range(RUN):
        row, place, of_scan, inside = _places(i, n, channel, ok, C, RUN, BN)
        gate = _tile(z, row * STRIDE + channel[None, :], inside)
        opened, _ = _sigmoid(gate)
        out = _tile(o, of_scan, inside) + skip * _tile(u, place, inside)
        _put(y, place, out * (gate * opened), inside)


@triton.jit(do_not_specialize=["n"])
def after_backward(
    raw, bias, o, u, D, z, d_y, dt, v, d_o, d_z, d_D, n,
    C: tl.constexpr, STRIDE: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients of o and z and parts of that of D; and what `before` computes, once more."""
    channel, ok = _channels(C, BC)
    offset, skip = _parameter(bias, channel, ok, C), _parameter(D, channel, ok, C)
    total = tl.zeros([BN, BC], tl.float32)
    for i in range(RUN):
        row, place, of_scan, inside = _places(i, n, channel, ok, C, RUN, BN)
        value = _tile(u, place, inside)
        step = _softplus(_tile(raw, place, inside) + offset)
        _put(dt, of_scan, step, inside)
        _put(v, of_scan, step * value, inside)
        gate, d_out = _tile(z, row * STRIDE + channel[None, :], inside), _tile(d_y, place, inside)
        opened, slope = _sigmoid(gate)
        _put(d_z, place, d_out * (_tile(o, of_scan, inside) + skip * value) * (opened + gate * slope), inside)
        d_out *= gate * opened
        _put(d_o, of_scan, d_out, inside)
        total += d_out * value
    _store_part(d_D, channel, ok, total, C)


@triton.jit(do_not_specialize=["n"])
def before_backward(
    raw, bias, u, D, d_o, d_dt, d_v, d_raw, d_u, d_bias, n,
    C: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of raw, that of u in all its places, and parts of that of the bias."""
    channel, ok = _channels(C, BC)
    offset, skip = _parameter(bias, channel, ok, C), _parameter(D, channel, ok, C)
    total = tl.zeros([BN, BC], tl.float32)
    for i in range(RUN):
        _, place, of_scan, inside = _places(i, n, channel, ok, C, RUN, BN)
        x, d_value = _tile(raw, place, inside) + offset, _tile(d_v, of_scan, inside)
        opened, _ = _sigmoid(x)
        d_x = (_tile(d_dt, of_scan, inside) + d_value * _tile(u, place, inside)) * opened
        _put(d_raw, place, d_x, inside)
        _put(d_u, place, d_value * _softplus(x) + skip * _tile(d_o, of_scan, inside), inside)
        # What is loaded outside is zeros, and so is its gradient.
        total += d_x
    _store_part(d_bias, channel, ok, total, C)
