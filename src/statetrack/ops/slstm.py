"""The recurrence of sLSTM, which is not linear and so has one way to be computed: token by token, in one operator.

PyTorch runs it anywhere; on a GPU the Triton kernels of `triton_slstm.py` do all tokens in one launch.

    (z, i, f, o)_t = gates_t + h_{t-1} R,     m_t = max(log sigmoid(f) + m_{t-1}, i)
    c_t = f' c_{t-1} + i' tanh(z),   n_t = f' n_{t-1} + i',   h_t = sigmoid(o) c_t / n_t
    f' = exp(log sigmoid(f) + m_{t-1} - m_t),   i' = exp(i - m_t)

Letters for shapes as in `statetrack.transition`, and N the channels of a head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops import triton_slstm
from statetrack.ops.backend import register_operator
from statetrack.ops.vmapped import is_vmapped, vmapped_over_heads


def slstm(
    gates: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states h, c, n, m after every token, each [T, H, B, N]; h is the output.

    The stabilizer m cancels out of h, so it is a constant to gradients. Those through h, c and n are exact for whatever
    does not depend on how c, n and m are scaled, which is so for all that this function makes of them.

    Args:
        gates: what the inputs say of z, i, f, o: [T, H, B, 4 N], float32 or float64.
        recurrent: R [H, N, 4 N], in the dtype of the gates.
        state: h, c, n, m before the first token, each [H, B, N]. At the start h = c = n = 0 and m = -inf.
        backend: "torch", "triton", or "auto" for the faster that serves these tensors.

    Raises:
        ValueError: for an unknown backend, or one that does not serve these tensors.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"the backend of sLSTM must be auto, torch or triton, got {backend!r}")
    use_triton = False
    if backend != "torch":
        reason = triton_slstm.supports(gates, recurrent)
        if reason is not None and backend == "triton":
            raise ValueError(f"backend 'triton' can't serve sLSTM: {reason}")
        use_triton = reason is None
    recurrence = partial(_SLSTM.apply, use_triton)
    if is_vmapped():
        return vmapped_over_heads(recurrence, [1, 0, 0, 0, 0, 0], gates, recurrent, *state)  # type: ignore[no-any-return]
    return recurrence(gates, recurrent, *state)  # type: ignore[no-any-return]


class _SLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, use_triton: bool, gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> tuple[Tensor, ...]:
        operator = _triton_forward_op if use_triton else _forward_op
        states = operator(gates, recurrent, h, c, n, m)
        ctx.use_triton = use_triton
        ctx.save_for_backward(gates, recurrent, h, c, n, m, *states)
        ctx.mark_non_differentiable(states[3])
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_h, d_c, d_n, _ = grad_outputs
        operator = _triton_backward_op if ctx.use_triton else _backward_op
        return (None, *operator(*ctx.saved_tensors, d_h, d_c, d_n), None)


def _forward(
    gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for token in gates.unbind(0):
        z, i, f, o = torch.baddbmm(token, h, recurrent).chunk(4, -1)
        kept = F.logsigmoid(f) + m
        m = torch.maximum(kept, i)
        forget, write = torch.exp(kept - m), torch.exp(i - m)
        c = torch.addcmul(write * torch.tanh(z), forget, c)
        n = torch.addcmul(write, forget, n)  # at least 1, as forget or write is 1
        h = torch.sigmoid(o) * c / n
        states.append((h, c, n, m))
    h, c, n, m = (torch.stack(values) for values in zip(*states, strict=True))
    return h, c, n, m


def _backward(
    gates: Tensor,
    recurrent: Tensor,
    h_start: Tensor,
    c_start: Tensor,
    n_start: Tensor,
    m_start: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    d_n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    h_before, c_before, n_before, m_before = (
        torch.cat([start.unsqueeze(0), after[:-1]])
        for start, after in ((h_start, h), (c_start, c), (n_start, n), (m_start, m))
    )
    z, i, f, o = (gates + h_before @ recurrent).chunk(4, -1)
    z, o = torch.tanh(z), torch.sigmoid(o)
    forget, write = torch.exp(F.logsigmoid(f) + m_before - m), torch.exp(i - m)
    # All derivatives that don't depend on what comes later, for all tokens at once.
    c_of_h, n_of_h, o_of_h = o / n, -h / n, c / n * o * (1 - o)
    z_of_c, f_of_forget = write * (1 - z.square()), forget * torch.sigmoid(-f)
    d_gates = torch.empty_like(gates)
    h_later, c_later, n_later = torch.zeros_like(h_start), torch.zeros_like(c_start), torch.zeros_like(n_start)
    backwards = recurrent.mT
    for t in range(gates.shape[0] - 1, -1, -1):
        dh = d_h[t] + h_later
        dc = torch.addcmul(d_c[t] + c_later, dh, c_of_h[t])
        dn = torch.addcmul(d_n[t] + n_later, dh, n_of_h[t])
        d_write = torch.addcmul(dn, dc, z[t])
        d_forget = torch.addcmul(dn * n_before[t], dc, c_before[t])
        d_token = torch.cat([dc * z_of_c[t], d_write * write[t], d_forget * f_of_forget[t], dh * o_of_h[t]], -1)
        d_gates[t] = d_token
        h_later, c_later, n_later = d_token @ backwards, dc * forget[t], dn * forget[t]
    d_recurrent = torch.einsum("thbn,thbm->hnm", h_before, d_gates)
    return d_gates, d_recurrent, h_later, c_later, n_later


def _empty_states(
    gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (gates.shape[0], *h.shape)
    return gates.new_empty(shape), gates.new_empty(shape), gates.new_empty(shape), gates.new_empty(shape)


def _empty_gradients(
    gates: Tensor, recurrent: Tensor, h_start: Tensor, c_start: Tensor, n_start: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (gates, recurrent, h_start, c_start, n_start))


_forward_op = register_operator("slstm", _forward, _empty_states)
_backward_op = register_operator("slstm_backward", _backward, _empty_gradients)
_triton_forward_op = register_operator(
    "triton_slstm",
    triton_slstm.forward,
    _empty_states,
    then=lambda states, *given: triton_slstm.backward(*given, *states, *states[:3]),
)
_triton_backward_op = register_operator("triton_slstm_backward", triton_slstm.backward, _empty_gradients)
