"""The holonomy decomposition: any automaton as a cascade of levels that permute or reset (Krohn and Rhodes).

Words map the set of all states to smaller and smaller sets. A level knows one of these sets, X, that the current state
is in, and names one of its tiles, the largest such sets inside X; after the last level a single state is left. Two sets
are equivalent if words lead from each to the other, and the height of a set is the length of the longest chain of
classes from it down to single states; a level takes the sets of one height apart.

With X the set of a level before a letter a, and Y the one after it, X a is a part of Y, and a level does one of two
things, which do not depend on the tile that it names:

- X a = Y, and X has the height of Y: then they are equivalent, a maps the tiles of X onto those of Y, and the level
  permutes. Tiles of equivalent sets are numbered along words that lead from one to the other, so that all permutations
  of a class lie in its holonomy group, which is a subgroup of the transition monoid: an aperiodic automaton needs
  identities and resets alone.
- otherwise X a lies inside one tile of Y, and the level is reset to that one.

See A. Egri-Nagy and C. L. Nehaniv, "Computational holonomy decomposition of transformation semigroups" (arXiv
1508.06345), which has the proofs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.monoid import strongly_connected

MAX_SETS = 2048
"""More sets of states than this are refused: finding the tiles compares all pairs."""


class HolonomyError(ValueError):
    """An automaton with too many images for a holonomy decomposition."""


@dataclass(frozen=True)
class Action:
    """What a letter does to a level: `images[tile]` is the tile that follows, or all go to the tile `reset`.

    Attributes:
        images: the tiles of X after the letter, by tile; None for a reset.
        reset: a tile of Y; None for a permutation.
    """

    images: tuple[int, ...] | None = None
    reset: int | None = None


@dataclass(frozen=True, eq=False)
class Holonomy:
    """The decomposition of an automaton; sets of states are numbered, and set 0 is that of all states.

    Attributes:
        sets: the states of every set, in increasing order.
        heights: of every set; 0 for single states.
        images: the set that a set becomes by a letter, int64 [sets, letters].
        tiles: the tiles of every set, as sets, in the order of the level's coordinates; empty for single states.
        start: the tile that each level names at first, the level of the greatest height first.
    """

    sets: tuple[tuple[int, ...], ...]
    heights: tuple[int, ...]
    images: np.ndarray
    tiles: tuple[tuple[int, ...], ...]
    start: tuple[int, ...]

    @property
    def num_levels(self) -> int:
        return self.heights[0]

    def level_of(self, number: int) -> int:
        """The level that takes a set apart, from 0 on; `num_levels` for single states, which none does."""
        return self.num_levels - self.heights[number]

    def level_size(self, level: int) -> int:
        """The most tiles of a set that a level takes apart."""
        return max(len(tiles) for number, tiles in enumerate(self.tiles) if self.level_of(number) == level)

    def action(self, level: int, before: int, after: int, letter: int) -> Action | None:
        """What a level does at a letter.

        Args:
            level: the level.
            before: the set X that the level knows the state to be in before the letter.
            after: the set Y after it; X after the letter is a part of it.
            letter: the letter.

        Returns:
            None where the level has nothing to name after the letter, and may do anything.
        """
        if self.level_of(after) != level:
            return None
        moved = self.images[before, letter]
        if self.level_of(before) == level and moved == after:
            place = {tile: index for index, tile in enumerate(self.tiles[after])}
            return Action(images=tuple(place[self.images[tile, letter]] for tile in self.tiles[before]))
        inside = set(self.sets[moved])
        return Action(reset=next(i for i, tile in enumerate(self.tiles[after]) if inside <= set(self.sets[tile])))


def holonomy(automaton: Automaton) -> Holonomy:
    """Decomposes an automaton all of whose states can be reached.

    Raises:
        HolonomyError: if words lead the set of all states to more than `MAX_SETS` sets.
    """
    table: list[list[int]] = automaton.transitions.tolist()
    sets, images = _images(table, automaton.num_letters)
    masks = [sum(1 << state for state in members) for members in sets]
    tiles = [_maximal_inside(mask, masks) for mask in masks]
    component = strongly_connected(images)
    heights = _heights(sets, images, tiles, component)
    ordered = _along_words(images, tiles, component)
    current, start = 0, []
    for level in range(heights[0]):
        if heights[0] - heights[current] != level:
            start.append(0)
            continue
        start.append(next(i for i, tile in enumerate(ordered[current]) if automaton.start in sets[tile]))
        current = ordered[current][start[-1]]
    return Holonomy(tuple(sets), tuple(heights), images, tuple(ordered), tuple(start))


def _images(table: list[list[int]], letters: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The images of the set of all states, and the single states; and what letters make of them."""
    sets = [tuple(range(len(table)))]
    numbers = {sets[0]: 0}
    for state in range(len(table)):
        if (single := (state,)) not in numbers:
            numbers[single] = len(sets)
            sets.append(single)
    rows = []
    for members in sets:  # grows while it is read
        row = []
        for letter in range(letters):
            following = tuple(sorted({table[state][letter] for state in members}))
            number = numbers.setdefault(following, len(sets))
            if number == len(sets):
                sets.append(following)
            row.append(number)
        rows.append(row)
        if len(sets) > MAX_SETS:
            raise HolonomyError(
                f"words lead the set of all {len(table)} states to more than {MAX_SETS:,} sets, too many for a "
                "holonomy decomposition"
            )
    return sets, np.array(rows)


