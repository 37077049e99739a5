"""Finite groups as automata: the state is the running product of the letters read so far.

Groups come from SymPy as permutations, and follow its convention: in a product p q the factor p acts first,
`(p q)(i) = q(p(i))`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from statetrack.automata.automaton import Automaton

if TYPE_CHECKING:
    from sympy.combinatorics import Permutation, PermutationGroup

MAX_ELEMENTS = 5040
"""The order of S7. A multiplication table of a group so large takes 200 MB."""

NAMES = (
    "Z, S, A or D with a number, Q8, and products and powers of them, such as S3, A5, D4, A5xZ9 or Z2^4, "
    "or what permutations generate, such as (1 2),(1 2 3)"
)
"""Which groups there are, in words."""


@dataclass(frozen=True)
class _Group:
    """A group with n elements numbered from 0, the identity.

    Attributes:
        products: the number of a b at [a, b]: int64 [n, n].
        elements: the images of the points under each element: int64 [n, points].
        generators: the numbers of SymPy's generators.
        moved: how many points each element moves: [n].
        names: of the elements, for people.
    """

    products: np.ndarray
    elements: np.ndarray
    generators: np.ndarray
    moved: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Family:
    """Groups that differ by a number n.

    Attributes:
        smallest: the least n.
        why: why there is nothing below.
        order: how many elements the group has.
        permutations: SymPy's group.
    """

    smallest: int
    why: str
    order: Callable[[int], int]
    permutations: Callable[[int], PermutationGroup]


def _sympy(constructor: str) -> Callable[[int], PermutationGroup]:
    def construct(n: int) -> PermutationGroup:
        from sympy.combinatorics import named_groups  # slow to import, and other tasks do without it

        return getattr(named_groups, constructor)(n)

    return construct


_TRIVIAL = "smaller ones have one element only"
_FAMILIES = {
    "Z": _Family(2, _TRIVIAL, lambda n: n, _sympy("CyclicGroup")),
    "S": _Family(2, _TRIVIAL, math.factorial, _sympy("SymmetricGroup")),
    "A": _Family(3, _TRIVIAL, lambda n: math.factorial(n) // 2, _sympy("AlternatingGroup")),
    "D": _Family(3, "D1 is Z2 and D2 is Z2xZ2", lambda n: 2 * n, _sympy("DihedralGroup")),
}


def _quaternion_group() -> PermutationGroup:
    from sympy.combinatorics import Permutation, PermutationGroup

    # What multiplication by i and by j from the right does to 1, -1, i, -i, j, -j, k, -k.
    return PermutationGroup(Permutation([2, 3, 1, 0, 7, 6, 4, 5]), Permutation([4, 5, 6, 7, 1, 0, 3, 2]))


_LETTERS: dict[str, Callable[[_Group], np.ndarray]] = {
    "all": lambda group: np.arange(len(group.moved)),
    "generators": lambda group: group.generators,
    "swaps": lambda group: np.flatnonzero(group.moved <= 2),
    "3-cycles": lambda group: np.flatnonzero(group.moved <= 3),
    "two": lambda group: _two_generators(group),
}
LETTERS = tuple(_LETTERS)
"""What the letters of a group automaton may be, if they are not given as permutations."""


@lru_cache(maxsize=8)
def group_automaton(name: str, letters: str | None = None) -> Automaton:
    """The automaton of the word problem of a finite group: state_t = state_{t-1} letter_t, every state its own output.

    The groups are Z_m (cyclic, m >= 2), S_n (symmetric, n >= 2), A_n (alternating, n >= 3), D_n (dihedral, with 2n
    elements, n >= 3), Q8 (quaternions, as permutations of eight points), and direct products of any number of them such
    as Z2xZ2xS3 or Z2^2xS3, up to `MAX_ELEMENTS` elements.

    Elements are numbered by the lexicographic order of their permutations as lists of images, so the identity, which is
    the start, is 0, and the element k of Z_m is the shift by k. A product counts like an odometer: the last factor runs
    fastest. In a product of elements the one on the left acts first, as in SymPy: `(p q)(i) = q(p(i))`.

    Permutations are written as cycles: points stand between parentheses, a product of disjoint cycles is one
    permutation, commas separate permutations, as in `(1 2),(1 2 3)(4 5)`. Points are numbered from 1, as in GAP, or
    from 0 where a 0 occurs. Letters given so keep what was written as their names.

    Args:
        name: such as "S3" or "A5xZ9", or permutations that generate the group.
        letters: which elements are read, in the order of their numbers but for generators:
            "all" - every element;
            "generators" - SymPy's generators, of every factor;
            "swaps" - the identity and all swaps of two points;
            "3-cycles" - those and all cycles of three points, so all elements that move at most three points;
            "two" - SymPy's generators where they are two;
            a number - so many elements: SymPy's generators, then what else products of them and their inverses make,
                shorter products first, and the identity last (2, 6 or 60 letters of A5, for example);
            permutations of the group - these, in their order;
            None - all, or where `name` is permutations, these.

    Raises:
        ValueError: for an unknown name, a group that is trivial or too large, unknown letters, or letters that don't
            generate the group.
    """
    if letters is None:
        letters = name if "(" in name else "all"
    count = int(letters) if letters.isascii() and letters.isdecimal() and len(letters) <= 4 else None
    if letters not in _LETTERS and "(" not in letters and count is None:
        raise ValueError(
            f"unknown letters {letters!r} of a group; they may be {', '.join(LETTERS)}, a number of elements, or "
            "permutations such as (1 2)"
        )
    group = _generated(name) if "(" in name else _named(name)
    names = group.names
    if letters in _LETTERS:
        chosen = _LETTERS[letters](group)
    elif count is not None:
        chosen = _nearest(group, count, name)
    else:
        texts, images = _read_permutations(letters, degree=group.elements.shape[1])
        chosen = np.array([_number_of(group, image, text, name) for text, image in zip(texts, images, strict=True)])
        names = dict(zip(chosen.tolist(), texts, strict=True))
    automaton = Automaton(
        transitions=torch.from_numpy(group.products[:, chosen]),
        start=0,
        outputs=torch.arange(len(group.moved)),
        letter_names=tuple(names[number] for number in chosen.tolist()),
        state_names=group.names,
    )
    reached = int(automaton.reachable().sum())
    if reached < automaton.num_states:
        raise ValueError(
            f"the letters {letters!r} reach only {reached} of the {automaton.num_states} elements of {name}; "
            "'all' and 'generators' reach every element"
        )
    return automaton


def group_class(name: str) -> str:
    """What the group is, "abelian group", "solvable group" or "non-solvable group", without its table of products.

    Raises:
        ValueError: as `group_automaton`.
    """
    from sympy.combinatorics import Permutation, PermutationGroup

    if "(" in name:
        groups = [PermutationGroup([Permutation(image) for image in _read_permutations(name)[1].tolist()])]
    else:
        groups = [permutations() for _, permutations in _factors(name)]
    if all(group.is_abelian for group in groups):
        return "abelian group"
    return "solvable group" if all(group.is_solvable for group in groups) else "non-solvable group"


def _factors(name: str) -> list[tuple[int, Callable[[], PermutationGroup]]]:
    """The order of each factor of a product, and what makes its permutations; a power is so many factors."""
    found = []
    for factor in name.split("x"):
        base, _, exponent = factor.partition("^")
        if exponent and not re.fullmatch(r"[1-9][0-9]?", exponent):
            raise ValueError(f"the exponent of a power of groups, as in Z2^4, is from 1 to 99; got {factor!r}")
        found += [_parse(base if exponent else factor, name)] * int(exponent or 1)
    return found


def _named(name: str) -> _Group:
    factors = _factors(name)
    if math.prod(order for order, _ in factors) > MAX_ELEMENTS:
        raise ValueError(f"the group {name} has more than {MAX_ELEMENTS:,} elements, the most that a table is made for")
    return reduce(_direct_product, [_from_permutations(_array_forms(permutations())) for _, permutations in factors])


def _generated(name: str) -> _Group:
    """The group that permutations generate."""
    from sympy.combinatorics import Permutation, PermutationGroup

    _, images = _read_permutations(name)
    group = PermutationGroup([Permutation(image) for image in images.tolist()])
    if not 1 < (order := int(group.order())) <= MAX_ELEMENTS:
        raise ValueError(
            f"the permutations {name} generate {order:,} elements; a table is made for 2 to {MAX_ELEMENTS:,}"
        )
    return _from_permutations(images.astype(">u2"))


_POINTS = re.compile(r"\(\s*(\d+(?:[\s,]+\d+)*)?\s*\)")
_PERMUTATION = re.compile(rf"(?:{_POINTS.pattern}\s*)+")


def _read_permutations(text: str, degree: int | None = None) -> tuple[list[str], np.ndarray]:
    """Permutations in cycle notation: each as it was written, and their images, int64 [permutations, points]."""
    pieces = [piece.group().strip() for piece in _PERMUTATION.finditer(text)]
    if not pieces or _PERMUTATION.sub("", text).strip(" ,"):
        raise ValueError(f"permutations are written as cycles, such as (1 2),(1 2 3)(4 5); got {text!r}")
    written = [
        [[int(point) for point in re.findall(r"\d+", cycle)] for cycle in _POINTS.findall(piece)] for piece in pieces
    ]
    points = [point for cycles in written for cycle in cycles for point in cycle]
    first = min([1, *points])  # numbered from 1 unless a 0 occurs
    largest = max([first, *points]) - first
    if degree is None:
        degree = largest + 1
    if largest >= degree:
        raise ValueError(f"{text} moves the point {largest + first}, and the group acts on {degree} points")
    if degree > MAX_ELEMENTS:
        raise ValueError(f"permutations of at most {MAX_ELEMENTS:,} points will do, and {text!r} has {degree:,}")
    images = np.tile(np.arange(degree), (len(pieces), 1))
    for row, cycles, piece in zip(images, written, pieces, strict=True):
        members = [point - first for cycle in cycles for point in cycle]
        if len(set(members)) != len(members):
            raise ValueError(f"the cycles of a permutation have no point in common; got {piece}")
        for cycle in cycles:
            row[np.array(cycle, dtype=np.int64) - first] = np.roll(np.array(cycle, dtype=np.int64) - first, -1)
    return pieces, images


def _number_of(group: _Group, image: np.ndarray, text: str, name: str) -> int:
    found = np.flatnonzero((group.elements == image).all(1))
    if not len(found):
        raise ValueError(f"{text} is not an element of {name}")
    return int(found[0])


def _two_generators(group: _Group) -> np.ndarray:
    if len(group.generators) != 2:
        raise ValueError(
            f"this group comes with {len(group.generators)} generators, not two; "
            "take 'generators', or give two permutations such as (1 2),(1 2 3)"
        )
    return group.generators


def _nearest(group: _Group, count: int, name: str) -> np.ndarray:
    """The first `count` elements, in the order in which a breadth-first search from the generators meets them."""
    order, inverses = len(group.moved), group.products.argmin(1)  # the identity is 0, the least product of any element
    if not 1 <= count <= order:
        raise ValueError(f"{name} has {order} elements, so the number of letters is from 1 to {order}; got {count}")
    steps = list(dict.fromkeys([*group.generators.tolist(), *inverses[group.generators].tolist()]))
    met = dict.fromkeys(steps)
    queue = list(met)
    for element in queue:  # grows while it is read
        for step in steps:
            product = int(group.products[element, step])
            if product and product not in met:
                met[product] = None
                queue.append(product)
    return np.array([*queue, 0][:count])


def _parse(factor: str, name: str) -> tuple[int, Callable[[], PermutationGroup]]:
    """The order of a factor of `name`, and what makes its permutations."""
    if factor == "Q8":
        return 8, _quaternion_group
    if not (match := re.fullmatch(r"([ZSAD])([1-9][0-9]*)", factor)):
        respelt = name.upper().replace("X", "x")
        hint = "" if respelt == name or not _is_name(respelt) else f"did you mean {respelt!r}? "
        raise ValueError(f"unknown group {name!r}; {hint}groups are {NAMES}")
    family, digits = _FAMILIES[match[1]], match[2]
    # Whatever the family, n beyond the limit means an order beyond it; a factorial of such an n would take forever.
    n = int(digits) if len(digits) <= len(str(MAX_ELEMENTS)) else MAX_ELEMENTS + 1
    if n < family.smallest:
        raise ValueError(f"the groups {match[1]} start with {match[1]}{family.smallest}, as {family.why}; got {factor}")
    order = family.order(n) if n <= MAX_ELEMENTS else n
    return order, lambda: family.permutations(n)


def _is_name(name: str) -> bool:
    return all(re.fullmatch(r"[ZSAD][1-9][0-9]*|Q8", factor) for factor in name.split("x"))


def _array_forms(group: PermutationGroup) -> np.ndarray:
    """The images of all points under each generator: big-endian uint16 [generators, points]."""
    generators = cast("list[Permutation]", group.generators)
    return np.array([generator.array_form for generator in generators], dtype=">u2")


def _from_permutations(generators: np.ndarray) -> _Group:
    """The group that permutations [generators, points] generate.

    A breadth-first search finds the elements and the products g b with each generator g. Another one fills the table:
    from the row of c follows that of a = g c, as a b = g (c b), for a level of the search and all b at once.
    """
    degree = generators.shape[1]
    identity = np.arange(degree, dtype=generators.dtype)
    found = {identity.tobytes()}
    frontier = identity[None]
    while len(frontier):
        fresh = {row.tobytes() for generator in generators for row in frontier[:, generator]} - found
        found |= fresh
        frontier = np.frombuffer(b"".join(fresh), dtype=generators.dtype).reshape(-1, degree)
    # Big-endian numbers sort as their bytes do.
    numbers = {row: number for number, row in enumerate(sorted(found))}
    elements = np.frombuffer(b"".join(numbers), dtype=generators.dtype).reshape(-1, degree)
    by_generator = [np.array([numbers[row.tobytes()] for row in elements[:, generator]]) for generator in generators]

    order = len(elements)
    products = np.empty((order, order), dtype=np.int64)
    products[0] = np.arange(order)
    known = np.zeros(order, dtype=bool)
    known[0] = True
    level = np.array([0])
    while len(level):
        levels = []
        for times in by_generator:
            parents = level[~known[times[level]]]
            products[times[parents]] = times[products[parents]]
            known[times[parents]] = True
            levels.append(times[parents])
        level = np.concatenate(levels)
    return _Group(
        products=products,
        elements=elements.astype(np.int64),
        generators=np.array([times[0] for times in by_generator]),
        moved=(elements != identity).sum(1),
        names=_names(elements),
    )


def _direct_product(left: _Group, right: _Group) -> _Group:
    n, m = len(left.moved), len(right.moved)
    products = left.products[:, None, :, None] * m + right.products[None, :, None, :]
    return _Group(
        products=products.reshape(n * m, n * m),
        elements=np.concatenate(
            [np.repeat(left.elements, m, 0), np.tile(right.elements, (n, 1)) + left.elements.shape[1]], 1
        ),
        generators=np.concatenate([left.generators * m, right.generators]),
        moved=(left.moved[:, None] + right.moved).reshape(-1),
        names=tuple(f"{a},{b}" for a in left.names for b in right.names),
    )


def _names(elements: np.ndarray) -> tuple[str, ...]:
    """The cycles of permutations [elements, points], such as `(0 1)(2 3)` and `()`.

    In a cyclic group, and where cycles are too long to be read, the names are the numbers.
    """
    order, degree = elements.shape
    if degree > 100 or np.array_equal(elements, (np.arange(order)[:, None] + np.arange(degree)) % degree):
        return tuple(map(str, range(order)))
    return tuple(_cycles(element) for element in elements.tolist())


def _cycles(images: list[int]) -> str:
    seen: set[int] = set()
    text = ""
    for point in range(len(images)):
        if point in seen or images[point] == point:
            continue
        cycle = []
        while point not in seen:
            seen.add(point)
            cycle.append(str(point))
            point = images[point]
        text += f"({' '.join(cycle)})"
    return text or "()"
