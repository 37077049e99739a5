"""One token, which is what generation computes: the few matrix products of a step, and plain autograd.

"auto" comes here wherever T is 1. Chunks have nothing to gain there, and the step loop is written to be read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from statetrack.transition import Diagonal, Discretized, Householder, LowRank, Transition, accumulation_dtype

Step = Callable[[Transition, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(transition, q, v, write, initial_state) -> (o, final_state) for a single token."""


class _Mode(threading.local):
    in_place = False


_MODE = _Mode()


@contextmanager
def in_place_steps() -> Iterator[None]:
    """Inside, `linear_recurrence` of a single token may write the state after it over its `initial_state`.

    A state is then read once and written once, in memory that it has already. Who opens this block gives the states up
    that are passed on in it. It holds for this thread, and there are no gradients in it.
    """
    before, _MODE.in_place = _MODE.in_place, True
    try:
        with torch.no_grad():
            yield
    finally:
        _MODE.in_place = before


def overwrites(initial_state: Tensor | None, dtype: torch.dtype) -> TypeGuard[Tensor]:
    """Whether the state after a token, in this dtype, takes the place of the one before it."""
    return (
        _MODE.in_place
        and initial_state is not None
        and initial_state.dtype == dtype
        and initial_state.is_contiguous()
        and not torch.is_grad_enabled()
    )


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

    def overwritable(state: Tensor) -> bool:
        return over or not (state is before or torch.is_grad_enabled())

    def add_product(state: Tensor, column: Tensor, row: Tensor, sign: int = 1) -> Tensor:
        """state + sign column row^T; by elementwise multiplication, which costs half as much as a matrix product."""
        column, row = rows(column, key_dim, 1), rows(row, 1, value_dim)
        if overwritable(state):
            return state.addcmul_(column, row, value=sign)
        return torch.addcmul(state, column, row, value=sign)

    def decayed(state: Tensor, decay: Tensor) -> Tensor:
        decay = rows(decay, -1, 1)
        return state.mul_(decay) if overwritable(state) else decay * state

    over = overwrites(initial_state, dtype)
    if initial_state is None:
        before = q.new_zeros(b * h, key_dim, value_dim, dtype=dtype)
    else:
        before = rows(initial_state, key_dim, value_dim)

    if isinstance(transition, Householder):
        state = before if transition.decay is None else decayed(before, transition.decay)
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
            if torch.is_grad_enabled():
                state = decay * before
            else:
                state = torch.mul(decay, before, out=before if over else decay)
        elif isinstance(transition, Diagonal):
            state = decayed(before, transition.decay)
        elif isinstance(transition, LowRank):
            read = torch.bmm(rows(transition.w, 1, key_dim), before)
            state = add_product(decayed(before, transition.decay), transition.u, read, sign=-1)
        else:
            raise TypeError(f"no step is defined for {type(transition).__name__}")
        state = add_product(state, write, v)
    o = torch.bmm(rows(q, 1, key_dim), state)
    after = initial_state if over and initial_state is not None else state.view(b, h, key_dim, value_dim)
    return o.view(b, 1, h, value_dim).to(v.dtype), after
