"""Products with an activated gate on a GPU, `silu(gate) * x`: one Triton kernel forward, one backward.

Only gate and x are kept for the backward, which computes the activation again. Parts of wider tensors are read where
they are, and the gradients of two halves of one are written into one. `kernels/gate.py` has the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops.backend import distinct, register_operator, wants_gradient, with_signature
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
        return _Gated.apply(*distinct((gate, x)), silu)  # type: ignore[no-any-return]
    return _forward_op(gate, x, silu)  # type: ignore[no-any-return]


def gated_halves(both: Tensor, *, silu: bool = True) -> Tensor:
    """`gated` of the first and the second half of the last axis, [..., 2 C] -> [..., C]."""
    if is_vmapped() or wants_gradient(both):
        return _GatedHalves.apply(both, silu)  # type: ignore[no-any-return]
    return _halves_forward_op(both, silu)  # type: ignore[no-any-return]


def by_operations(gate: Tensor, x: Tensor, *, silu: bool) -> Tensor:
    """The same from PyTorch's operations."""
    return (F.silu(gate) if silu else torch.sigmoid(gate)) * x


class _Gated(torch.autograd.Function):
    @staticmethod
    @with_signature
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


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    @with_signature
    def forward(both: Tensor, silu: bool) -> Tensor:
        return _halves_forward_op(both, silu)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        both, ctx.silu = inputs
        ctx.save_for_backward(both)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (d_y,) = grad_outputs
        (both,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients
            y = by_operations(*both.chunk(2, -1), silu=ctx.silu)
            return torch.autograd.grad(y, both, d_y, create_graph=True)[0], None
        return _halves_backward_op(both, d_y, ctx.silu), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        both, silu = args
        return _GatedHalves.apply(both.movedim(in_dims[0] or 0, 0), silu), 0


def _differentiable(gate: Tensor, x: Tensor, d_y: Tensor, *, silu: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from PyTorch's operations."""
    y = by_operations(gate, x, silu=silu)
    inputs = [tensor for tensor in (gate, x) if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, d_y, create_graph=True))
    d_gate, d_x = (next(found) if tensor.requires_grad else None for tensor in (gate, x))
    return d_gate, d_x


def _forward(gate: Tensor, x: Tensor, silu: bool) -> Tensor:
    y = _empty_product(gate, x, silu)
    gate, x, columns = _readable(gate, x)
    _launch("forward", silu, columns, {"GATE": gate, "X": x}, y)
    return y


def _empty_product(gate: Tensor, x: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(gate.dtype, x.dtype))


def _backward(gate: Tensor, x: Tensor, d_y: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    d_gate, d_x = _empty_gradients(gate, x, d_y, silu)
    gate, x, columns = _readable(gate, x)
    strided = {"GATE": gate, "X": x, "D_GATE": d_gate, "D_X": d_x}
    _launch("backward", silu, columns, strided, d_y.contiguous())
    return d_gate, d_x


def _empty_gradients(gate: Tensor, x: Tensor, d_y: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


def _halves_forward(both: Tensor, silu: bool) -> Tensor:
    gate, x = both.contiguous().chunk(2, -1)
    return _forward(gate, x, silu)


def _empty_half(both: Tensor, silu: bool) -> Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


def _halves_backward(both: Tensor, d_y: Tensor, silu: bool) -> Tensor:
    d_both = both.new_empty(both.shape)
    (gate, x), (d_gate, d_x) = both.contiguous().chunk(2, -1), d_both.chunk(2, -1)
    strided = {"GATE": gate, "X": x, "D_GATE": d_gate, "D_X": d_x}
    _launch("backward", silu, gate.shape[-1], strided, d_y.contiguous())
    return d_both


def _empty_both(both: Tensor, d_y: Tensor, silu: bool) -> Tensor:
    return both.new_empty(both.shape)


_forward_op = register_operator(
    "triton_gated", _forward, _empty_product, then=lambda y, gate, x, silu: _backward(gate, x, y, silu)
)
_backward_op = register_operator("triton_gated_backward", _backward, _empty_gradients)
_halves_forward_op = register_operator(
    "triton_gated_halves", _halves_forward, _empty_half, then=lambda y, both, silu: _halves_backward(both, y, silu)
)
_halves_backward_op = register_operator("triton_gated_halves_backward", _halves_backward, _empty_both)


def _readable(gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both as the kernels can read them, and how many numbers lie one after the other; 0 for all of them."""
    if gate.is_contiguous() and x.is_contiguous():
        return gate, x, 0
    # One that is contiguous can be cut anywhere.
    columns = {
        0 if (found := _pieces(tensor)) is None else found[0] for tensor in (gate, x) if not tensor.is_contiguous()
    }
    if len(columns) == 1 and (count := columns.pop()):
        return gate, x, count
    return gate.contiguous(), x.contiguous(), 0


def _pieces(x: Tensor) -> tuple[int, int] | None:
    """How many numbers lie one after the other, and how far apart such pieces begin; None where they are not alike."""
    columns, stride, expected = 1, 0, 0
    for extent, distance in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if extent == 1:
            continue
        if not stride and distance == columns:
            columns *= extent
        elif distance > columns and distance == (expected or distance):
            stride, expected = stride or distance, distance * extent
        else:
            return None
    return columns, stride or columns


def _stride(x: Tensor, columns: int) -> int:
    """How far apart pieces of so many numbers begin."""
    pieces = None if x.is_contiguous() else _pieces(x)
    return columns if pieces is None else pieces[1]


def _launch(kernel: str, silu: bool, columns: int, strided: dict[str, Tensor], dense: Tensor) -> None:
    """With gate, x and their gradients as pieces of `columns` numbers, 0 for one piece; y or its gradient is one."""
    if not dense.numel():
        return
    # By the last axis alone, so that neither batch nor length make another kernel.
    width = math.gcd(8, dense.shape[-1], columns) if dense.ndim else 1
    count, rows = dense.numel() // width, _NUMBERS // width
    strides = {name: _stride(x, columns) if columns else width for name, x in strided.items()}
    gate, x, *gradients = strided.values()
    with torch.cuda.device_of(dense):
        getattr(_kernels(), kernel)[(-(-count // rows),)](
            gate, x, dense, *gradients, count,
            W=width, BN=rows, SILU=silu, COLUMNS=columns // width if columns else 1, **strides,
        )  # fmt: skip


def _kernels() -> Any:
    return kernels("gate")
