"""The RMS norm or the layer norm on a GPU, with the sum before it: one Triton kernel forward, one backward.

PyTorch's own operations take a pass over memory for each of: the sum, the norm, the cast of its output for the products
that read it, the cast of their gradient, the gradients of the input and of the weight, and the sum of the gradients of
the residual stream. `kernels/norm.py` has the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import distinct, register_operator, wants_gradient, with_signature
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, contiguous, kernels, power_of_two, sum_parts, unavailable
from statetrack.ops.vmapped import is_vmapped, replicas_first

PRIORITY = CHECKED_ON_A_CARD
"""As that of the backends; `tests/ops/test_triton_norm.py` is the check."""

LARGEST = 16_384
"""The most channels of a row, which a program holds whole."""

_NUMBERS = 2048  # of a tile, at least
_PROGRAMS = 512  # of a backward: as many as an H100 holds at once, each with a part of the gradient of the weight


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `add_and_norm` is to be used for these tensors."""
    return (
        PRIORITY == CHECKED_ON_A_CARD
        and x.is_floating_point()
        and 0 < x.shape[-1] <= LARGEST
        and unavailable(x, *others) is None
        # Inductor fuses these operations with those around them.
        and not torch.compiler.is_compiling()
    )


def add_and_norm(
    x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype, *, center: bool = False
) -> tuple[Tensor, Tensor]:
    """`total = x + y` (x itself where y is None) and `weight total / sqrt(mean(total^2) + eps)` over the last axis.

    With `center` the norm is that of the total less its mean: a layer norm.

    What reads x after the norm should read the total that this returns: its gradient is then added to that of the norm
    in the same pass.

    Args:
        x: [..., C].
        y: [..., C], of the same shape.
        weight: [C], rounded to the dtype of the total; None for ones.
        eps: added to the mean square.
        dtype: of the norm; the total has the dtype of a sum.
    """
    if is_vmapped() or wants_gradient(x, y, weight):
        total, normed, _ = _AddAndNorm.apply(*distinct((x, y, weight)), eps, dtype, center)
        return total, normed
    total, normed, _ = _forward_op(x, y, weight, eps, dtype, center)
    return (x if y is None else total), normed


