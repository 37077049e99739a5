"""The transition monoid of an automaton: which maps of the states its words make, and Green's relations between them.

A word acts on the states from the left letter to the right one, so a product `m a` is "m, then a": an element is the
row of its images, and `(m a)[q] = a[m[q]]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from statetrack.automata.automaton import Automaton, first_occurrences


@dataclass(frozen=True, eq=False)
class TransitionMonoid:
    """All maps of the states that words make, in the order of their first words (shorter first, then by letters).

    Attributes:
        elements: the images of the states under every element, int64 [elements, states]; element 0 is the identity.
        parents: the element that an element prolongs by a letter, int64 [elements]; -1 for the identity.
        last_letters: by which letter, int64 [elements]; -1 for the identity.
        right: element times letter ("the element, then the letter"), int64 [elements, letters].
        levels: where the words of each length begin among the elements, and where the last ones end.
    """

    elements: np.ndarray
    parents: np.ndarray
    last_letters: np.ndarray
    right: np.ndarray
    levels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.elements)

    def word(self, element: int) -> tuple[int, ...]:
        """The first shortest word that makes an element, as letters."""
        letters: list[int] = []
        while element:
            letters.append(int(self.last_letters[element]))
            element = int(self.parents[element])
        return tuple(reversed(letters))

    @cached_property
    def products(self) -> np.ndarray:
        """All products, "m, then n" at [m, n]: int32 [elements, elements], for monoids of some thousand elements."""
        table = np.empty((len(self), len(self)), dtype=np.int32)
        table[0] = np.arange(len(self))
        for element in range(1, len(self)):  # by rows of the second factor: m (p b) = (m p) b
            table[element] = self.right[table[self.parents[element]], self.last_letters[element]]
        return table.T

    @cached_property
    def left(self) -> np.ndarray:
        """Letter times element ("the letter, then the element"), int64 [elements, letters]."""
        left = np.empty_like(self.right)
        left[0] = self.right[0]
        for begin, end in zip(self.levels[1:-1], self.levels[2:], strict=True):
            # a (p b) = (a p) b, and a p is known from the level before.
            left[begin:end] = self.right[left[self.parents[begin:end]], self.last_letters[begin:end, None]]
        return left

    @cached_property
    def idempotents(self) -> np.ndarray:
        """The elements e with e e = e: int64 [idempotents]."""
        twice = np.take_along_axis(self.elements, self.elements, 1)
        return np.flatnonzero((twice == self.elements).all(1))

    @cached_property
    def green(self) -> GreenRelations:
        """Green's relations."""
        if len(self.idempotents) == 1:  # then it is a group, and all elements are one class
            return GreenRelations(*(np.zeros(len(self), dtype=np.int64) for _ in range(4)))
        r_class = strongly_connected(self.right)
        l_class = strongly_connected(self.left)
        pairs, h_class = np.unique(np.stack([l_class, r_class], 1), axis=0, return_inverse=True)
        # In a finite monoid D joins L and R: components of the graph whose edges are the H-classes.
        component = _components(pairs[:, 0], pairs[:, 1] + l_class.max() + 1)
        return GreenRelations(l_class, r_class, h_class.reshape(-1), component[l_class])


@dataclass(frozen=True, eq=False)
class GreenRelations:
    """The number of the L-, R-, H- and D-class of every element: int64 [elements] each."""

    l_class: np.ndarray
    r_class: np.ndarray
    h_class: np.ndarray
    d_class: np.ndarray


_MANY_LETTERS = 8
"""From this many letters on a group is enumerated with those alone that generate it."""


def transition_monoid(automaton: Automaton, limit: int = 200_000) -> TransitionMonoid | None:
    """Enumerates the transition monoid breadth first; None if it has more than `limit` elements."""
    table = automaton.transitions.cpu().numpy()
    if automaton.is_permutation_automaton and automaton.num_letters >= _MANY_LETTERS:
        return _regular_group(table, limit) or _enumerate_group(table, limit)
    return _enumerate(table, limit)


