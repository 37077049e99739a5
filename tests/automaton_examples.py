"""Automata with known monoids."""

import torch

from statetrack.automata import Automaton


def full(n):
    """The automaton whose letters generate all maps of n states."""
    cycle, exchange, merge = [*range(1, n), 0], [1, 0, *range(2, n)], [0, 0, *range(2, n)]
    return Automaton(torch.tensor([cycle, exchange, merge]).T.contiguous(), 0, torch.arange(n))


def dyck(depth):
    """One kind of brackets, nested at most so deep; words that are balanced are accepted."""
    trap = depth + 1
    rows = [[level + 1, level - 1 if level else trap] for level in range(trap)]
    return Automaton(torch.tensor([*rows, [trap, trap]]), 0, torch.tensor([1] + [0] * trap))
