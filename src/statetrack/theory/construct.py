"""From an automaton to exact weights: a `LanguageModel` that tracks it for ever.

All numbers in a compiled model, weights and activations, are small integers or halves of them, so that float32 and
bfloat16 compute with them exactly and no error can grow. The state of a head is driven by reflections that exchange or
negate coordinates and by factors that overwrite one (`exact_deltaproduct`). The state is 0 before the first token,
and models must start from there, so a head holds the difference between what it tracks and where that starts.

One layer suffices where the ladder of `plan` finds one of these (theorem 3 of arXiv 2411.12537 and simple extensions):

- representation: the letters generate a group; a head holds the matrix of the product so far, in a small
  representation by signed permutations, and the answer is the group element whose matrix reads the most alike.
- states: a head holds the current state as a unit vector. Every letter permutes the states, sends all of them to one,
  or is a partial injection beside a state that is the zero vector.
- definite: the last k letters decide; a head is a shift register.

Otherwise an automaton with n states becomes a cascade of n - 1 layers by exclusion. Level i names one state b_i that
the automaton is not in, other than those of the levels above; what is left after n - 1 levels is the state. With X the
states not excluded above before a letter and Y those after it, level i does one of two things, and which one does not
depend on b_i:

- the letter is injective on X: then it maps b_i like any state, and a permutation does that;
- it is not: then some state of Y is not hit from X at all. The least of them becomes b_i, a reset.

That theorem 4 holds with n - 1 layers in place of 2^n is our own finding. The proof in the paper hands the next level
the state after the update where it needs the one before, which does not determine the action; here levels read both.
Between two levels a ReLU MLP with three hidden layers computes the action from X, Y and the letter, so that the size
of a model grows with n^2 times the letters for each level and not with the number of subsets.

The holonomy decomposition (`automata.holonomy`) is the other cascade, on request. Its levels are the heights of the
sets that words lead all states to: fewer than n - 1 where words merge many states at once, more where sets of equal
size lead to each other in one direction only. The groups of its levels are subgroups of the transition monoid, so that
an aperiodic automaton needs resets alone, which no exclusion cascade promises. Its MLPs look the action up in tables
with an entry for each X, Y and letter, so that it serves automata with few such sets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.automata.holonomy import HolonomyError
from statetrack.automata.monoid import TransitionMonoid, transition_monoid
from statetrack.automata.representations import (
    MAX_ORDER,
    Representation,
    smallest_representation,
)
from statetrack.mixers import MixerConfig
from statetrack.mixers.deltanet import DeltaNet, DeltaProductConfig
from statetrack.mixers.exact_deltaproduct import ExactDeltaProduct
from statetrack.model import Block, LanguageModel, ModelConfig
from statetrack.theory.cascades import Exclusion, Holonomy
from statetrack.theory.construction import (
    MAX_INTEGER,
    Construction,
    ConstructionError,
    Plan,
    bumps,
    completed,
    exact_mixer,
    letter_name,
    reflections,
    relu_mlp,
)
from statetrack.theory.wiring import ONE, Coordinates, Name, Sum, total, wire_mlp

Strategy = Literal["auto", "one_layer", "exclusion", "holonomy"]
STRATEGIES: tuple[Strategy, ...] = ("auto", "one_layer", "exclusion", "holonomy")

MAX_PARAMETERS = 100_000_000
"""Larger models are refused."""

_MAX_PATTERNS = 4096
_MAX_DECODED = 256


def plan(automaton: Automaton, strategy: Strategy = "auto", monoid: TransitionMonoid | None = None) -> Plan:
    """What `compile` would make of an automaton.

    Args:
        automaton: any automaton.
        strategy: as for `compile`.
        monoid: the transition monoid of the minimal automaton, where it is known.

    Raises:
        ValueError: for an unknown strategy.
        ConstructionError: if there is no such model.
    """
    return _choose(automaton.minimized(), strategy, "raw", monoid).plan


def compile(
    automaton: Automaton,
    *,
    strategy: Strategy = "auto",
    keys: Literal["raw", "pair"] = "raw",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model that says the output of the automaton's state after every letter, exactly and at any length.

    Args:
        automaton: any automaton; it is minimized first.
        strategy: "auto", one layer if that is enough; "one_layer" refuses if not; "exclusion" and
            "holonomy" are cascades of layers, of which the second refuses automata with too many sets of states.
        keys: "raw" for `exact_deltaproduct`, whose keys are integers; "pair" for the ordinary `deltaproduct`, which
            normalizes its keys: an exchange of two pairs of coordinates has the key (1, 1, -1, -1) / 2, whose length is
            exactly 1. Pairs serve groups with a representation by permutations.
        dtype: of the weights and activations, torch.float32 or torch.bfloat16. States are float32 in any case.

    Returns:
        A `LanguageModel` in evaluation mode, with tokens for letters and classes for outputs.

    Raises:
        ValueError: for an unknown strategy or kind of keys.
        ConstructionError: if there is no such model, with the nearest that there is.
    """
    if keys not in ("raw", "pair"):
        raise ValueError(f"keys must be raw or pair, got {keys!r}")
    construction = _choose(automaton.minimized(), strategy, keys)
    # Outputs that no word leads to are classes all the same: a model has those of its task.
    construction.num_classes = automaton.num_outputs
    if (parameters := construction.num_parameters()) > MAX_PARAMETERS:
        nearest = "the size grows with the square of the states times the letters, so give fewer letters or states"
        if construction.plan.strategy == "holonomy":
            nearest = f"the exclusion cascade has {construction.automaton.num_states - 1} layers and smaller ones"
        raise ConstructionError(
            f"the model would have {parameters:,} parameters in {construction.plan.num_layers} layers, more than the "
            f"{MAX_PARAMETERS:,} that are practical; {nearest}"
        )
    return construction.build().to(dtype).eval()