class _AddAndNorm(torch.autograd.Function):
    """As `add_and_norm`. All tensors may have a first axis more, of replicas: then the weight is [R, C]."""

    @staticmethod
    @with_signature
    def forward(
        x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype, center: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, normed, inverse_rms = _forward_op(x, y, weight, eps, dtype, center)
        return (x.view_as(x) if y is None else total), normed, inverse_rms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, weight, ctx.eps, ctx.normed_dtype, ctx.center = inputs
        total, _, inverse_rms = output
        ctx.mark_non_differentiable(inverse_rms)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, None if y is None else y.dtype
        ctx.save_for_backward(x if y is None else total, weight, inverse_rms)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        d_total, d_normed, _ = grad_outputs
        total, weight, inverse_rms = ctx.saved_tensors
        x_dtype, y_dtype = ctx.dtypes
        d_weight = None
        if d_normed is None:
            d_x = d_y = d_total
        elif torch.is_grad_enabled():  # gradients of gradients
            d_x, d_weight = _differentiable(total, weight, ctx.eps, ctx.normed_dtype, ctx.center, d_normed)
            d_x = d_y = d_x if d_total is None else d_x + d_total
        else:
            d_x, d_y, d_weight = _backward_op(
                total, weight, inverse_rms, d_normed, d_total, x_dtype, y_dtype, ctx.center
            )
            d_y = d_y if y_dtype != x_dtype else d_x
        return (
            None if d_x is None else d_x.to(x_dtype),
            None if d_y is None or y_dtype is None else d_y.to(y_dtype),
            None if weight is None else d_weight,
            *(None, None, None),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, tuple[int, int, int]]:
        return _AddAndNorm.apply(*replicas_first(info, in_dims[:3], args[:3]), *args[3:]), (0, 0, 0)


def _differentiable(
    total: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, center: bool, d_normed: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of total and weight from PyTorch's operations."""
    wide = total.float()
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float().view(*weight.shape[:-1], *(1,) * (total.ndim - weight.ndim), -1)
    inputs = [x for x in (total, weight) if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(normed.to(dtype), inputs, d_normed, create_graph=True))
    d_total, d_weight = (next(found) if x is not None and x.requires_grad else None for x in (total, weight))
    return torch.zeros_like(total) if d_total is None else d_total, d_weight


def _forward(
    x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The total, of no numbers without y, the norm and the reciprocal root mean squares [...]."""
    results = _empty_results(x, y, weight, eps, dtype, center)
    total, normed, inverse_rms = results
    x, y, weight = x.contiguous(), contiguous(y), contiguous(weight)
    rows, sets, tile = _launch(x, weight)
    if rows:
        with torch.cuda.device_of(x):
            _kernels().forward[(-(-rows // tile["BR"]), sets)](
                x, y, weight, x if y is None else total, normed, inverse_rms, rows, eps,
                C=x.shape[-1], **tile, WEIGHT=weight is not None, ADD=y is not None, CENTER=center,
            )  # fmt: skip
    return results


def _empty_results(
    x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if y is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    total: Tensor,
    weight: Tensor | None,
    inverse_rms: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of y in a dtype of its own (else of no numbers), and of the weight (of no numbers)."""
    d_x, d_y, d_weight = _empty_gradients(total, weight, inverse_rms, d_normed, d_total, x_dtype, y_dtype, center)
    total, d_normed = total.contiguous(), d_normed.contiguous()
    d_total, weight = contiguous(d_total), contiguous(weight)
    rows, sets, tile = _launch(total, weight)
    if not rows:
        return d_x, d_y, d_weight.zero_()
    programs = min(-(-rows // tile["BR"]), max(1, _PROGRAMS // sets))
    shape = (sets, programs, total.shape[-1])
    parts = None if weight is None else total.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(total):
        _kernels().backward[(programs, sets)](
            total, weight, inverse_rms, d_normed, d_total, d_x, d_y, parts, rows, programs,
            C=total.shape[-1], **tile, WEIGHT=weight is not None, ADDED=d_total is not None, TWICE=d_y.numel() > 0,
            CENTER=center,
        )  # fmt: skip
    if weight is None or parts is None:
        return d_x, d_y, d_weight
    # A sum over one part would be a kernel that copies.
    d_weight = parts.view(weight.shape).to(weight.dtype) if programs == 1 else sum_parts(parts, weight)
    return d_x, d_y, d_weight


def _likely_backwards(
    results: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    center: bool,
) -> None:
    total, normed, inverse_rms = results
    if y is not None:
        _backward(total, weight, inverse_rms, normed, total, x.dtype, y.dtype, center)
        return
    # A model's residual stream, [B, T, C], is read again after its first norm and not after its last; heads are not.
    for d_total in (None, x) if x.ndim <= 3 else (None,):
        _backward(x, weight, inverse_rms, normed, d_total, x.dtype, None, center)


def _empty_gradients(
    total: Tensor,
    weight: Tensor | None,
    inverse_rms: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = total.new_empty(total.shape, dtype=x_dtype)
    d_y = total.new_empty(0) if y_dtype is None or y_dtype == x_dtype else total.new_empty(total.shape, dtype=y_dtype)
    return d_x, d_y, total.new_empty(0) if weight is None else weight.new_empty(weight.shape)


_forward_op = register_operator("triton_add_and_norm", _forward, _empty_results, then=_likely_backwards)
_backward_op = register_operator("triton_add_and_norm_backward", _backward, _empty_gradients)


def _launch(x: Tensor, weight: Tensor | None) -> tuple[int, int, dict[str, int]]:
    """Rows that share their weight, how many weights there are, and the tile: 16 numbers for each thread."""
    channels = x.shape[-1]
    sets = 1 if weight is None else weight.numel() // channels
    block = power_of_two(channels)
    rows = max(1, _NUMBERS // block)
    return x.numel() // (sets * channels), sets, {"BR": rows, "BC": block, "num_warps": max(4, block // 512)}


def _kernels() -> Any:
    return kernels("norm")
