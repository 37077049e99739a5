"""Padded rows as packed sequences, and packed sequences as dense batches for backends that compute [B, T, ...] only.

Sequences of similar length share a batch. The shorter ones are padded at their end with steps that leave the state
alone, so a batch's final states are those of its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from statetrack.ops.backend import Run
from statetrack.transition import Transition

RunDense = Callable[[Transition, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(transition, q, v, write, initial_state) -> (o, final_state), as `linear_recurrence` without `cu_seqlens`."""

Check = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]
"""(q, v, write, initial_state): raises ValueError for what a backend can't take."""

# The longest sequence of a batch has at most this many times the tokens of the shortest, which bounds the padding.
_LENGTH_RATIO = 1.5
# The same for rows that end in one segment of time.
_SEGMENT_RATIO = 1.2


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


Move = Callable[[Tensor], Tensor]
"""Takes an index tensor from the host to the device of the activations."""

Made = TypeVar("Made")
Function = TypeVar("Function", bound=Callable)


def _untraced(function: Function) -> Function:
    """Runs as it is where torch.compile traces the rest, which could neither read a tensor nor keep what it made."""

    @wraps(function)
    def call(*args: Any) -> Any:
        # `disable` imports torch.compile, and Triton with it, which takes long.
        return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)

    return cast(Function, call)


class Packing:
    """The boundaries of packed sequences on the host, and what devices index with, made once for all layers.

    Attributes:
        boundaries: those of `cu_seqlens`.
        lengths: of the sequences.
        ordered: whether the boundaries begin at 0 and don't decrease.

    Args:
        boundaries: from 0 to T.
    """

    def __init__(self, boundaries: list[int]) -> None:
        self.boundaries = boundaries
        self.lengths = [stop - start for start, stop in pairwise(boundaries)]
        self.ordered = boundaries[0] == 0 and min(self.lengths) >= 0
        self._made: dict[tuple, Any] = {}

    @_untraced
    def make(self, function: Callable[..., Made], x: Tensor, *args: Any) -> Made:
        """`function(self, move, *args)` for activations on the device of `x`; a second call gets the same object.

        Args:
            function: makes its index tensors on the host, and gives them to `move`.
            x: the activations.
            args: further arguments, hashable.
        """
        if type(x) not in (Tensor, torch.nn.Parameter):  # tensors made under FakeTensorMode are good for it alone
            return function(self, lambda indices: indices.to(x.device), *args)
        # Another stream would not wait for the copies.
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        key = (function, x.device, stream, *args)
        if key not in self._made:
            # Tensors of inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                self._made[key] = function(self, lambda indices: _move(indices, x.device), *args)
        return self._made[key]


_PACKINGS = WeakTensorKeyDictionary()


@_untraced
def packing_of(cu_seqlens: Tensor) -> Packing:
    """The boundaries [S + 1] as a `Packing`. A tensor is read once, as reading one on a GPU waits for all its work."""
    if type(cu_seqlens) is not Tensor or cu_seqlens.is_inference():  # the latter don't tell when they are changed
        return Packing(cu_seqlens.tolist())
    version, packing = _PACKINGS.get(cu_seqlens) or (None, None)
    if packing is None or version != cu_seqlens._version:
        packing = Packing(cu_seqlens.tolist())
        _PACKINGS[cu_seqlens] = cu_seqlens._version, packing
    return packing


def on_host(cu_seqlens: Tensor) -> Tensor:
    """Boundaries that all layers can read without waiting for a GPU, and without making their indices again."""
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor:
        return cu_seqlens
    with torch.inference_mode(False):  # tensors of inference mode don't tell when they are changed
        host = cu_seqlens.cpu()
        return host.clone() if host.is_inference() else host


