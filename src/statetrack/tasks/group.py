"""Word problems of finite groups (arXiv 2411.12537, section 5.2)."""

from __future__ import annotations

from statetrack.automata import group_automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

DESCRIPTION = (
    "elements of a finite group (Z60, S5, A5, D4, Q8, A5xZ9, ...), all or only generators, swaps or 3-cycles; "
    "the label is their running product"
)


def _make(argument: str) -> AutomatonTask:
    name, colon, letters = argument.partition(":")
    automaton = group_automaton(name, letters) if colon else group_automaton(name)
    description = f"elements of {name}{f' ({letters})' if colon else ''}; the label is their running product"
    return AutomatonTask(name=f"group:{argument}", description=description, automaton=automaton)


TASK = TaskFamily(name="group", argument="NAME[:LETTERS]", description=DESCRIPTION, example="group:S3", make=_make)
