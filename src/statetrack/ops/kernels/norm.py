"""Triton kernels for the RMS norm and the layer norm of rows [C], with a sum before it, forward and backward.

Rows are [R, rows, C], and `rows` rows share one of R weights. A program has whole rows in its registers, several where
they are short. Sums run in float32 in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _centered(value, inside, C: tl.constexpr):
    return tl.where(inside, value - (tl.sum(value, axis=1) / C)[:, None], 0.0)


@triton.jit(do_not_specialize=["rows"])
def forward(
    x, y, weight, total, normed, inverse_rms,
    rows, eps,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    WEIGHT: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """normed = weight total inverse_rms, with total = x + y where ADD, else x; CENTER: less its mean, before both."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    row_of_all = tl.program_id(1).to(tl.int64) * rows + row
    channel = tl.arange(0, BC)
    place = row_of_all[:, None] * C + channel[None, :]
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        rounded = (value + tl.load(y + place, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTER:
        value = _centered(value, inside, C)
    scale = 1 / tl.sqrt(tl.sum(value * value, axis=1) / C + eps)
    tl.store(inverse_rms + row_of_all, scale, mask=row < rows)
    value *= scale[:, None]
    if WEIGHT:
        # Of the dtype of what it scales.
        factor = tl.load(weight + tl.program_id(1).to(tl.int64) * C + channel, mask=channel < C, other=0.0)
        value *= factor.to(total.dtype.element_ty).to(tl.float32)[None, :]
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def backward(
    total, weight, inverse_rms, d_normed, d_total, d_x, d_y, parts,
    rows, programs,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    WEIGHT: tl.constexpr, ADDED: tl.constexpr, TWICE: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """The gradient d_x of total, with d_total on top where ADDED; TWICE: in the dtype of d_y too; CENTER: as forwards.

    parts [R, programs, C]: of every programs-th tile of rows, the sums of d_normed total inverse_rms.
    """
    weights = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BC)
    within = channel < C
    if WEIGHT:
        factor = tl.load(weight + weights * C + channel, mask=within, other=0.0)
        factor = factor.to(total.dtype.element_ty).to(tl.float32)
        d_weight = tl.zeros([BR, BC], tl.float32)
    for first in range(tl.program_id(0) * BR, rows, programs * BR):
        row = first + tl.arange(0, BR)
        row_of_all = weights * rows + row
        place = row_of_all[:, None] * C + channel[None, :]
        inside = (row < rows)[:, None] & within[None, :]
        scale = tl.load(inverse_rms + row_of_all, mask=row < rows, other=0.0)
        unit = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            unit = _centered(unit, inside, C)
        unit *= scale[:, None]
        d_unit = tl.load(d_normed + place, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            d_weight += d_unit * unit
            d_unit *= factor[None, :]
        along = tl.sum(d_unit * unit, axis=1) / C
        d = (d_unit - unit * along[:, None]) * scale[:, None]
        if CENTER:
            d = _centered(d, inside, C)
        if ADDED:
            d += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + place, d.to(d_x.dtype.element_ty), mask=inside)
        if TWICE:
            tl.store(d_y + place, d.to(d_y.dtype.element_ty), mask=inside)
    if WEIGHT:
        part = (weights * programs + tl.program_id(0)) * C + channel
        tl.store(parts + part, tl.sum(d_weight, axis=0), mask=within)