def _choose(automaton: Automaton, strategy: str, keys: str, monoid: TransitionMonoid | None = None) -> Construction:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; the strategies are {', '.join(STRATEGIES)}")
    if strategy in ("exclusion", "holonomy") and automaton.num_states > 1:  # a single state leaves nothing to track
        if keys == "pair":
            raise ConstructionError(
                "a cascade overwrites coordinates, for which keys in pairs have no factor; use raw keys"
            )
        return Exclusion(automaton) if strategy == "exclusion" else _holonomy(automaton)
    candidates: list[Construction] = [*_group_constructions(automaton, keys, monoid)]
    if keys == "raw":
        candidates += _state_constructions(automaton)
        if not candidates and (register := _definite(automaton)) is not None:
            candidates.append(register)
    if candidates:
        return min(candidates, key=lambda c: (c.plan.num_householder, c.work))
    if keys == "pair":
        raise ConstructionError(
            "keys in pairs serve groups of up to "
            f"{MAX_ORDER:,} elements with a representation by permutations; use raw keys"
        )
    if strategy == "one_layer":
        raise ConstructionError(
            "there is no construction with one layer for this automaton: its letters are not all permutations, "
            "constants or partial injections, and no bounded number of last letters decides; "
            f"the exclusion cascade has {automaton.num_states - 1} layers"
        )
    return Exclusion(automaton)


def _holonomy(automaton: Automaton) -> Holonomy:
    try:
        return Holonomy(automaton)
    except HolonomyError as error:
        raise ConstructionError(
            f"{error}; the exclusion cascade has {automaton.num_states - 1:,} layers and serves automata of up to "
            f"{MAX_INTEGER} states"
        ) from None


# Groups: the matrix of the product so far


