"""Cascades: automata whose letters do more than one layer can, as layers that permute or reset.

A level of a cascade is a head that holds a unit vector. What a letter does to it, a permutation or a reset, is decided
by the letter and the levels above, read before and after their update, and computed by the MLP of the level above.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch

from statetrack.automata import Automaton
from statetrack.automata.holonomy import Action, holonomy, levels_of_actions
from statetrack.mixers.exact_deltaproduct import ExactDeltaProduct
from statetrack.model import LanguageModel, ModelConfig
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

_READS: tuple[Name, ...] = ("read before", "read after")


# The exclusion cascade


class Exclusion(Construction):
    """n - 1 layers: each excludes one more state that the automaton is not in."""

    def __init__(self, automaton: Automaton) -> None:
        super().__init__(automaton)
        self.n = n = automaton.num_states
        if n > MAX_INTEGER:
            raise ConstructionError(
                f"the automaton has {n:,} states, and integers above {MAX_INTEGER} are not exact in bfloat16; "
                "the exclusion cascade serves smaller ones, and the strategy holonomy those whose levels are small"
            )
        self.classes = [_kernel_classes(column) for column in self.table.T]
        self.permutations = [reflections(self._after_merging(letter)) for letter in self.letters]
        widest = max(len(c) + len(p) for c, p in zip(self.classes, self.permutations, strict=True))
        self.plan = Plan(
            strategy="exclusion",
            num_layers=max(1, n - 1),
            num_householder=max(1, widest, n),
            num_heads=1,
            head_dim=n,
            value_dim=1,
            theorem="T4 with n - 1 layers (ours)",
            why=f"a cascade of {max(1, n - 1)} levels, each of which permutes or resets one of {n} states",
        )
        self.merged = [("merge", a, x) for a in self.letters for members in self.classes[a] for x in members[1:]]
        self.moves = [("move", a) for a in self.letters]
        self.resets = [("reset", x) for x in range(n)]
        self.buffers: list[Name] = [*self.merged, *self.moves, *self.resets]
        self.before: list[Name] = [("before", x) for x in range(n)]
        self.after: list[Name] = [("after", x) for x in range(n)]
        self.stream = Coordinates(
            [
                ONE,
                *map(letter_name, self.letters),
                "read before",
                "read after",
                *self.before,
                *self.after,
                *self.buffers,
            ]
        )
        self.excluded_at_start = [state for state in range(n) if state != automaton.start]

    def _after_merging(self, letter: int) -> np.ndarray:
        """The permutation that a letter is once every state was exchanged for the representative of its class."""
        column = self.table[:, letter]
        merged = {x for members in self.classes[letter] for x in members[1:]}
        return completed({x: int(column[x]) for x in range(self.n) if x not in merged}, self.n)

    @cached_property
    def config(self) -> ModelConfig:
        hidden = max(len(units) for units in self._mlp(0, last=self.plan.num_layers == 1)[0])
        if self.plan.num_layers > 1:
            hidden = max(hidden, *(len(units) for units in self._mlp(0, last=False)[0]))
        return self.model_config(self.stream, hidden, 3, self.mixer_config(read_before=True))

    def write(self, model: LanguageModel) -> None:
        everything: Sum = dict.fromkeys((*self.before, *self.after), 1.0)
        for letter in self.letters:
            model.embedding.weight[letter] = self.stream.vector(
                total({ONE: 1, letter_name(letter): 1}, everything, self._first_action(letter))
            )
        blocks = model._blocks()
        for level, block in enumerate(blocks):
            if self.n > 1:
                self._write_mixer(exact_mixer(block), self.excluded_at_start[level])
                layers, writes = self._mlp(level, last=level == len(blocks) - 1)
                wire_mlp(relu_mlp(block), self.stream, layers, writes)
        model.output_weight.copy_(self.stream.matrix(self.label_rows(self.after)))

    def _first_action(self, letter: int) -> Sum:
        """The buffers of the first level, whose action the letter alone decides: a permutation or a reset."""
        unhit = sorted(set(range(self.n)) - set(self.table[:, letter].tolist()))
        return {("reset", unhit[0]): 1} if unhit else {("move", letter): 1}

    def _write_mixer(self, mixer: ExactDeltaProduct, start: int) -> None:
        n = self.plan.num_householder
        k_weights = mixer.k_proj.weight.view(n, self.n, -1)

        def reflect(slot: int, key: dict[int, float], when: Name) -> None:
            column = self.stream[when]
            for axis, value in key.items():
                k_weights[slot, axis, column] += value
            mixer.v_proj.weight[slot, column] -= key.get(start, 0)

        for letter in self.letters:
            for slot, (representative, *others) in enumerate(self.classes[letter]):
                # At most one of the class is left, and it takes the representative's place.
                for x in others:
                    reflect(slot, {x: 1, representative: -1}, ("merge", letter, x))
            for slot, key in enumerate(self.permutations[letter], len(self.classes[letter])):
                axes = np.flatnonzero(key)
                reflect(slot, {int(x): float(key[x]) for x in axes}, ("move", letter))
        mixer.b_proj.weight[:, self.stream[ONE]] = 1
        write_resets(mixer, self.stream, range(self.n), self.n, start)
        write_reads(mixer, self.stream)

    def _mlp(self, level: int, *, last: bool) -> tuple[list[dict[Name, Sum]], dict[Name, Sum]]:
        """The MLP after a level: leaves its state out of both sets and computes the next level's action.

        Its layers: hinges that turn positions into unit vectors; the sets without them, and with each letter how many
        states merge and which are not hit; the least of those, and the permutation unless states merge.
        """
        n, offset = self.n, float(self.excluded_at_start[level] + 1)
        kept: dict[Name, Sum] = {name: {name: 1} for name in self.buffers}
        letters: dict[Name, Sum] = {letter_name(a): {letter_name(a): 1} for a in self.letters}
        sets: dict[Name, Sum] = {name: {name: 1.0} for name in (*self.before, *self.after)}
        hinges_before, bumps_before = bumps("read before", offset, n)
        hinges_after, bumps_after = bumps("read after", offset, n)
        first = {**hinges_before, **hinges_after, **sets, **letters, **kept}

        # What the level excluded, as unit vectors, and the sets without it.
        excluded: dict[Name, Sum] = {("excluded before", x): bumps_before[x] for x in range(n)}
        excluded |= {("excluded after", x): bumps_after[x] for x in range(n)}
        reads: dict[Name, Sum] = {side: {(side, 0): 1} for side in ("read before", "read after")}
        left_before = [total({("before", x): 1}, total(bumps_before[x], scale=-1)) for x in range(n)]
        left_after = [total({("after", x): 1}, total(bumps_after[x], scale=-1)) for x in range(n)]
        second = {**excluded, **reads, **kept}
        third: dict[Name, Sum] = {ONE: {ONE: 1}}
        third |= {name: {name: 1} for name in (*excluded, *reads, *self.buffers)}
        writes: dict[Name, Sum] = {("before", x): {("excluded before", x): -1} for x in range(n)}
        writes |= {("after", x): {("excluded after", x): -1} for x in range(n)}
        writes |= {side: {side: -1, ONE: offset} for side in ("read before", "read after")}
        writes |= {name: {name: -1} for name in self.buffers}
        if last:
            return [first, second, third], writes

        surplus: Sum = {}
        for a in self.letters:
            second[letter_name(a)] = {letter_name(a): 1}
            for number, members in enumerate(self.classes[a]):
                # One less than the members that are left, if the letter is a; negative, so 0, if it is another.
                count = total(*(left_before[x] for x in members), {ONE: -1.0 - len(members)})
                second["surplus", a, number] = total(count, {letter_name(a): len(members)})
                surplus["surplus", a, number] = 1
                for x in members[1:]:
                    second["left", a, x] = total(left_before[x], {letter_name(a): 1, ONE: -1})
        unhit: list[Sum] = [{} for _ in range(n)]
        for a in self.letters:
            for y in range(n):
                sources = total(*(left_before[x] for x in np.flatnonzero(self.table[:, a] == y)), scale=-1)
                second["unhit", a, y] = total(left_after[y], sources, {letter_name(a): 1, ONE: -1})
                unhit[y]["unhit", a, y] = 1
        # If nothing merges, all of Y is hit and no reset is written; if something does, no permutation is.
        for _, a, x in self.merged:
            third["next merge", a, x] = total({("left", a, x): 1}, total(surplus, scale=-1))
            writes["merge", a, x]["next merge", a, x] = 1
        for a in self.letters:
            third["next move", a] = total({letter_name(a): 1}, total(surplus, scale=-1))
            writes["move", a]["next move", a] = 1
        for y in range(n):
            third["next reset", y] = total(unhit[y], total(*unhit[:y], scale=-1))
            writes["reset", y]["next reset", y] = 1
        return [first, second, third], writes


def _kernel_classes(column: np.ndarray) -> list[list[int]]:
    """The states that a letter merges, by class with two members or more, the representative first.

    A state that the letter fixes represents its class, which leaves the least to do afterwards.
    """
    classes = []
    for image in np.unique(column).tolist():
        members = np.flatnonzero(column == image).tolist()
        if len(members) > 1:
            representative = image if image in members else members[0]
            classes.append([representative, *(x for x in members if x != representative)])
    return classes


# The holonomy decomposition


class Holonomy(Construction):
    """A layer for each height: it names a tile of the set that the levels above it leave (`automata.holonomy`).

    The residual stream holds the set before the letter and the one after it as unit vectors, and what the next level
    does as a unit vector over the permutations and resets of that level. The MLP looks both up in tables.
    """

    def __init__(self, automaton: Automaton) -> None:
        super().__init__(automaton)
        self.found = found = holonomy(automaton)
        self.actions = levels_of_actions(found, automaton.num_letters)
        # A level that permutes its tiles in several ways has a buffer for each, in the order of `moves`.
        self.moves: list[list[tuple[int, ...]]] = []
        sizes = [found.level_size(level) for level in range(found.num_levels)]
        resets = [any(a is not None and a.reset is not None for a in level.values()) for level in self.actions]
        for actions in self.actions:
            images = {a.images for a in actions.values() if a is not None and a.images is not None}
            self.moves.append(sorted(p for p in images if p != tuple(range(len(p)))))
        self.size = size = max(sizes)
        if size > MAX_INTEGER:
            raise ConstructionError(
                f"a level of the holonomy decomposition has {size:,} tiles, and integers above {MAX_INTEGER} are not "
                "exact in bfloat16; give an automaton with fewer states"
            )
        self.keys = [[reflections(self._padded(move)) for move in moves] for moves in self.moves]
        widest = max((len(keys) for level in self.keys for keys in level), default=1)
        self.plan = Plan(
            strategy="holonomy",
            num_layers=found.num_levels,
            num_householder=max(1, widest, *(s for s, has_resets in zip(sizes, resets, strict=True) if has_resets), 1),
            num_heads=1,
            head_dim=size,
            value_dim=1,
            theorem="Krohn-Rhodes, by the holonomy decomposition",
            why=f"a cascade of levels that permute or reset {', '.join(map(str, sizes))} sets of states",
        )
        self.buffers: list[Name] = [
            *(("move", number) for number in range(max(map(len, self.moves)))),
            *(("reset", tile) for tile in range(size)),
        ]
        numbers = range(len(found.sets))
        self.before: list[Name] = [("before", number) for number in numbers]
        self.after: list[Name] = [("after", number) for number in numbers]
        self.stream = Coordinates(
            [ONE, *map(letter_name, self.letters), *_READS, *self.before, *self.after, *self.buffers]
        )

    def _padded(self, images: tuple[int, ...]) -> np.ndarray:
        """A permutation of a set's tiles as one of all coordinates of the level."""
        return np.array([*images, *range(len(images), self.size)])

    @cached_property
    def config(self) -> ModelConfig:
        hidden = max(len(units) for level in range(self.plan.num_layers) for units in self._mlp(level)[0])
        return self.model_config(self.stream, hidden, 3, self.mixer_config(read_before=True))

    def write(self, model: LanguageModel) -> None:
        for letter in self.letters:
            everywhere: Sum = {("before", 0): 1, ("after", 0): 1}
            action = self._buffer(0, self.actions[0][0, 0, letter])
            first: Sum = {} if action is None else {action: 1}
            model.embedding.weight[letter] = self.stream.vector(
                total({ONE: 1, letter_name(letter): 1}, everywhere, first)
            )
        for level, block in enumerate(model._blocks()):
            self._write_mixer(exact_mixer(block), level)
            layers, writes = self._mlp(level)
            wire_mlp(relu_mlp(block), self.stream, layers, writes)
        singles: list[Name] = [("after", self.found.sets.index((state,))) for state in range(len(self.table))]
        model.output_weight.copy_(self.stream.matrix(self.label_rows(singles)))

    def _buffer(self, level: int, action: Action | None) -> Name | None:
        """The coordinate of the stream that makes a level act; None if it leaves its state alone."""
        if action is None:
            return None
        if action.images is None:
            return ("reset", action.reset)
        moves = self.moves[level]
        return ("move", moves.index(action.images)) if action.images in moves else None

    def _write_mixer(self, mixer: ExactDeltaProduct, level: int) -> None:
        start = self.found.start[level]
        k_weights = mixer.k_proj.weight.view(self.plan.num_householder, self.size, -1)
        mixer.b_proj.weight[:, self.stream[ONE]] = 1
        for number, keys in enumerate(self.keys[level]):
            column = self.stream["move", number]
            for slot, key in enumerate(keys):
                k_weights[slot, :, column] = torch.from_numpy(key).float()
                mixer.v_proj.weight[slot, column] = -float(key[start])
        targets = {a.reset for a in self.actions[level].values() if a is not None and a.reset is not None}
        write_resets(mixer, self.stream, targets, self.found.level_size(level), start)
        write_reads(mixer, self.stream)

    def _mlp(self, level: int) -> tuple[list[dict[Name, Sum]], dict[Name, Sum]]:
        """The MLP after a level: puts the tiles in place of their sets and looks up what the next level does.

        Its layers: hinges that turn positions into unit vectors; pairs of a set and its tile; sets and letters.
        """
        found, offset = self.found, float(self.found.start[level] + 1)
        kept: dict[Name, Sum] = {name: {name: 1} for name in self.buffers}
        letters: dict[Name, Sum] = {letter_name(a): {letter_name(a): 1} for a in self.letters}
        # Sets that may be there, and where those come from that may be there afterwards.
        sides = {"before": 0, "after": 1}
        alive = {side: sorted({key[i] for key in self.actions[level]}) for side, i in sides.items()}
        first: dict[Name, Sum] = {(side, x): {(side, x): 1} for side in sides for x in alive[side]}
        second: dict[Name, Sum] = {}
        third: dict[Name, Sum] = {ONE: {ONE: 1}, **{name: {name: 1} for name in (*_READS, *self.buffers)}}
        present: dict[Name, Sum] = {}
        writes: dict[Name, Sum] = {side: {side: -1, ONE: offset} for side in _READS}
        writes |= {name: {name: -1} for name in self.buffers}
        for side in sides:
            hinges, peaks = bumps(f"read {side}", offset, found.level_size(level))
            first |= hinges
            second[f"read {side}"] = {(f"read {side}", 0): 1}
            for x in alive[side]:
                if found.level_of(x) != level:
                    second[side, x] = {(side, x): 1}
                    present.setdefault((side, x), {})[side, x] = 1
            for x in alive[side]:
                if found.level_of(x) != level:
                    continue
                leaves: Sum = {}
                for place, tile in enumerate(found.tiles[x]):
                    second["tile", side, x, place] = total({(side, x): 1}, peaks[place], {ONE: -1})
                    present.setdefault((side, tile), {})["tile", side, x, place] = 1
                    leaves["tile", side, x, place] = 1
                    third["new", side, tile] = total(third.get(("new", side, tile), {}), {("tile", side, x, place): 1})
                    writes.setdefault((side, tile), {})["new", side, tile] = 1
                third["old", side, x] = leaves
                writes.setdefault((side, x), {})["old", side, x] = -1
        first |= {**letters, **kept}
        second |= {**letters, **kept}
        if level + 1 < self.plan.num_layers:
            for key, action in self.actions[level + 1].items():
                if (buffer := self._buffer(level + 1, action)) is not None:
                    before, after, letter = key
                    sets = total(present["before", before], present["after", after])
                    third["act", key] = total(sets, {letter_name(letter): 1, ONE: -2})
                    writes[buffer]["act", key] = 1
        return [first, second, third], writes


def write_resets(mixer: ExactDeltaProduct, stream: Coordinates, targets: Iterable[int], size: int, start: int) -> None:
    """Factors that overwrite the unit vector of a level, one coordinate each, if the stream says ("reset", target)."""
    k_weights = mixer.k_proj.weight.view(mixer.config.num_householder, mixer.config.head_dim, -1)
    for target in targets:
        column = stream["reset", target]
        mixer.b_proj.weight[:, column] = -0.5  # beta = 1 overwrites where beta = 2 reflects
        for slot in range(size):
            k_weights[slot, slot, column] += 1
            mixer.v_proj.weight[slot, column] += float(slot == target) - float(slot == start)


def write_reads(mixer: ExactDeltaProduct, stream: Coordinates) -> None:
    """The head reads the position of its unit vector, less that of the start, before and after the update."""
    mixer.query[0] = torch.arange(1.0, mixer.config.head_dim + 1)
    mixer.o_proj.weight[stream["read after"], 0] = 1
    mixer.o_proj.weight[stream["read before"], 1] = 1
