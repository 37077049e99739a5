"""Deterministic finite automata as integer tables, evaluated on whole batches of words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.automata.expressions import ExpressionError, letters_of

if TYPE_CHECKING:
    from automata.fa.dfa import DFA

    from statetrack.automata.prefixes import Prefixes

DIRECT_LENGTH = 256
"""Up to this length a word is read letter by letter, in T steps."""

WINDOW = 4096
"""Longer words are read in windows of so many letters, which bounds the temporary memory."""

BLOCKED_WORK = {"cpu": 1 << 11, "cuda": 1 << 18}
"""Sequences times states up to which following every start state costs less than the steps that it saves, by device."""

SCANNED_ELEMENTS = {"cuda": 1024}
"""Elements of a transition monoid up to which words are read as products of their letters, by device: on a GPU, where
an operation on the letters of one position takes as long as one on all of them."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic finite automaton with an output for each state (a Moore machine).

        s_0 = start,    s_t = transitions[s_{t-1}, letter_t],    label_t = outputs[s_t]

    States, letters and outputs are numbered from 0. A language has the outputs 0 (reject) and 1 (accept); in the word
    problem of a group every state is its own output. Two automata are equal if their tables, start and names are, on
    whatever device. The tables are copied when the automaton is made and must not be written to afterwards.

    Attributes:
        transitions: the next state, int64 [states, letters].
        start: the first state.
        outputs: the label of every state, int64 [states].
        letter_names: a distinct name for each letter, for people and for `accepts`; None if they have none.
        state_names: a name for each state, for people; None if they have none.

    Raises:
        ValueError: for tables that are no automaton, or names that don't go with them.
    """

    transitions: Tensor
    start: int
    outputs: Tensor
    letter_names: tuple[str, ...] | None = None
    state_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        transitions = _table(self.transitions, "transitions", "[states, letters]", ndim=2)
        outputs = _table(self.outputs, "outputs", "[states]", ndim=1)
        states, letters = transitions.shape
        if states == 0 or letters == 0:
            raise ValueError(f"an automaton needs at least one state and one letter, got {states} and {letters}")
        if transitions.min() < 0 or transitions.max() >= states:
            raise ValueError(
                f"transitions must lead to states from 0 to {states - 1}, "
                f"got {int(transitions.min())} to {int(transitions.max())}"
            )
        if not isinstance(self.start, int) or not 0 <= self.start < states:
            raise ValueError(f"start must be a state from 0 to {states - 1}, got {self.start}")
        if len(outputs) != states:
            raise ValueError(f"outputs must give each of the {states} states a label, got {len(outputs)} labels")
        if outputs.min() < 0:
            raise ValueError(f"outputs must be labels from 0 on, got {int(outputs.min())}")
        if outputs.device != transitions.device:
            raise ValueError(
                f"transitions and outputs must be on one device, got {transitions.device} and {outputs.device}"
            )
        object.__setattr__(self, "transitions", transitions)
        object.__setattr__(self, "outputs", outputs)
        for field, what, count in (("letter_names", "letters", letters), ("state_names", "states", states)):
            if (names := getattr(self, field)) is None:
                continue
            if len(names) != count:
                raise ValueError(f"{field} must name each of the {count} {what}, got {len(names)} names")
            object.__setattr__(self, field, tuple(names))
        if self.letter_names is not None and len(set(self.letter_names)) != letters:
            raise ValueError("letter_names must be distinct, so that a name says which letter is meant")

    @property
    def num_states(self) -> int:
        return self.transitions.shape[0]

    @property
    def num_letters(self) -> int:
        return self.transitions.shape[1]

    @cached_property
    def num_outputs(self) -> int:
        """The largest output plus one."""
        return int(self.outputs.max()) + 1

    @property
    def device(self) -> torch.device:
        return self.transitions.device

    @cached_property
    def is_permutation_automaton(self) -> bool:
        """Whether every letter permutes the states, so that none ever forgets."""
        reached = torch.zeros_like(self.transitions, dtype=torch.bool)
        return bool(reached.scatter_(0, self.transitions, True).all())

    def reachable(self) -> Tensor:
        """Which states some word leads to: bool [states]."""
        reached = torch.zeros(self.num_states, dtype=torch.bool, device=self.device)
        frontier = torch.tensor([self.start], device=self.device)
        while len(frontier):
            reached[frontier] = True
            following = torch.zeros_like(reached)
            following[self.transitions[frontier]] = True
            frontier = (following & ~reached).nonzero().squeeze(1)
        return reached

    def run(self, letters: Tensor, start: int | Tensor | None = None) -> Tensor:
        """The states after each letter, the start itself not among them.

        Short words are read letter by letter. Longer ones are cut in blocks that are read side by side: first from
        every state at once, which says where each block leads, then from the one state that it really starts in. In a
        window of T letters that takes O(sqrt T) tensor operations instead of O(T). Where there are so many words or
        states that this costs more than it saves, long words are read letter by letter as well. On a GPU words are
        read as products of their letters, O(log T) operations for all states after them, where the transition monoid is
        small (`automata/prefixes.py`).

        Args:
            letters: the words, integers [B, T] on the automaton's device; T may be 0.
            start: the first state: one for all words, integers [B], or None for the automaton's own.

        Returns:
            int64 [B, T].

        Raises:
            ValueError: for letters or states that don't exist, a wrong shape, dtype or device.
        """
        letters = self._checked(letters, "letters", "[B, T]", 2, self.num_letters)
        if start is None:
            start = self.start
        if isinstance(start, int):
            start = torch.full((1,), start, device=self.device).expand(len(letters))
        start = self._checked(start, "start", "[B]", 1, self.num_states)
        if len(start) != len(letters):
            raise ValueError(f"start must have one state for each of the {len(letters)} words, got {len(start)}")
        return self.run_time_first(letters.T, start).T.contiguous()

    def labels(self, letters: Tensor, start: int | Tensor | None = None) -> Tensor:
        """The outputs of `run(letters, start)`: int64 [B, T]."""
        return self.outputs[self.run(letters, start)]

    def run_time_first(self, letters: Tensor, start: Tensor) -> Tensor:
        """`run` on letters int64 [T, B] from states int64 [B], to states [T, B], for callers that know their letters.

        Nothing is checked, as looking at the letters would wait for a GPU: letters that don't exist give wrong states.
        """
        length, batch = letters.shape
        prefixes = self._prefixes if length > 1 and self.device.type in SCANNED_ELEMENTS else None
        blocked = length > DIRECT_LENGTH and batch * self.num_states <= BLOCKED_WORK.get(self.device.type, 0)
        states = torch.empty((length, batch), dtype=torch.int64, device=letters.device)
        for source, target in zip(letters.split(WINDOW), states.split(WINDOW), strict=True):
            if prefixes is not None:
                prefixes.run(source, start, target)
            elif blocked:
                self._run_blocks(source, start, target)
            else:
                self._run_steps(source.contiguous(), start, target)
            if length > WINDOW:
                start = target[-1]
        return states

    def _run_steps(self, letters: Tensor, start: Tensor, states: Tensor) -> None:
        """Writes the states [T, N] after each of the letters [T, N], in T steps."""
        table, index, state = self.transitions.view(-1), torch.empty_like(start), start
        for letter, following in zip(letters.unbind(), states.unbind(), strict=True):
            torch.add(letter, state, alpha=self.num_letters, out=index)
            torch.index_select(table, 0, index, out=following)
            state = following

    def _run_blocks(self, letters: Tensor, start: Tensor, states: Tensor) -> None:
        """The same in O(sqrt T) operations on up to B S sqrt T numbers."""
        length, batch = letters.shape
        size = math.isqrt(length - 1) + 1
        count = -(-length // size)
        # Whatever the padding does happens after the last state that is asked for.
        padded = F.pad(letters, (0, 0, 0, count * size - length))
        blocks = padded.view(count, size, batch).transpose(0, 1).reshape(size, count * batch)

        table = self.transitions.view(-1)
        everywhere = torch.arange(self.num_states, device=self.device)
        ends = everywhere.expand(count * batch, -1).contiguous()
        index = torch.empty_like(ends)
        for letter in blocks.unbind():
            torch.add(letter.unsqueeze(1), ends, alpha=self.num_letters, out=index)
            torch.index_select(table, 0, index.view(-1), out=ends.view(-1))

        starts = [start.unsqueeze(1)]
        for end in ends.view(count, batch, -1)[:-1].unbind():
            starts.append(end.gather(1, starts[-1]))

        filled = torch.empty_like(blocks)
        self._run_steps(blocks, torch.cat(starts).view(-1), filled)
        states.copy_(filled.view(size, count, batch).transpose(0, 1).reshape(-1, batch)[:length])

    def accepts(self, word: Iterable[str | int]) -> bool:
        """Whether the language contains a word, given as the names of its letters (a string will do) or their numbers.

        Raises:
            ValueError: for an unknown letter, or if the outputs are not 0 and 1.
        """
        if self.num_outputs > 2:
            raise ValueError(
                f"only an automaton with outputs 0 and 1 accepts words; this one has {self.num_outputs} outputs"
            )
        letters = torch.tensor([[self._letter(letter) for letter in word]], dtype=torch.int64, device=self.device)
        state = self.run(letters)[0, -1] if letters.numel() else self.start
        return bool(self.outputs[state])

    def to(self, device: torch.device | str) -> Automaton:
        """The same automaton on a device; a copy is made once for each device and kept."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._copies:
            tables = {"transitions": self.transitions.to(device), "outputs": self.outputs.to(device)}
            self._copies[device] = replace(self, **tables)
        return self._copies[device]

    @classmethod
    def from_dfa(cls, dfa: DFA) -> Automaton:
        """The automaton of an automata-lib `DFA`, with the outputs 0 (reject) and 1 (accept).

        Letters are sorted by name. States are numbered as a breadth-first search meets them, from the initial state 0
        on, and those that no word reaches are left out. Where a partial DFA has no transition, a last state, named
        "trap", rejects all that follows.

        Raises:
            ValueError: if the DFA has no input symbols, or two with the same name.
        """
        symbols = sorted(dfa.input_symbols, key=str)
        if not symbols:
            raise ValueError("an automaton needs at least one letter, and this DFA has no input symbols")
        states = [dfa.initial_state]
        numbers = {dfa.initial_state: 0}
        rows: list[list[int]] = []
        for state in states:  # grows while it is read
            leads = dfa.transitions.get(state, {})
            for following in (leads[symbol] for symbol in symbols if symbol in leads):
                if following not in numbers:
                    numbers[following] = len(states)
                    states.append(following)
            rows.append([numbers[leads[symbol]] if symbol in leads else -1 for symbol in symbols])
        transitions = torch.tensor(rows)
        outputs = [int(state in dfa.final_states) for state in states]
        names = [str(state) for state in states]
        if (transitions < 0).any():
            trap = len(states)
            transitions = F.pad(torch.where(transitions < 0, trap, transitions), (0, 0, 0, 1), value=trap)
            outputs.append(0)
            names.append("trap")
        return cls(transitions, 0, torch.tensor(outputs), tuple(map(str, symbols)), tuple(names))

    @classmethod
    def from_regex(cls, expression: str, alphabet: Iterable[str] | None = None) -> Automaton:
        """The minimal automaton of a regular expression, with the outputs 0 (reject) and 1 (accept).

        Expressions are automata-lib's: letters are single characters; `|`, `*`, `+`, `?`, `{m,n}`, `&` (intersection),
        `.` (any letter), classes such as `[ab]` and `()` (the empty word) work, and `\\` quotes.

        Args:
            expression: such as "(ab)*".
            alphabet: the letters, of which the expression may use only some; None for those that occur in it.

        Raises:
            ValueError: for an expression that can't be parsed or is too long, one with letters outside the alphabet, or
                no letters.
        """
        from automata.base.exceptions import (
            AutomatonException,
            RegexException,
        )  # slow to import, and most of the package does without
        from automata.fa.dfa import DFA
        from automata.fa.nfa import NFA

        symbols = None if alphabet is None else set(alphabet)
        if symbols is not None and (not symbols or any(len(symbol) != 1 for symbol in symbols)):
            raise ValueError(f"the alphabet of an expression is single characters, such as 'ab'; got {alphabet!r}")
        try:
            letters = letters_of(expression)
            if symbols is None:
                symbols = letters
            if outside := sorted(letters - symbols):
                raise ExpressionError(f"its letter {outside[0]!r} is not in the alphabet {''.join(sorted(symbols))!r}")
            if not symbols:
                raise ExpressionError("it names no letters, so that it needs an alphabet, such as 'ab'")
            dfa = DFA.from_nfa(NFA.from_regex(expression, input_symbols=symbols), minify=True)
        except (AutomatonException, RegexException, ExpressionError) as error:
            raise ValueError(f"the regular expression {expression!r} can't be read: {error}") from None
        # automata-lib leaves a trap implicit, and the minimal complete automaton has it.
        return cls.from_dfa(dfa).minimized()

    @classmethod
    def from_group(cls, name: str, letters: str | None = None) -> Automaton:
        """The automaton of the word problem of a group; see `group_automaton`."""
        from statetrack.automata.groups import group_automaton

        return group_automaton(name, letters)

    def minimized(self) -> Automaton:
        """The smallest automaton with the same label after every word: reachable states, those alike made one.

        States are numbered as a breadth-first search meets them, from the start, 0, on. A merged state has the name of
        its first member. (Moore's partition refinement.)
        """
        return self if self.__dict__.get("_is_minimal") else self._minimal

    @cached_property
    def _minimal(self) -> Automaton:
        classes = torch.unique(self.outputs, return_inverse=True)[1]
        while (count := int(classes.max()) + 1) < self.num_states:
            signature = torch.cat([classes.unsqueeze(1), classes[self.transitions]], 1)
            refined = torch.unique(signature, dim=0, return_inverse=True)[1]
            if int(refined.max()) + 1 == count:
                break
            classes = refined
        table, classes = self.transitions.cpu().numpy(), classes.cpu().numpy()
        numbers, first = np.full(count, -1), np.empty(count, dtype=np.int64)
        numbers[classes[self.start]] = 0
        members = [frontier := np.array([self.start])]
        found = 1
        while len(frontier):
            following = table[frontier].reshape(-1)
            following = following[numbers[classes[following]] < 0]
            frontier = following[first_occurrences(classes[following], first)]
            numbers[classes[frontier]] = found + np.arange(len(frontier))
            found += len(frontier)
            members.append(frontier)
        kept = np.concatenate(members)
        names = None if self.state_names is None else tuple(self.state_names[state] for state in kept.tolist())
        minimal = Automaton(
            torch.from_numpy(numbers[classes[table[kept]]]).to(self.device),
            0,
            self.outputs[torch.from_numpy(kept).to(self.device)],
            self.letter_names,
            names,
        )
        minimal.__dict__["_is_minimal"] = True
        return minimal

    @cached_property
    def _prefixes(self) -> Prefixes | None:
        """For words read as products; None if the transition monoid is too large."""
        from statetrack.automata.prefixes import Prefixes  # which reads automata itself

        return Prefixes.of(self, SCANNED_ELEMENTS[self.device.type])

    @cached_property
    def _copies(self) -> dict[torch.device, Automaton]:
        return {}

    @cached_property
    def _letter_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.letter_names or ())}

    def _letter(self, letter: str | int) -> int:
        if isinstance(letter, int) and 0 <= letter < self.num_letters:
            return letter
        if isinstance(letter, str) and letter in self._letter_numbers:
            return self._letter_numbers[letter]
        names = ", ".join([*list(self._letter_numbers)[:20], *(["..."] if len(self._letter_numbers) > 20 else [])])
        named = f"named {names}" if names else "without names"
        raise ValueError(f"unknown letter {letter!r}; the letters are 0 to {self.num_letters - 1}, {named}")

    def _checked(self, values: Tensor, what: str, shape: str, ndim: int, bound: int) -> Tensor:
        if not _is_integer(values) or values.ndim != ndim:
            raise ValueError(f"{what} must be an integer tensor {shape}, got {_describe(values)}")
        if values.device != self.device:
            raise ValueError(
                f"{what} on {values.device} can't be read by an automaton on {self.device}; move one with .to()"
            )
        if values.numel():
            lowest, highest = values.aminmax()
            if lowest < 0 or highest >= bound:
                raise ValueError(f"{what} must be from 0 to {bound - 1}, got {int(lowest)} to {int(highest)}")
        return values.to(torch.int64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Automaton):
            return NotImplemented
        if self is other:
            return True
        return (
            (self.start, self.letter_names, self.state_names) == (other.start, other.letter_names, other.state_names)
            and torch.equal(self.transitions.cpu(), other.transitions.cpu())
            and torch.equal(self.outputs.cpu(), other.outputs.cpu())
        )

    def __hash__(self) -> int:
        # The table itself may have millions of entries; its shape and the outputs tell most automata apart.
        return hash((self.start, tuple(self.transitions.shape), tuple(self.outputs.tolist())))

    def __repr__(self) -> str:
        return f"Automaton({self.num_states} states, {self.num_letters} letters, {self.num_outputs} outputs)"


def first_occurrences(values: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Where each number occurs for the first time, in order; `np.unique` would sort.

    Args:
        values: numbers from 0 on, int64 [n].
        scratch: int64, longer than the largest of them; it is written to, and may be used again as it is.
    """
    places = np.arange(len(values))
    scratch[values[::-1]] = places[::-1]  # of entries that are written twice the last one stays
    return np.flatnonzero(scratch[values] == places)


def _table(values: Tensor, what: str, shape: str, ndim: int) -> Tensor:
    if not _is_integer(values) or values.ndim != ndim:
        raise ValueError(f"{what} must be an integer tensor {shape}, got {_describe(values)}")
    return values.detach().to(torch.int64, copy=True, memory_format=torch.contiguous_format)


def _is_integer(values: object) -> bool:
    if not isinstance(values, Tensor):
        return False
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _describe(values: object) -> str:
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else repr(values)
