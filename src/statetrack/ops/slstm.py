"""The recurrence of sLSTM, which is not linear and so has one way to be computed: token by token, in one operator.

PyTorch runs it anywhere; on a GPU the Triton kernels of `triton_slstm.py` do all tokens in one launch.

    (z, i, f, o)_t = inputs_t + bias + h_{t-1} R,     m_t = max(log sigmoid(f) + m_{t-1}, i)
    c_t = f' c_{t-1} + i' tanh(z),   n_t = f' n_{t-1} + i',   h_t = sigmoid(o) c_t / n_t
    f' = exp(log sigmoid(f) + m_{t-1} - m_t),   i' = exp(i - m_t)

Letters for shapes as in `statetrack.transition`, and N the channels of a head. Inside, G groups of as many rows have
parameters of their own: the replicas of `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops import triton_slstm
from statetrack.ops.backend import differentiable_once, register_operator, wants_gradient
from statetrack.ops.vmapped import is_vmapped, vmapped

States = tuple[Tensor, Tensor, Tensor, Tensor]
"""h, c, n, m."""

_INPUTS = 4


def slstm(
    inputs: Sequence[Tensor], bias: Tensor, recurrent: Tensor, state: Sequence[Tensor], backend: str = "auto"
) -> States:
    """The states h, c, n, m after every token, each [B, T, H, N] in the dtype of R; h is the output.

    The stabilizer m cancels out of h, so it is a constant to gradients. Those through h, c and n are exact for whatever
    does not depend on how c, n and m are scaled, which is so for all that this function makes of them.

    Args:
        inputs: what the inputs say of z, i, f and o: each [B, T, H, N], in any floating dtype.
        bias: [H, 4 N].
        recurrent: R [H, N, 4 N], float32 or float64, which is what everything is computed in.
        state: h, c, n, m before the first token, each [B, H, N]. At the start h = c = n = 0 and m = -inf.
        backend: "torch", "triton", or "auto" for the faster that serves these tensors.

    Raises:
        ValueError: for an unknown backend, or one that does not serve these tensors.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"the backend of sLSTM must be auto, torch or triton, got {backend!r}")
    use_triton = False
    if backend != "torch":
        reason = triton_slstm.supports(inputs, recurrent)
        if reason is not None and backend == "triton":
            raise ValueError(f"backend 'triton' can't serve sLSTM: {reason}")
        use_triton = reason is None
    bias, state = bias.to(recurrent.dtype), [x.to(recurrent.dtype) for x in state]
    if is_vmapped():
        return vmapped(partial(_replicas, use_triton), *inputs, bias, recurrent, *state)  # type: ignore[no-any-return]
    return _run(use_triton, *inputs, bias.unsqueeze(0), recurrent.unsqueeze(0), *state)


def _replicas(use_triton: bool, *tensors: Tensor) -> States:
    """As `_run`, of tensors with replicas on a first axis: of what has rows they become more rows."""
    parameters = (_INPUTS, _INPUTS + 1)
    folded = [x if place in parameters else x.flatten(0, 1) for place, x in enumerate(tensors)]
    h, c, n, m = (x.unflatten(0, (len(tensors[0]), -1)) for x in _run(use_triton, *folded))
    return h, c, n, m


def _run(use_triton: bool, *tensors: Tensor) -> States:
    if wants_gradient(*tensors):
        return _SLSTM.apply(use_triton, *tensors)  # type: ignore[no-any-return]
    h, c, n, m, _ = (_triton_forward_op if use_triton else _forward_op)(*tensors, False)
    return h, c, n, m


class _SLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, use_triton: bool, z: Tensor, i: Tensor, f: Tensor, o: Tensor,
        bias: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    ) -> States:  # fmt: skip
        operator = _triton_forward_op if use_triton else _forward_op
        *states, gates = operator(z, i, f, o, bias, recurrent, h, c, n, m, True)
        ctx.use_triton, ctx.dtype = use_triton, z.dtype
        ctx.save_for_backward(gates[0], recurrent, h, c, n, m, *states)
        ctx.mark_non_differentiable(states[3])
        if not torch.compiler.is_compiling():  # which need not know this method
            ctx.set_materialize_grads(False)
        return states[0], states[1], states[2], states[3]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_h, d_c, d_n, _ = grad_outputs
        if d_h is None:
            d_h = torch.zeros_like(ctx.saved_tensors[6])
        operator = _triton_backward_op if ctx.use_triton else _backward_op
        return (None, *operator(*ctx.saved_tensors, d_h, d_c, d_n, ctx.dtype), None)


