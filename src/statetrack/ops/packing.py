"""Packed sequences as dense batches, for backends that compute [B, T, ...] only.

Sequences of similar length share a batch. The shorter ones are padded at their end with steps that leave the state
alone, so a batch's final states are those of its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from statetrack.transition import Householder, Transition

RunDense = Callable[[Transition, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(transition, q, v, write, initial_state) -> (o, final_state), as `linear_recurrence` without `cu_seqlens`."""

# The longest sequence of a batch has at most this many times the tokens of the shortest, which bounds the padding.
_LENGTH_RATIO = 1.5


def run_packed(
    run_dense: RunDense,
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    can_pad: bool,
) -> tuple[Tensor, Tensor]:
    """Serves a packed call by dense ones; arguments and results are those of `linear_recurrence`, already checked.

    Args:
        run_dense: computes a dense batch.
        can_pad: whether zeros for the transition (1 for a decay), `q`, `v` and `write` make a step that leaves the
            state as it is. If not, only sequences of one length share a batch.
    """
    boundaries = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(boundaries)]
    if len(set(lengths)) == 1:
        return _run_equal(run_dense, transition, q, v, write, initial_state, len(lengths))

    # Where every token and every sequence will be found in the concatenated results of the dense calls.
    token_places = torch.empty(boundaries[-1], dtype=torch.long)
    sequence_places = [0] * len(lengths)
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    tokens_done = sequences_done = 0
    for batch in _batches(lengths, _LENGTH_RATIO if can_pad else 1.0):
        longest = lengths[batch[0]]
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        real = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, sequence in enumerate(batch):
            start, length = boundaries[sequence], lengths[sequence]
            tokens[row, :length] = torch.arange(start, start + length)
            real[row, :length] = True
            first = tokens_done + row * longest
            token_places[start : start + length] = torch.arange(first, first + length)
            sequence_places[sequence] = sequences_done + row
        tokens_done += tokens.numel()
        sequences_done += len(batch)

        take = _Take(tokens.to(q.device), None if real.all() else real.to(q.device))
        states_in = None if initial_state is None else initial_state[batch]
        written = None if write is None else take(write)
        o, state = run_dense(_take_transition(transition, take), take(q), take(v), written, states_in)
        outputs.append(o.flatten(0, 1))
        states.append(state)

    empty = [sequence for sequence, length in enumerate(lengths) if length == 0]
    if empty:
        unchanged = states[0].new_zeros(len(empty), *states[0].shape[1:])
        states.append(unchanged if initial_state is None else initial_state[empty].to(unchanged.dtype))
        for row, sequence in enumerate(empty):
            sequence_places[sequence] = sequences_done + row
    o = torch.cat(outputs).index_select(0, token_places.to(q.device)).unsqueeze(0)
    return o, torch.cat(states)[sequence_places]


def _run_equal(
    run_dense: RunDense,
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
    sequences: int,
) -> tuple[Tensor, Tensor]:
    """Sequences of one length are a batch already: views, no copies."""

    def split(x: Tensor) -> Tensor:
        return x.reshape(sequences, -1, *x.shape[2:])

    written = None if write is None else split(write)
    o, state = run_dense(transition.map_tokens(split), split(q), split(v), written, initial_state)
    return o.reshape(1, -1, *o.shape[2:]), state


def _batches(lengths: list[int], ratio: float) -> list[list[int]]:
    """The sequences that are not empty, grouped by length, the longest of each group first."""
    batches: list[list[int]] = []
    for sequence in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] <= ratio * lengths[sequence]:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


class _Take:
    """Takes tokens [S, L] out of a packed tensor [1, T, ...] and fills the places that are not real."""

    def __init__(self, tokens: Tensor, real: Tensor | None) -> None:
        self.tokens = tokens
        self.real = real

    def __call__(self, x: Tensor, fill: float = 0.0) -> Tensor:
        # `index_select`, not `x[0, tokens]`: the backward of the latter sorts its indices.
        taken = x[0].index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)
        if self.real is None:
            return taken
        return torch.where(self.real.reshape(*self.real.shape, *[1] * (x.ndim - 2)), taken, fill)


def _take_transition(transition: Transition, take: _Take) -> Transition:
    taken = transition.map_tokens(take)
    if isinstance(taken, Householder) and isinstance(transition, Householder) and transition.decay is not None:
        return replace(taken, decay=take(transition.decay, fill=1.0))
    return taken
