"""Membership in the language of a regular expression, after every letter."""

from __future__ import annotations

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

OVER = " over "
"""What stands between an expression and its alphabet."""


def _make(argument: str) -> AutomatonTask:
    expression, over, alphabet = argument.rpartition(OVER)
    automaton = Automaton.from_regex(expression, alphabet) if over else Automaton.from_regex(argument)
    letters = ", ".join(automaton.letter_names or ())
    description = f"letters {letters}; the label is 1 where the word so far matches {expression or argument}"
    return AutomatonTask(name=f"regex:{argument}", description=description, automaton=automaton)


TASK = TaskFamily(
    name="regex",
    argument=f"EXPRESSION[{OVER}ALPHABET]",
    description="letters; the label is 1 where the word so far matches the regular expression",
    example="regex:(ab)*",
    make=_make,
)
