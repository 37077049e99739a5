"""The holonomy decomposition: it follows the automaton, and its levels have no groups but those of the monoid."""

import numpy as np
import pytest
import torch
from automaton_examples import dyck, full

from statetrack.automata import Automaton, group_automaton
from statetrack.automata.holonomy import HolonomyError, holonomy, levels_of_actions
from statetrack.automata.monoid import transition_monoid


def random_automaton(seed):
    generator = torch.Generator().manual_seed(seed)
    states, letters = 2 + seed % 7, 1 + seed % 3
    transitions = torch.randint(states, (states, letters), generator=generator)
    return Automaton(transitions, 0, torch.arange(states)).minimized()


def follow(automaton, letters):
    """The set of states that the levels name after each letter, level by level."""
    found = holonomy(automaton)
    tiles = list(found.start)
    for letter in letters:
        before = after = 0
        following = list(tiles)
        for level in range(found.num_levels):
            action = found.action(level, before, after, letter)
            if action is not None:
                following[level] = action.reset if action.images is None else action.images[tiles[level]]
            if found.level_of(before) == level:
                before = found.tiles[before][tiles[level]]
            if found.level_of(after) == level:
                after = found.tiles[after][following[level]]
        tiles = following
        yield found.sets[after]


EXAMPLES = [full(4), dyck(3), group_automaton("S4", "two"), Automaton.from_regex("(a|b)*aba(a|b)*")]


@pytest.mark.parametrize("automaton", [*EXAMPLES, *map(random_automaton, range(30))])
def test_the_levels_name_the_state_of_the_automaton(automaton):
    letters = torch.randint(automaton.num_letters, (1, 200), generator=torch.Generator().manual_seed(0))
    states = automaton.run(letters)[0].tolist()
    assert list(follow(automaton, letters[0].tolist())) == [(state,) for state in states]


def test_levels_only_permute_or_reset_and_an_aperiodic_automaton_only_resets():
    aperiodic = 0
    for seed in range(60):
        automaton = random_automaton(seed)
        actions = [a for level in levels_of_actions(holonomy(automaton), automaton.num_letters) for a in level.values()]
        moves = [a.images for a in actions if a is not None and a.images is not None]
        assert all(sorted(images) == list(range(len(images))) for images in moves)
        monoid = transition_monoid(automaton)
        if (np.bincount(monoid.green.h_class) == 1).all():
            aperiodic += 1
            assert all(images == tuple(range(len(images))) for images in moves)
    assert aperiodic > 5


def test_the_groups_of_all_maps_are_symmetric():
    """The level that takes sets of k of 4 states apart has the k! permutations of its tiles."""
    automaton = full(4)
    levels = levels_of_actions(holonomy(automaton), automaton.num_letters)
    for level, order in zip(levels, (24, 6, 2), strict=True):
        generators = {a.images for a in level.values() if a is not None and a.images is not None}
        group = {tuple(range(len(next(iter(generators)))))}
        while True:
            larger = group | {tuple(g[i] for i in h) for g in generators for h in group}
            if larger == group:
                break
            group = larger
        assert len(group) == order


def test_too_many_sets_are_refused():
    with pytest.raises(HolonomyError, match="more than 2,048 sets"):
        holonomy(full(12))
