"""Cycle navigation: walk on a circle of M places (arXiv 2207.02098)."""

from __future__ import annotations

import torch

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily, read_numbers

DESCRIPTION = "stay, +1 or -1 on a circle of M places; the label is the place"


def _make(argument: str) -> AutomatonTask:
    (size,) = read_numbers(argument, "cycle_navigation", {"M": (3, 1000)}, "5")
    places = torch.arange(size)
    automaton = Automaton(
        transitions=(places[:, None] + torch.tensor([0, 1, -1])) % size,
        start=0,
        outputs=places,
        letter_names=("stay", "+1", "-1"),
        state_names=tuple(map(str, range(size))),
    )
    return AutomatonTask(
        name=f"cycle_navigation:{size}", description=DESCRIPTION, automaton=automaton, known_class="abelian group"
    )


TASK = TaskFamily(
    name="cycle_navigation", argument="M", description=DESCRIPTION, example="cycle_navigation:5", make=_make
)
