"""Parity: is the number of ones odd? The smallest state that must never be forgotten (arXiv 2411.12537, theorem 1)."""

from __future__ import annotations

import torch

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

DESCRIPTION = "bits; the label is 1 after an odd number of ones"


def _make(argument: str) -> AutomatonTask:
    automaton = Automaton(
        transitions=torch.tensor([[0, 1], [1, 0]]),
        start=0,
        outputs=torch.tensor([0, 1]),
        letter_names=("0", "1"),
        state_names=("even", "odd"),
    )
    return AutomatonTask(name="parity", description=DESCRIPTION, automaton=automaton, known_class="abelian group")


TASK = TaskFamily(name="parity", argument="", description=DESCRIPTION, example="parity", make=_make)
