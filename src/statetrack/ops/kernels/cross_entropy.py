"""A Triton kernel for the cross-entropy of logits and its gradient, which takes their place.

A program has a row of logits [V]. It reads them twice, once for their logsumexp and once for the gradient; the second
time they are in the cache. Sums run in float32 in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def replace_by_gradient(
    logits, labels, shares, losses, z_loss,
    V: tl.constexpr, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """losses [N]; logits [N, V] become `shares ((1 + 2 z_loss lse) softmax(logits) - onehot(labels))` with GRADIENT."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * V
    within = tl.arange(0, BV)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in range(0, V, BV):
        block = tl.load(x + first + within, mask=first + within < V, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(block, axis=0))
        # As long as there is nothing but -inf, the difference of two of them would be NaN.
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - finite) + tl.sum(tl.exp(block - finite), axis=0)
    lse = largest + tl.log(total)
    label = tl.load(labels + row)
    asked = label != IGNORE
    target = tl.load(x + label, mask=asked, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(asked, lse - target + z_loss * lse * lse, 0.0))
    if GRADIENT:
        # Other warps have yet to read the label's logit, which is overwritten below.
        tl.debug_barrier()
        share = tl.load(shares + row)
        scale = share * (1 + 2 * z_loss * lse)
        for first in range(0, V, BV):
            place = first + within
            block = tl.load(x + place, mask=place < V, other=0.0).to(tl.float32)
            gradient = tl.exp(block - lse) * scale - tl.where(place == label, share, 0.0)
            tl.store(x + place, gradient.to(logits.dtype.element_ty), mask=place < V)
