"""Well-nested brackets up to a depth: a stack that finitely many states hold (arXiv 2010.07515)."""

from __future__ import annotations

import itertools

import torch

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily, read_numbers

MAX_STATES = 5000
DESCRIPTION = "K kinds of brackets, at most DEPTH deep; the label is the kind that must close next, 0 if none is open"
OPENING, CLOSING = "([{<abcdefgh", ")]}>ABCDEFGH"


def _make(argument: str) -> AutomatonTask:
    kinds, depth = read_numbers(argument, "bounded_dyck", {"K": (1, len(OPENING)), "DEPTH": (1, 100)}, "2,5")
    count = depth + 1 if kinds == 1 else (kinds ** (depth + 1) - 1) // (kinds - 1)
    if count > MAX_STATES:
        raise ValueError(f"bounded_dyck:{argument} has {count:,} stacks; a table is made for {MAX_STATES:,}")
    stacks = [stack for size in range(depth + 1) for stack in itertools.product(range(kinds), repeat=size)]
    numbers, trap = {stack: number for number, stack in enumerate(stacks)}, count
    transitions = torch.full((count + 1, 2 * kinds), trap)
    draws = []
    for number, stack in enumerate(stacks):
        for kind in range(kinds):
            transitions[number, kind] = numbers.get((*stack, kind), trap)
        if stack:
            transitions[number, kinds + stack[-1]] = numbers[stack[:-1]]
        # Opening and closing are equally likely where both are possible.
        opening, closing = list(range(kinds)), [kinds + stack[-1] if stack else 0] * kinds
        draws.append(opening * 2 if not stack else closing * 2 if len(stack) == depth else opening + closing)
    automaton = Automaton(
        transitions=transitions,
        start=0,
        outputs=torch.tensor([stack[-1] + 1 if stack else 0 for stack in stacks] + [0]),
        letter_names=tuple(OPENING[:kinds] + CLOSING[:kinds]),
        state_names=(*("".join(OPENING[kind] for kind in stack) for stack in stacks), "trap"),
    )
    return AutomatonTask(
        name=f"bounded_dyck:{kinds},{depth}",
        description=DESCRIPTION,
        automaton=automaton,
        draws=(*map(tuple, draws), (0,) * (2 * kinds)),
        known_class="aperiodic monoid",
        # The depth walks between 0 and DEPTH, and is half as often at its ends as at each place between them.
        known_chance=max(1 / (2 * depth), (1 - 1 / (2 * depth)) / kinds),
    )


TASK = TaskFamily(
    name="bounded_dyck", argument="K,DEPTH", description=DESCRIPTION, example="bounded_dyck:2,5", make=_make
)
