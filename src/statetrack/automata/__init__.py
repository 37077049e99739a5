"""Deterministic finite automata as integer tables, and the groups whose word problems they solve."""

from statetrack.automata.automaton import Automaton
from statetrack.automata.groups import group_automaton

__all__ = ["Automaton", "group_automaton"]
