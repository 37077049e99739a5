"""What a language needs of a linear RNN, and which theorem says so.

T1 to T4 and T6 are the theorems of Grazzi et al., arXiv 2411.12537. O1 (a cascade of n - 1 levels, `construct`), O2 and
the unit-modulus argument are our own; tests support them and nobody has reviewed them:

- O2. A layer that sees the current letter alone, with matrices of norm at most 1 and finitely many reachable states,
  tracks an automaton only if any two idempotents e, f of its transition monoid satisfy efe = fe (e is read first).
  Contractive idempotents are orthogonal projections, and in a finite monoid of contractions they commute.
- Unit modulus. If all matrices are products of factors with eigenvalues in [0, 1], a product of them can have no
  eigenvalue of modulus 1 but 1 itself, so what it repeats converges and can't go round a cycle for ever.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from statetrack.automata import Automaton
from statetrack.automata.holonomy import HolonomyError, holonomy
from statetrack.automata.monoid import TransitionMonoid, image_groups, transition_monoid
from statetrack.automata.representations import MAX_ORDER, count_reflections, cycles, smallest_representation
from statetrack.theory.construct import ConstructionError, Plan, plan

if TYPE_CHECKING:
    from sympy.combinatorics import Permutation, PermutationGroup

MONOID_LIMIT = 200_000

_MOST_ENTRIES = 40_000_000
"""Numbers that the table of a monoid may have: elements times states."""

_MOST_IMAGE_STATES = 20_000_000
"""The same for the images of all states under words: sets times states."""

_MOST_POINTS = 1000

_GIANT = 8
"""From this degree on a test for symmetric and alternating groups comes first: SymPy takes long to count those."""


@dataclass(frozen=True)
class Subgroup:
    """A group of words, up to isomorphism.

    Attributes:
        name: such as "S3", "Z2 x Z4" or "order 20".
        order: elements.
        solvable: whether it is solvable.
        primes: the primes that divide its order.
    """

    name: str
    order: int
    solvable: bool
    primes: tuple[int, ...]


@dataclass(frozen=True)
class LetterFacts:
    """What a letter does to the states of the minimal automaton.

    Attributes:
        name: the letter.
        kind: "identity", "permutation", "constant" (all states go to one), or "other".
        moved: states that it moves.
        rank: of I - A, where A is its matrix; for a permutation the reflections that it is a product of.
        period: the length of the cycle that repeating the letter ends in.
    """

    name: str
    kind: Literal["identity", "permutation", "constant", "other"]
    moved: int
    rank: int
    period: int


@dataclass(frozen=True)
class Obstruction:
    """Two words that show that one layer is not enough (O2).

    Attributes:
        e: a word that acts like itself repeated.
        f: another one.
        state: from this state (of the minimal automaton) the words e f e and f e lead to different states.
    """

    e: tuple[str, ...]
    f: tuple[str, ...]
    state: int


@dataclass(frozen=True)
class Requirement:
    """One row of the table.

    Attributes:
        quantity: "eigenvalue_range", "num_householder" or "layers".
        value: what it must be at least, or is enough.
        kind: "necessary" or "sufficient".
        theorem: which statement says so.
        assumption: what it is proved for.
        sentence: the reason in plain words.
    """

    quantity: str
    value: str
    kind: Literal["necessary", "sufficient"]
    theorem: str
    assumption: str
    sentence: str


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found; all of it is about the minimal automaton.

    Attributes:
        states: of the minimal complete automaton.
        monoid_size: elements of the transition monoid, the identity included; None beyond the limit.
        aperiodic: whether no word permutes states in a cycle: the language is star-free.
        group: whether every letter permutes the states.
        groups: the different non-trivial groups in the monoid, largest first.
        solvable: whether all of them are solvable.
        primes: all primes that divide their orders.
        one_layer_obstruction: a witness against one layer, or None if there is none (or, beyond the limit, none was
            found: see `obstruction_searched`).
        obstruction_searched: "all idempotents", or which ones.
        green: the numbers of D-, L-, R- and H-classes and of idempotents; empty beyond the limit.
        letters: what each letter does.
        requirements: the table.
        plan: what `compile` makes of it; None if it refuses.
        automaton: the minimal automaton.
    """

    states: int
    monoid_size: int | None
    aperiodic: bool
    group: bool
    groups: tuple[Subgroup, ...]
    solvable: bool
    primes: tuple[int, ...]
    one_layer_obstruction: Obstruction | None
    obstruction_searched: str
    green: dict[str, int]
    letters: tuple[LetterFacts, ...]
    requirements: tuple[Requirement, ...]
    plan: Plan | None
    automaton: Automaton = field(repr=False)

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        data = asdict(self)
        del data["automaton"]
        return data | {
            "transitions": self.automaton.transitions.tolist(),
            "outputs": self.automaton.outputs.tolist(),
        }