class _Product(Construction):
    """One layer that holds the matrices of the product of all letters, one head for each representation."""

    def __init__(
        self, automaton: Automaton, monoid: TransitionMonoid, representations: list[Representation], keys: str
    ) -> None:
        super().__init__(automaton)
        self.keys = keys
        elements = monoid.elements
        self.factors = [
            [reflections(r.images[element], r.signs[element]) for r in representations] for element in monoid.right[0]
        ]
        self.queries = [_separating_query(r) for r in representations]
        # How each element reads: [elements, dimensions of all heads].
        self.reads = np.concatenate(
            [r.signs * q[r.images] for r, q in zip(representations, self.queries, strict=True)], 1
        )
        self.state_of = elements[:, automaton.start]
        self.degrees = [r.degree for r in representations]
        degree = max(self.degrees)
        n = max(1, *(len(keys) for factors in self.factors for keys in factors))
        self.plan = Plan(
            strategy="representation",
            num_layers=1,
            num_householder=n,
            num_heads=len(representations),
            head_dim=degree * (2 if keys == "pair" else 1),
            value_dim=degree,
            theorem="T3",
            why=f"the letters generate a group of {len(elements)} elements, which acts on "
            f"{' and '.join(map(str, self.degrees))} signed axes; a letter is a product of at most {n} reflections",
        )
        # With a class for each element the output layer can compare by itself; otherwise hidden units do, one each.
        self.direct = len(set(self.outputs)) == len(self.outputs) == len(elements)
        self.coordinates = [("read", h, i) for h, degree in enumerate(self.degrees) for i in range(degree)]
        names = [ONE, *map(letter_name, self.letters), *self.coordinates]
        self.stream = Coordinates(names if self.direct else [*names, *self.label_names])

    @property
    def label_names(self) -> list[Name]:
        return [("label", label) for label in range(self.automaton.num_outputs)]

    @property
    def norm(self) -> int:
        return int(np.square(self.reads[0]).sum())

    @cached_property
    def config(self) -> ModelConfig:
        p = self.plan
        if self.keys == "raw":
            mixer: MixerConfig = self.mixer_config()
        else:
            mixer = DeltaProductConfig(
                num_heads=p.num_heads,
                head_dim=p.head_dim,
                value_dim=p.value_dim,
                num_householder=p.num_householder,
                conv_size=0,
                activation="identity",
                output_norm=False,
            )
        return self.model_config(self.stream, 0 if self.direct else len(self.reads), 1, mixer)

    def write(self, model: LanguageModel) -> None:
        (block,) = model._blocks()
        for letter in self.letters:
            model.embedding.weight[letter] = self.stream.vector({ONE: 1, letter_name(letter): 1})
        self._write_mixer(block)
        # The head holds the matrix less the identity, which reads as the first element does.
        matches = [
            total(
                {name: float(w) for name, w in zip(self.coordinates, row, strict=True) if w},
                {ONE: float(row @ self.reads[0])},
            )
            for row in self.reads
        ]
        if self.direct:
            rows: list[Sum] = [{}] * self.num_classes
            for match, state in zip(matches, self.state_of, strict=True):
                rows[self.outputs[state]] = match
            model.output_weight.copy_(self.stream.matrix(rows))
            return
        # The element that matches reads `norm`, any other at least 1 less.
        units: dict[Name, Sum] = {
            ("element", g): total(match, {ONE: 1.0 - self.norm}) for g, match in enumerate(matches)
        }
        writes: dict[Name, Sum] = {name: {} for name in self.label_names}
        for g, state in enumerate(self.state_of):
            writes[("label", self.outputs[state])][("element", g)] = 1
        wire_mlp(relu_mlp(block), self.stream, [units], writes)
        labels = self.stream.matrix([{name: 1} for name in self.label_names])
        model.output_weight[: len(labels)] = labels

    def _write_mixer(self, block: Block) -> None:
        p, mixer = self.plan, block.mixer
        shape = (p.num_householder, p.num_heads, -1, len(self.stream))
        assert isinstance(mixer, ExactDeltaProduct | DeltaNet)
        k_weights, v_weights = mixer.k_proj.weight.view(shape), mixer.v_proj.weight.view(shape)
        for letter, factors in enumerate(self.factors):
            for head, keys in enumerate(factors):
                for slot, key in enumerate(keys):
                    column = self.stream[letter_name(letter)]
                    # Writing -k into the difference from the identity reflects the whole matrix.
                    v_weights[slot, head, : len(key), column] = -torch.from_numpy(key).float()
                    k_weights[slot, head, :, column] = self._key(key)
        for head, degree in enumerate(self.degrees):
            for i in range(degree):
                mixer.o_proj.weight[self.stream["read", head, i], head * p.value_dim + i] = 1
        if isinstance(mixer, ExactDeltaProduct):
            mixer.b_proj.weight[:, self.stream[ONE]] = 1
            for head, query in enumerate(self.queries):
                mixer.query[head, : len(query)] = torch.from_numpy(query).float()
            return
        # The logit at which the sigmoid is 1 in float32, so that beta is 2; a letter without a factor has the key 0.
        mixer.b_proj.weight[:, self.stream[ONE]] = _SATURATED
        q_weights = mixer.q_proj.weight.view(p.num_heads, p.head_dim, -1)
        for head, query in enumerate(self.queries):
            q = torch.from_numpy(query).float().repeat_interleave(2) / 2
            q_weights[head, : len(q), self.stream[ONE]] = q
            # The mixer divides its query by its length and by sqrt K; what comes out is scaled back.
            norm = float(q.norm()) * p.head_dim**0.5
            rows = slice(self.stream["read", head, 0], self.stream["read", head, 0] + self.degrees[head])
            mixer.o_proj.weight[rows] *= norm

    def _key(self, key: np.ndarray) -> Tensor:
        padded = torch.zeros(self.plan.head_dim)
        if self.keys == "raw":
            padded[: len(key)] = torch.from_numpy(key).float()
        else:
            # The mixer adds 1e-6 to the squared length before it divides; beside 2^16 that rounds away.
            padded[: 2 * len(key)] = torch.from_numpy(key).float().repeat_interleave(2) * _LONG
        return padded


