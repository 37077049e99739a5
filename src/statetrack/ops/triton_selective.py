"""Mamba between its projections on a GPU: the selective scan, and one Triton kernel each way before and after it.

    dt = softplus(raw + bias),    H_t = A_t H_{t-1} + write_t (dt_t u_t)^T,    y_t = (H_t^T q_t + D u_t) silu(z_t)

PyTorch's own operations take a dozen passes over memory for this, most in float32, and keep what they read. Here what
the projections give is kept as it is, with the outputs of the scan: step sizes and values are computed again.
`kernels/selective.py` has the kernels, `triton_discretized.py` the scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statetrack.ops import triton_discretized
from statetrack.ops.backend import differentiable_once, register_operator, wants_gradient
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, LARGEST_KEY, ON_REQUEST, kernels, power_of_two, unavailable
from statetrack.ops.vmapped import is_vmapped
from statetrack.transition import EigenvalueRange

PRIORITY = ON_REQUEST
"""As that of the backends; `tests/ops/test_triton_selective.py` is the check."""

# Of a program: so many times so many tokens, of so many channels.
_RUN, _TOKENS, _CHANNELS = 8, 8, 128


def serves(u: Tensor, raw: Tensor, z: Tensor, q: Tensor, *others: Tensor | None) -> bool:
    """Whether `selective_scan` is to be used for these tensors; one token has faster code, and so have replicas."""
    return (
        PRIORITY == CHECKED_ON_A_CARD
        and u.shape[1] > 1
        and u.numel() > 0
        and q.shape[-1] <= LARGEST_KEY
        and unavailable(u, raw, z, q, *others) is None
        and not torch.compiler.is_compiling()
        and not is_vmapped()
    )


def selective_scan(
    u: Tensor,
    raw: Tensor,
    bias: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    write: Tensor,
    q: Tensor,
    D: Tensor,
    z: Tensor,
    initial_state: Tensor | None,
    eigenvalue_range: EigenvalueRange,
) -> tuple[Tensor, Tensor]:
    """See above; A_t is that of `Discretized`. Step sizes, decays and states are float32; differentiable once.

    Args:
        u: what is written and skips the scan, [B, T, V].
        raw: step sizes before bias and softplus, [B, T, V].
        bias: [V].
        A: [K, V].
        lower_end: [V], or None for that of the range.
        write: [B, T, K].
        q: [B, T, K].
        D: [V].
        z: the output gate before its silu, [B, T, V].
        initial_state: [B, 1, K, V]; None for zeros.
        eigenvalue_range: the range.

    Returns:
        y: [B, T, V] in the dtype of u.
        final_state: [B, 1, K, V], float32.
    """
    inputs = (u, raw, bias, A, lower_end, write, q, D, z, initial_state)
    lo, hi = eigenvalue_range.lo, eigenvalue_range.hi
    if wants_gradient(*inputs):
        return _SelectiveScan.apply(*inputs, lo, hi)  # type: ignore[no-any-return]
    y, final_state, _ = _forward_op(*inputs, lo, hi, False)
    return y, final_state


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, final_state, tape = _forward_op(*inputs, True)
        *tensors, initial_state, ctx.lo, ctx.hi = inputs
        ctx.save_for_backward(*tensors, *tape)
        ctx.set_materialize_grads(False)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return y, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_y, d_state = grad_outputs
        *tensors, o, pairs, starts = ctx.saved_tensors
        if d_y is None:
            d_y = torch.zeros_like(o)
        *gradients, d_initial = _backward_op(*tensors, [o, pairs, starts], ctx.lo, ctx.hi, d_y, d_state)
        if tensors[4] is None:
            gradients[4] = None
        return *gradients, None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype), None, None


def _forward(
    u: Tensor,
    raw: Tensor,
    bias: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    write: Tensor,
    q: Tensor,
    D: Tensor,
    z: Tensor,
    initial_state: Tensor | None,
    lo: float,
    hi: float,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns y, the final state, and a tape for `_backward`, which is empty unless `save`."""
    u, raw, bias, D = (x.contiguous() for x in (u, raw, bias, D))
    z, stride = _rows(z)
    dt, v, y = torch.empty_like(u, dtype=torch.float32), torch.empty_like(u), torch.empty_like(u)
    grid, sizes, options = _launch(u)
    with torch.cuda.device_of(u):
        _kernels().before[grid](raw, bias, u, dt, v, *sizes, **options)
        o, final, tape = triton_discretized._forward(
            *_scanned(dt, A, lower_end, q, write, v), initial_state, lo, hi, save
        )
        _kernels().after[grid](o, u, D, z, y, *sizes, STRIDE=stride, **options)
    return y, final, [o.squeeze(2), *tape] if save else []


