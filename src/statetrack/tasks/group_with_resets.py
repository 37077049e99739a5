"""Word problems of groups with a letter that forgets all: running products since the last reset."""

from __future__ import annotations

import torch

from statetrack.automata import Automaton, group_automaton
from statetrack.automata.groups import group_class
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

DESCRIPTION = "elements of a finite group, and a reset; the label is the product of the elements since the last reset"


def _make(argument: str) -> AutomatonTask:
    name, colon, letters = argument.partition(":")
    group = group_automaton(name, letters) if colon else group_automaton(name)
    names = group.letter_names
    automaton = Automaton(
        torch.cat([group.transitions, torch.zeros(group.num_states, 1, dtype=torch.int64)], 1),
        group.start,
        group.outputs,
        None if names is None else (*names, "reset"),
        group.state_names,
    )
    hidden = "non-solvable" if group_class(name) == "non-solvable group" else "solvable"
    return AutomatonTask(
        name=f"group_with_resets:{argument}",
        description=f"elements of {name}{f' ({letters})' if colon else ''}, and a reset; the label is their product",
        automaton=automaton,
        known_class=f"{hidden} monoid",
    )


TASK = TaskFamily(
    name="group_with_resets",
    argument="NAME[:LETTERS]",
    description=DESCRIPTION,
    example="group_with_resets:S5:swaps",
    make=_make,
)
