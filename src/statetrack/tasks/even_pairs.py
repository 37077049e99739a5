"""Even pairs: are as many `ab` as `ba` in the word? That is, does it end as it began (arXiv 2207.02098)?"""

from __future__ import annotations

import torch

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

DESCRIPTION = (
    "letters a and b; the label is 1 after an even number of ab and ba, that is, where a word ends as it began"
)


def _make(argument: str) -> AutomatonTask:
    automaton = Automaton(
        transitions=torch.tensor([[1, 4], [1, 2], [1, 2], [3, 4], [3, 4]]),
        start=0,
        outputs=torch.tensor([1, 1, 0, 0, 1]),
        letter_names=("a", "b"),
        state_names=("", "a..a", "a..b", "b..a", "b..b"),
    )
    return AutomatonTask(
        name="even_pairs", description=DESCRIPTION, automaton=automaton, known_class="aperiodic monoid"
    )


TASK = TaskFamily(name="even_pairs", argument="", description=DESCRIPTION, example="even_pairs", make=_make)
