"""Star-free languages, whose automata count nothing (after the languages of arXiv 2009.11264)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.tasks.automaton_task import AutomatonTask
from statetrack.tasks.task import TaskFamily


def _nested(depth: int) -> str:
    """(a(ab)*b)* for depth 2, and so on: words of one kind of bracket, at most so deep."""
    return f"(a{_nested(depth - 1)}b)*" if depth > 1 else "(ab)*"


LANGUAGES = {
    "tomita4": ("(1|01|001)*(0|00)?", "words without 000"),
    "02": ("[012]*02*", "words whose last letter but for 2s is 0"),
    "no_ab": ("(b|c|a+c)*a*", "words over a, b, c without ab"),
    "d2": (_nested(2), "brackets a and b, at most 2 deep"),
    "d3": (_nested(3), "brackets a and b, at most 3 deep"),
    "d4": (_nested(4), "brackets a and b, at most 4 deep"),
    "d12": (_nested(12), "brackets a and b, at most 12 deep"),
}
"""By name: a regular expression, and what it says. Those of whose long words nearly all look alike, such as 1*, are not
among them: every model is right on them."""

DESCRIPTION = (
    f"words of a star-free language, {', '.join(LANGUAGES)}; the label says which letters may follow and whether the "
    "word may end"
)


def _make(argument: str) -> AutomatonTask:
    if argument not in LANGUAGES:
        raise ValueError(f"E in star_free:E is one of {', '.join(LANGUAGES)}; got {argument!r}")
    expression, words = LANGUAGES[argument]
    language = Automaton.from_regex(expression)
    living = _living(language)
    automaton = Automaton(
        language.transitions, language.start, _prospects(language, living), language.letter_names, language.state_names
    )
    return AutomatonTask(
        name=f"star_free:{argument}",
        description=f"{words}; the label says which letters may follow and whether the word may end",
        automaton=automaton,
        draws=_equally_likely(living),
        known_class="aperiodic monoid",
    )


def _living(language: Automaton) -> Tensor:
    """After which letters a word of the language is still possible: bool [states, letters]."""
    alive = language.outputs == 1
    for _ in range(language.num_states):
        alive = alive | alive[language.transitions].any(1)
    return alive[language.transitions]


def _prospects(language: Automaton, living: Tensor) -> Tensor:
    """A number for each different set of letters that may follow and each answer whether the word may end.

    No word that is drawn leaves the language, so the state from which nothing is possible shares the number 0.
    """
    seen: dict[tuple[int, ...], int] = {}
    numbers = []
    for row, accepted in zip(living.tolist(), language.outputs.tolist(), strict=True):
        numbers.append(seen.setdefault((accepted, *row), len(seen)) if any(row) or accepted else 0)
    return torch.tensor(numbers)


def _equally_likely(living: Tensor) -> tuple[tuple[int, ...], ...]:
    """In every state the letters that keep a word of the language possible, each as often as the others."""
    choices = [[letter for letter, may in enumerate(row) if may] or [0] for row in living.tolist()]
    draws = math.lcm(*map(len, choices))
    return tuple(tuple(letters * (draws // len(letters))) for letters in choices)


TASK = TaskFamily(name="star_free", argument="E", description=DESCRIPTION, example="star_free:d4", make=_make)