_SATURATED = 64.0
_LONG = 128.0


def _group_constructions(
    automaton: Automaton, keys: str, monoid: TransitionMonoid | None = None
) -> Iterable[Construction]:
    if not automaton.is_permutation_automaton:
        return
    monoid = monoid or transition_monoid(automaton, MAX_ORDER)
    if monoid is None or not 1 < len(monoid) <= MAX_ORDER:
        return
    if len(monoid) > _MAX_DECODED and len(monoid) != automaton.num_states:
        return  # an element for each hidden unit would be too many
    own = monoid.elements if automaton.num_states <= 64 and len(monoid) > automaton.num_states else None
    representations = smallest_representation(monoid.products, monoid.right[0], own, signed=keys == "raw")
    construction = _Product(automaton, monoid, representations, keys)
    if construction.norm <= MAX_INTEGER:
        yield construction


def _separating_query(representation: Representation) -> np.ndarray:
    """A vector with small entries that different matrices of a representation read differently: int64 [degree]."""
    images, signs = representation.images, representation.signs
    wanted = len(np.unique(np.concatenate([images, signs], 1), axis=0))
    query = np.zeros(representation.degree, dtype=np.int64)
    for value in range(1, representation.degree + 1):
        best = (0, 0)
        for axis in np.flatnonzero(query == 0):
            trial = query.copy()
            trial[axis] = value
            best = max(best, (len(np.unique(signs * trial[images], axis=0)), -int(axis)))
        query[-best[1]] = value
        if best[0] == wanted:
            return query
    raise AssertionError("distinct entries on all axes tell all signed permutations apart")


# A unit vector for the state


@dataclass(frozen=True)
class _Factor:
    """One factor of one letter: reflect along `key`, or overwrite the coordinate along it by `value`."""

    key: np.ndarray
    reflects: bool
    value: float = 0


