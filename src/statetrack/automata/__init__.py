"""Deterministic finite automata as integer tables, where they come from, and their algebra."""

from statetrack.automata.automaton import Automaton
from statetrack.automata.files import automaton_from_json, automaton_to_json, read_automaton
from statetrack.automata.groups import group_automaton

__all__ = ["Automaton", "automaton_from_json", "automaton_to_json", "group_automaton", "read_automaton"]
