"""The flip-flop: one bit that is written, kept and read; the unit of all aperiodic memory (arXiv 2306.00946)."""

from __future__ import annotations

import torch

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

DESCRIPTION = "write 0, write 1 or keep; the label is the bit that was written last, 0 before any"


def _make(argument: str) -> AutomatonTask:
    automaton = Automaton(
        transitions=torch.tensor([[0, 1, 0], [0, 1, 1]]),
        start=0,
        outputs=torch.tensor([0, 1]),
        letter_names=("0", "1", "keep"),
        state_names=("0", "1"),
    )
    return AutomatonTask(name="flip_flop", description=DESCRIPTION, automaton=automaton, known_class="aperiodic monoid")


TASK = TaskFamily(name="flip_flop", argument="", description=DESCRIPTION, example="flip_flop", make=_make)
