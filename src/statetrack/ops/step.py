"""One token, which is what generation computes: the few matrix products of a step, and plain autograd.

"auto" comes here wherever T is 1. Chunks have nothing to gain there, and the step loop is written to be read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from statetrack.transition import Diagonal, Discretized, Householder, LowRank, Transition, accumulation_dtype


def one_token(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`linear_recurrence` where T is 1 and nothing is packed; arguments and results as there, already checked."""
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return _one_token(transition, q, v, write, initial_state)
    return _one_token(transition, q, v, write, initial_state)


def _one_token(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    given = [x for x in (q, v, write, initial_state) if x is not None]
    dtype = accumulation_dtype(*given, *transition.tensors().values())
    b, _, h = transition.batch_shape
    key_dim, value_dim = q.shape[-1], v.shape[-1]

    def rows(x: Tensor, *shape: int) -> Tensor:
        return (x if x.dtype == dtype else x.to(dtype)).reshape(b * h, *shape)

    def add_product(state: Tensor, column: Tensor, row: Tensor, sign: int = 1) -> Tensor:
        """state + sign column row^T; by elementwise multiplication, which costs half as much as a matrix product."""
        shape = (key_dim, 1), (1, value_dim)
        if state is before or torch.is_grad_enabled():
            return torch.addcmul(state, rows(column, *shape[0]), rows(row, *shape[1]), value=sign)
        return state.addcmul_(rows(column, *shape[0]), rows(row, *shape[1]), value=sign)

    if initial_state is None:
        before = q.new_zeros(b * h, key_dim, value_dim, dtype=dtype)
    else:
        before = rows(initial_state, key_dim, value_dim)

    if isinstance(transition, Householder):
        state = before if transition.decay is None else rows(transition.decay, -1, 1) * before
        factors = zip(transition.k.unbind(2), transition.effective_beta.unbind(2), v.unbind(2), strict=True)
        for k, beta, value in factors:
            error = torch.baddbmm(rows(value, 1, value_dim), rows(k, 1, key_dim), state, alpha=-1)
            state = add_product(state, k, rows(beta, 1, 1) * error)
    else:
        assert write is not None
        if isinstance(transition, Discretized):
            # Step sizes and A laid out alike, or the product of the two would have to be copied into rows.
            decay = replace(transition, A=transition.A.contiguous()).decay_of(transition.dt.to(dtype))
            decay = decay.view(b * h, key_dim, value_dim)
            state = decay * before if torch.is_grad_enabled() else decay.mul_(before)
        elif isinstance(transition, Diagonal):
            state = rows(transition.decay, -1, 1) * before
        elif isinstance(transition, LowRank):
            read = torch.bmm(rows(transition.w, 1, key_dim), before)
            state = add_product(rows(transition.decay, -1, 1) * before, transition.u, read, sign=-1)
        else:
            raise TypeError(f"no step is defined for {type(transition).__name__}")
        state = add_product(state, write, v)
    o = torch.bmm(rows(q, 1, key_dim), state)
    return o.view(b, 1, h, value_dim).to(v.dtype), state.view(b, h, key_dim, value_dim)
