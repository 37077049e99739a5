"""Any automaton, from a JSON file or from the JSON itself, so that a run directory can hold it."""

from __future__ import annotations

from statetrack.automata import automaton_from_json, automaton_to_json, read_automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily


def _make(argument: str) -> AutomatonTask:
    automaton = automaton_from_json(argument) if argument.lstrip().startswith("{") else read_automaton(argument)
    description = (
        f"letters of an automaton with {automaton.num_states} states and {automaton.num_letters} letters; "
        "the label is the output of its state"
    )
    # A name must make the same task for ever, and a file may change or not go along with a run.
    return AutomatonTask(name=f"automaton:{automaton_to_json(automaton)}", description=description, automaton=automaton)


TASK = TaskFamily(
    name="automaton",
    argument="FILE",
    description="letters of the automaton in a JSON file; the label is the output of its state",
    example='automaton:{"transitions":[[0,1],[1,0]],"start":0,"outputs":[0,1]}',
    make=_make,
)
