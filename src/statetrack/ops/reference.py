"""The step loop: the definition that every other backend is compared with, in float64 where its inputs are.

It is written to be read, in any dtype and on any device, and never optimised.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from statetrack.ops.backend import Backend
from statetrack.transition import Discretized, Householder, Transition, accumulation_dtype


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
    boundaries = cu_seqlens.tolist()
    for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
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
    inputs = [q, v, *(x for x in (write, initial_state) if x is not None)]
    transition.map_tokens(lambda x: inputs.append(x) or x)
    if isinstance(transition, Discretized):
        inputs.append(transition.A)
    dtype = accumulation_dtype(*inputs)
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
        assert isinstance(transition, Discretized)
        assert write is not None
        writes = write.to(dtype).unbind(1)
        steps, a = transition.dt.to(dtype).unbind(1), transition.A.to(dtype)
        for i in range(t):
            decay = transition.eigenvalue_range.widen(torch.exp(steps[i].unsqueeze(2) * a))
            state = decay * state + torch.einsum("bhk,bhv->bhkv", writes[i], values[i])
            outputs.append(torch.einsum("bhk,bhkv->bhv", queries[i], state))
    o = torch.stack(outputs, 1) if outputs else torch.zeros(b, 0, h, v.shape[-1], dtype=dtype, device=v.device)
    return o.to(v.dtype), state


def _per_channel(decay: Tensor) -> Tensor:
    return decay.unsqueeze(-1) if decay.ndim == 3 else decay


BACKEND = Backend(name="reference", supports=lambda transition: None, run=run)
