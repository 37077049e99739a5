"""Arithmetic modulo M with brackets, nested as deep as the length allows (arXiv 2207.02098 and 2411.12537)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from statetrack.tasks.modular_arithmetic import OPERATORS, arithmetic_name, read_arithmetic
from statetrack.tasks.task import IGNORE, Batch, Task, TaskFamily, check_fits, check_stream

EXAMPLE = "modular_arithmetic_brackets:5"
DESCRIPTION = (
    "bracketed expressions of digits 0 to M-1 with + - * (or only some: M:+-), then =, where the label is the value "
    "modulo M"
)
OPERATION = 5
"""So many tokens an operation has at least: brackets, operator, two digits."""


@dataclass(frozen=True, kw_only=True)
class ModularArithmeticWithBrackets(Task):
    """Random expressions of exactly T - 1 tokens, then `=`.

    The distribution is that of Delétang et al., arXiv 2207.02098, which the paper takes over: an expression of one to
    four tokens is d, -d, (d) or (-d) with a uniform digit; a longer one is (left operator right), with all lengths of
    the left side equally likely and so all operators. Tokens are the digits, the operators, `-` if it is not among
    them (as a sign), `(`, `)` and `=`.

    Attributes:
        modulus: M.
        operators: which there are, of "+-*".
        parts: whether the last token of every subexpression has a label too, its value.
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
            "name": arithmetic_name("modular_arithmetic_brackets", self.modulus, self.operators),
            "vocab_size": len(self.token_names),
            "num_labels": self.modulus,
            "chance": max(_long_run_values(self.modulus, self.operators)),
        }.items():
            object.__setattr__(self, key, value)

    @property
    def token_names(self) -> tuple[str, ...]:
        sign = "" if "-" in self.operators else "-"
        return (*map(str, range(self.modulus)), *self.operators, *sign, "(", ")", "=")

    @property
    def algebraic_class(self) -> str:
        return "context-free: a stack of values"

    @property
    def num_generators(self) -> None:
        return None

    def fits(self, length: int) -> bool:
        return length >= 2

    def with_parts(self) -> ModularArithmeticWithBrackets:
        return replace(self, parts=True)

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> Batch:
        check_stream(batch_size, generator, device)
        check_fits(self, length)
        there, shape = generator.device, (batch_size, length)
        # No two subexpressions start at the same place, so that one random number for each place is enough.
        random = torch.rand(shape, generator=generator, device=there)
        tree = _Tree(random, length - 1)
        digits = torch.randint(self.modulus, shape, generator=generator, device=there)
        operators = torch.randint(len(self.operators), shape, generator=generator, device=there)

        names = self.token_names
        sign, opening, closing, equals = (names.index(name) for name in "-()=")
        # A leaf of 1 to 4 tokens is d, -d, (d) or (-d).
        bracketed = tree.leaf_length >= 3
        digit = tree.offset == tree.leaf_length - 1 - bracketed.long()
        ids = torch.where(digit, digits, sign)
        ids = torch.where(bracketed & (tree.offset == 0), opening, ids)
        ids = torch.where(bracketed & (tree.offset == tree.leaf_length - 1), closing, ids)
        ids = torch.where(tree.opens, opening, ids)
        ids = torch.where(tree.operates, operators + self.modulus, ids)
        ids = torch.where(tree.closes, closing, ids)
        ids[:, -1] = equals

        negative = (tree.leaf_length % 2 == 0).long()
        leaves = torch.where(digit, digits * (1 - 2 * negative), 0)
        labels = torch.full(shape, IGNORE, device=there)
        values = self._values(tree, leaves, operators)
        if self.parts:
            ends = tree.closes | ((tree.leaf_length > 0) & (tree.offset == tree.leaf_length - 1))
            labels = torch.where(ends, values.gather(1, tree.start), IGNORE)
        labels[:, -1] = values[:, 0]
        return Batch(ids.contiguous(), labels)

    def _values(self, tree: _Tree, leaves: Tensor, operators: Tensor) -> Tensor:
        """The value of each subexpression at its first place, from the innermost operations outwards: int64 [B, T].

        The digit of a leaf has to be brought there.
        """
        values = torch.zeros_like(leaves).scatter_add_(1, tree.start, leaves)
        for opens, middle in reversed(tree.levels):
            left = values.roll(-1, 1)
            right = values.gather(1, (middle + 1).clamp(max=values.shape[1] - 1))
            which = operators.gather(1, middle)
            result = values
            for number, operator in enumerate(self.operators):
                outcome = left + right if operator == "+" else left - right if operator == "-" else left * right
                result = torch.where(which == number, outcome, result)
            values = torch.where(opens, result % self.modulus, values)
        return values % self.modulus


