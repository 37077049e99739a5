"""Does a model run an automaton, for ever? A proof where its states can be enumerated, random words where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from statetrack import seeds
from statetrack.automata import Automaton
from statetrack.model import ModelState, Tracker

Mode = Literal["auto", "exhaustive", "words"]
MODES: tuple[Mode, ...] = ("auto", "exhaustive", "words")

STATE_LIMIT = 500_000
STEP_LIMIT = 500_000
"""Pairs of a state and a letter that are looked at before giving up."""

MEMORY_LIMIT = 2 * 10**9
"""Bytes that the states found so far may take."""

_ROWS = 16_384
_SEGMENT = 16_384


@dataclass(frozen=True)
class Proof:
    """What was checked, and what came out.

    Attributes:
        mode: "exhaustive" or "words".
        errors: how many answers were wrong.
        checked: how many answers were looked at.
        states: pairs of a state of the model and one of the automaton that some word leads to, in an exhaustive
            verification; otherwise None.
        first_error: a word after which the answer is wrong, in letters, or in "words" its length; None if none was.
        reason: why the verification was not exhaustive; empty if it was.
    """

    mode: Literal["exhaustive", "words"]
    errors: int
    checked: int
    states: int | None = None
    first_error: tuple[int, ...] | int | None = None
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether the model is proved right on all words of all lengths."""
        return self.mode == "exhaustive" and self.errors == 0

    def __str__(self) -> str:
        if self.mode == "words":
            because = f" ({self.reason})" if self.reason else ""
            return f"{self.errors:,} errors in {self.checked:,} answers on random words{because}; no proof"
        if self.errors:
            return f"wrong after {self.errors:,} of {self.checked:,} pairs of reachable state and letter"
        return (
            f"exact at every length: all {self.checked:,} pairs of the {self.states:,} reachable states and a letter "
            "are right"
        )


class _TooManyError(Exception):
    """The model has more reachable states than can be enumerated, and why."""