def _empty_results(
    u: Tensor,
    raw: Tensor,
    bias: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    write: Tensor,
    q: Tensor,
    D: Tensor,
    z: Tensor,
    initial_state: Tensor | None,
    lo: float,
    hi: float,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dt = u.new_empty(u.shape, dtype=torch.float32)
    o, final, tape = triton_discretized._empty_results(
        *_scanned(dt, A, lower_end, q, write, u), initial_state, lo, hi, save
    )
    return u.new_empty(u.shape), final, [o.squeeze(2), *tape] if save else []


def _backward(
    u: Tensor,
    raw: Tensor,
    bias: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    write: Tensor,
    q: Tensor,
    D: Tensor,
    z: Tensor,
    tape: list[Tensor],
    lo: float,
    hi: float,
    d_y: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of all inputs in their order, that of lower_end empty without one."""
    u, raw, bias, D, d_y = (x.contiguous() for x in (u, raw, bias, D, d_y))
    z, stride = _rows(z)
    o, *states = tape
    dt, v, d_o = torch.empty_like(u, dtype=torch.float32), torch.empty_like(u), torch.empty_like(u)
    d_u, d_raw, d_z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, raw, z))
    grid, sizes, options = _launch(u)
    parts_D, parts_bias = torch.empty(2, grid[0], u.shape[-1], dtype=torch.float32, device=u.device).unbind()
    with torch.cuda.device_of(u):
        _kernels().after_backward[grid](
            raw, bias, o, u, D, z, d_y, dt, v, d_o, d_z, parts_D, *sizes, STRIDE=stride, **options
        )
        d_dt, d_A, d_lower_end, d_q, d_write, d_v, d_initial = triton_discretized._backward(
            *_scanned(dt, A, lower_end, q, write, v), states, lo, hi, d_o.unsqueeze(2), d_state
        )
        _kernels().before_backward[grid](raw, bias, u, D, d_o, d_dt, d_v, d_raw, d_u, parts_bias, *sizes, **options)
    d_bias, d_D = (parts.sum(0).to(x.dtype) for parts, x in ((parts_bias, bias), (parts_D, D)))
    d_lower_end = d_lower_end.squeeze(0) if lower_end is not None else d_lower_end
    return d_u, d_raw, d_bias, d_A.squeeze(0), d_lower_end, d_write.squeeze(2), d_q.squeeze(2), d_D, d_z, d_initial


def _empty_gradients(
    u: Tensor,
    raw: Tensor,
    bias: Tensor,
    A: Tensor,
    lower_end: Tensor | None,
    write: Tensor,
    q: Tensor,
    D: Tensor,
    z: Tensor,
    tape: list[Tensor],
    lo: float,
    hi: float,
    d_y: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_u, d_raw, d_bias, d_A, d_write, d_q, d_D, d_z = (x.new_empty(x.shape) for x in (u, raw, bias, A, write, q, D, z))
    d_lower_end = A.new_empty(0) if lower_end is None else lower_end.new_empty(lower_end.shape)
    d_initial = u.new_empty((u.shape[0], 1, *A.shape), dtype=torch.float32)
    return d_u, d_raw, d_bias, d_A, d_lower_end, d_write, d_q, d_D, d_z, d_initial


_forward_op = register_operator("triton_selective", _forward, _empty_results)
_backward_op = register_operator("triton_selective_backward", _backward, _empty_gradients)


def _scanned(
    dt: Tensor, A: Tensor, lower_end: Tensor | None, q: Tensor, write: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The arguments of the scan, whose channels are all of one head."""
    low = None if lower_end is None else lower_end.unsqueeze(0)
    return dt.unsqueeze(2), A.unsqueeze(0), low, q.unsqueeze(2), write.unsqueeze(2), v.unsqueeze(2)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with all tokens at one distance from each other, and that: a part of a wider projection is read where it is."""
    whole = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    if x.stride(2) != 1 or x.stride(1) < x.shape[2] or not whole:
        x = x.contiguous()
    return x, x.stride(1)


def _launch(u: Tensor) -> tuple[tuple[int, int], tuple[int], dict[str, int]]:
    """A grid, the arguments and the constants that all kernels share."""
    channels, tokens = u.shape[-1], u.shape[:-1].numel()
    block = power_of_two(min(channels, _CHANNELS))
    options = {"C": channels, "RUN": _RUN, "BN": _TOKENS, "BC": block, "num_warps": 4}
    return (-(-tokens // (_RUN * _TOKENS)), -(-channels // block)), (tokens,), options


def _kernels() -> Any:
    return kernels("selective")