def analyze(automaton: Automaton, *, monoid_limit: int = MONOID_LIMIT) -> Analysis:
    """Analyses a language, or any automaton with outputs, by its minimal automaton.

    Up to `monoid_limit` elements (and so many that their table fits into memory) the transition monoid is enumerated;
    beyond that the groups are those on images of the states under words, which have the same primes.

    Raises:
        ValueError: for a limit below 1, or an automaton whose images are too many as well.
    """
    if monoid_limit < 1:
        raise ValueError(f"monoid_limit must be at least 1, got {monoid_limit}")
    automaton = automaton.minimized()
    monoid = transition_monoid(automaton, max(1, min(monoid_limit, _MOST_ENTRIES // automaton.num_states)))
    if monoid is None:
        images = image_groups(automaton, max(1, min(200_000, _MOST_IMAGE_STATES // automaton.num_states)))
        for found in images:
            if found.generators and len(found.states) > _MOST_POINTS:
                raise ValueError(
                    f"words permute {len(found.states):,} states, and a group on more than {_MOST_POINTS:,} is too "
                    "large to analyse unless it can be enumerated; give an automaton with fewer states"
                )
        groups = [_permutation_group(found.generators) for found in images if found.generators]
        green: dict[str, int] = {}
        if automaton.is_permutation_automaton:  # the only idempotent is the identity
            obstruction, searched = None, "all idempotents"
        else:
            obstruction, searched = _quick_obstruction(automaton), "idempotents of short words"
    else:
        groups = _monoid_groups(monoid, automaton.is_permutation_automaton)
        obstruction, searched = _obstruction(automaton, monoid), "all idempotents"
        green = _green_counts(monoid)
    subgroups = tuple(sorted({_describe(group) for group in groups}, key=lambda g: (-g.order, g.name)))
    try:
        construction = plan(automaton, monoid=monoid)
    except ConstructionError:
        construction = None
    letters = _letters(automaton, monoid)
    facts = {
        "states": automaton.num_states,
        "aperiodic": not subgroups,
        "group": automaton.is_permutation_automaton,
        "groups": subgroups,
        "solvable": all(group.solvable for group in subgroups),
        "primes": tuple(sorted({prime for group in subgroups for prime in group.primes})),
        "one_layer_obstruction": obstruction,
        "letters": letters,
        "plan": construction,
    }
    return Analysis(
        monoid_size=None if monoid is None else len(monoid),
        obstruction_searched=searched,
        green=green,
        requirements=tuple(_requirements(automaton=automaton, **facts)),
        automaton=automaton,
        **facts,
    )


# Groups


def _monoid_groups(monoid: TransitionMonoid, is_group: bool) -> list[PermutationGroup]:
    """A group for each D-class that has a non-trivial one."""
    if is_group:
        return [_small_group(monoid)] if len(monoid) > 1 else []
    green = monoid.green
    sizes = np.bincount(green.h_class)
    groups = []
    seen: set[int] = set()
    for e in monoid.idempotents.tolist():
        h, d = int(green.h_class[e]), int(green.d_class[e])
        if d in seen or sizes[h] == 1:
            continue
        seen.add(d)
        image = np.unique(monoid.elements[e])
        members = monoid.elements[green.h_class == h][:, image]
        groups.append(_generated_by(np.searchsorted(image, members), len(members)))
    return groups


def _small_group(monoid: TransitionMonoid) -> PermutationGroup:
    """A monoid that is a group, on as few points as are found: SymPy takes long on many."""
    letters = monoid.right[0]
    if len(monoid) > MAX_ORDER:
        return _permutation_group(monoid.elements[letters].tolist())
    points, offset = [], 0
    for representation in smallest_representation(monoid.products, letters, signed=False):
        points.append(offset + representation.images[letters])
        offset += representation.degree
    return _generated_by(np.concatenate(points, 1), len(monoid))


def _generated_by(permutations: np.ndarray, size: int) -> PermutationGroup:
    """The group of so many elements that permutations generate, from a few of them: SymPy takes long with many."""
    order = np.random.default_rng(0).permutation(len(permutations))
    identity = np.arange(permutations.shape[1])
    chosen: list[list[int]] = []
    for index in order.tolist():
        if (permutations[index] == identity).all():
            continue
        chosen.append(permutations[index].tolist())
        group = _permutation_group(chosen)
        if group.order() == size:
            return group
    raise AssertionError("permutations generate the group that they were said to")


def _permutation_group(generators: Any) -> PermutationGroup:
    from sympy.combinatorics import Permutation, PermutationGroup

    return PermutationGroup([Permutation(list(generator)) for generator in generators])


def _generators(group: PermutationGroup) -> list[Permutation]:
    return cast("list[Permutation]", group.generators)


def _describe(group: PermutationGroup) -> Subgroup:
    from sympy import primefactors, primerange

    degree = group.degree
    if degree >= _GIANT and group.is_alt_sym():  # if this says yes, it is certain
        even = all(generator.is_even for generator in _generators(group))
        order = math.factorial(degree) // (2 if even else 1)
        return Subgroup(f"{'A' if even else 'S'}{degree}", order, False, tuple(primerange(2, degree + 1)))
    order = int(group.order())
    # Schreier's generators may be hundreds, and SymPy's derived subgroups have a commutator for each pair of them.
    group = _generated_by(np.array([generator.array_form for generator in _generators(group)]), order)
    return Subgroup(_name(group, order), order, bool(group.is_solvable), tuple(int(p) for p in primefactors(order)))


def _name(group: PermutationGroup, order: int) -> str:
    generators = _generators(group)
    moved = len({point for generator in generators for point in generator.support()})
    if group.is_abelian:
        return " x ".join(f"Z{factor}" for factor in sorted(group.abelian_invariants(), reverse=True)) or "trivial"
    for degree in range(3, moved + 1):
        factorial = int(np.prod(np.arange(1, degree + 1, dtype=object)))
        if order == factorial and (group.is_symmetric or degree == 3):
            return f"S{degree}"
        if 2 * order == factorial and group.is_alternating:
            return f"A{degree}"
    if group.is_dihedral:
        return f"D{order // 2}"
    if order == 8:
        return "Q8"  # the only group of 8 elements that is neither abelian nor dihedral
    return f"order {order}" if group.is_solvable else f"order {order}, not solvable"


# The obstruction


def _obstruction(automaton: Automaton, monoid: TransitionMonoid) -> Obstruction | None:
    idempotents = monoid.idempotents
    found = _violation(monoid.elements[idempotents])
    if found is None:
        return None
    e, f, state = found
    e_word, f_word = (monoid.word(int(idempotents[index])) for index in (e, f))
    return Obstruction(_spelt(automaton, e_word), _spelt(automaton, f_word), state)


def _violation(maps: np.ndarray) -> tuple[int, int, int] | None:
    """Indices of idempotent maps e, f and a state that efe and fe, both read from the left, send elsewhere."""
    for index, e in enumerate(maps):
        efe, fe = e[maps[:, e]], e[maps]
        different = np.argwhere(efe != fe)
        if len(different):
            f, state = different[0].tolist()
            return index, f, state
    return None


def _quick_obstruction(automaton: Automaton, words: int = 2000) -> Obstruction | None:
    """The same among idempotent powers of the first words, for monoids too large to enumerate."""
    table = automaton.transitions.cpu().numpy()
    maps: list[np.ndarray] = [np.arange(len(table))]
    spellings: list[tuple[int, ...]] = [()]
    known = {maps[0].tobytes()}
    for current, spelling in zip(maps, spellings, strict=False):  # both grow while they are read
        for letter, column in enumerate(table.T):
            product = column[current]
            if len(maps) < words and product.tobytes() not in known:
                known.add(product.tobytes())
                maps.append(product)
                spellings.append((*spelling, letter))
    idempotents, powers = [], []
    for current, spelling in zip(maps, spellings, strict=True):
        power, exponent = current, 1
        while not (power[power] == power).all():
            power, exponent = current[power], exponent + 1
            if exponent > 1000:
                break
        else:
            idempotents.append(power)
            powers.append(spelling * exponent)
    found = _violation(np.array(idempotents))
    if found is None:
        return None
    e, f, state = found
    return Obstruction(_spelt(automaton, powers[e]), _spelt(automaton, powers[f]), state)


def _spelt(automaton: Automaton, word: tuple[int, ...]) -> tuple[str, ...]:
    names = automaton.letter_names
    return tuple(str(letter) if names is None else names[letter] for letter in word)


# The table


def _letters(automaton: Automaton, monoid: TransitionMonoid | None) -> tuple[LetterFacts, ...]:
    states = automaton.num_states
    if monoid is None or not automaton.is_permutation_automaton or len(monoid) > states:
        return tuple(_letter_facts(automaton, letter) for letter in range(automaton.num_letters))
    # A group with as few elements as states that it reaches: what fixes one state fixes all, and the cycle of one state
    # says what all others do.
    table = automaton.transitions.cpu().numpy()
    letters = np.arange(automaton.num_letters)
    periods, current, steps = np.zeros_like(letters), np.zeros_like(letters), 0
    while not periods.all():
        current, steps = table[current, letters], steps + 1
        periods[(periods == 0) & (current == 0)] = steps
    return tuple(
        LetterFacts(
            name=_spelt(automaton, (letter,))[0],
            kind="identity" if period == 1 else "permutation",
            moved=0 if period == 1 else states,
            rank=states - states // period,
            period=period,
        )
        for letter, period in enumerate(periods.tolist())
    )


def _letter_facts(automaton: Automaton, letter: int) -> LetterFacts:
    images = automaton.transitions[:, letter].cpu().numpy()
    states = np.arange(len(images))
    distinct = len(np.unique(images))
    kind = "permutation" if distinct == len(images) else "constant" if distinct == 1 else "other"
    if (images == states).all():
        kind = "identity"
    # Where the letter ends up when it is repeated, it is a permutation.
    core, before = np.unique(images), -1
    while len(core) != before:
        before, core = len(core), np.unique(images[core])
    period = math.lcm(*map(len, cycles(np.searchsorted(core, images[core]))))
    if kind in ("identity", "permutation"):
        rank = int(count_reflections(images))
    else:
        rank = int(np.linalg.matrix_rank(np.eye(len(images)) - np.eye(len(images))[images]))
    return LetterFacts(_spelt(automaton, (letter,))[0], kind, int((images != states).sum()), rank, period)


def _levels(automaton: Automaton) -> str:
    """How many levels the holonomy decomposition has, in brackets; empty if it is too large to say."""
    try:
        return f" ({holonomy(automaton).num_levels})"
    except HolonomyError:
        return ""


def _requirements(
    *,
    automaton: Automaton,
    states: int,
    aperiodic: bool,
    group: bool,
    groups: tuple[Subgroup, ...],
    solvable: bool,
    primes: tuple[int, ...],
    one_layer_obstruction: Obstruction | None,
    letters: tuple[LetterFacts, ...],
    plan: Plan | None,
) -> list[Requirement]:
    rows = []
    finite = "finite precision, states that stay apart by a margin"
    if aperiodic:
        rows.append(
            Requirement(
                "eigenvalue_range",
                "[0, 1]",
                "sufficient",
                "Krohn-Rhodes, T4",
                "as many layers as its holonomy decomposition has levels" + _levels(automaton),
                "No word goes round in a cycle, so the language is made of resets alone, and forgetting needs no "
                "eigenvalue below 0.",
            )
        )
    else:
        even = [letter for letter in letters if letter.period % 2 == 0]
        rows.append(
            Requirement(
                "eigenvalue_range",
                "[-1, 1]",
                "necessary",
                "T1" if even else "unit modulus (ours)",
                "any depth; " + finite,
                f"Repeating {even[0].name!r} goes round a cycle of {even[0].period} states, which contains parity: "
                "some matrix needs an eigenvalue that is not 0 or positive."
                if even
                else f"Some word goes round a cycle of {primes[0]} states; products of factors with eigenvalues in "
                "[0, 1] only come to rest.",
            )
        )
        odd = [prime for prime in primes if prime != 2]
        turning = [letter for letter in letters if letter.period & (letter.period - 1)]
        if turning:
            period = turning[0].period
            rows.append(
                Requirement(
                    "num_householder",
                    "2 in one layer, or 1 in two",
                    "necessary",
                    "T2",
                    "real transition matrices; " + finite,
                    f"Repeating {turning[0].name!r} counts modulo {period}, no power of two: that turns, and a matrix "
                    "that turns has non-real eigenvalues. One reflection has none, the product of two does.",
                )
            )
        if odd:
            rows.append(
                Requirement(
                    "transition",
                    "not diagonal",
                    "necessary",
                    "O3 (ours)",
                    "all products have real eigenvalues",
                    "Diagonal and jointly triangular matrices with real entries never turn, at any depth.",
                )
            )
        if not solvable:
            hard = next(g for g in groups if not g.solvable)
            rows.append(
                Requirement(
                    "transition",
                    "depends on the input and is not diagonal",
                    "necessary",
                    "arXiv 2404.08819",
                    "TC0 is not NC1",
                    f"The group {hard.name} is not solvable: its word problem is complete for NC1, beyond diagonal "
                    "linear RNNs and Transformers of fixed depth.",
                )
            )
    if one_layer_obstruction is not None:
        o = one_layer_obstruction
        rows.append(
            Requirement(
                "layers",
                "2",
                "necessary",
                "O2 (ours)",
                "layers that see the current letter alone (no short convolution), norms of at most 1, " + finite,
                f"From state {o.state} the words efe and fe lead to different states, for e = "
                f"{' '.join(o.e) or 'nothing'} and f = {' '.join(o.f) or 'nothing'}; "
                "in one layer what e forgets is gone whenever it is read.",
            )
        )
    if plan is not None:
        rows += [
            Requirement(
                "layers", str(plan.num_layers), "sufficient", plan.theorem, "eigenvalues in [-1, 1]", plan.why + "."
            ),
            Requirement(
                "num_householder",
                str(plan.num_householder),
                "sufficient",
                plan.theorem,
                f"{counted(plan.num_layers, 'layer')}, {counted(plan.num_heads, 'head')}, K = {plan.head_dim}, "
                f"V = {plan.value_dim}",
                "The compiled model has so many factors for each token.",
            ),
        ]
    if group:
        most = max(letter.moved for letter in letters)
        rows.append(
            Requirement(
                "num_householder",
                str(max(1, most - 1)),
                "sufficient",
                "T3",
                f"one layer, K = {states}",
                f"A letter moves at most {most} states, and a permutation of k points is a product of k - 1 exchanges.",
            )
        )
    return rows


def counted(count: int, what: str) -> str:
    """A number of things: "1 layer", "2 layers"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _green_counts(monoid: TransitionMonoid) -> dict[str, int]:
    green = monoid.green
    classes = {"D": green.d_class, "L": green.l_class, "R": green.r_class, "H": green.h_class}
    return {name: int(values.max()) + 1 for name, values in classes.items()} | {"idempotents": len(monoid.idempotents)}
