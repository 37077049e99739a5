"""The step loop: the definition that every other backend is compared with, in float64 where its inputs are.

It is written to be read, in any dtype and on any device, and never optimised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from statetrack.ops.backend import Backend
from statetrack.ops.packing import packing_of
from statetrack.transition import Diagonal, Discretized, Householder, LowRank, Transition, accumulation_dtype


def run(
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _sequences(transition, q, v, write, initial_state)
    outputs, states = [], []
    for index, (start, stop) in enumerate(itertools.pairwise(packing_of(cu_seqlens).boundaries)):
        o, state = _sequences(
            transition.map_tokens(lambda x, start=start, stop=stop: x[:, start:stop]),
            q[:, start:stop],
            v[:, start:stop],
            None if write is None else write[:, start:stop],
            None if initial_state is None else initial_state[index : index + 1],
        )
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def _sequences(
    transition: Transition, q: Tensor, v: Tensor, write: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs = [x for x in (q, v, write, initial_state) if x is not None]
    dtype = accumulation_dtype(*inputs, *transition.tensors().values())
    b, t, h = transition.batch_shape
    if initial_state is None:
        state = torch.zeros(b, h, q.shape[-1], v.shape[-1], dtype=dtype, device=q.device)
    else:
        state = initial_state.to(dtype)
    outputs = []
    # `unbind`, not `x[:, i]`: the backward of the latter fills a whole [B, T, ...] tensor for every token.
    queries = q.to(dtype).unbind(1)
    values = v.to(dtype).unbind(1)
    if isinstance(transition, Householder):
        keys = transition.k.to(dtype).unbind(1)
        betas = transition.effective_beta.to(dtype).unbind(1)
        decays = [None] * t if transition.decay is None else _per_channel(transition.decay).to(dtype).unbind(1)
        for i in range(t):
            if (decay := decays[i]) is not None:
                state = decay.unsqueeze(-1) * state
            for k, beta, value in zip(keys[i].unbind(1), betas[i].unbind(1), values[i].unbind(1), strict=True):
                error = value - torch.einsum("bhk,bhkv->bhv", k, state)
                state = state + torch.einsum("bh,bhk,bhv->bhkv", beta, k, error)
            outputs.append(torch.einsum("bhk,bhkv->bhv", queries[i], state))
    else:
        assert write is not None
        writes = write.to(dtype).unbind(1)
        for i, move in enumerate(_moves(transition, dtype)):
            state = move(state) + torch.einsum("bhk,bhv->bhkv", writes[i], values[i])
            outputs.append(torch.einsum("bhk,bhkv->bhv", queries[i], state))
    o = torch.stack(outputs, 1) if outputs else torch.zeros(b, 0, h, v.shape[-1], dtype=dtype, device=v.device)
    return o.to(v.dtype), state


def _moves(transition: Transition, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
    """For every token the map of the state, H -> A_t H."""
    if isinstance(transition, Discretized):
        a = replace(transition, A=transition.A.to(dtype))
        for dt in transition.dt.to(dtype).unbind(1):
            yield partial(torch.mul, a.decay_of(dt))
    elif isinstance(transition, Diagonal):
        for decay in _per_channel(transition.decay).to(dtype).unbind(1):
            yield partial(torch.mul, decay.unsqueeze(-1))
    elif isinstance(transition, LowRank):
        decays = _per_channel(transition.decay).to(dtype).unbind(1)
        us, ws = transition.u.to(dtype).unbind(1), transition.w.to(dtype).unbind(1)
        for decay, u, w in zip(decays, us, ws, strict=True):
            yield partial(_low_rank, decay, u, w)
    else:
        raise TypeError(f"no step is defined for {type(transition).__name__}")


def _low_rank(decay: Tensor, u: Tensor, w: Tensor, state: Tensor) -> Tensor:
    read = torch.einsum("bhk,bhkv->bhv", w, state)
    return decay.unsqueeze(-1) * state - torch.einsum("bhk,bhv->bhkv", u, read)


def _per_channel(decay: Tensor) -> Tensor:
    return decay.unsqueeze(-1) if decay.ndim == 3 else decay


BACKEND = Backend(name="reference", supports=lambda transition: None, run=run)
