"""Products with an activated gate on a GPU, `silu(gate) * x`: one Triton kernel forward, one backward.

Only gate and x are kept for the backward, which computes the activation again. `kernels/gate.py` has the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops.backend import register_operator, wants_gradient
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, kernels, unavailable
from statetrack.ops.vmapped import is_vmapped, replicas_first

PRIORITY = CHECKED_ON_A_CARD
"""As that of the backends; `tests/ops/test_triton_gate.py` is the check."""

_NUMBERS = 2048  # of a program


def serves(gate: Tensor, x: Tensor) -> bool:
    """Whether `gated` is to be used for these tensors."""
    return (
        PRIORITY == CHECKED_ON_A_CARD
        and gate.shape == x.shape
        and unavailable(gate, x) is None
        # Inductor fuses these operations with those around them.
        and not torch.compiler.is_compiling()
    )


def gated(gate: Tensor, x: Tensor, *, silu: bool = True) -> Tensor:
    """`silu(gate) * x`, or `sigmoid(gate) * x`, in the dtype of a product of the two, rounded once.

    Args:
        gate: any shape.
        x: of the same shape.
        silu: False for sigmoid.
    """
    if is_vmapped() or wants_gradient(gate, x):
        return _Gated.apply(gate, x, silu)  # type: ignore[no-any-return]
    return _forward_op(gate, x, silu)  # type: ignore[no-any-return]


def by_operations(gate: Tensor, x: Tensor, *, silu: bool) -> Tensor:
    """The same from PyTorch's operations."""
    return (F.silu(gate) if silu else torch.sigmoid(gate)) * x


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, x: Tensor, silu: bool) -> Tensor:
        return _forward_op(gate, x, silu)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        gate, x, ctx.silu = inputs
        ctx.save_for_backward(gate, x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (d_y,) = grad_outputs
        gate, x = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients
            return *_differentiable(gate, x, d_y, silu=ctx.silu), None
        return *_backward_op(gate, x, d_y, ctx.silu), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _Gated.apply(*replicas_first(info, in_dims[:2], args[:2]), args[2]), 0


def _differentiable(gate: Tensor, x: Tensor, d_y: Tensor, *, silu: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from PyTorch's operations."""
    y = by_operations(gate, x, silu=silu)
    inputs = [tensor for tensor in (gate, x) if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, d_y, create_graph=True))
    d_gate, d_x = (next(found) if tensor.requires_grad else None for tensor in (gate, x))
    return d_gate, d_x


def _forward(gate: Tensor, x: Tensor, silu: bool) -> Tensor:
    y = _empty_product(gate, x, silu)
    _launch("forward", silu, gate.contiguous(), x.contiguous(), y)
    return y


def _empty_product(gate: Tensor, x: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(gate.dtype, x.dtype))


def _backward(gate: Tensor, x: Tensor, d_y: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    d_gate, d_x = _empty_gradients(gate, x, d_y, silu)
    _launch("backward", silu, gate.contiguous(), x.contiguous(), d_y.contiguous(), d_gate, d_x)
    return d_gate, d_x


def _empty_gradients(gate: Tensor, x: Tensor, d_y: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


_forward_op = register_operator("triton_gated", _forward, _empty_product)
_backward_op = register_operator("triton_gated_backward", _backward, _empty_gradients)


def _launch(kernel: str, silu: bool, first: Tensor, *others: Tensor) -> None:
    if not first.numel():
        return
    # By the last axis alone, so that neither batch nor length make another kernel.
    width = math.gcd(8, first.shape[-1]) if first.ndim else 1
    count, rows = first.numel() // width, _NUMBERS // width
    with torch.cuda.device_of(first):
        getattr(_kernels(), kernel)[(-(-count // rows),)](first, *others, count, W=width, BN=rows, SILU=silu)


def _kernels() -> Any:
    return kernels("gate")
