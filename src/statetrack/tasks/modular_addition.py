"""Counting modulo m: the word problem of the cyclic group (arXiv 2411.12537, theorem 2)."""

from __future__ import annotations

import torch

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily

MAX_MODULUS = 1000
DESCRIPTION = "digits 0 to M-1; the label is their running sum modulo M"


def _make(argument: str) -> AutomatonTask:
    modulus = int(argument) if argument.isascii() and argument.isdecimal() and len(argument) <= 4 else 0
    if not 2 <= modulus <= MAX_MODULUS:
        raise ValueError(f"M in modular_addition:M is an integer from 2 to {MAX_MODULUS}, such as 5; got {argument!r}")
    digits = torch.arange(modulus)
    automaton = Automaton(
        transitions=(digits[:, None] + digits) % modulus,
        start=0,
        outputs=digits,
        letter_names=tuple(map(str, range(modulus))),
        state_names=tuple(map(str, range(modulus))),
    )
    return AutomatonTask(
        name=f"modular_addition:{modulus}", description=DESCRIPTION, automaton=automaton, known_class="abelian group"
    )


TASK = TaskFamily(
    name="modular_addition", argument="M", description=DESCRIPTION, example="modular_addition:5", make=_make
)
