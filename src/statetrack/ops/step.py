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
        return x.to(dtype).reshape(b * h, *shape)

    if initial_state is None:
        state = q.new_zeros(b * h, key_dim, value_dim, dtype=dtype)
    else:
        state = rows(initial_state, key_dim, value_dim)

    if isinstance(transition, Householder):
        if transition.decay is not None:
            state = rows(transition.decay, -1, 1) * state
        factors = zip(
            *(x.to(dtype).unbind(2) for x in (transition.k, transition.effective_beta, v)),
            strict=True,
        )
        for k, beta, value in factors:
            k = k.reshape(b * h, 1, key_dim)
            error = torch.baddbmm(value.reshape(b * h, 1, value_dim), k, state, alpha=-1)
            state = torch.baddbmm(state, k.mT, beta.reshape(b * h, 1, 1) * error)
    else:
        assert write is not None
        if isinstance(transition, Discretized):
            exact = replace(transition, A=transition.A.to(dtype))
            state = rows(exact.decay_of(transition.dt.to(dtype)), key_dim, value_dim) * state
        elif isinstance(transition, Diagonal):
            state = rows(transition.decay, -1, 1) * state
        elif isinstance(transition, LowRank):
            read = torch.bmm(rows(transition.w, 1, key_dim), state)
            kept = rows(transition.decay, -1, 1) * state
            state = torch.baddbmm(kept, rows(transition.u, key_dim, 1), read, alpha=-1)
        else:
            raise TypeError(f"no step is defined for {type(transition).__name__}")
        state = torch.baddbmm(state, rows(write, key_dim, 1), rows(v, 1, value_dim))
    o = torch.bmm(rows(q, 1, key_dim), state)
    return o.view(b, 1, h, value_dim).to(v.dtype), state.view(b, h, key_dim, value_dim)
