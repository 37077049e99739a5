"""Small representations of a finite group by signed permutation matrices.

A group that acts on many states often acts faithfully on few points: the 120 elements of S5 on five. With signs it may
need fewer still: Z4 turns a square's two axes, S4 the three axes of a cube, Q8 the four of the quaternions. Such a
matrix is a product of as many reflections as its eigenvalues other than 1 number, and both are what a linear RNN
pays for: dimension and Householder factors.

Every transitive representation comes from a subgroup: the group permutes the cosets of H (signs all 1), or, if K is a
subgroup of index 2 in H, the pairs of cosets of K, exchanging the two of a pair with a sign.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

MAX_ORDER = 5040
"""The order of the largest groups whose subgroups are searched."""

MAX_SIGNED_ORDER = 400
"""The same for representations with signs."""

_PAIRS = 600
_PAIR_WORK = 300_000
_LARGEST_DEGREE = 64
_LARGEST_SIGNED_DEGREE = 8


@dataclass(frozen=True, eq=False)
class Representation:
    """A representation by signed permutation matrices: g sends axis i to axis `images[g, i]`, times `signs[g, i]`.

    Attributes:
        images: int64 [elements, degree].
        signs: 1 or -1, int64 [elements, degree].
    """

    images: np.ndarray
    signs: np.ndarray

    @property
    def degree(self) -> int:
        return self.images.shape[1]

    @property
    def kernel(self) -> frozenset[int]:
        """The elements that it sends to the identity matrix."""
        trivial = (self.images == np.arange(self.degree)).all(1) & (self.signs == 1).all(1)
        return frozenset(np.flatnonzero(trivial).tolist())

    def reflections(self, elements: np.ndarray) -> int:
        """The most reflections that the matrix of any of the elements is a product of: the rank of I - A."""
        return int(count_reflections(self.images[elements], self.signs[elements]).max())


def count_reflections(images: np.ndarray, signs: np.ndarray | None = None) -> np.ndarray:
    """The rank of I - A for signed permutation matrices A, images and signs [..., degree]: int64 [...].

    A cycle costs its length minus 1, and 1 more if its signs multiply to -1.
    """
    degree = images.shape[-1]
    if signs is None:
        return degree - _count_cycles(images)
    # On the axes and their opposites a cycle occurs twice, or once and twice as long if it negates.
    flip = np.where(signs < 0, degree, 0)
    doubled = np.concatenate([images + flip, images + degree - flip], -1)
    return degree - (_count_cycles(doubled) - _count_cycles(images))


def _count_cycles(images: np.ndarray) -> np.ndarray:
    points = np.arange(images.shape[-1])
    least, power = np.broadcast_to(points, images.shape), images
    for _ in range(max(1, images.shape[-1].bit_length())):
        least = np.minimum(least, np.take_along_axis(least, power, -1))
        power = np.take_along_axis(power, power, -1)
    return (least == points).sum(-1)


def cycles(images: np.ndarray) -> list[list[int]]:
    """The cycles of a permutation, those of length 1 included."""
    seen: set[int] = set()
    found = []
    for start in range(len(images)):
        cycle = []
        point = start
        while point not in seen:
            seen.add(point)
            cycle.append(point)
            point = int(images[point])
        if cycle:
            found.append(cycle)
    return found


def smallest_representation(
    products: np.ndarray, letters: np.ndarray, own: np.ndarray | None = None, *, signed: bool = True
) -> list[Representation]:
    """Representations that are faithful together, with few reflections for the letters and then few dimensions.

    Subgroups are found as closures of one or two elements: of all pairs in small groups, of a fixed random choice in
    larger ones, so that the result need not be the least there is.

    Args:
        products: the number of "g, then h" at [g, h], element 0 the identity: int64 [elements, elements].
        letters: the elements that are read.
        own: a faithful action that is known, images [elements, points]; None for none.
        signed: allow signs.

    Raises:
        ValueError: for a group with more than `MAX_ORDER` elements, or one.
    """
    order = len(products)
    if not 1 < order <= MAX_ORDER:
        raise ValueError(f"representations are searched for in groups of 2 to {MAX_ORDER:,} elements, got {order:,}")
    candidates = [] if own is None else [_permutations(own)]
    inverses = np.argmin(products, 1)
    subgroups = _subgroups(products)
    for members in subgroups:
        if order // len(members) <= _LARGEST_DEGREE:
            candidates.append(_coset_action(products, members))
    if signed and order <= MAX_SIGNED_ORDER:
        for members in subgroups:
            if order <= 2 * len(members) * _LARGEST_SIGNED_DEGREE:
                candidates += _signed_actions(products, inverses, members)
    if not candidates:
        candidates.append(_permutations(products.T))
    return _cheapest(candidates, letters)


def _cheapest(candidates: list[Representation], letters: np.ndarray) -> list[Representation]:
    best: dict[tuple[frozenset[int], int], Representation] = {}
    for representation in sorted(candidates, key=lambda r: r.degree):
        best.setdefault((representation.kernel, representation.reflections(letters)), representation)
    everything = frozenset(range(len(candidates[0].images)))
    for most in sorted({reflections for _, reflections in best}):
        # The smallest of each kernel among those with few enough reflections.
        allowed: dict[frozenset[int], Representation] = {}
        for (kernel, reflections), representation in best.items():
            if reflections <= most and kernel != everything:
                smaller = allowed.get(kernel)
                if smaller is None or representation.degree < smaller.degree:
                    allowed[kernel] = representation
        faithful = [
            chosen
            for size in range(1, 5)
            for chosen in itertools.combinations(allowed.items(), size)
            if len(frozenset.intersection(*(kernel for kernel, _ in chosen))) == 1
        ]
        if faithful:
            chosen = min(faithful, key=lambda chosen: (sum(r.degree for _, r in chosen), len(chosen)))
            return [representation for _, representation in chosen]
    raise AssertionError("the regular representation is faithful, so there is always an answer")


def _subgroups(products: np.ndarray) -> list[np.ndarray]:
    """Subgroups that one or two elements generate, as sorted elements, without repetition."""
    order = len(products)
    found: dict[bytes, np.ndarray] = {}

    def add(*generators: int) -> None:
        members = _closure(products, np.array(generators))
        found.setdefault(members.tobytes(), members)

    for element in range(min(order, _PAIRS)):
        add(element)
    if order * order <= 2 * _PAIRS:
        pairs = list(itertools.combinations(range(1, order), 2))
    else:
        count = min(_PAIRS, _PAIR_WORK // order)
        pairs = np.random.default_rng(0).integers(1, order, size=(count, 2)).tolist()
    for pair in pairs:
        add(*pair)
    return list(found.values())


def _closure(products: np.ndarray, generators: np.ndarray) -> np.ndarray:
    member = np.zeros(len(products), dtype=bool)
    member[0] = True
    frontier = np.array([0])
    while len(frontier):
        reached = np.unique(products[frontier[:, None], generators])
        frontier = reached[~member[reached]]
        member[frontier] = True
    return np.flatnonzero(member)


def _cosets(products: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the coset (members, then g) of every g, and a representative of each coset."""
    least = products[members].min(0)
    representatives, coset = np.unique(least, return_inverse=True)
    return coset, representatives


