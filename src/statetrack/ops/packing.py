"""Padded rows as packed sequences, and packed sequences as dense batches for backends that compute [B, T, ...] only.

Sequences of similar length share a batch. The shorter ones are padded at their end with steps that leave the state
alone, so a batch's final states are those of its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from statetrack.ops.backend import Run
from statetrack.transition import Transition

RunDense = Callable[[Transition, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(transition, q, v, write, initial_state) -> (o, final_state), as `linear_recurrence` without `cu_seqlens`."""

Check = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]
"""(q, v, write, initial_state): raises ValueError for what a backend can't take."""

# The longest sequence of a batch has at most this many times the tokens of the shortest, which bounds the padding.
_LENGTH_RATIO = 1.5


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of padded rows as packed sequences, one for each row.

    Args:
        x: [B, T, ...].
        mask: bool [B, T], True at tokens, False at padding.

    Returns:
        The tokens [1, mask.sum(), ...], and their boundaries cu_seqlens [B + 1].

    Raises:
        ValueError: if the mask is no bool tensor [B, T], or has no token at all.
    """
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must be a bool tensor [B, T] = {tuple(x.shape[:2])}, True at tokens and False at padding, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if not mask.any():
        raise ValueError("mask must have at least one token, got padding only")
    lengths = mask.sum(1)
    return x[mask].unsqueeze(0), torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def unpack(x: Tensor, mask: Tensor) -> Tensor:
    """The reverse of `pack`: [1, mask.sum(), ...] -> [B, T, ...], 0 at padding."""
    return x.new_zeros(*mask.shape, *x.shape[2:]).index_put((mask,), x[0])


def sequence_mask(cu_seqlens: Tensor) -> Tensor:
    """The mask [S, L] of packed sequences as rows with padding at their end, where L is the longest: `unpack(x, mask)`
    makes such rows, and `pack` packs them again."""
    lengths = cu_seqlens.diff()
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)


def by_rows(run_dense: RunDense, check: Check | None = None) -> Run:
    """What a backend runs, from a function that computes a dense batch: packed sequences go to it as rows.

    Args:
        run_dense: computes a dense batch.
        check: refuses tensors before anything is computed; None to take all.
    """

    def run(
        transition: Transition,
        q: Tensor,
        v: Tensor,
        write: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if check is not None:
            check(q, v, write, initial_state)
        if cu_seqlens is None:
            return run_dense(transition, q, v, write, initial_state)
        return run_packed(run_dense, transition, q, v, write, initial_state, cu_seqlens)

    return run


def run_packed(
    run_dense: RunDense,
    transition: Transition,
    q: Tensor,
    v: Tensor,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Serves a packed call by dense ones; arguments and results are those of `linear_recurrence`, already checked.

    Where the transition has no identity to pad with, only sequences of one length share a batch.

    Args:
        run_dense: computes a dense batch.
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
    for batch in _batches(lengths, _LENGTH_RATIO if transition.has_identity else 1.0):
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
    tensors = transition.tensors()
    return replace(
        transition,
        **{name: take(tensors[name], fill) for name, fill in transition.identity.items() if name in tensors},
    )
