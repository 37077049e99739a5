"""Arithmetic modulo M without brackets, where `*` binds tighter than `+` and `-` (arXiv 2411.12537, appendix E.1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from statetrack.automata import Automaton
from statetrack.automata.algebra import algebraic_class
from statetrack.tasks.task import IGNORE, Batch, Task, TaskFamily, check_fits, check_stream

MAX_MODULUS = 31
OPERATORS = "+-*"
EXAMPLE = "modular_arithmetic:5"
DESCRIPTION = (
    "digits 0 to M-1 with + - * between them (or only some: M:+-), then =, where the label is the value modulo M"
)


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Task):
    """Expressions digit, operator, digit, ..., digit, `=`; all digits and operators independent and uniform.

    Tokens are the digits, then the operators, then `=`. An expression of n digits has 2n tokens with its `=`.

    Attributes:
        modulus: M.
        operators: which there are, of "+-*".
        parts: whether every digit has a label too, the value of the expression up to there.
    """

    name: str = field(init=False)
    description: str = DESCRIPTION
    vocab_size: int = field(init=False)
    num_labels: int = field(init=False)
    chance: float = field(init=False)
    modulus: int
    operators: str = OPERATORS
    parts: bool = False

    def __post_init__(self) -> None:
        for key, value in {
            "name": arithmetic_name("modular_arithmetic", self.modulus, self.operators),
            "vocab_size": self.modulus + len(self.operators) + 1,
            "num_labels": self.modulus,
            # In the long run some term is a digit alone, which makes the sum uniform, unless there are products only.
            "chance": 1 / self.modulus if set(self.operators) != {"*"} else 1.0,
        }.items():
            object.__setattr__(self, key, value)

    @property
    def token_names(self) -> tuple[str, ...]:
        return (*map(str, range(self.modulus)), *self.operators, "=")

    @property
    def algebraic_class(self) -> str:
        return algebraic_class(self.automaton)

    @property
    def num_generators(self) -> int:
        return len(self.automaton.transitions.unique(dim=1).T)

    def fits(self, length: int) -> bool:
        return length >= 2 and length % 2 == 0

    def with_parts(self) -> ModularArithmetic:
        return replace(self, parts=True)

    @cached_property
    def automaton(self) -> Automaton:
        """What reads an expression, an operator with its digit at a time; the operator `+` goes with the first digit.

        The state is the sum of the terms that are over and the term that may still be multiplied, both modulo M.
        """
        m = self.modulus
        total, term, digit = torch.arange(m)[:, None, None], torch.arange(m)[:, None], torch.arange(m)
        after = {
            "+": ((total + term).expand(m, m, m), digit.expand(m, m, m)),
            "-": ((total + term).expand(m, m, m), (-digit).expand(m, m, m)),
            "*": (total.expand(m, m, m), (term * digit).expand(m, m, m)),
        }
        columns = [(after[o][0] % m * m + after[o][1] % m).reshape(m * m, m) for o in (*self.operators, "+")]
        return Automaton(
            transitions=torch.cat(columns, 1),
            start=0,
            outputs=((total + term) % m).flatten(),
            letter_names=tuple(f"{o}{d}" for o in self.operators for d in range(m)) + tuple(map(str, range(m))),
        )

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> Batch:
        check_stream(batch_size, generator, device)
        check_fits(self, length)
        there, m, count = generator.device, self.modulus, len(self.operators)
        letters = torch.randint(count * m, (length // 2, batch_size), generator=generator, device=there)
        letters[0] = letters[0] % m + count * m
        automaton = self.automaton.to(there)
        states = automaton.run_time_first(letters, torch.zeros(batch_size, dtype=torch.int64, device=there))
        ids = torch.full((batch_size, length), m + count, device=there)
        ids[:, ::2] = letters.T % m
        ids[:, 1:-1:2] = torch.div(letters[1:].T, m, rounding_mode="floor") + m
        labels = torch.full_like(ids, IGNORE)
        if self.parts:
            labels[:, ::2] = automaton.outputs[states].T
        labels[:, -1] = automaton.outputs[states[-1]]
        return Batch(ids, labels)


def arithmetic_name(family: str, modulus: int, operators: str) -> str:
    return f"{family}:{modulus}" + ("" if operators == OPERATORS else f":{operators}")


def read_arithmetic(argument: str, family: str) -> tuple[int, str]:
    """The modulus and the operators in "5" or "5:+-"."""
    digits, colon, operators = argument.partition(":")
    modulus = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 4 else 0
    if not 2 <= modulus <= MAX_MODULUS:
        raise ValueError(f"M in {family}:M is an integer from 2 to {MAX_MODULUS}, such as 5; got {digits!r}")
    chosen = "".join(operator for operator in OPERATORS if operator in operators) if colon else OPERATORS
    if colon and (not operators or len(chosen) != len(operators)):
        raise ValueError(f"OPERATORS in {family}:M:OPERATORS are some of {OPERATORS}, such as +-; got {operators!r}")
    return modulus, chosen


def _make(argument: str) -> ModularArithmetic:
    modulus, operators = read_arithmetic(argument, "modular_arithmetic")
    return ModularArithmetic(modulus=modulus, operators=operators)


TASK = TaskFamily(
    name="modular_arithmetic", argument="M[:OPERATORS]", description=DESCRIPTION, example=EXAMPLE, make=_make
)