class _States(Construction):
    """One layer, one head: the current state as a unit vector, or as 0 if it is the state `zero`."""

    def __init__(self, automaton: Automaton, zero: int | None, factors: list[list[_Factor]]) -> None:
        super().__init__(automaton)
        self.factors = factors
        self.points = [state for state in range(automaton.num_states) if state != zero]
        self.zero = zero
        n = max(1, *(len(letter) for letter in factors))
        beside = "" if zero is None else ", or a partial injection beside the state that is the zero vector"
        self.plan = Plan(
            strategy="states",
            num_layers=1,
            num_householder=n,
            num_heads=1,
            head_dim=max(1, len(self.points)),
            value_dim=1,
            theorem="T3" if automaton.is_permutation_automaton else "one-layer constructions (ours)",
            why=f"every letter permutes the {automaton.num_states} states or sends all to one{beside}",
        )
        self.state_names: list[Name] = [("state", state) for state in range(automaton.num_states)]
        self.stream = Coordinates([ONE, *map(letter_name, self.letters), "read", *self.state_names])

    @cached_property
    def config(self) -> ModelConfig:
        return self.model_config(self.stream, len(self.points) + 1, 1, self.mixer_config())

    def write(self, model: LanguageModel) -> None:
        (block,) = model._blocks()
        for letter in self.letters:
            model.embedding.weight[letter] = self.stream.vector({ONE: 1, letter_name(letter): 1})
        start = np.array([float(point == self.automaton.start) for point in self.points])
        mixer = exact_mixer(block)
        k_weights = mixer.k_proj.weight.view(self.plan.num_householder, -1, len(self.stream))
        for letter, factors in enumerate(self.factors):
            column = self.stream[letter_name(letter)]
            for slot, factor in enumerate(factors):
                k_weights[slot, :, column] = torch.from_numpy(factor.key).float()
                mixer.v_proj.weight[slot, column] = factor.value - float(factor.key @ start)
                mixer.b_proj.weight[slot, column] = 1 if factor.reflects else 0.5
        positions = torch.arange(1.0, len(self.points) + 1)
        mixer.query[0, : len(positions)] = positions
        mixer.o_proj.weight[self.stream["read"], 0] = 1
        offset = float(positions.numpy() @ start)
        hinges, peaks = bumps("read", offset, len(self.points))
        writes: dict[Name, Sum] = {("state", state): peaks[position] for position, state in enumerate(self.points)}
        if self.zero is not None:
            hinges["nothing"] = {"read": -1, ONE: 1 - offset}
            writes["state", self.zero] = {"nothing": 1}
        wire_mlp(relu_mlp(block), self.stream, [hinges], writes)
        model.output_weight.copy_(self.stream.matrix(self.label_rows(self.state_names)))


def _state_constructions(automaton: Automaton) -> Iterable[Construction]:
    if automaton.num_states > MAX_INTEGER:
        return
    table = automaton.transitions.cpu().numpy()
    for zero in (None, *range(automaton.num_states)):
        factors = [_letter_factors(column, zero) for column in table.T]
        if all(letter is not None for letter in factors):
            yield _States(automaton, zero, [letter for letter in factors if letter is not None])


def _letter_factors(images: np.ndarray, zero: int | None) -> list[_Factor] | None:
    """What a letter does to unit vectors for all states but `zero`, which is 0; None if no factors do that."""
    points = [state for state in range(len(images)) if state != zero]
    unit = np.eye(len(points), dtype=np.int64)
    place = {state: index for index, state in enumerate(points)}
    if len(set(images.tolist())) == 1:
        target = place.get(int(images[0]))
        return [_Factor(unit[i], False, float(i == target)) for i in range(len(points))]
    if zero is not None and images[zero] != zero:
        return None
    kept = [state for state in points if images[state] != zero]
    targets = [int(images[state]) for state in kept]
    if len(set(targets)) < len(targets):
        return None
    erased = [_Factor(unit[place[state]], False) for state in points if images[state] == zero]
    permutation = completed(
        {place[state]: place[target] for state, target in zip(kept, targets, strict=True)}, len(points)
    )
    return erased + [_Factor(key, True) for key in reflections(permutation)]


# The last letters


