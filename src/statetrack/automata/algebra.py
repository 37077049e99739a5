"""The algebraic class of an automaton: which groups, if any, are hidden in its transition monoid."""

from __future__ import annotations

from itertools import combinations

from statetrack.automata.automaton import Automaton
from statetrack.automata.monoid import image_groups

CLASSES = (
    "aperiodic monoid",
    "abelian group",
    "solvable group",
    "non-solvable group",
    "solvable monoid",
    "non-solvable monoid",
)
"""From easy to hard within groups, and within monoids. An aperiodic monoid has no group: its language is star-free."""


def algebraic_class(automaton: Automaton, limit: int = 200_000) -> str:
    """One of `CLASSES`, for the transition monoid of the minimal automaton.

    A group is what the letters of a permutation automaton generate. Other monoids are solvable if all groups in them
    are. The groups are those on the images of all states (`image_groups`), whose composition factors are those of the
    groups in the monoid.

    Raises:
        ValueError: if there are more than `limit` images.
    """
    from sympy.combinatorics import Permutation, PermutationGroup  # slow to import, and most tasks do without

    minimal = automaton.minimized()
    groups = [group.generators for group in image_groups(minimal, limit) if group.generators]
    if not groups:
        return "aperiodic monoid"
    is_group = minimal.is_permutation_automaton
    if is_group and all(_commute(a, b) for a, b in combinations(groups[0], 2)):
        return "abelian group"
    permutations = (PermutationGroup([Permutation(list(generator)) for generator in group]) for group in groups)
    # Random permutations nearly always make all permutations, or all even ones. That is found fast, the rest slowly.
    solvable = all(not (group.degree >= 5 and group.is_alt_sym()) and group.is_solvable for group in permutations)
    return f"{'solvable' if solvable else 'non-solvable'} {'group' if is_group else 'monoid'}"


def _commute(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(a[b[i]] == b[a[i]] for i in range(len(a)))