def _regular_group(table: np.ndarray, limit: int) -> TransitionMonoid | None:
    """The same where the states are the elements of the group that the letters make, as in its word problem; else None.

    Then the automaton's own table says all products: the element that leads from state 0 to x, and a letter on, is the
    one that leads from 0 to where the letter leads from x. It is so if and only if maps that commute with all letters
    lead from state 0 to every state: a word that returns from one state to itself then does so from all.
    """
    states, letters = table.shape
    if states > limit:
        return None
    generators: list[int] = []
    order, parents, by = [0], np.zeros(states, dtype=np.int64), np.zeros(states, dtype=np.int64)
    for letter in np.random.default_rng(0).permutation(letters).tolist():  # few of them nearly always are enough
        if len(order) == states:
            break
        if table[0, letter] in order:
            continue
        generators.append(letter)
        if 2 ** len(generators) > states:  # each at least doubles a group
            return None
        order, reached = [0], {0}
        for state in order:  # grows while it is read
            for generator in generators:
                if (following := int(table[state, generator])) not in reached:
                    reached.add(following)
                    order.append(following)
                    parents[following], by[following] = state, generator
    if len(order) < states:
        return None
    for generator in generators:  # maps that lead from 0 along each of these lead everywhere
        commuting = np.empty(states, dtype=np.int64)
        commuting[0] = table[0, generator]
        for state in order[1:]:
            commuting[state] = table[commuting[parents[state]], by[state]]
        if not np.array_equal(table[commuting], commuting[table]):
            return None
    columns = {generator: np.ascontiguousarray(table[:, generator]) for generator in generators}
    elements = np.empty((states, states), dtype=np.int64)
    elements[0] = np.arange(states)
    for state in order[1:]:
        elements[state] = columns[int(by[state])][elements[parents[state]]]
    return _in_order_of_words(elements, table)


def _enumerate_group(table: np.ndarray, limit: int) -> TransitionMonoid | None:
    """The same for a group with many letters: products are made with those letters alone that generate it.

    Products of maps take elements x letters x states numbers, 10^11 for all 5,040 elements of S7 as letters. A letter
    that is no generator only needs the number of its element.
    """
    encode = _encoder(len(table))
    keys = encode(table.T)
    generators = [0]
    while True:  # a letter that is missing at least doubles a group, so that the last round costs the most
        monoid = _enumerate(table[:, generators], limit)
        if monoid is None:
            return None
        numbers = {key: number for number, key in enumerate(encode(monoid.elements))}
        missing = next((letter for letter, key in enumerate(keys) if key not in numbers), None)
        if missing is None:
            break
        generators.append(missing)
    # Every element times every letter, by the word of the letter: x (p a) = (x p) a.
    columns = {0: np.arange(len(monoid))}
    for letter_number in sorted({numbers[key] for key in keys}):
        word = []
        while letter_number not in columns:
            word.append(letter_number)
            letter_number = int(monoid.parents[letter_number])
        for element in reversed(word):
            columns[element] = monoid.right[columns[int(monoid.parents[element])], monoid.last_letters[element]]
    return _in_order_of_words(monoid.elements, np.stack([columns[numbers[key]] for key in keys], 1))