def _coset_action(products: np.ndarray, members: np.ndarray) -> Representation:
    coset, representatives = _cosets(products, members)
    return _permutations(coset[products[representatives]].T)


def _permutations(images: np.ndarray) -> Representation:
    return Representation(images, np.ones_like(images))


def _signed_actions(products: np.ndarray, inverses: np.ndarray, members: np.ndarray) -> list[Representation]:
    """A representation for every subgroup in which `members` has index 2."""
    coset, representatives = _cosets(products, members)
    inside = np.zeros(len(products), dtype=bool)
    inside[members] = True
    found: list[Representation] = []
    partners: set[int] = set()
    # t must lie outside, square into the subgroup and normalize it; one t for each coset will do.
    for t in representatives[inside[products[representatives, representatives]]].tolist():
        conjugates = products[products[t, members], inverses[t]]
        if inside[t] or coset[t] in partners or not inside[conjugates].all():
            continue
        partners.add(int(coset[t]))
        opposite = coset[products[t, representatives]]
        axes = np.flatnonzero(np.arange(len(opposite)) < opposite)
        axis_of = np.empty(len(opposite), dtype=np.int64)
        axis_of[axes] = axis_of[opposite[axes]] = np.arange(len(axes))
        reached = coset[products[representatives[axes]]].T
        signs = np.where(np.isin(reached, axes), 1, -1)
        found.append(Representation(axis_of[reached], signs))
    return found
