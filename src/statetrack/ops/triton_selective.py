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
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, LARGEST_KEY, kernels, power_of_two, unavailable
from statetrack.ops.vmapped import is_vmapped, vmapped
from statetrack.transition import EigenvalueRange

PRIORITY = CHECKED_ON_A_CARD
"""As that of the backends; `tests/ops/test_triton_selective.py` is the check."""

# Of a program: so many times so many tokens, of so many channels.
_RUN, _TOKENS, _CHANNELS = 8, 8, 128


def serves(u: Tensor, raw: Tensor, z: Tensor, q: Tensor, *others: Tensor | None) -> bool:
    """Whether `selective_scan` is to be used for these tensors; a single token has code of its own."""
    return (
        PRIORITY == CHECKED_ON_A_CARD
        and u.shape[1] > 1
        and u.numel() > 0
        and q.shape[-1] <= LARGEST_KEY
        and unavailable(u, raw, z, q, *others) is None
        # Inductor fuses what is around the scan.
        and not torch.compiler.is_compiling()
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
    """See above; A_t is that of `Discretized`. Step sizes, decays and states are float32.

    Differentiable once; `torch.func.vmap` makes one call of all replicas.

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

    def all_replicas(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _replicated(*tensors, eigenvalue_range.lo, eigenvalue_range.hi)

    if is_vmapped():
        return vmapped(all_replicas, *inputs)  # type: ignore[no-any-return]
    y, final_state = all_replicas(*(None if x is None else x.unsqueeze(0) for x in inputs))
    return y.squeeze(0), final_state.squeeze(0)


def _replicated(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`selective_scan` of tensors with an axis of replicas before all others."""
    if wants_gradient(*inputs[:-2]):
        return _SelectiveScan.apply(*inputs)  # type: ignore[no-any-return]
    y, final_state, _ = _forward_op(*inputs, False)
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
            d_y = torch.zeros_like(tensors[0])
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
    y, dt, v = torch.empty_like(u), _heads_like(u, torch.float32), _heads_like(u)
    grid, sizes, options = _launch(u)
    with torch.cuda.device_of(u):
        _kernels().before[grid](raw, bias, u, dt, v, *sizes, **options)
        o, final, tape = triton_discretized._forward(
            dt, A, lower_end, _to_heads(q), _to_heads(write), v, _state_to_heads(initial_state), lo, hi, save
        )
        _kernels().after[grid](o, u, D, z, y, *sizes, STRIDE=stride, **options)
    return y, final.movedim(1, 0).unsqueeze(2), [o, *tape] if save else []


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
    dt, v = _heads_like(u, torch.float32), _heads_like(u)
    o, final, tape = triton_discretized._empty_results(
        dt, A, lower_end, _to_heads(q), _to_heads(write), v, _state_to_heads(initial_state), lo, hi, save
    )
    return u.new_empty(u.shape), final.movedim(1, 0).unsqueeze(2), [o, *tape] if save else []


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
    dt, v, d_o = _heads_like(u, torch.float32), _heads_like(u), _heads_like(u)
    d_u, d_raw, d_z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, raw, z))
    grid, sizes, options = _launch(u)
    # Each from an address of its own: kernels are told apart by whether addresses are multiples of 16.
    parts_D, parts_bias = (torch.empty(grid[0], *D.shape, dtype=torch.float32, device=u.device) for _ in range(2))
    with torch.cuda.device_of(u):
        _kernels().after_backward[grid](
            raw, bias, o, u, D, z, d_y, dt, v, d_o, d_z, parts_D, *sizes, STRIDE=stride, **options
        )
        d_dt, d_A, d_lower_end, d_q, d_write, d_v, d_initial = triton_discretized._backward(
            dt, A, lower_end, _to_heads(q), _to_heads(write), v, states, lo, hi, d_o, _state_to_heads(d_state)
        )
        _kernels().before_backward[grid](raw, bias, u, D, d_o, d_dt, d_v, d_raw, d_u, parts_bias, *sizes, **options)
    d_bias, d_D = (parts.sum(0).to(x.dtype) for parts, x in ((parts_bias, bias), (parts_D, D)))
    d_write, d_q = d_write.movedim(2, 0), d_q.movedim(2, 0)
    return d_u, d_raw, d_bias, d_A, d_lower_end, d_write, d_q, d_D, d_z, d_initial.movedim(1, 0).unsqueeze(2)


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
    d_u, d_raw, d_bias, d_A, d_D, d_z = (x.new_empty(x.shape) for x in (u, raw, bias, A, D, z))
    d_lower_end = A.new_empty(0) if lower_end is None else lower_end.new_empty(lower_end.shape)
    replicas, batch, *_ = u.shape
    # As the scan leaves them, whose heads replicas are.
    d_write, d_q = (x.new_empty(_to_heads(x).shape).movedim(2, 0) for x in (write, q))
    d_initial = u.new_empty((batch, replicas, *A.shape[1:]), dtype=torch.float32).movedim(1, 0).unsqueeze(2)
    return d_u, d_raw, d_bias, d_A, d_lower_end, d_write, d_q, d_D, d_z, d_initial


_forward_op = register_operator(
    "triton_selective",
    _forward,
    _empty_results,
    then=lambda results, u, raw, bias, A, lower_end, write, q, D, z, initial_state, lo, hi, save: _backward(
        u, raw, bias, A, lower_end, write, q, D, z, results[2], lo, hi, results[0], None
    ),
)
_backward_op = register_operator("triton_selective_backward", _backward, _empty_gradients)


def _to_heads(x: Tensor) -> Tensor:
    """[R, B, T, ...] as [B, T, R, ...]: the scan's heads are the replicas."""
    return x.movedim(0, 2)


def _state_to_heads(x: Tensor | None) -> Tensor | None:
    """[R, B, 1, K, V] as [B, R, K, V]."""
    return None if x is None else x.squeeze(2).movedim(0, 1)


def _heads_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for [B, T, R, V], from x [R, B, T, V]."""
    return x.new_empty(_to_heads(x).shape, dtype=dtype or x.dtype)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with all tokens at one distance from each other, and that: a part of a wider projection is read where it is."""
    replicas, batch, length, channels = x.shape
    distance = x.stride(2)
    together = (batch == 1 or x.stride(1) == length * distance) and (
        replicas == 1 or x.stride(0) == batch * length * distance
    )
    if not together or x.stride(3) != 1 or distance < channels:
        x = x.contiguous()
    return x, x.stride(2)


def _launch(u: Tensor) -> tuple[tuple[int, int, int], tuple[int], dict[str, int]]:
    """A grid, the arguments and the constants that all kernels share."""
    replicas, batch, length, channels = u.shape
    block = power_of_two(min(channels, _CHANNELS))
    options = {"C": channels, "RUN": _RUN, "BN": _TOKENS, "BC": block, "num_warps": 4}
    grid = -(-batch * length // (_RUN * _TOKENS)), -(-channels // block), replicas
    return grid, (batch * length,), options


def _kernels() -> Any:
    return kernels("selective")