def _in_order_of_words(elements: np.ndarray, right: np.ndarray) -> TransitionMonoid:
    """A monoid whose elements, of which 0 is the identity, are numbered anew in the order of their first words."""
    letters = right.shape[1]
    new, scratch = np.full(len(elements), -1), np.empty(len(elements), dtype=np.int64)
    new[0], order, parents, last_letters, levels = 0, [np.array([0])], [np.array([-1])], [np.array([-1])], [0, 1]
    while levels[-1] < len(elements):
        products = right[order[-1]].reshape(-1)
        fresh = np.flatnonzero(new[products] < 0)
        first = fresh[first_occurrences(products[fresh], scratch)]
        new[products[first]] = levels[-1] + np.arange(len(first))
        order.append(products[first])
        parents.append(levels[-2] + first // letters)
        last_letters.append(first % letters)
        levels.append(levels[-1] + len(first))
    old = np.concatenate(order)
    return TransitionMonoid(
        elements=elements[old],
        parents=np.concatenate(parents),
        last_letters=np.concatenate(last_letters),
        right=new[right[old]],
        levels=tuple(levels),
    )


def _enumerate(table: np.ndarray, limit: int) -> TransitionMonoid | None:
    states, letters = table.shape
    encode = _encoder(states)
    levels = [0, 1]
    elements = [np.arange(states)[None]]
    numbers = {encode(elements[0])[0]: 0}
    parents, last_letters = [-1], [-1]
    right: list[int] = []
    while levels[-2] < levels[-1]:
        products = table[elements[-1]].transpose(0, 2, 1).reshape(-1, states)
        fresh: list[int] = []
        for index, key in enumerate(encode(products)):
            number = numbers.setdefault(key, len(numbers))
            if number == len(parents):
                fresh.append(index)
                parents.append(levels[-2] + index // letters)
                last_letters.append(index % letters)
            right.append(number)
        if len(numbers) > limit:
            return None
        elements.append(products[fresh])
        levels.append(len(numbers))
    return TransitionMonoid(
        elements=np.concatenate(elements),
        parents=np.array(parents),
        last_letters=np.array(last_letters),
        right=np.array(right).reshape(-1, letters),
        levels=tuple(levels[:-1]),
    )


def strongly_connected(successors: np.ndarray) -> np.ndarray:
    """The strongly connected component of every node, int64 [nodes], by Tarjan's algorithm.

    Args:
        successors: nodes that the edges of each node lead to, int64 [nodes, edges].
    """
    edges: list[list[int]] = successors.tolist()
    count = len(edges)
    order, low, component = [-1] * count, [0] * count, [-1] * count
    stack: list[int] = []
    visited = found = 0
    for root in range(count):
        if order[root] >= 0:
            continue
        order[root] = low[root] = visited
        visited += 1
        stack.append(root)
        path = [(root, iter(edges[root]))]
        while path:
            node, following = path[-1]
            for target in following:
                if order[target] < 0:
                    order[target] = low[target] = visited
                    visited += 1
                    stack.append(target)
                    path.append((target, iter(edges[target])))
                    break
                if component[target] < 0:
                    low[node] = min(low[node], order[target])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == order[node]:
                    while component[node] < 0:
                        component[stack.pop()] = found
                    found += 1
    return np.array(component)


@dataclass(frozen=True)
class ImageGroup:
    """What the words that map a set of states onto itself do to it: a permutation group.

    Attributes:
        states: the set, in increasing order.
        generators: permutations of the positions in it.
    """

    states: tuple[int, ...]
    generators: tuple[tuple[int, ...], ...]


def image_groups(automaton: Automaton, limit: int = 200_000) -> list[ImageGroup]:
    """The groups on the images of all states under words, one for each strongly connected set of images.

    Every prime that divides the order of a group in the transition monoid divides the order of one of these, and the
    other way round; there are at most 2^states images where the monoid may have states^states elements. Generators are
    Schreier's.

    Raises:
        ValueError: if there are more than `limit` images.
    """
    table = automaton.transitions.cpu().numpy()
    images = {tuple(range(automaton.num_states)): 0}
    sets = list(images)
    successors: list[list[int]] = []
    for current in sets:  # grows while it is read
        row = []
        for image in table[list(current)].T.tolist():
            following = tuple(sorted(set(image)))
            number = images.setdefault(following, len(sets))
            if number == len(sets):
                sets.append(following)
            row.append(number)
        successors.append(row)
        if len(sets) > limit:
            raise ValueError(
                f"words lead the set of all {automaton.num_states} states to more than {limit:,} sets, too many to "
                "analyse; give an automaton with fewer states"
            )
    component = strongly_connected(np.array(successors))
    groups, seen = [], set()
    for root, base in enumerate(sets):
        if component[root] in seen or len(base) == 1:
            continue
        seen.add(component[root])
        # transport[Y][i] is where the i-th state of the base goes on the way to Y.
        transport = {root: base}
        generators = set()
        queue = [root]
        for current in queue:  # grows while it is read
            for letter, following in enumerate(successors[current]):
                if component[following] != component[root]:
                    continue
                moved = tuple(table[list(transport[current]), letter].tolist())
                if following not in transport:
                    transport[following] = moved
                    queue.append(following)
                else:
                    position = {state: index for index, state in enumerate(transport[following])}
                    generators.add(tuple(position[state] for state in moved))
        generators.discard(tuple(range(len(base))))
        groups.append(ImageGroup(base, tuple(sorted(generators))))
    return groups


def _encoder(states: int):
    """A function from maps [maps, states] to a list of hashable keys."""
    if states**states < 2**63:
        powers = states ** np.arange(states, dtype=np.int64)
        return lambda maps: (maps @ powers).tolist()
    dtype = np.uint8 if states <= 256 else np.uint32
    return lambda maps: [row.tobytes() for row in maps.astype(dtype)]


def _components(sources: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray) -> np.ndarray:
    """The connected component of every node of an undirected graph, numbered in the order of the nodes."""
    parent = list(range(int(max(np.max(sources), np.max(targets))) + 1))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for source, target in zip(np.asarray(sources).tolist(), np.asarray(targets).tolist(), strict=True):
        a, b = root(source), root(target)
        parent[max(a, b)] = min(a, b)
    return np.unique([root(node) for node in range(len(parent))], return_inverse=True)[1]
