"""Code evaluation: what does a program print that swaps, assigns and branches?

A program is Python. Its variables a, b, c, ... start as 0, 1, 2, ...; the tokens, written one after the other, are its
source, such as `a,b=b,a` / `if c==1:a=c` / `print(a)`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.tasks.task import IGNORE, Batch, Task, TaskFamily, check_fits, check_stream, read_numbers

VARIABLES = "abcde"
DESCRIPTION = (
    "Python programs that swap, assign and branch over V variables with V values; the label, at the end of the print, "
    "is what they print"
)
KINDS = ("swap", "swap", "swap", "swap", "constant", "copy", "branch", "branch")
"""What a statement is, each as likely as the others."""

PRINT_LENGTH = 3
"""Tokens of `print(`, a variable, `)`."""


class _Statement(NamedTuple):
    """One line of a program.

    Attributes:
        tokens: their numbers.
        effect: what it does to every tuple of values: int64 [states].
        target: which variable it assigns, the first of two.
    """

    tokens: tuple[int, ...]
    effect: Tensor
    target: int


class _Statements(NamedTuple):
    """All statements of the language as tables, the empty line last.

    Attributes:
        automaton: its letters are the statements, its states the values of all variables.
        tokens: of each, int64 [statements, longest], -1 behind the end.
        lengths: how many tokens each has: int64 [statements].
        targets: which variable each assigns, the first of two: int64 [statements].
        first, counts: where the statements of each of the `KINDS` begin, and how many they are: int64 [8].
        values: of each variable in each state: int64 [states, V].
    """

    automaton: Automaton
    tokens: Tensor
    lengths: Tensor
    targets: Tensor
    first: Tensor
    counts: Tensor
    values: Tensor

    def to(self, device: torch.device) -> _Statements:
        return _Statements(
            automaton=self.automaton.to(device),
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            targets=self.targets.to(device),
            first=self.first.to(device),
            counts=self.counts.to(device),
            values=self.values.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class CodeEvaluation(Task):
    """Random programs of exactly T tokens, the last three of which are `print(`, a variable and `)`.

    Half of the statements swap two variables, an eighth assigns a constant, an eighth copies a variable, and a quarter
    does one of these if a variable has a certain value; within each kind all are equally likely (to 1 in 10^5). What
    is too short for the next statement is empty lines.

    Attributes:
        variables: V, how many variables and values.
        parts: whether every line has a label too, at its end: the value that the variable on its left, or the first of
            two, has by then.
    """

    name: str = field(init=False)
    description: str = DESCRIPTION
    vocab_size: int = field(init=False)
    num_labels: int = field(init=False)
    chance: float = field(init=False)
    variables: int
    parts: bool = False

    def __post_init__(self) -> None:
        values = {
            "name": f"code_evaluation:{self.variables}",
            "vocab_size": len(self.token_names),
            "num_labels": self.variables,
            "chance": 1 / self.variables,  # renaming the values changes nothing about the distribution of programs
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def token_names(self) -> tuple[str, ...]:
        digits = map(str, range(self.variables))
        return (*VARIABLES[: self.variables], *digits, "=", ",", "if ", "==", ":", "\n", "print(", ")")

    @property
    def algebraic_class(self) -> str:
        # An exchange under a condition exchanges two of the V! orders of values and keeps the others; with the plain
        # exchanges that makes all permutations of the orders.
        return "non-solvable monoid"

    @property
    def num_generators(self) -> int:
        return len(self._statements.automaton.transitions.unique(dim=1).T)

    def fits(self, length: int) -> bool:
        return length >= PRINT_LENGTH

    def with_parts(self) -> CodeEvaluation:
        return replace(self, parts=True)

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> Batch:
        check_stream(batch_size, generator, device)
        check_fits(self, length)
        there, room = generator.device, length - PRINT_LENGTH
        language = self._statements_on(there)
        shortest = 4
        draws = torch.randint(2**31, (batch_size, room // shortest), generator=generator, device=there)
        kinds, which = draws % len(KINDS), torch.div(draws, len(KINDS), rounding_mode="floor")
        statements = language.first[kinds] + which % language.counts[kinds]
        ends = language.lengths[statements].cumsum(1)
        statements = torch.where(ends <= room, statements, len(language.lengths) - 1)

        names = self.token_names
        ids = torch.full((batch_size, length + 1), names.index("\n"), device=there)
        tokens = language.tokens[statements]
        places = (ends - language.lengths[statements]).unsqueeze(2) + torch.arange(tokens.shape[2], device=there)
        places = torch.where(tokens >= 0, places, length)  # what is nothing goes behind the end
        ids.scatter_(1, places.flatten(1), tokens.flatten(1))
        printed = torch.randint(self.variables, (batch_size,), generator=generator, device=there)
        ids = ids[:, :length].contiguous()
        ids[:, -3], ids[:, -2], ids[:, -1] = names.index("print("), printed, names.index(")")

        labels = torch.full_like(ids, IGNORE)
        start = torch.full((batch_size,), language.automaton.start, device=there)
        states = torch.cat([start.unsqueeze(0), language.automaton.run_time_first(statements.T, start)])
        if self.parts:
            values = language.values[states[1:].T].gather(2, language.targets[statements].unsqueeze(2)).squeeze(2)
            # What is no line puts its label where the answer comes.
            labels.scatter_(1, torch.where(ends <= room, ends, length) - 1, values)
        labels[:, -1] = language.values[states[-1], printed]
        return Batch(ids, labels)

    def _statements_on(self, device: torch.device) -> _Statements:
        """The tables on a device; a copy is made once for each device and kept."""
        if device not in self._copies:
            self._copies[device] = self._statements.to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, _Statements]:
        return {}

    @cached_property
    def _statements(self) -> _Statements:
        """The language."""
        count = self.variables
        values = torch.cartesian_prod(*[torch.arange(count)] * count)
        base = count ** torch.arange(count - 1, -1, -1)
        same = torch.arange(len(values))
        number = {name: index for index, name in enumerate(self.token_names)}

        def statement(text: list[str], changes: dict[int, Tensor]) -> _Statement:
            after = values.clone()
            for variable, value in changes.items():
                after[:, variable] = value
            return _Statement(tuple(number[word] for word in text), (after * base).sum(1), target=next(iter(changes)))

        pairs = list(itertools.permutations(range(count), 2))
        swaps = [
            statement(
                [(x := VARIABLES[i]), ",", (y := VARIABLES[j]), "=", y, ",", x, "\n"],
                {i: values[:, j], j: values[:, i]},
            )
            for i, j in pairs
        ]
        constants = [
            statement([VARIABLES[i], "=", str(d), "\n"], {i: torch.full_like(same, d)})
            for i, d in itertools.product(range(count), repeat=2)
        ]
        copies = [statement([VARIABLES[i], "=", VARIABLES[j], "\n"], {i: values[:, j]}) for i, j in pairs]
        branches = [
            _Statement(
                (number["if "], i, number["=="], number[str(d)], number[":"], *then.tokens),
                torch.where(values[:, i] == d, then.effect, same),
                then.target,
            )
            for i, d in itertools.product(range(count), repeat=2)
            for then in (*swaps, *constants, *copies)
        ]
        groups = {"swap": swaps, "constant": constants, "copy": copies, "branch": branches}
        everything = [*swaps, *constants, *copies, *branches, _Statement((), same, target=0)]
        starts = dict(zip(groups, itertools.accumulate(map(len, groups.values()), initial=0), strict=False))
        longest = max(len(one.tokens) for one in everything)
        return _Statements(
            automaton=Automaton(
                torch.stack([one.effect for one in everything], 1),
                start=int((torch.arange(count) * base).sum()),
                outputs=same,
            ),
            tokens=torch.tensor([one.tokens + (-1,) * (longest - len(one.tokens)) for one in everything]),
            lengths=torch.tensor([len(one.tokens) for one in everything]),
            targets=torch.tensor([one.target for one in everything]),
            first=torch.tensor([starts[kind] for kind in KINDS]),
            counts=torch.tensor([len(groups[kind]) for kind in KINDS]),
            values=values,
        )


def _make(argument: str) -> CodeEvaluation:
    (variables,) = read_numbers(argument, "code_evaluation", {"V": (3, len(VARIABLES))}, "5")
    return CodeEvaluation(variables=variables)


TASK = TaskFamily(
    name="code_evaluation", argument="V", description=DESCRIPTION, example="code_evaluation:4", make=_make
)