def _forward(
    z: Tensor, i: Tensor, f: Tensor, o: Tensor,
    bias: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The states [G B, T, H, N] and, with `save`, what the inputs say of the gates, biases included.

    Args:
        z, i, f, o: [G B, T, H, N].
        bias: [G, H, 4 N].
        recurrent: [G, H, N, 4 N].
        h, c, n, m: [G B, H, N].
    """
    groups = len(recurrent)
    with torch.autocast(z.device.type, enabled=False):
        gates = torch.cat([x.to(recurrent.dtype) for x in (z, i, f, o)], -1)
        gates = (_by_heads(gates, groups) + bias.flatten(0, 1).unsqueeze(1)).contiguous()
        matrix = recurrent.flatten(0, 1)
        h, c, n, m = (_by_heads(start.unsqueeze(1), groups)[0] for start in (h, c, n, m))
        states: list[States] = []
        for token in gates.unbind(0):
            z, i, f, o = torch.baddbmm(token, h, matrix).chunk(4, -1)
            kept = F.logsigmoid(f) + m
            m = torch.maximum(kept, i)
            forget, write = torch.exp(kept - m), torch.exp(i - m)
            c = torch.addcmul(write * torch.tanh(z), forget, c)
            n = torch.addcmul(write, forget, n)  # at least 1, as forget or write is 1
            h = torch.sigmoid(o) * c / n
            states.append((h, c, n, m))
    h, c, n, m = (_by_rows(torch.stack(values), groups) for values in zip(*states, strict=True))
    return h, c, n, m, [gates] if save else []


def _backward(
    gates: Tensor, recurrent: Tensor, h_start: Tensor, c_start: Tensor, n_start: Tensor, m_start: Tensor,
    h: Tensor, c: Tensor, n: Tensor, m: Tensor, d_h: Tensor, d_c: Tensor | None, d_n: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of what `_forward` is given, in its order; those of the inputs in `dtype`."""
    groups = len(recurrent)
    starts = [_by_heads(x.unsqueeze(1), groups) for x in (h_start, c_start, n_start, m_start)]
    h, c, n, m, d_h = (_by_heads(x, groups) for x in (h, c, n, m, d_h))
    d_c, d_n = (None if x is None else _by_heads(x, groups) for x in (d_c, d_n))
    with torch.autocast(gates.device.type, enabled=False):
        h_before, c_before, n_before, m_before = (
            torch.cat([start, after[:-1]]) for start, after in zip(starts, (h, c, n, m), strict=True)
        )
        matrix = recurrent.flatten(0, 1)
        z, i, f, o = (gates + h_before @ matrix).chunk(4, -1)
        z, o = torch.tanh(z), torch.sigmoid(o)
        forget, write = torch.exp(F.logsigmoid(f) + m_before - m), torch.exp(i - m)
        # All derivatives that don't depend on what comes later, for all tokens at once.
        c_of_h, n_of_h, o_of_h = o / n, -h / n, c / n * o * (1 - o)
        z_of_c, f_of_forget = write * (1 - z.square()), forget * torch.sigmoid(-f)
        d_gates = torch.empty_like(gates)
        h_later, c_later, n_later = (torch.zeros_like(h[0]) for _ in range(3))
        backwards = matrix.mT
        for t in range(gates.shape[0] - 1, -1, -1):
            dh = d_h[t] + h_later
            dc = torch.addcmul(c_later if d_c is None else d_c[t] + c_later, dh, c_of_h[t])
            dn = torch.addcmul(n_later if d_n is None else d_n[t] + n_later, dh, n_of_h[t])
            d_write = torch.addcmul(dn, dc, z[t])
            d_forget = torch.addcmul(dn * n_before[t], dc, c_before[t])
            d_token = torch.cat([dc * z_of_c[t], d_write * write[t], d_forget * f_of_forget[t], dh * o_of_h[t]], -1)
            d_gates[t] = d_token
            h_later, c_later, n_later = d_token @ backwards, dc * forget[t], dn * forget[t]
        d_recurrent = torch.einsum("thbn,thbm->hnm", h_before, d_gates)
    d_z, d_i, d_f, d_o = (x.to(dtype).contiguous() for x in _by_rows(d_gates, groups).chunk(4, -1))
    d_starts = [_by_rows(x.unsqueeze(0), groups).squeeze(1) for x in (h_later, c_later, n_later)]
    return (
        *(d_z, d_i, d_f, d_o),
        d_gates.sum((0, 2)).unflatten(0, (groups, -1)),
        d_recurrent.unflatten(0, (groups, -1)),
        *(d_starts[0], d_starts[1], d_starts[2]),
    )


def _by_heads(x: Tensor, groups: int) -> Tensor:
    """[G B, T, H, N] as [T, G H, B, N]."""
    return x.unflatten(0, (groups, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)


def _by_rows(x: Tensor, groups: int) -> Tensor:
    """[T, G H, B, N] as [G B, T, H, N], contiguous."""
    return x.unflatten(1, (groups, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous()


def _empty_states(
    z: Tensor, i: Tensor, f: Tensor, o: Tensor,
    bias: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    rows, length, heads, size = z.shape
    groups = recurrent.shape[0]
    shape = (length, groups * heads, rows // groups, 4 * size)
    states = [recurrent.new_empty(z.shape) for _ in range(4)]
    return states[0], states[1], states[2], states[3], [recurrent.new_empty(shape)] if save else []


def _empty_gradients(
    gates: Tensor, recurrent: Tensor, h_start: Tensor, c_start: Tensor, n_start: Tensor, m_start: Tensor,
    h: Tensor, c: Tensor, n: Tensor, m: Tensor, d_h: Tensor, d_c: Tensor | None, d_n: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [h.new_empty(h.shape, dtype=dtype) for _ in range(_INPUTS)]
    starts = [h_start.new_empty(h_start.shape) for _ in range(3)]
    bias = recurrent.new_empty(recurrent.shape[0], recurrent.shape[1], recurrent.shape[3])
    return (
        *(inputs[0], inputs[1], inputs[2], inputs[3]),
        *(bias, recurrent.new_empty(recurrent.shape)),
        *(starts[0], starts[1], starts[2]),
    )


def _triton_backward(
    results: tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]], z: Tensor, i: Tensor, f: Tensor, o: Tensor,
    bias: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, save: bool,
) -> None:  # fmt: skip
    h_all, c_all, n_all, m_all, (gates,) = results
    triton_slstm.backward(gates, recurrent, h, c, n, m, h_all, c_all, n_all, m_all, h_all, None, None, z.dtype)


_forward_op = register_operator("slstm", _forward, _empty_states)
_backward_op = register_operator("slstm_backward", _backward, _empty_gradients)
_triton_forward_op = register_operator(
    "triton_slstm",
    triton_slstm.forward,
    triton_slstm.empty_states,
    then=_triton_backward,
)
_triton_backward_op = register_operator("triton_slstm_backward", triton_slstm.backward, _empty_gradients)