class _Definite(Construction):
    """One layer: a shift register of the last k letters, read by a head for each."""

    def __init__(self, automaton: Automaton, length: int, patterns: list[_Pattern]) -> None:
        super().__init__(automaton)
        self.patterns = patterns
        self.plan = Plan(
            strategy="definite",
            num_layers=1,
            num_householder=length,
            num_heads=length,
            head_dim=length,
            value_dim=automaton.num_letters,
            theorem="one-layer constructions (ours)",
            why=f"the last {length} letters decide on the state; a head is a shift register of so many letters",
        )
        self.slots: list[list[Name]] = [[("slot", i, letter) for letter in self.letters] for i in range(length)]
        self.state_names: list[Name] = [("state", state) for state in range(automaton.num_states)]
        flat = [name for slot in self.slots for name in slot]
        self.stream = Coordinates([ONE, *map(letter_name, self.letters), *flat, *self.state_names])

    @cached_property
    def config(self) -> ModelConfig:
        return self.model_config(self.stream, len(self.patterns), 1, self.mixer_config())

    def write(self, model: LanguageModel) -> None:
        (block,) = model._blocks()
        for letter in self.letters:
            model.embedding.weight[letter] = self.stream.vector({ONE: 1, letter_name(letter): 1})
        mixer, length = exact_mixer(block), self.plan.num_householder
        k_weights = mixer.k_proj.weight.view(length, length, length, -1)
        v_weights = mixer.v_proj.weight.view(length, length, self.automaton.num_letters, -1)
        b_weights = mixer.b_proj.weight.view(length, length, -1)
        one = self.stream[ONE]
        for factor in range(length - 1):  # exchanges from the oldest slot on move every letter up by one
            older = length - 1 - factor
            k_weights[factor, :, older, one] = -1
            k_weights[factor, :, older - 1, one] = 1
            b_weights[factor, :, one] = 1
        k_weights[length - 1, :, 0, one] = 1
        b_weights[length - 1, :, one] = 0.5
        for letter in self.letters:
            v_weights[length - 1, :, letter, self.stream[letter_name(letter)]] = 1
        for slot, names in enumerate(self.slots):
            mixer.query[slot, slot] = 1
            for letter, name in enumerate(names):
                mixer.o_proj.weight[self.stream[name], slot * len(names) + letter] = 1
        units: dict[Name, Sum] = {}
        writes: dict[Name, Sum] = {name: {} for name in self.state_names}
        for number, pattern in enumerate(self.patterns):
            seen: Sum = {self.slots[i][letter]: 1.0 for i, letter in enumerate(pattern.last)}
            more: Sum = dict.fromkeys(self.slots[len(pattern.last)], -1.0) if pattern.whole else {}
            units["pattern", number] = total(seen, more, {ONE: 1.0 - len(pattern.last)})
            writes["state", pattern.state]["pattern", number] = 1
        wire_mlp(relu_mlp(block), self.stream, [units], writes)
        model.output_weight.copy_(self.stream.matrix(self.label_rows(self.state_names)))


@dataclass(frozen=True)
class _Pattern:
    """Words that lead to a state: those that end in letters (the last one first), or only the `whole` word."""

    last: tuple[int, ...]
    whole: bool
    state: int


def definite_length(table: np.ndarray) -> int | None:
    """The least k for which the last k letters decide on the state, whatever came before; None if there is none."""
    states = len(table)
    apart = ~np.eye(states, dtype=bool)
    for length in range(states):
        if not apart.any():
            return length
        # Pairs of states that some word of one more letter leaves apart: of those before, all or fewer.
        before, apart = apart, np.any([apart[np.ix_(column, column)] for column in table.T], 0)
        if np.array_equal(apart, before):
            return None
    return None


def _definite(automaton: Automaton) -> Construction | None:
    if automaton.num_states > _MAX_PATTERNS:  # there is a pattern for every state at least
        return None
    table = automaton.transitions.cpu().numpy()
    length = definite_length(table)
    if not length or length > MAX_INTEGER:
        return None
    patterns: list[_Pattern] = []
    pending: list[tuple[tuple[int, ...], np.ndarray]] = [((), np.arange(len(table)))]
    while pending:
        last, images = pending.pop()
        if (images == images[0]).all():
            patterns.append(_Pattern(last, False, int(images[0])))
            continue
        if last:
            patterns.append(_Pattern(last, True, int(images[automaton.start])))
        # One more letter before those: it acts first.
        pending += [((*last, letter), images[column]) for letter, column in enumerate(table.T)]
        if len(patterns) + len(pending) > _MAX_PATTERNS:
            return None
    return _Definite(automaton, length, patterns)
