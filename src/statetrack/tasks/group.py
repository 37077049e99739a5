"""Word problems of finite groups (arXiv 2411.12537, section 5.2), with several tokens for each element if wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.automata import Automaton, group_automaton
from statetrack.automata.groups import group_class
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import IGNORE, Batch, Stream, TaskFamily, check_length, check_stream

MAX_TOKENS = 64
DESCRIPTION = (
    "elements of a finite group (Z60, S5, A5, D4, Q8, Z2^4, A5xZ9, ...): all, generators, swaps, 3-cycles or a number "
    "of them, each followed by fillers if it has TOKENS tokens; the label is their running product"
)


@dataclass(frozen=True, kw_only=True)
class GroupTask(AutomatonTask):
    """The word problem of a group.

    Attributes:
        group: the group's name.
        tokens: tokens for each element: the element, then fillers, the last letter of the automaton, which change
            nothing. Only the last of them has a label, so that a model has so many tokens to work out a product.
    """

    group: str
    tokens: int = 1

    @property
    def algebraic_class(self) -> str:
        return group_class(self.group)

    def fits(self, length: int) -> bool:
        return length >= 1 and length % self.tokens == 0

    def stream(self, batch_size: int, generator: torch.Generator, device: torch.device | str | None = None) -> Stream:
        if self.tokens == 1:
            return super().stream(batch_size, generator, device)
        check_stream(batch_size, generator, device)
        return _PacedStream(self.automaton.to(generator.device), self.tokens, batch_size, generator)


class _PacedStream(Stream):
    """Elements that are followed by fillers."""

    def __init__(self, automaton: Automaton, tokens: int, batch_size: int, generator: torch.Generator) -> None:
        self._automaton = automaton
        self._tokens = tokens
        self._generator = generator
        self._state = torch.full((batch_size,), automaton.start, device=automaton.device)
        self._position = 0

    def next(self, length: int) -> Batch:
        check_length(length)
        automaton, tokens = self._automaton, self._tokens
        positions = torch.arange(self._position, self._position + length, device=automaton.device)
        # Elements stand at the multiples of `tokens`.
        before, after = (-(-position // tokens) for position in (self._position, self._position + length))
        filler = automaton.num_letters - 1
        elements = torch.randint(
            filler, (after - before, len(self._state)), generator=self._generator, device=automaton.device
        )
        states = torch.cat([self._state.unsqueeze(0), automaton.run_time_first(elements, self._state)])
        self._state, self._position = states[-1].clone(), self._position + length
        # How many elements of this segment are read at each position.
        read = torch.div(positions, tokens, rounding_mode="floor") + 1 - before
        ids = F.pad(elements, (0, 0, 1, 0)).index_select(0, read)
        answers = automaton.outputs[states].index_select(0, read)
        return Batch(
            self._where(positions % tokens == 0, ids, filler),
            self._where(positions % tokens == tokens - 1, answers, IGNORE),
        )

    @staticmethod
    def _where(chosen: Tensor, values: Tensor, otherwise: int) -> Tensor:
        """Values [T, B] at the chosen times, a constant at others, as [B, T]."""
        return values.masked_fill(~chosen.unsqueeze(1), otherwise).T.contiguous()


def _make(argument: str) -> AutomatonTask:
    name, *rest = argument.split(":", 2)
    automaton = group_automaton(name, rest[0]) if rest else group_automaton(name)
    tokens = 1
    if len(rest) == 2:
        tokens = int(rest[1]) if rest[1].isascii() and rest[1].isdecimal() and len(rest[1]) <= 2 else 0
        if not 1 <= tokens <= MAX_TOKENS:
            raise ValueError(f"TOKENS in group:NAME:LETTERS:TOKENS is from 1 to {MAX_TOKENS}; got {rest[1]!r}")
    if tokens > 1:
        automaton = _with_filler(automaton)
    described = f"{name}{f' ({rest[0]})' if rest else ''}{f', {tokens} tokens each' if tokens > 1 else ''}"
    return GroupTask(
        name=f"group:{argument}",
        description=f"elements of {described}; the label is their running product",
        automaton=automaton,
        group=name,
        tokens=tokens,
    )


def _with_filler(automaton: Automaton) -> Automaton:
    """A last letter that changes nothing."""
    stays = torch.arange(automaton.num_states).unsqueeze(1)
    names = automaton.letter_names
    return Automaton(
        torch.cat([automaton.transitions, stays], 1),
        automaton.start,
        automaton.outputs,
        None if names is None else (*names, "filler"),
        automaton.state_names,
    )


TASK = TaskFamily(
    name="group", argument="NAME[:LETTERS[:TOKENS]]", description=DESCRIPTION, example="group:S3", make=_make
)