class _Tree:
    """Where the parts of random expressions are, all places of all expressions at once, outermost operations first.

    Args:
        random: uniform numbers from [0, 1): [B, T].
        length: of the expressions, at most T; places behind it mean nothing.

    Attributes:
        start, leaf_length, offset: of the leaf that a place is in, its first place and its tokens, and the place in it;
            where an operation closes, `start` is where it opens: int64 [B, T].
        opens, operates, closes: whether an operation has its opening bracket, its operator or its closing one at a
            place: bool [B, T].
        levels: for every depth of nesting, whether an operation of that depth opens at a place, and where its operator
            is then: bool and int64 [B, T].
    """

    def __init__(self, random: Tensor, length: int) -> None:
        place = torch.arange(random.shape[1], device=random.device).expand_as(random)
        self.start = torch.zeros_like(place)
        size = torch.full_like(place, length)
        self.opens, self.operates, self.closes = (torch.zeros_like(place, dtype=torch.bool) for _ in range(3))
        self.levels: list[tuple[Tensor, Tensor]] = []
        inside = place < length
        for _ in range((length - 1) // (OPERATION - 1)):
            splits = inside & (size >= OPERATION)
            # Asking whether anything is left to do would make the host wait for a GPU.
            if random.device.type == "cpu" and not bool(splits.any()):
                break
            left = 1 + (random.gather(1, self.start) * (size - OPERATION + 1)).long()
            middle, end = self.start + 1 + left, self.start + size - 1
            opens, operates, closes = (splits & (place == where) for where in (self.start, middle, end))
            self.levels.append((opens, torch.where(opens, middle, 0)))
            self.opens, self.operates, self.closes = (
                self.opens | opens, self.operates | operates, self.closes | closes
            )  # fmt: skip
            inside = inside & ~(opens | operates | closes)
            on_the_left = place < middle
            start = torch.where(on_the_left, self.start + 1, middle + 1)
            size = torch.where(splits & inside, torch.where(on_the_left, left, end - middle - 1), size)
            self.start = torch.where(splits & inside, start, self.start)
        self.leaf_length = torch.where(inside, size, 0)
        self.offset = place - self.start


@cache  # a grid makes the task of each run, and this is most of its time
def _long_run_values(modulus: int, operators: str) -> tuple[float, ...]:
    """How often each value is that of a long expression: the distribution that operations on two such values keep."""
    values = torch.arange(modulus)
    results = {"+": values[:, None] + values, "-": values[:, None] - values, "*": values[:, None] * values}
    chosen = torch.cat([results[operator].flatten() % modulus for operator in operators])
    share = torch.full((modulus,), 1 / modulus, dtype=torch.float64)
    for _ in range(100):
        pairs = (share[:, None] * share).flatten().repeat(len(operators)) / len(operators)
        share = torch.zeros_like(share).index_add(0, chosen, pairs)
        share /= share.sum()  # rounding errors would square from one round to the next
    return tuple(share.tolist())


def _make(argument: str) -> ModularArithmeticWithBrackets:
    modulus, operators = read_arithmetic(argument, "modular_arithmetic_brackets")
    return ModularArithmeticWithBrackets(modulus=modulus, operators=operators)


TASK = TaskFamily(
    name="modular_arithmetic_brackets", argument="M[:OPERATORS]", description=DESCRIPTION, example=EXAMPLE, make=_make
)
