"""Vectors divided by their length on a GPU: a Triton kernel forward, one backward.

Each reads its inputs once and writes its result once, in the dtype of the activations; PyTorch's own operations take
float32 copies through memory. `kernels/normalize.py` has the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops.backend import differentiable_once, register_operator, with_signature
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, LARGEST_KEY, kernels, power_of_two, unavailable

PRIORITY = CHECKED_ON_A_CARD
"""As that of the backends."""

_NUMBERS = 2048
"""That a program of four warps has in its registers at once."""


def serves(x: Tensor) -> bool:
    """Whether `normalize` is to be used for this tensor; the compiler makes kernels of its own."""
    return (
        PRIORITY == CHECKED_ON_A_CARD
        and x.shape[-1] <= LARGEST_KEY
        and unavailable(x) is None
        and not torch.compiler.is_compiling()
    )


def normalize(x: Tensor, *, least: float = -1.0, eps: float = 0.0, scale: float = 1.0) -> Tensor:
    """`scale x / sqrt(|x|^2 + eps)` along the last axis, 0 where |x|^2 <= least, in the dtype of x.

    Sums run in float32. Differentiable once; `torch.func.vmap` works.

    Args:
        x: [..., K], K up to 256.
        least: the largest squared length that counts as none; below 0 for nowhere.
        eps: added to the squared length.
        scale: the length of the result.
    """
    return _Normalize.apply(x, least, eps, scale)  # type: ignore[no-any-return]


class _Normalize(torch.autograd.Function):
    @staticmethod
    @with_signature
    def forward(x: Tensor, least: float, eps: float, scale: float) -> Tensor:
        return _forward_op(x, least, eps, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, *ctx.options = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _backward_op(x, grad_outputs[0], *ctx.options), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        x, *options = args
        return _Normalize.apply(x.movedim(in_dims[0] or 0, 0), *options), 0


def _forward(x: Tensor, least: float, eps: float, scale: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch("forward", x, (x, y), least, eps, scale)
    return y


def _backward(x: Tensor, d_y: Tensor, least: float, eps: float, scale: float) -> Tensor:
    x = x.contiguous()
    d_x = torch.empty_like(x)
    _launch("backward", x, (x, d_y.contiguous(), d_x), least, eps, scale)
    return d_x


def _launch(name: str, x: Tensor, tensors: tuple[Tensor, ...], *options: float) -> None:
    size, rows = x.shape[-1], x.shape[:-1].numel()
    if x.numel() == 0:
        return
    block_k = power_of_two(size)
    block_r = _NUMBERS // block_k
    with torch.cuda.device_of(x):
        getattr(_kernels(), name)[(-(-rows // block_r),)](
            *tensors, rows, *options, K=size, BR=block_r, BK=block_k, num_warps=4
        )


def _empty_result(x: Tensor, least: float, eps: float, scale: float) -> Tensor:
    return x.new_empty(x.shape)


def _empty_gradient(x: Tensor, d_y: Tensor, least: float, eps: float, scale: float) -> Tensor:
    return x.new_empty(x.shape)


_forward_op = register_operator("triton_normalize", _forward, _empty_result, then=lambda y, x, *o: _backward(x, y, *o))
_backward_op = register_operator("triton_normalize_backward", _backward, _empty_gradient)


def _kernels() -> Any:
    return kernels("normalize")