def _move(indices: Tensor, device: torch.device) -> Tensor:
    # A copy from memory that is not pinned would wait for all work of the GPU.
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of packed sequences belong.

    Attributes:
        sequence: the sequence of each token, [T].
        offset: its place in it, [T].
        lengths: of the sequences, [S].
        starts: the first tokens of the sequences that have one, [S'].
        filled: which sequences those are, [S'].
        last: the last token of each sequence, [S]; of an empty one any.
        occupied: bool [S], whether a sequence has a token.
    """

    sequence: Tensor
    offset: Tensor
    lengths: Tensor
    starts: Tensor
    filled: Tensor
    last: Tensor
    occupied: Tensor


def tokens_of(cu_seqlens: Tensor, x: Tensor) -> Tokens:
    """Where the tokens `x` [1, T, ...] belong."""
    return packing_of(cu_seqlens).make(_tokens, x)


def _tokens(packing: Packing, move: Move) -> Tokens:
    lengths, boundaries = torch.tensor(packing.lengths), torch.tensor(packing.boundaries)
    sequence = torch.repeat_interleave(lengths)
    occupied = lengths > 0
    return Tokens(
        move(sequence),
        move(torch.arange(packing.boundaries[-1]) - boundaries[sequence]),
        move(lengths),
        move(boundaries[:-1][occupied]),
        move(occupied.nonzero().squeeze(1)),
        move((boundaries[1:] - 1).clamp(min=0)),
        move(occupied),
    )


@dataclass(frozen=True)
class PaddedRows:
    """Packed sequences as rows with padding at their end, as long as the longest.

    Attributes:
        places: of the tokens in the rows laid end to end, [T].
        lengths: of the sequences, [S].
        longest: L.
    """

    places: Tensor
    lengths: Tensor
    longest: int

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [S, L, ...], 0 at padding."""
        rows = x.new_zeros(len(self.lengths) * self.longest, *x.shape[2:]).index_copy(0, self.places, x[0])
        return rows.unflatten(0, (len(self.lengths), self.longest))

    def pack(self, rows: Tensor) -> Tensor:
        """[S, L, ...] -> [1, T, ...]."""
        return rows.flatten(0, 1).index_select(0, self.places).unsqueeze(0)


def padded_rows(cu_seqlens: Tensor, x: Tensor) -> PaddedRows:
    """Rows for the tokens `x` [1, T, ...]."""
    return packing_of(cu_seqlens).make(_padded_rows, x)


def _padded_rows(packing: Packing, move: Move) -> PaddedRows:
    lengths, longest = torch.tensor(packing.lengths), max(packing.lengths)
    sequence = torch.repeat_interleave(lengths)
    offset = torch.arange(packing.boundaries[-1]) - torch.tensor(packing.boundaries)[sequence]
    return PaddedRows(move(sequence * longest + offset), move(lengths), longest)


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
    packing = packing_of(cu_seqlens)
    if len(set(packing.lengths)) == 1:
        return _run_equal(run_dense, transition, q, v, write, initial_state, len(packing.lengths))
    groups = groups_of(cu_seqlens, q, alike=not transition.has_identity)
    outputs, states = [], []
    for take in groups.groups:
        states_in = None if initial_state is None else initial_state.index_select(0, take.sequences)
        written = None if write is None else take(write)
        o, state = run_dense(_take_transition(transition, take), take(q), take(v), written, states_in)
        outputs.append(o)
        states.append(state)
    return groups.join_tokens(outputs), groups.join_states(states, initial_state)


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


class Group:
    """Sequences of similar length as rows: takes their tokens [S, L] out of a packed tensor [1, T, ...].

    Args:
        tokens: the places in the packed tensor, [S, L].
        real: bool [S, L], False at padding; None where there is none.
        sequences: which sequences they are, [S].
    """

    def __init__(self, tokens: Tensor, real: Tensor | None, sequences: Tensor) -> None:
        self.tokens = tokens
        self.real = real
        self.sequences = sequences

    def __call__(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[1, T, ...] -> [S, L, ...], `fill` at padding."""
        # `index_select`, not `x[0, tokens]`: the backward of the latter sorts its indices.
        taken = x[0].index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)
        if self.real is None:
            return taken
        return torch.where(self.real.reshape(*self.real.shape, *[1] * (x.ndim - 2)), taken, fill)


@dataclass(frozen=True)
class Groups:
    """Packed sequences in groups of similar length, and how to join what is computed of each.

    Attributes:
        groups: all sequences that have a token.
        token_places: where the tokens lie in the groups' rows laid end to end, [T].
        sequence_places: where the sequences lie in the groups one after the other, the empty ones at the end, [S].
        empty: the sequences without a token.
    """

    groups: list[Group]
    token_places: Tensor
    sequence_places: Tensor
    empty: Tensor

    def join_tokens(self, rows: Sequence[Tensor]) -> Tensor:
        """[S', L', ...] of each group -> [1, T, ...]."""
        return torch.cat([x.flatten(0, 1) for x in rows]).index_select(0, self.token_places).unsqueeze(0)

    def join_states(self, states: Sequence[Tensor], before: Tensor | None) -> Tensor:
        """[S', ...] of each group -> [S, ...]; empty sequences keep those of `before` [S, ...], None for zeros."""
        if len(self.empty):
            unchanged = states[0].new_zeros(len(self.empty), *states[0].shape[1:])
            states = [*states, unchanged if before is None else before.index_select(0, self.empty).to(unchanged.dtype)]
        return torch.cat(list(states)).index_select(0, self.sequence_places)


def groups_of(cu_seqlens: Tensor, x: Tensor, *, alike: bool = False) -> Groups:
    """The sequences of a packed `x` [1, T, ...] in groups.

    Args:
        cu_seqlens: their boundaries [S + 1].
        x: tells the device.
        alike: only sequences of one length share a group, and there is no padding.
    """
    return packing_of(cu_seqlens).make(_groups, x, 1.0 if alike else _LENGTH_RATIO)


def _groups(packing: Packing, move: Move, ratio: float) -> Groups:
    boundaries, lengths = torch.tensor(packing.boundaries), torch.tensor(packing.lengths)
    batches = _batches(packing.lengths, ratio)
    sizes = [len(batch) * packing.lengths[batch[0]] for batch in batches]
    groups, token_places = [], torch.empty(packing.boundaries[-1], dtype=torch.long)
    for batch, first in zip(batches, accumulate(sizes, initial=0), strict=False):
        offsets = torch.arange(packing.lengths[batch[0]])
        sequences = torch.tensor(batch)
        real = offsets < lengths[sequences].unsqueeze(1)
        tokens = torch.where(real, boundaries[sequences].unsqueeze(1) + offsets, 0)
        token_places[tokens[real]] = first + real.flatten().nonzero().squeeze(1)
        groups.append(Group(move(tokens), None if real.all() else move(real), move(sequences)))
    empty = [sequence for sequence, length in enumerate(packing.lengths) if length == 0]
    order = torch.tensor([sequence for batch in batches for sequence in batch] + empty)
    return Groups(groups, move(token_places), move(order.argsort()), move(torch.tensor(empty, dtype=torch.long)))


@dataclass(frozen=True)
class Segments(Groups):
    """Packed sequences as rows side by side, the longest first, cut in time where rows end.

    For recurrences that go from token to token: in each segment only the rows that go on take part, so that all
    sequences together need as many steps as the longest. `groups` has the segments: a group takes tokens as
    [L, R, ...], L steps of the first R rows, of which those that end in it are its `sequences`.

    Attributes:
        order: the sequence of each row, [R].
        ends: for each segment the steps and the rows at which its sequences have their last token.
    """

    order: Tensor
    ends: list[tuple[Tensor, Tensor]]


def segments_of(cu_seqlens: Tensor, x: Tensor, *, alike: bool = False) -> Segments:
    """The sequences of a packed `x` [1, T, ...] in segments of time.

    Args:
        cu_seqlens: their boundaries [S + 1].
        x: tells the device.
        alike: rows end at the end of a segment alone, and there is no padding. Otherwise rows of similar length end in
            one segment, for fewer of them.
    """
    return packing_of(cu_seqlens).make(_segments, x, 1.0 if alike else _SEGMENT_RATIO)


def _segments(packing: Packing, move: Move, ratio: float) -> Segments:
    boundaries, lengths = torch.tensor(packing.boundaries), torch.tensor(packing.lengths)
    batches = _batches(packing.lengths, ratio)[::-1]  # those that end first are first
    order = torch.tensor([sequence for batch in batches[::-1] for sequence in batch])
    groups, ends, token_places = [], [], torch.empty(packing.boundaries[-1], dtype=torch.long)
    begin, rows, first = 0, len(order), 0
    for batch in batches:
        steps = torch.arange(begin, packing.lengths[batch[0]]).unsqueeze(1)
        real = steps < lengths[order[:rows]]
        tokens = torch.where(real, boundaries[order[:rows]] + steps, 0)
        token_places[tokens[real]] = first + real.flatten().nonzero().squeeze(1)
        sequences = order[rows - len(batch) : rows]
        groups.append(Group(move(tokens), None, move(sequences)))
        ends.append((move(lengths[sequences] - 1 - begin), move(torch.arange(rows - len(batch), rows))))
        begin, rows, first = packing.lengths[batch[0]], rows - len(batch), first + tokens.numel()
    empty = [sequence for sequence, length in enumerate(packing.lengths) if length == 0]
    ended = torch.tensor([sequence for batch in batches for sequence in batch] + empty)
    return Segments(
        groups,
        move(token_places),
        move(ended.argsort()),
        move(torch.tensor(empty, dtype=torch.long)),
        move(order),
        ends,
    )


def _take_transition(transition: Transition, take: Group) -> Transition:
    tensors = transition.tensors()
    return replace(
        transition,
        **{name: take(tensors[name], fill) for name, fill in transition.identity.items() if name in tensors},
    )