def _maximal_inside(whole: int, masks: Sequence[int]) -> list[int]:
    """The numbers of the largest sets that are parts of a set and not all of it; sets are bit masks."""
    inside = [number for number, mask in enumerate(masks) if mask | whole == whole and mask != whole]
    found: list[int] = []
    for number in sorted(inside, key=lambda number: (-masks[number].bit_count(), number)):
        if all(masks[number] | masks[other] != masks[other] for other in found):
            found.append(number)
    return found


def _heights(
    sets: Sequence[tuple[int, ...]], images: np.ndarray, tiles: Sequence[list[int]], component: np.ndarray
) -> list[int]:
    """The length of the longest strict chain from the class of each set down to single states."""
    members: dict[int, list[int]] = {}
    for number, found in enumerate(component.tolist()):
        members.setdefault(found, []).append(number)
    heights = [0] * len(sets)
    # Nothing that a set leads to is larger, and of equal size what is reached has the lower component.
    for found in sorted(members, key=lambda found: (len(sets[members[found][0]]), found)):
        if len(sets[members[found][0]]) == 1:
            continue
        below = {following for number in members[found] for following in (*images[number].tolist(), *tiles[number])}
        height = 1 + max((heights[number] for number in below if component[number] != found), default=0)
        for number in members[found]:
            heights[number] = height
    return heights


def _along_words(images: np.ndarray, tiles: Sequence[list[int]], component: np.ndarray) -> list[tuple[int, ...]]:
    """The tiles of every set, in an order that words from the first set of its class carry along."""
    ordered: list[tuple[int, ...] | None] = [None] * len(tiles)
    for root, own in enumerate(tiles):
        if ordered[root] is not None:
            continue
        ordered[root] = tuple(own)
        queue = [root]
        for number in queue:  # grows while it is read
            order = ordered[number]
            assert order is not None
            for letter, following in enumerate(images[number].tolist()):
                if ordered[following] is None and component[following] == component[root]:
                    ordered[following] = tuple(images[list(order), letter].tolist())
                    queue.append(following)
    return [order for order in ordered if order is not None]


def levels_of_actions(decomposition: Holonomy, letters: int) -> list[dict[tuple[int, int, int], Action | None]]:
    """For each level, the action for every (X, Y, letter) that words lead to.

    X and Y are the sets before and after the letter that the levels above leave.
    """
    found: list[dict[tuple[int, int, int], Action | None]] = []
    reached = {(0, 0, letter) for letter in range(letters)}
    for level in range(decomposition.num_levels):
        actions = {key: decomposition.action(level, *key) for key in sorted(reached)}
        found.append(actions)
        reached = {
            (*pair, key[2]) for key, action in actions.items() for pair in _following(decomposition, level, key, action)
        }
    return found


def _following(
    decomposition: Holonomy, level: int, key: tuple[int, int, int], action: Action | None
) -> set[tuple[int, int]]:
    """The sets before and after that a level hands on, whichever tile it names."""
    before, after, _ = key
    tiles = decomposition.tiles
    if action is not None and action.images is not None:
        return {(tiles[before][c], tiles[after][image]) for c, image in enumerate(action.images)}
    befores = tiles[before] if decomposition.level_of(before) == level else (before,)
    ends = (after,) if action is None or action.reset is None else (tiles[after][action.reset],)
    return {(x, y) for x in befores for y in ends}
