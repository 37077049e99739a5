"""Random permutation-reset automata: every letter permutes the states or sends all of them to one.

Those are the automata that one layer of a linear RNN can hold (Krohn and Rhodes; arXiv 2411.12537, theorem 4).
"""

from __future__ import annotations

import torch

from statetrack import seeds
from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily, read_numbers

BOUNDS = {"STATES": (2, 200), "PERMUTATIONS": (1, 100), "RESETS": (0, 100), "SEED": (0, 10**9 - 1)}
DESCRIPTION = "letters of a random automaton, PERMUTATIONS of its states and RESETS to one; the label is its state"


def _make(argument: str) -> AutomatonTask:
    states, permutations, resets, seed = read_numbers(argument, "permutation_reset", BOUNDS, "6,3,1,0")
    random = seeds.generator("permutation-reset automaton", states, permutations, resets, seed)
    while True:
        columns = [torch.randperm(states, generator=random) for _ in range(permutations)]
        columns += [torch.randint(states, (), generator=random).expand(states) for _ in range(resets)]
        automaton = Automaton(
            transitions=torch.stack(columns, 1),
            start=0,
            outputs=torch.arange(states),
            letter_names=(
                *(f"permutation {i}" for i in range(permutations)),
                *(f"reset {i}" for i in range(resets)),
            ),
        )
        if automaton.reachable().all():  # otherwise there would be labels that no word has
            break
    return AutomatonTask(
        name=f"permutation_reset:{states},{permutations},{resets},{seed}", description=DESCRIPTION, automaton=automaton
    )


TASK = TaskFamily(
    name="permutation_reset",
    argument=",".join(BOUNDS),
    description=DESCRIPTION,
    example="permutation_reset:6,3,1,0",
    make=_make,
)