@torch.inference_mode()
def verify(
    model: Tracker,
    automaton: Automaton,
    *,
    mode: Mode = "auto",
    state_limit: int = STATE_LIMIT,
    words: int = 16,
    length: int = 10_000,
    seed: int = 0,
) -> Proof:
    """Compares a model with an automaton.

    Exhaustive: between two tokens a model is what its recurrent state is, bit for bit. If words lead to finitely many
    states, and the answer to every letter is right in each of them, then it is right after every word of every length:
    a breadth-first search over pairs of states of model and automaton proves it. The search steps token by token; other
    ways of computing the same model (whole sequences) are compared with it by `count_errors`.

    Args:
        model: any model, in evaluation mode, on the CPU.
        automaton: its letters are the tokens, its outputs the right answers.
        mode: "exhaustive" or "words"; "auto" takes random words where there are too many states, or too many pairs of
            a state and a letter (`STEP_LIMIT`).
        state_limit: how many pairs of states are enumerated at most.
        words: how many random words.
        length: their length.
        seed: of the words.

    Raises:
        ValueError: if the model has other tokens or too few classes for the automaton, or more reachable states than
            the limit in the mode "exhaustive".
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    check_sizes(model, automaton)
    reason = ""
    if mode != "words":
        try:
            return _exhaustive(model, automaton, state_limit)
        except _TooManyError as error:
            if mode == "exhaustive":
                raise ValueError(f"{error}; verify it on random words instead (mode words)") from None
            reason = str(error)
    errors, first = count_errors(model, automaton, words=words, length=length, seed=seed)
    return Proof("words", errors, words * length, first_error=first, reason=reason)


def check_sizes(model: Tracker, automaton: Automaton) -> None:
    """Raises ValueError unless the model's tokens are the automaton's letters and its classes cover the outputs."""
    classes = model.config.output_size or model.config.vocab_size
    if model.config.vocab_size != automaton.num_letters or classes < automaton.num_outputs:
        raise ValueError(
            f"the model has {model.config.vocab_size} tokens and {classes} classes, the automaton "
            f"{automaton.num_letters} letters and {automaton.num_outputs} outputs; name the language it was made for"
        )


@torch.inference_mode()
def count_errors(
    model: Tracker,
    automaton: Automaton,
    *,
    words: int = 1,
    length: int = 1_000_000,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int | None]:
    """Wrong answers after all prefixes of random words, and the length of the shortest prefix with one, or None.

    Words are read in segments, as evaluation does, with the state carried from one to the next.
    """
    check_sizes(model, automaton)
    if words < 1 or length < 1:
        raise ValueError(f"words and their length must be at least 1, got {words} and {length}")
    random = seeds.generator("verification", seed)
    state: ModelState | None = None
    reached = torch.full((words,), automaton.start)
    errors, first, position = 0, None, 0
    size = max(1, _SEGMENT // words)
    while position < length:
        ids = torch.randint(automaton.num_letters, (words, min(size, length - position)), generator=random)
        following = automaton.run(ids, reached)
        logits, state = model.scan(ids, state)
        wrong = _wrong(logits, automaton.outputs[following])
        if first is None and wrong.any():
            first = position + int(wrong.any(0).nonzero()[0]) + 1
        errors += int(wrong.sum())
        reached = following[:, -1]
        position += ids.shape[1]
        on_progress(position, length)
    return errors, first


def _exhaustive(model: Tracker, automaton: Automaton, limit: int) -> Proof:
    letters = automaton.num_letters
    state = model.init_state(1)
    position = torch.tensor([automaton.start])
    found = dict.fromkeys(_keys(state, position), 0)
    origins: list[tuple[int, int]] = [(-1, -1)]
    checked = errors = 0
    first: tuple[int, ...] | None = None
    layers, positions, numbers = [state], [position], [np.array([0])]
    while layers:
        next_layers, next_positions, next_numbers = [], [], []
        for state, position, number in _pieces(layers, positions, numbers, max(1, _ROWS // letters)):
            rows = torch.arange(len(position)).repeat_interleave(letters)
            ids = torch.arange(letters).repeat(len(position))
            logits, after = model.step(ids, _select(state, rows))
            following = automaton.transitions[position].flatten()
            wrong = _wrong(logits, automaton.outputs[following]).nonzero().squeeze(1).tolist()
            checked += len(ids)
            errors += len(wrong)
            if wrong and first is None:
                parent = int(number[wrong[0] // letters])
                first = (*_word(origins, parent), wrong[0] % letters)
            fresh = []
            for row, key in enumerate(_keys(after, following)):
                if key not in found:
                    found[key] = len(origins)
                    origins.append((int(number[row // letters]), row % letters))
                    fresh.append(row)
            if checked > STEP_LIMIT or len(found) > limit or len(found) * len(next(iter(found))) > MEMORY_LIMIT:
                raise _TooManyError(f"words lead the model to more than {len(found) - 1:,} states")
            if fresh:
                kept = torch.tensor(fresh)
                next_layers.append(_select(after, kept))
                next_positions.append(following[kept])
                next_numbers.append(np.arange(len(origins) - len(fresh), len(origins)))
        layers, positions, numbers = next_layers, next_positions, next_numbers
    return Proof("exhaustive", errors, checked, states=len(found), first_error=first)


def _keys(state: ModelState, position: Tensor) -> list[bytes]:
    """The bits of every row of a state, with the automaton's state beside them."""
    tensors = [tensor.reshape(len(tensor), -1).double() for layer in state for tensor in layer.values()]
    # float64 has every number of the smaller types; adding 0 makes the two zeros one.
    table = torch.cat([*tensors, position.double().unsqueeze(1)], 1).add_(0.0)
    if table.float().double().equal(table):
        table = table.float()
    return [row.tobytes() for row in table.numpy()]


def _select(state: ModelState, rows: Tensor) -> ModelState:
    return [{name: tensor[rows] for name, tensor in layer.items()} for layer in state]


def _pieces(layers: list[ModelState], positions: list[Tensor], numbers: list[np.ndarray], size: int):
    """The frontier in pieces of at most `size` rows."""
    state = [
        {name: torch.cat([layer[index][name] for layer in layers]) for name in tensors}
        for index, tensors in enumerate(layers[0])
    ]
    position, number = torch.cat(positions), np.concatenate(numbers)
    for begin in range(0, len(position), size):
        rows = torch.arange(begin, min(begin + size, len(position)))
        yield _select(state, rows), position[rows], number[begin : begin + size]


def _word(origins: list[tuple[int, int]], state: int) -> tuple[int, ...]:
    letters = []
    while state:
        state, letter = origins[state]
        letters.append(letter)
    return tuple(reversed(letters))


def _wrong(logits: Tensor, expected: Tensor) -> Tensor:
    """Whether the largest logit isn't that of the expected class alone: a tie decides nothing, and NaN is wrong."""
    right = logits.gather(-1, expected.unsqueeze(-1))
    return ((logits < right).sum(-1) < logits.shape[-1] - 1) | ~right.squeeze(-1).isfinite()
